"""How population statistics settle over time, and what becomes of sequences longer than those trained on.

Cooijmans et al. 2016, section 3 and appendix A: statistics differ in the first steps and then converge to stationary
ones, so those of the last slot may serve all later steps. A character model shows how soon statistics cannot be told
from the last slot's, and what it costs to use the last slot where each step could have had its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_bnlstm import BNLSTM, estimate_statistics
from triton_bnlstm.statistics import Moments

from .data import load_text
from .experiment import Job, Report, Results, Settings
from .learning import Batch, CharacterTask, Model, layer_of, train
from .seeds import short
from .settling import settling
from .statistics_told import BINS, MODELS, SLOTS, TIMES, figure, key, summary, tables

__all__ = ["SIZES", "TITLE", "figure", "jobs", "run", "summary", "tables"]

TITLE = "Statistics over time, and lengths beyond those trained on"

SIZES: dict[str, Settings] = {
    "quick": {
        "about": "12 units, 10 characters, batches of 16, 20 steps, 2 seeds: shows that it runs, and nothing else",
        "hidden_size": 12,
        "length": 10,
        "batch_size": 16,
        "steps": 20,
        "rate": 5e-3,
        "seeds": 2,
        "estimate_batches": 4,
        "test_batches": 3,
    },
    "reduced": {
        "about": (
            "96 units, trained on 50 characters of Python's help texts, batches of 64, 500 steps of Adam at 0.005 "
            "falling to 0, 5 seeds; statistics from 40 batches, tested on 1,024 stretches of 200 characters. Smaller "
            "than full: units (1000), characters (100), steps (1000), batches for statistics (100)"
        ),
        "hidden_size": 96,
        "length": 50,
        "batch_size": 64,
        "steps": 500,
        "rate": 5e-3,
        "seeds": 5,
        "estimate_batches": 40,
        "test_batches": 16,
    },
    "full": {
        "about": (
            "the paper's sizes for characters of the Penn Treebank on Python's help texts instead: 1000 units, trained "
            "on 100 characters, batches of 64, 1000 steps of Adam at 0.002 falling to 0, 5 seeds; statistics from 100 "
            "batches, tested on 1,024 stretches of 400 characters"
        ),
        "hidden_size": 1000,
        "length": 100,
        "batch_size": 64,
        "steps": 1000,
        "rate": 2e-3,
        "seeds": 5,
        "estimate_batches": 100,
        "test_batches": 16,
    },
}

AFTER_TRAINING = 0.3  # work of estimates and scores against that of training
LSTM_WORK = 0.4  # of its training against a BN-LSTM's


def jobs(settings: Settings, results: Results) -> list[Job]:
    """One for each model and seed."""
    del results
    work = {model: settings["steps"] * (LSTM_WORK if model == "LSTM" else 1 + AFTER_TRAINING) for model in MODELS}
    return [
        Job(key(model, seed), {"model": model, "seed": seed}, work[model])
        for seed in range(settings["seeds"])
        for model in MODELS
    ]


def run(arguments: dict[str, Any], settings: Settings, device: str, report: Report) -> dict[str, Any]:
    """Train one model, and score it on stretches that are TIMES as long, by each kind of statistics.

    bits: by kind of statistics, the loss [bits] of each of BINS groups of positions. With batch norm also settling (see
    `settling`) by norm, and slots: bits of the positions beyond the training length with fewer slots.
    """
    name, seed, where = arguments["model"], arguments["seed"], torch.device(device)
    length, batch_size = settings["length"], settings["batch_size"]
    task = CharacterTask(load_text(), length)
    torch.manual_seed(seed)
    model = Model(layer_of(name, task, settings["hidden_size"]), settings["hidden_size"], task.classes, True).to(where)
    optimiser = torch.optim.Adam(model.parameters(), lr=settings["rate"])
    share = LSTM_WORK if name == "LSTM" else 1.0
    batches = task.batches(batch_size, seed)
    losses = train(model, batches, optimiser, settings["steps"], where, each=lambda done: report(share))
    test = _test_batches(task, settings)
    trained = fmean(losses[-len(losses) // 10 :]) / math.log(2)
    if name == "LSTM":
        return {"trained": short(trained), "bits": {"none": _binned(bits_by_position(model, test, where))}}

    layer = model.layer
    assert isinstance(layer, BNLSTM)
    rest = settings["steps"] * AFTER_TRAINING
    bits = {
        "running": _binned(bits_by_position(model, test, where)),
        "batch": _binned(bits_by_position(model, test, where, training=True)),
    }
    _estimate(model, _stretches(task, settings, seed, "first"), where, length)
    bits["last"] = _binned(bits_by_position(model, test, where))
    report(rest / 4)
    layer.set_max_length(TIMES * length)
    _estimate(model, _stretches(task, settings, seed, "second"), where)
    second = layer.statistics()
    report(rest / 4)
    _estimate(model, _stretches(task, settings, seed, "first"), where)
    first = layer.statistics()
    bits["own"] = _binned(bits_by_position(model, test, where))
    report(rest / 4)
    slots = {}
    for count in (n for n in SLOTS if n <= length):
        keep_slots(layer, count)  # from many slots to few would lose what the next needs
        slots[count] = short(bits_by_position(model, test, where)[length:].mean().item())
        _restore(layer, first)
    report(rest / 4)
    return {
        "trained": short(trained),
        "bits": bits,
        "settling": {norm: settling(first[norm], second[norm], length) for norm in first},
        "slots": {str(count): value for count, value in slots.items()},
    }


def _stretches(task: CharacterTask, settings: Settings, seed: int, which: str) -> Iterator[Batch]:
    """Batches of long stretches from anywhere in the training text; the `first` ones and the `second` are others."""
    long = CharacterTask(task.text, TIMES * task.steps)
    own = 10_000 + 2 * seed + (which == "second")
    return islice(long.batches(settings["batch_size"], own), settings["estimate_batches"])


def _test_batches(task: CharacterTask, settings: Settings) -> list[Batch]:
    """Long stretches from anywhere in the test text, the same for all models and seeds.

    Stretches that follow one another would be of one topic, and so would be the statistics of their batch.
    """
    long = CharacterTask(task.text._replace(train=task.text.test), TIMES * task.steps)
    return list(islice(long.batches(settings["batch_size"], 0), settings["test_batches"]))


def _estimate(model: Model, batches: Iterator[Batch], device: torch.device, steps: int | None = None) -> None:
    """Population statistics from the first `steps` steps of each batch."""
    estimate_statistics(model, batches, forward=lambda called, batch: called(batch[0][:steps].to(device)))


@torch.no_grad()
def bits_by_position(model: Model, batches: list[Batch], device: torch.device, *, training: bool = False) -> Tensor:
    """Mean loss [T] in bits at each position. training: by the batches' own statistics, which are not kept."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train(training)
    total, count = torch.zeros(len(batches[0][1]), dtype=torch.float64), 0
    for x, targets in batches:
        logits = model(x.to(device)).double()
        losses = F.cross_entropy(logits.transpose(1, 2), targets.to(device), reduction="none")  # [T, B]
        total += losses.sum(1).cpu()
        count += losses.shape[1]
    for name, buffer in model.named_buffers():
        buffer.copy_(before[name])
    model.eval()
    return total / count / math.log(2)


@torch.no_grad()
def keep_slots(layer: BNLSTM, slots: int) -> None:
    """What a layer with `slots` slots uses: the last of them in place of each later one."""
    for norm in layer.statistics():
        for part in ("mean", "var", "count"):
            buffer = layer.get_buffer(f"{part}_{norm}_l0")
            buffer[slots:] = buffer[slots - 1].clone()


@torch.no_grad()
def _restore(layer: BNLSTM, statistics: dict[str, Moments]) -> None:
    for norm, moments in statistics.items():
        for part, values in zip(("mean", "var", "count"), moments, strict=True):
            layer.get_buffer(f"{part}_{norm}_l0").copy_(values)


def _binned(bits: Tensor) -> list[float]:
    return [short(value) for value in bits.view(BINS, -1).mean(1).tolist()]
