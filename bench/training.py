"""One model on one task: the classifier, its training and its test scores."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import triton_bnlstm
from triton_bnlstm import BNLSTM

from .data import Batch, Input, Task

MODELS = ("nn.LSTM", "BN-LSTM")
TEST_BATCH = 512  # evaluation does not depend on the batch; this only bounds memory
LONGEST_SHARE = 0.1
REPORT_EVERY = 10

Report = Callable[[int, float], None]


@dataclass(frozen=True)
class Settings:
    """What a training run is given; both models get the same.

    Attributes:
        steps: batches of training.
        batch_size: sequences of a batch.
        hidden_size: units H.
        learning_rate: Adam's at first; it falls to 0 in a straight line, so that the last few steps decide less.
        clip_norm: largest norm of the gradient.
        momentum, cell_norm, input_stats, initial_noise: BNLSTM's own arguments.
    """

    steps: int
    batch_size: int = 32
    hidden_size: int = 64
    learning_rate: float = 5e-3
    clip_norm: float = 1.0
    momentum: float = 0.1
    cell_norm: bool = True
    input_stats: str = "sequence"
    initial_noise: float = 0.0

    @property
    def evaluate_every(self) -> int:
        """Steps between two evaluations on the test split: about fifteen of them in a run."""
        return max(1, self.steps // 15)


SETTINGS = {
    # the first pixel is the same in every image: without noise the first hidden states would have no variance
    "digits": Settings(steps=1200, batch_size=64, initial_noise=0.1),
    "spoken": Settings(steps=750),
}
QUICK_STEPS = 150


@dataclass(frozen=True)
class Scores:
    """Scores on the test split.

    Attributes:
        accuracy: share of the sequences that are classified rightly, 0..1.
        loss: mean cross-entropy in nats.
        sequences: how many there are.
        longest_accuracy: accuracy on the longest tenth; None where all lengths are equal.
        longest_sequences: how many these are; 0 where all lengths are equal.
    """

    accuracy: float
    loss: float
    sequences: int
    longest_accuracy: float | None
    longest_sequences: int


@dataclass
class Run:
    """What one training run gave.

    Attributes:
        model: one of MODELS.
        backend: what computed the recurrence.
        parameters: how many numbers were trained.
        steps_per_second: of training alone, without data preparation and evaluation; None if nothing was timed.
        losses: training loss of each step, in nats.
        curve: (step, test accuracy) along the way, a BN-LSTM with its running statistics.
        scores: final ones, by the statistics used: "running" and "estimated", or "none" for nn.LSTM.
    """

    model: str
    backend: str
    parameters: int
    steps_per_second: float | None = None
    losses: list[float] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    scores: dict[str, Scores] = field(default_factory=dict)


class Classifier(nn.Module):
    """A linear readout of each sequence's own last hidden state."""

    def __init__(self, model: str, task: Task, settings: Settings) -> None:
        super().__init__()
        # first, so that with one seed both models start from the same readout
        self.readout = nn.Linear(settings.hidden_size, task.classes)
        if model == "BN-LSTM":
            self.layer: nn.Module = BNLSTM(
                task.features,
                settings.hidden_size,
                max_length=int(task.lengths[task.train].max()),
                cell_norm=settings.cell_norm,
                input_stats=settings.input_stats,
                momentum=settings.momentum,
                initial_noise=settings.initial_noise,
            )
        else:
            self.layer = nn.LSTM(task.features, settings.hidden_size)

    def forward(self, input: Input) -> Tensor:
        """Logits [B, classes] of sequences [T, B, D] or packed."""
        _, (h_n, _) = self.layer(input)
        return self.readout(h_n[-1])


def train(
    task: Task,
    model: str,
    settings: Settings,
    device: torch.device,
    seed: int,
    report: Report = lambda step, loss: None,
) -> Run:
    """Train one model and score it on the test split.

    Args:
        task: the data.
        model: one of MODELS.
        settings: see there.
        device: where to.
        seed: of the weights, the noise on h_0 and the order of the batches.
        report: called now and then with the number of steps done and the loss of the last one.
    """
    torch.manual_seed(seed)
    classifier = Classifier(model, task, settings).to(device)
    optimiser = torch.optim.Adam(classifier.parameters(), lr=settings.learning_rate)
    run = Run(model, backend_of(model, device), sum(p.numel() for p in classifier.parameters()))
    stream = task.training_batches(settings.batch_size, seed)
    seconds, timed = 0.0, 0
    while (done := len(run.losses)) < settings.steps:
        stretch = min(settings.evaluate_every, settings.steps - done)
        batches = [(_to(input, device), labels.to(device)) for input, labels in islice(stream, stretch)]
        began = _now(device)
        losses = _stretch(classifier, optimiser, batches, settings, done, report)
        elapsed = _now(device) - began
        if done:  # the first stretch warms up and is not timed
            seconds, timed = seconds + elapsed, timed + stretch
        run.losses += losses
        run.curve.append((done + stretch, evaluate(classifier, task, device).accuracy))
    run.steps_per_second = timed / seconds if timed else None

    if model == "BN-LSTM":
        run.scores["running"] = evaluate(classifier, task, device)
        estimate(classifier, task, settings, device, seed)
        run.scores["estimated"] = evaluate(classifier, task, device)
    else:
        run.scores["none"] = evaluate(classifier, task, device)
    return run


def _stretch(
    classifier: Classifier,
    optimiser: torch.optim.Optimizer,
    batches: list[Batch],
    settings: Settings,
    done: int,
    report: Report,
) -> list[float]:
    """Train on the batches in turn, after `done` steps; the loss of each."""
    classifier.train()
    losses: list[Tensor] = []
    for n, (input, labels) in enumerate(batches, 1):
        optimiser.param_groups[0]["lr"] = settings.learning_rate * (1 - (done + n - 1) / settings.steps)
        optimiser.zero_grad()
        loss = F.cross_entropy(classifier(input), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(classifier.parameters(), settings.clip_norm)
        optimiser.step()
        losses.append(loss.detach())
        if n % REPORT_EVERY == 0 or n == len(batches):  # reading a loss waits for the GPU
            report(done + n, float(losses[-1]))
    return torch.stack(losses).tolist()


def estimate(classifier: Classifier, task: Task, settings: Settings, device: torch.device, seed: int) -> None:
    """Set a BN-LSTM's population statistics from one pass over the training split in batches as in training."""
    batches = task.epoch(settings.batch_size, torch.Generator().manual_seed(seed))
    triton_bnlstm.estimate_statistics(classifier, batches, forward=lambda model, batch: model(_to(batch[0], device)))


@torch.no_grad()
def evaluate(classifier: Classifier, task: Task, device: torch.device) -> Scores:
    """Scores on the whole test split; a BN-LSTM normalises with the population statistics that it holds."""
    classifier.eval()
    logits = torch.cat([classifier(_to(task.batch(part)[0], device)).cpu() for part in task.test.split(TEST_BATCH)])
    labels = task.labels[task.test]
    right = (logits.argmax(1) == labels).double()
    longest = longest_share(task.lengths[task.test])
    return Scores(
        accuracy=right.mean().item(),
        loss=F.cross_entropy(logits.double(), labels).item(),
        sequences=len(labels),
        longest_accuracy=None if task.equal_lengths else right[longest].mean().item(),
        longest_sequences=0 if task.equal_lengths else len(longest),
    )


def longest_share(lengths: Tensor) -> Tensor:
    """Positions of the longest tenth of `lengths` [N], at least one; of equal lengths the earlier ones."""
    return lengths.argsort(descending=True, stable=True)[: math.ceil(LONGEST_SHARE * len(lengths))]


def backend_of(model: str, device: torch.device) -> str:
    """What computes the recurrence of one of MODELS on `device`."""
    if model == "BN-LSTM":
        return triton_bnlstm.backend_report().backend if device.type == "cuda" else "reference"
    return "cuDNN" if device.type == "cuda" and torch.backends.cudnn.is_available() else "torch"


def _to(input: Any, device: torch.device) -> Input:
    """`input` on the device. (PackedSequence.to takes one, though its annotation lacks it.)"""
    moved: Input = input.to(device)
    return moved


def _now(device: torch.device) -> float:
    """Seconds on a clock, once all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
