"""The search: which layouts are tried, timed by turns, and when one takes another's place. Knows no device.

Layouts that divide the work differently come first, then the neighbours of the best. All that are compared are timed in
the same rounds, one after the other, so that a clock that slows down slows them all; medians count. What stands, stays,
unless something is 2 % better, and in the end that has to be shown once more, against the default alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from .device import Provenance, minor
from .entry import MEASURED, Candidate, Entry
from .work import Layout, Work

# A new layout has to be this much faster, or what is there stays: choices must not follow the noise.
BETTER = 0.98
ROUNDS, LEAST_ROUNDS, SCREENING = 15, 5, 3
# After the screening rounds a layout whose best time is beyond this multiple of the best one is not timed further.
_HOPELESS = 1.3
# The part of the time in which new layouts may still be compiled; what is left is for timing them.
_PREPARING = 0.8
_WAVES = 4


class Unfit(Exception):
    """A layout cannot run here, or computes something wrong."""


class TuningError(RuntimeError):
    """Nothing could be measured; nothing has changed."""


class Bench(Protocol):
    """Where layouts are tried. Times are of one step, or of a call where there are no steps."""

    default: Layout

    def structures(self) -> Iterable[Layout]:
        """Layouts that divide the work differently, the most promising first."""

    def neighbours(self, layout: Layout) -> Iterable[Layout]:
        """Layouts that differ from this one in one decision."""

    def prepare(self, layout: Layout) -> None:
        """Compile it, see that it fits and that it is right.

        Raises:
            Unfit: it does not.
        """

    def sample(self, layout: Layout) -> float:
        """Seconds, of a layout that has been prepared.

        Raises:
            Unfit: it fails after all.
        """


Tell = Callable[[str], None]


def nobody(_: str) -> None:
    """Is told what is done, and does nothing about it."""


@dataclass
class _Search:
    bench: Bench
    deadline: float
    rounds: int
    clock: Callable[[], float]
    tell: Tell
    incumbent: Layout
    tried: dict[Layout, Candidate] = field(default_factory=dict)
    ready: set[Layout] = field(default_factory=set)

    def prepared(self, layout: Layout) -> bool:
        if layout in self.ready:
            return True
        try:
            self.bench.prepare(layout)
        except Unfit as error:
            self.tried[layout] = Candidate(layout, failed=str(error))
            return False
        self.ready.add(layout)
        return True

    def wave(self, candidates: Iterable[Layout], until: float) -> None:
        """Try what has not been tried yet, against what stands and the default; `until` new ones are prepared."""
        fresh = [layout for layout in candidates if layout not in self.tried and layout != self.bench.default]
        if not fresh and self.bench.default in self.tried:
            return
        ours = [layout for layout in dict.fromkeys((self.bench.default, self.incumbent)) if self.prepared(layout)]
        known = len(ours)
        for k, layout in enumerate(fresh):
            if ours and self.clock() > until:
                break
            self.tell(f"compiling layout {k + 1} of {len(fresh)}")
            if layout not in ours and self.prepared(layout):
                ours.append(layout)
        if len(ours) > known or not self.tried.keys() & set(ours):
            self.compete(ours)

    def compete(self, layouts: list[Layout]) -> dict[Layout, float]:
        """Time these by turns, record what comes of it, and let the best take its place. Their medians."""
        times = self.timed(layouts)
        medians = {layout: statistics.median(values) for layout, values in times.items()}
        standard = medians.get(self.bench.default)
        for layout, median in medians.items():
            against = None if standard is None else 1e6 * standard
            self.tried[layout] = Candidate(layout, 1e6 * median, against, len(times[layout]))
        if medians:
            best = min(medians, key=lambda layout: medians[layout])
            standing = medians.get(self.incumbent)
            if standing is None or medians[best] < BETTER * standing:
                self.incumbent = best
        return medians

    def timed(self, layouts: list[Layout]) -> dict[Layout, list[float]]:
        """Samples of each; the first of all is not counted."""
        times: dict[Layout, list[float]] = {layout: [] for layout in layouts}
        for round_ in range(-1, self.rounds):
            self.tell(f"timing {len(times)} layouts, round {max(1, round_ + 1)} of {self.rounds}")
            if round_ >= LEAST_ROUNDS and self.clock() > self.deadline:
                break
            for layout in list(times):
                try:
                    seconds = self.bench.sample(layout)
                except Unfit as error:
                    del times[layout]
                    self.ready.discard(layout)
                    self.tried[layout] = Candidate(layout, failed=str(error))
                    continue
                if round_ >= 0:
                    times[layout].append(seconds)
            if round_ + 1 == SCREENING and times:
                times = self._screened(times)
        return {layout: values for layout, values in times.items() if values}

    def _screened(self, times: dict[Layout, list[float]]) -> dict[Layout, list[float]]:
        fastest = min(min(values) for values in times.values())
        standard = times.get(self.bench.default)
        kept = {}
        for layout, values in times.items():
            if layout in (self.bench.default, self.incumbent) or min(values) <= _HOPELESS * fastest:
                kept[layout] = values
            else:
                against = None if standard is None else 1e6 * statistics.median(standard)
                self.tried[layout] = Candidate(layout, 1e6 * statistics.median(values), against, len(values))
        return kept


def tune(
    work: Work,
    bench: Bench,
    *,
    by: Provenance,
    case: dict[str, int],
    known: Entry | None = None,
    seconds: float = 60.0,
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.monotonic,
    now: Callable[[], float] = time.time,
    tell: Tell = nobody,
) -> Entry:
    """Find the best layout for some work.

    Args:
        work: what the kernel does.
        bench: where it is tried.
        by, case: who measures, and the sizes that are measured, for the record.
        known: what was found before; with the same minor version of Triton only layouts that it has not tried are.
        seconds: after which nothing new is begun. What has been compiled by then is still timed, in at least
            `LEAST_ROUNDS` rounds.
        rounds: of which the medians count.
        clock, now: the time that passes, and the time of day.
        tell: is told what is done.

    Raises:
        TuningError: no layout runs, not even the default.
    """
    start = clock()
    carried = known is not None and known.how == MEASURED and minor(known.by.triton) == minor(by.triton)
    search = _Search(bench, start + seconds, rounds, clock, tell, bench.default)
    if known is not None and carried:
        search.tried = {each.layout: each for each in known.candidates}
    if known is not None and known.how == MEASURED:
        search.incumbent = known.layout
    untouched = dict(search.tried)
    until = start + _PREPARING * seconds
    search.wave(bench.structures(), start + 0.6 * seconds)
    for _ in range(_WAVES):
        before = search.incumbent
        if clock() > until:
            break
        search.wave(bench.neighbours(before), until)
        if search.incumbent == before:
            break
    if known is not None and carried and search.tried == untouched:
        if known.default == bench.default:
            return known  # nothing is new
        # times against another default say nothing of this one
        search.compete([each for each in dict.fromkeys((bench.default, search.incumbent)) if search.prepared(each)])
    _confirm(search)
    best = search.tried.get(search.incumbent)
    if best is None or best.microseconds is None:
        reasons = "; ".join(sorted({each.failed for each in search.tried.values() if each.failed})[:3])
        raise TuningError(f"{work.key}: no layout could be measured ({reasons or 'none was tried'})")
    candidates = tuple(search.tried.values())
    found = Entry(work.key, search.incumbent, MEASURED, now(), by, bench.default, dict(case), candidates)
    return Entry.of_json(found.as_json())  # as it will be read, to as many digits


def _confirm(search: _Search) -> None:
    """The fastest of many is partly the luckiest: it has to beat the default once more, in rounds of their own."""
    default, best = search.bench.default, search.incumbent
    if best == default or not {default, best} <= search.ready:
        return
    medians = search.compete([default, best])
    if not medians.get(best, float("inf")) < BETTER * medians.get(default, 0.0):
        search.incumbent = default if default in medians else best
