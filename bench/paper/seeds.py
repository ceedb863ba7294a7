"""What several seeds tell: a spread, and whether a difference can be told from chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median, stdev

STANDARD_ERRORS = 3.0  # a mean difference of fewer of its standard errors may be chance; with five seeds 2.8 are 5 %


def short(value: float, digits: int = 5) -> float:
    """The value with so many significant digits, as records keep it."""
    return float(f"{value:.{digits}g}")


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Mean ± deviation over seeds."""
    deviation = f" ± {stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{fmean(values):{form}}{deviation}"


def verdict(differences: Sequence[float]) -> str:
    """What losses are that differ by these, pair by pair: "worse", "better", or "equal" where it may be chance."""
    mean = fmean(differences)
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    if abs(mean) <= STANDARD_ERRORS * error:
        return "equal"
    return "worse" if mean > 0 else "better"


def compare(differences: Sequence[float], what: str, other: str, unit: str) -> str:
    """A line on `what`'s losses less `other`'s, one for each seed."""
    if len(differences) < 2:
        return f"{what}: {differences[0]:+.4f} {unit} against {other}, with one seed"
    found = f"{spread(differences, '+.4f')} {unit}, {len(differences)} seeds"
    told = {"worse": "worse than", "better": "better than", "equal": "no different, as far as these seeds show, from"}
    return f"{what}: {told[verdict(differences)]} {other} ({found})"


def middle(values: Sequence[float | None]) -> str:
    """Median and range of numbers some of which may be "never" (None)."""
    numbers = sorted(math.inf if value is None else value for value in values)
    words = ["never" if math.isinf(n) else f"{n:g}" for n in (median(numbers), numbers[0], numbers[-1])]
    return words[0] if words[1] == words[2] else f"{words[0]} ({words[1]} – {words[2]})"
