"""Means with their deviations, and paired tests between seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation between seeds (n − 1), or the value alone if there is one."""
    if not len(values):
        return "–"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


class Paired(NamedTuple):
    """A comparison of two models that were trained with the same seeds.

    difference: mean of a − b. p: two-sided, of a paired t-test; NaN for fewer than two pairs. lower: pairs in which a
    is below b. pairs: how many.
    """

    difference: float
    p: float
    lower: int
    pairs: int


def paired(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Seed by seed; the t-test takes the differences to be normal, which so few seeds cannot show or refute."""
    from scipy import stats

    if len(a) != len(b):
        raise ValueError(f"a and b must have the same seeds, got {len(a)} and {len(b)} values")
    difference = np.asarray(a, float) - np.asarray(b, float)
    if len(difference) < 2:
        p = math.nan
    elif np.ptp(difference) == 0:  # no spread at all: the test would divide by zero
        p = 1.0 if difference[0] == 0 else 0.0
    else:
        p = float(stats.ttest_1samp(difference, 0).pvalue)
    return Paired(float(difference.mean()), p, int((difference < 0).sum()), len(difference))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's correction: adjusted p values, in the order given, for tests of which any may be lucky."""
    order = sorted(range(len(p)), key=lambda k: p[k])
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, k in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[k]))
        adjusted[k] = highest
    return adjusted


def shown(p: float) -> str:
    """A p value with as many digits as mean something."""
    if math.isnan(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def rounded(values: Sequence[float], digits: int = 5) -> list[float]:
    """To so many significant digits: for JSON."""
    return [float(f"{value:.{digits}g}") for value in values]
