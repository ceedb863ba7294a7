"""One model on one task: the classifier, its training and its test scores."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import triton_bnlstm
from triton_bnlstm import BNLSTM

from .data import Batch, Input, Task

MODELS = ("nn.LSTM", "BN-LSTM")
TEST_BATCH = 512  # evaluation does not depend on the batch; this only bounds memory
LONGEST_SHARE = 0.1


@dataclass(frozen=True)
class Settings:
    """What a training run is given; both models get the same.

    Attributes:
        steps: batches of training.
        evaluate_every: steps between two evaluations on the test split.
        batch_size: sequences of a batch.
        hidden_size: units H.
        learning_rate: Adam's.
        clip_norm: largest norm of the gradient.
        momentum, cell_norm, input_stats, initial_noise: BNLSTM's own arguments.
    """

    steps: int
    evaluate_every: int
    batch_size: int = 32
    hidden_size: int = 64
    learning_rate: float = 2e-3
    clip_norm: float = 1.0
    momentum: float = 0.1
    cell_norm: bool = True
    input_stats: str = "sequence"
    initial_noise: float = 0.0


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
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> Run:
    """Train one model and score it on the test split.

    Args:
        task: the data.
        model: one of MODELS.
        settings: see there.
        device: where to.
        seed: of the weights, the noise on h_0 and the order of the batches.
        report: called with the number of steps done and the loss of a recent one.
    """
    torch.manual_seed(seed)
    classifier = Classifier(model, task, settings).to(device)
    optimiser = torch.optim.Adam(classifier.parameters(), lr=settings.learning_rate)
    run = Run(model, backend_of(model, device), sum(p.numel() for p in classifier.parameters()))
    stream = task.training_batches(settings.batch_size, seed)
    seconds, timed = 0.0, 0
    while len(run.losses) < settings.steps:
        done = len(run.losses)
        batches = [_to(b, device) for b in islice(stream, min(settings.evaluate_every, settings.steps - done))]
        classifier.train()
        began = _now(device)
        losses: list[Tensor] = []
        for batch in batches:
            losses.append(_step(classifier, optimiser, batch, settings.clip_norm))
            report(done + len(losses), losses[-1])
        elapsed = _now(device) - began
        if done:  # the first stretch warms up
            seconds, timed = seconds + elapsed, timed + len(batches)
        run.losses += torch.stack(losses).tolist()
        run.curve.append((len(run.losses), evaluate(classifier, task, device).accuracy))
    run.steps_per_second = timed / seconds if timed else None
    if model == "BN-LSTM":
        run.scores["running"] = evaluate(classifier, task, device)
        estimate(classifier, task, settings, device, seed)
        run.scores["estimated"] = evaluate(classifier, task, device)
    else:
        run.scores["none"] = evaluate(classifier, task, device)
    return run
