"""Unequal lengths: each way of taking batch statistics, with statistics of the input over time or over sequences.

`formulations` says what they are. All have the same budget, batches, initial weights and rate for each seed, so they
are compared seed by seed. The rate is chosen for nn.LSTM and for batch norm, on validation data and other seeds: for
batch norm as the best one of a panel of formulations together, so that none of them chooses for the others.
"""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

import torch

from triton_bnlstm import BNLSTM, estimate_statistics

from . import data
from .data import Sequences
from .ensemble import Ensemble, Member, Plan, inputs, scores
from .experiment import Job, Report, Results, Settings
from .formulations import FORMULATIONS
from .lengths_plot import figure
from .lengths_tables import sets_of, summary, tables
from .numbers import rounded

__all__ = ["SIZES", "TITLE", "figure", "jobs", "run", "summary", "tables"]

TITLE = "Unequal lengths: which rows a step's statistics are made of"
LOADERS = {"vowels": data.load_vowels, "spoken": data.load_spoken, "sentences": data.load_sentences}
PANEL = ("both rules", "frozen rows", "plain masking")
WITHOUT_CELL_NORM = ("both rules", "frozen rows")
INPUT_STATS = ("time", "sequence")
MODES = ("batches", "paper", "whole")

_ALL = [name for name in FORMULATIONS if name != "LSTM"]
_REDUCED = {
    "rates": [0.003, 0.01, 0.03, 0.1],
    "tuning_seeds": [100, 101],
    "seeds": list(range(8)),
    "formulations": _ALL,
}

SIZES: dict[str, Settings] = {
    "quick": {
        "about": "a handful of steps, to see that it runs",
        **_REDUCED,
        "rates": [0.01],
        "tuning_seeds": [100],
        "seeds": [0, 1],
        "formulations": ["both rules", "frozen rows", "plain masking"],
        "sets": {"vowels": {"hidden": 8, "batch": 16, "steps": 4}},
    },
    "reduced": {
        "about": "32 or 64 units instead of 128, 300 to 500 batches instead of 2,000, 8 seeds instead of 16; the data "
        "are whole",
        **_REDUCED,
        "sets": {
            "vowels": {"hidden": 32, "batch": 32, "steps": 400},
            "spoken": {"hidden": 64, "batch": 32, "steps": 500},
            "sentences": {"hidden": 64, "batch": 32, "steps": 300},
        },
    },
    "full": {
        "about": "128 units, 2,000 batches of 32, 16 seeds",
        **_REDUCED,
        "rates": [0.001, 0.003, 0.01, 0.03, 0.1],
        "tuning_seeds": [100, 101, 102, 103],
        "seeds": list(range(16)),
        "sets": {name: {"hidden": 128, "batch": 32, "steps": 2000} for name in LOADERS},
    },
}

_WORK = {"vowels": 1.0, "spoken": 2.5, "sentences": 4.0}  # of a step, about


def variants(settings: Settings) -> list[tuple[str, str, bool]]:
    """(formulation, input_stats, cell_norm) of all that are compared."""
    names = settings["formulations"]
    found = [("LSTM", "time", False)]
    found += [(name, stats, True) for name in names for stats in INPUT_STATS]
    return found + [(name, stats, False) for name in names if name in WITHOUT_CELL_NORM for stats in INPUT_STATS]


def key_of(of: str, variant: tuple[str, str, bool], rate: float | None = None) -> str:
    """A job's key; a rate for one of the grid."""
    name, stats, cell = variant
    ending = "final" if rate is None else f"rate {rate:g}"
    return f"{of}/{name}/{stats}/{'cell norm' if cell else 'no cell norm'}/{ending}"


def _job(settings: Settings, of: str, variant: tuple[str, str, bool], rate: float, *, final: bool) -> Job:
    seeds = settings["seeds" if final else "tuning_seeds"]
    steps = settings["sets"][of]["steps"]
    speed = 0.3 if variant[0] == "LSTM" else 1.0
    work = steps * _WORK[of] * speed * (1 + 0.15 * len(seeds))  # what does not depend on the members is the larger part
    name, stats, cell = variant
    arguments = {
        "set": of,
        "formulation": name,
        "input_stats": stats,
        "cell_norm": cell,
        "rate": rate,
        "final": final,
        "work": work,
    }
    return Job(key_of(of, variant, None if final else rate), arguments, work)


def _panel(settings: Settings, name: str) -> list[tuple[str, str, bool]]:
    if name == "LSTM":
        return [("LSTM", "time", False)]
    return [(each, "time", True) for each in PANEL if each in settings["formulations"]]


def best_rate(settings: Settings, results: Results, of: str, name: str) -> float | None:
    """The rate with the lowest validation loss: of "LSTM", for all else of the panel's mean. None if not yet."""
    found = {}
    for rate in settings["rates"]:
        keys = [key_of(of, variant, rate) for variant in _panel(settings, name)]
        if any(key not in results for key in keys):
            return None
        losses = [loss for key in keys for loss in results[key]["validation"]]
        found[rate] = fmean(losses) if all(math.isfinite(loss) for loss in losses) else math.inf
    return min(found, key=lambda rate: found[rate])


def jobs(settings: Settings, results: Results) -> list[Job]:
    """The grid; then, set by set as its rates are known, all variants."""
    found = []
    for of in sets_of(settings):
        for name in ("LSTM", "batch norm"):
            for variant in _panel(settings, name):
                found += [_job(settings, of, variant, rate, final=False) for rate in settings["rates"]]
        for variant in variants(settings):
            rate = best_rate(settings, results, of, variant[0])
            if rate is not None:
                found.append(_job(settings, of, variant, rate, final=True))
    return found


def run(arguments: dict[str, Any], settings: Settings, device: str, report: Report) -> dict[str, Any]:
    """Train all seeds of one variant together, and score each in evaluation."""
    on = torch.device(device)
    of = settings["sets"][arguments["set"]]
    found = LOADERS[arguments["set"]]()
    plan = Plan(
        arguments["formulation"],
        arguments["input_stats"],
        arguments["cell_norm"],
        of["hidden"],
        of["batch"],
        of["steps"],
        arguments["rate"],
        settings["seeds" if arguments["final"] else "tuning_seeds"],
    )
    ensemble = Ensemble(found, plan, on)
    losses = torch.stack(ensemble.train(lambda: report(arguments["work"] / plan.steps)))
    members = range(len(plan.seeds))
    if not arguments["final"]:
        validation = [scores(ensemble.member(k), found, found.validation, on)["loss"] for k in members]
        return {"validation": validation}
    last = losses[-max(1, plan.steps // 10) :].mean(0)
    return {
        "rate": plan.rate,
        "seeds": plan.seeds,
        "training_loss": rounded(last.tolist()),
        "source": found.source,
        "scores": [_all_scores(ensemble, k, found, on) for k in members],
    }


def _all_scores(ensemble: Ensemble, k: int, found: Sequences, on: torch.device) -> dict[str, Any]:
    """One member's scores on both parts by the statistics used."""
    if ensemble.formulation.counted == "none":
        return {"none": _both_parts(ensemble.member(k), found, on)}
    by = {kind: _both_parts(ensemble.member(k, kind), found, on) for kind in ensemble.running}
    # what estimates do is a question about the library's own training; they cost as much as a tenth of it each
    for mode in MODES if ensemble.plan.formulation == "both rules" else ():
        member = ensemble.member(k)
        _estimate(ensemble, member, found, on, mode, ensemble.plan.seeds[k])
        by[mode] = _both_parts(member, found, on)
    return by


def _estimate(ensemble: Ensemble, member: Member, found: Sequences, on: torch.device, mode: str, seed: int) -> None:
    """Population statistics of the training part, in batches as in training, padding counted where it was."""
    assert isinstance(member.layer, BNLSTM)
    order = found.train[torch.randperm(len(found.train), generator=torch.Generator().manual_seed(seed))]
    items = []
    for positions in order.split(ensemble.plan.batch):
        if len(positions) > 1:
            x, lengths, _ = inputs(found, positions, on)
            if ensemble.formulation.counted == "padded":
                lengths = torch.full_like(lengths, len(x))
            items.append((x, lengths))
    estimate_statistics(member, items, mode)


def _both_parts(member: Member, found: Sequences, on: torch.device) -> dict[str, dict[str, float]]:
    parts = {"validation": found.validation, "test": found.test}
    result = {}
    for name, positions in parts.items():
        of_part = scores(member, found, positions, on)
        result[name] = dict(zip(of_part, rounded(list(of_part.values())), strict=True))
    return result
