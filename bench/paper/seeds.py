"""What several seeds tell, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median, stdev

from .numbers import paired, shown

LEVEL = 0.05


def short(value: float, digits: int = 5) -> float:
    """The value with so many significant digits, as records keep it."""
    return float(f"{value:.{digits}g}")


def signed(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± deviation of differences."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):+.{digits}f}{deviation}"


def compare(differences: Sequence[float], what: str, other: str, unit: str) -> str:
    """A line on `what`'s losses less `other`'s, one for each seed, by a paired t-test."""
    found = f"{signed(differences, 4)} {unit}"
    if len(differences) < 2:
        return f"{what}: {found} against {other}, with one seed"
    test = paired(differences, [0.0] * len(differences))
    told = "no clear difference from"
    if test.p < LEVEL:
        told = "worse than" if test.difference > 0 else "better than"
    higher = sum(difference > 0 for difference in differences)
    p = shown(test.p)
    p = p if p.startswith("<") else f"= {p}"
    return f"{what}: {told} {other} ({found}, higher in {higher} of {test.pairs} seeds, p {p})"


def middle(values: Sequence[float | None]) -> str:
    """Median and range of numbers some of which may be "never" (None)."""
    numbers = sorted(math.inf if value is None else value for value in values)
    words = ["never" if math.isinf(n) else f"{n:g}" for n in (median(numbers), numbers[0], numbers[-1])]
    return words[0] if words[1] == words[2] else f"{words[0]} ({words[1]} – {words[2]})"
