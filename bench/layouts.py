"""Tuning as users get it, with a record of everything that was tried: does a layout run faster here than the default?

Nothing goes into the user's cache. The record holds whole entries, which `python -m bench.adopt` makes
part of what is shipped.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, fields
from itertools import islice
from typing import Any

import torch

from triton_bnlstm.kernels.config import device_of
from triton_bnlstm.tuning import Work
from triton_bnlstm.tuning.device import Identity, provenance_of
from triton_bnlstm.tuning.entry import Entry
from triton_bnlstm.tuning.tuner import Bench, TuningError, Unfit
from triton_bnlstm.tuning.tuner import tune as search
from triton_bnlstm.tuning.work import Layout

from . import records
from .cases import Case
from .measure import CannotCapture, DeviceLost, is_lost
from .timing import Tell

WAYS = ("forward", "backward", "inference")


def difference(layout: Layout, default: Layout) -> str:
    """What is changed, in words: "units 16, warps 8"."""
    changed = [f.name for f in fields(layout) if getattr(layout, f.name) != getattr(default, f.name)]
    return ", ".join(f"{name} {getattr(layout, name)}" for name in changed) or "default"


def work_of(case: Case, way: str) -> Work:
    """What the kernel of one way has to do in a case."""
    unequal = case.lengths != "equal"
    given = {"cell_norm": case.cell_norm, "narrow": case.columns == 1, "seats": unequal and way == "forward"}
    flags = tuple(sorted(name for name, is_set in given.items() if is_set))
    precision = "tf32" if case.precision == "tf32" else "ieee"
    return Work(way, case.hidden, case.batch, case.directions, case.dtype, precision, flags)


class _Watched:
    """A bench that says what it is about to try, and leaves out what has brought down an earlier process."""

    def __init__(
        self, bench: Bench, way: str, skip: dict[str, str], most: int, tell: Tell, device: torch.device
    ) -> None:
        self.bench, self.way, self.skip, self.most = bench, way, skip, most
        self.tell_, self.device, self.default = tell, device, bench.default

    def structures(self) -> Iterable[Layout]:
        return islice(self.bench.structures(), 1 + self.most)

    def neighbours(self, layout: Layout) -> Iterable[Layout]:
        return islice(self.bench.neighbours(layout), self.most)

    def prepare(self, layout: Layout) -> None:
        name = f"{self.way}, {difference(layout, self.default)}"
        if name in self.skip:
            raise Unfit(self.skip[name])
        self.tell_(name, "prepare")
        try:
            self.bench.prepare(layout)
        except Unfit:
            if is_lost(self.device):
                raise DeviceLost(name, RuntimeError("it was lost while this layout was tried")) from None
            raise
        except TuningError as error:
            raise CannotCapture(name, error) from error
        except Exception as error:
            if is_lost(self.device):
                raise DeviceLost(name, error) from error
            raise Unfit(f"{type(error).__name__}: {error}") from error

    def sample(self, layout: Layout) -> float:
        self.tell_(f"{self.way}, {difference(layout, self.default)}", "time")
        return self.bench.sample(layout)


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
    """The library's own search for each kernel of a case.

    Args:
        case, device: what and where.
        rounds: interleaved, of which the medians count.
        seconds: for all kernels.
        most: at most so many layouts of each kind.
        skip: reasons, by the names that `tell` is told, not to try them.
        tell: is told what is tried.

    Raises:
        DeviceLost, CannotCapture: the process cannot go on; do it again in a new one, with `provider` in `skip`.
    """
    from triton_bnlstm.tuning.measure import bench_of  # not at the top: there may be no Triton

    found = []
    for way in WAYS:
        work = work_of(case, way)
        # in the interpreter nothing is measured: no more steps than the case has
        steps = case.steps if device.type == "cpu" else None
        watched = _Watched(bench_of(work, device, steps), way, skip or {}, most, tell, device)
        share = {"seconds": seconds / len(WAYS), "rounds": rounds}
        sizes = {"hidden": case.hidden, "batch": case.batch, "columns": 0}
        try:
            entry = search(work, watched, by=provenance_of(device), case=sizes, **share)  # type: ignore[arg-type]
        except TuningError as error:
            found.append({"case": case.key, "way": way, "tried": 0, "failed": {"all": str(error)}})
            continue
        found.append(_record(case, way, entry, device))
    return [{**record, "source": records.source()} for record in found]


def _record(case: Case, way: str, entry: Entry, device: torch.device) -> dict[str, Any]:
    standard, best = entry.candidate(entry.default), entry.candidate(entry.layout)
    times = {}
    for each in entry.candidates:
        if each.microseconds is not None:
            times[difference(each.layout, entry.default)] = each.microseconds * case.steps
    return {
        "case": case.key,
        "way": way,
        "tried": len(entry.candidates),
        "default": asdict(entry.default),
        "default_us": None if standard is None or standard.microseconds is None else standard.microseconds * case.steps,
        "failed": {difference(each.layout, entry.default): each.failed for each in entry.candidates if each.failed},
        "best": asdict(entry.layout),
        "best_us": None if best is None or best.microseconds is None else best.microseconds * case.steps,
        "times_us": times,
        "device": Identity.of(device_of(device))._asdict(),
        "entry": entry.as_json(),
    }
