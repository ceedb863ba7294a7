"""Training a layer of the library, or nn.LSTM, on sequences of equal length: images to classify, text to go on with.

A task gives batches and scores; `train` does the rest, the same for all models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_bnlstm import BNLSTM

from .data import Images, Text

Batch = tuple[Tensor, Tensor]  # x [T, B, ·], targets [B] or [T, B]


class Model(nn.Module):
    """A layer between one-hot characters or numbers and a linear readout of the last or of every hidden state."""

    def __init__(self, layer: nn.Module, hidden_size: int, classes: int, every_step: bool) -> None:
        super().__init__()
        self.layer = layer
        self.readout = nn.Linear(hidden_size, classes)
        self.every_step = every_step

    def forward(self, x: Tensor) -> Tensor:
        """X [T, B, D] → logits [B, classes], or [T, B, classes]."""
        rows, (h_n, _) = self.layer(x)
        logits: Tensor = self.readout(rows if self.every_step else h_n[-1])
        return logits


class Task(Protocol):
    """What `train` needs to know of the data.

    Attributes:
        features, classes, steps, every_step: D; number of labels or characters; T; targets at each step.
    """

    features: int
    classes: int
    steps: int
    every_step: bool

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Training batches without end; the same seed gives the same ones."""

    def held_out(self, part: str) -> list[Batch]:
        """Batches of "validation" or "test"."""


class PixelTask:
    """Images pixel by pixel; the label is asked for after the last."""

    features, every_step = 1, False

    def __init__(self, images: Images) -> None:
        self.images, self.classes, self.steps = images, images.classes, images.x.shape[1]

    def _take(self, positions: Tensor) -> Batch:
        return self.images.x[positions].t()[..., None].contiguous(), self.images.y[positions]

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Epochs in orders of their own; what does not fill a batch is left out."""
        generator = torch.Generator().manual_seed(seed)
        train = self.images.train
        while True:
            order = train[torch.randperm(len(train), generator=generator)]
            for k in range(len(train) // batch_size):
                yield self._take(order[k * batch_size : (k + 1) * batch_size])

    def held_out(self, part: str) -> list[Batch]:
        """In batches of 250, which their scores do not depend on in evaluation."""
        return [self._take(positions) for positions in getattr(self.images, part).split(250)]


class CharacterTask:
    """Stretches of T characters from anywhere in the text; each next character is asked for."""

    every_step = True

    def __init__(self, text: Text, steps: int) -> None:
        self.text, self.steps = text, steps
        self.features = self.classes = len(text.characters)

    def _take(self, part: Tensor, starts: Tensor, steps: int) -> Batch:
        at = starts + torch.arange(steps + 1)[:, None]  # [T + 1, B]
        characters = part[at]
        return F.one_hot(characters[:-1], self.features).float(), characters[1:]

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Each stretch begins where it may, so that step t is not always the same place of a topic."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(self.text.train) - self.steps, (batch_size,), generator=generator)
            yield self._take(self.text.train, starts, self.steps)

    def held_out(self, part: str, steps: int | None = None, batch_size: int = 64, most: int = 64_000) -> list[Batch]:
        """Stretches of `steps` characters one after another, at most `most` characters in all, in full batches."""
        steps = steps or self.steps
        text: Tensor = getattr(self.text, part)
        starts = torch.arange(0, min(len(text) - steps, most), steps)
        return [self._take(text, group, steps) for group in starts.split(batch_size) if len(group) == batch_size]


def layer_of(model: str, task: Task, hidden_size: int, **options: Any) -> nn.Module:
    """The layer called "LSTM" (nn.LSTM with its forget bias at 1, as BNLSTM's), "BN-LSTM" or "BN-LSTM, cell norm"."""
    if model == "LSTM":
        layer = nn.LSTM(task.features, hidden_size)
        with torch.no_grad():  # what differs should be batch norm: recurrent weights and biases begin as BNLSTM's
            for weight in layer.get_parameter("weight_hh_l0").chunk(4):
                nn.init.orthogonal_(weight)
            bias_ih, bias_hh = layer.get_parameter("bias_ih_l0"), layer.get_parameter("bias_hh_l0")
            bias_ih.zero_()
            bias_hh.zero_()
            bias_ih.chunk(4)[1].fill_(1)
        return layer
    options = {"max_length": task.steps, "input_stats": "time", **options}  # statistics as in the paper
    return BNLSTM(task.features, hidden_size, cell_norm=model.endswith("cell norm"), **options)


def train(
    model: Model,
    batches: Iterator[Batch],
    optimiser: torch.optim.Optimizer,
    steps: int,
    device: torch.device,
    *,
    clip: float = 1.0,
    decay: bool = True,
    each: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """Train for so many steps; the loss of each.

    decay: the learning rate falls to 0 in a straight line. each: called after each step with their number.
    """
    rates = [group["lr"] for group in optimiser.param_groups]
    losses: list[Tensor] = []
    for done in range(steps):
        model.train()
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - done / steps) if decay else rate
        x, targets = (tensor.to(device) for tensor in next(batches))
        optimiser.zero_grad()
        loss = loss_of(model(x), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimiser.step()
        losses.append(loss.detach())
        each(done + 1)
    return torch.stack(losses).tolist()


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


@torch.no_grad()
def scores(model: Model, batches: list[Batch], device: torch.device, *, training: bool = False) -> dict[str, float]:
    """Mean loss [nats] and accuracy over all targets. training: by the batches' own statistics, which are not kept."""
    loss, right, count = 0.0, 0, 0
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train(training)
    for x, targets in batches:
        logits, targets = model(x.to(device)), targets.to(device)
        loss += loss_of(logits.double(), targets).item() * targets.numel()
        right += int((logits.argmax(-1) == targets).sum())
        count += targets.numel()
    for name, buffer in model.named_buffers():
        buffer.copy_(before[name])
    model.eval()
    return {"loss": loss / count, "accuracy": right / count}
