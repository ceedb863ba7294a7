"""A look around the default layouts: does a neighbour of what the library chooses run faster on this device?

Nothing is stored for the library to use; the record tells which default to doubt.
"""

from __future__ import annotations

import time
from dataclasses import asdict, fields
from typing import Any

import torch

from triton_bnlstm.kernels.config import Config
from triton_bnlstm.tuning.space import neighbours

from . import records
from .cases import Case
from .checking import check, why_wrong
from .measure import CannotCapture, DeviceLost, Runner, is_lost, runner_of, short
from .problem import Problem, product_precision
from .providers import Layouts, default_layouts, kernels
from .timing import CaptureFailed, Tell, percentiles, sample
from .unavailable import Unavailable


def difference(layout: Config, default: Config) -> str:
    """What is changed, in words: "units 16, warps 8"."""
    changed = [f.name for f in fields(layout) if getattr(layout, f.name) != getattr(default, f.name)]
    return ", ".join(f"{name} {getattr(layout, name)}" for name in changed) or "default"


def _default(problem: Problem) -> Layouts:
    try:
        return default_layouts(problem, sequence=True)
    except Unavailable:
        return default_layouts(problem, sequence=False)


def tune(
    case: Case,
    device: torch.device,
    *,
    rounds: int = 15,
    seconds: float = 60.0,
    most: int = 100,
    skip: dict[str, str] | None = None,
    tell: Tell = lambda provider, what: None,
) -> list[dict[str, Any]]:
    """Times of the default layout and its neighbours, forward and backward in training; the right ones only.

    Args:
        case, device: what and where.
        rounds: interleaved, of which the medians count.
        seconds: for compiling and checking neighbours; those that are left then are not tried.
        most: at most so many neighbours each way.
        skip: reasons, by the names that `tell` is told, not to try them.
        tell: is told what is tried.

    Raises:
        DeviceLost, CannotCapture: the process cannot go on; do it again in a new one, with `provider` in `skip`.
    """
    with product_precision(case):
        problem = Problem(case, device)
        default = _default(problem)
        ways = ("forward", "backward")
        return [_tune(problem, default, way, rounds, seconds / 2, most, skip or {}, tell) for way in ways]


def _tune(
    problem: Problem,
    default: Layouts,
    way: str,
    rounds: int,
    seconds: float,
    most: int,
    skip: dict[str, str],
    tell: Tell,
) -> dict[str, Any]:
    began = time.perf_counter()
    standing: Config = getattr(default, way)
    runners: dict[Config, Runner] = {}
    failed: dict[str, str] = {}
    near = (each for each in neighbours(standing) if isinstance(each, Config))
    candidates = [standing, *near][: 1 + most]
    for layout in candidates:
        if runners and time.perf_counter() - began > seconds:
            break
        name = difference(layout, standing)
        if f"{way}, {name}" in skip:
            failed[name] = skip[f"{way}, {name}"]
            continue
        tell(f"{way}, {name}", "prepare")
        try:
            model = kernels(problem, Layouts(**{**default._asdict(), way: layout}))
            errors, _ = check(problem, model)
            why = why_wrong(problem, errors)
            if why:
                failed[name] = why
            else:
                runners[layout] = runner_of(problem, model)
        except CaptureFailed as error:
            raise CannotCapture(f"{way}, {name}", error) from error
        except Exception as error:
            if is_lost(problem.device):
                raise DeviceLost(f"{way}, {name}", error) from error
            failed[name] = f"{type(error).__name__}: {short(error, 160)}"
    tell(way, "time")
    taken: dict[Config, list[float]] = {layout: [] for layout in runners}
    for _ in range(rounds):
        for layout, runner in runners.items():
            forward, backward = sample([runner.forward, runner.backward], problem.device)
            taken[layout].append(1e6 * (forward if way == "forward" else backward))
    medians = {layout: percentiles(values)[0] for layout, values in taken.items()}
    record: dict[str, Any] = {"case": problem.case.key, "way": way, "tried": len(medians) + len(failed)}
    record |= {"default": asdict(standing), "default_us": medians.get(standing), "failed": failed}
    if medians:
        best = min(medians, key=lambda layout: medians[layout])
        record |= {"best": asdict(best), "best_us": medians[best]}
    times = {difference(layout, standing): median for layout, median in medians.items()}
    return record | {"times_us": times, "source": records.source()}
