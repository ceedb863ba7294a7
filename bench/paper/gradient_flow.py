"""Does γ = 0.1 keep the gradient alive, and does γ = 1 kill it? `gradients` says what is measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .experiment import Job, Report, Results, Settings
from .gradient_flow_told import LOST, MODELS, NORMALISED, STARTS, TITLE, figure, summary, tables
from .gradients import Case, measure, positions_of, slope
from .seeds import short

__all__ = ["SIZES", "TITLE", "figure", "jobs", "run", "summary", "tables"]

_PAPERS = {"side": 28, "hidden": 100, "batch": 100, "noise": 0.1, "gammas": [round(0.1 * k, 1) for k in range(1, 11)]}
_ABOUT = "the paper's T = 784, 100 units and batches of 100"
_TINY = {"side": 7, "hidden": 32, "batch": 50, "noise": 0.1, "gammas": [0.1, 0.5, 1.0]}
SIZES: dict[str, Settings] = {
    "quick": {"about": "images of 7×7 pixels, 32 units, batches of 50; one seed, three γ", **_TINY, "seeds": 1},
    "reduced": {"about": f"{_ABOUT}; 2 seeds (weights, noise and images) where full has 10", **_PAPERS, "seeds": 2},
    "full": {"about": f"{_ABOUT}; 10 seeds (weights, noise and images)", **_PAPERS, "seeds": 10},
}

COSTS = {"BN-RNN": 1.0, "RNN": 1.0, "LSTM": 2.0, "BN-LSTM": 6.0, "BN-LSTM, cell norm": 6.5}


def jobs(settings: Settings, results: Results) -> list[Job]:
    """One for each case, with all its seeds, and one for the derivative of tanh."""
    cases = [
        Case(model, start, gamma)
        for model in MODELS
        for start in STARTS[model]
        for gamma in (settings["gammas"] if model in NORMALISED else [None])
    ]
    made = [Job(case.key, {"case": list(case)}, COSTS[case.model] * settings["seeds"]) for case in cases]
    return [Job("tanh", {}, 1.0), *made]


def run(arguments: dict[str, Any], settings: Settings, device: str, report: Report) -> dict[str, Any]:
    """A case's curve and its figures by seed, in decades relative to the last step, or figure 1(b).

    norm: log10 of the norm at positions_of(T), mean over the seeds. first: of h_1. low, high: the extremes over t.
    lost: steps back from the end to where the norm is first below 10^−LOST of the last, None if it never is.
    """
    if "case" not in arguments:
        report(1.0)
        return {f"{0.05 * k:.2f}": {n: _short(v) for n, v in slope(0.05 * k).items()} for k in range(21)}
    torch.set_num_threads(1)  # products of 100×100: several threads wait for each other
    case = Case(*arguments["case"])
    norms: list[Tensor] = []
    value: dict[str, Any] = {name: [] for name in ("first", "low", "high", "lost")}
    for seed in range(settings["seeds"]):
        found = measure(case, settings, seed, device)
        norm = found.pop("norm")
        for name, entry in of_seed(norm).items():
            value[name].append(entry)
        for name, entry in found.items():
            value.setdefault(name, []).append(_short(entry))
        norms.append(norm)
        report(COSTS[case.model])
    mean = torch.stack(norms).mean(0)
    return {**value, "norm": [_short(v) for v in mean[positions_of(len(mean)) - 1].tolist()], "steps": len(mean)}


def of_seed(norm: Tensor) -> dict[str, Any]:
    """What `run` keeps of one seed's curve [T] besides the curve."""
    relative = norm - norm[-1]
    below = (relative < -LOST).nonzero()
    return {
        "first": _short(relative[0].item()),
        "low": _short(relative.min().item()),
        "high": _short(relative.max().item()),
        "lost": len(norm) - 1 - int(below[-1]) if len(below) else None,
    }


def _short(number: float) -> float:
    return short(number, 4)
