"""How soon population statistics are those of the last slot, as far as estimates can tell.

Two estimates of one slot from data drawn independently differ by chance alone. This is the floor: no distance between
slots of different estimates can be expected below it. Slots of one estimate are no measure of each other: neighbours
stand on much the same data.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch

from triton_bnlstm.statistics import Moments

from .seeds import short

TOLERANCE = 1.25  # times the floor: what is left beyond chance is then at most three quarters of chance
WINDOW = 5  # slots
QUARTILES = (0.25, 0.5, 0.75)


def settling(first: Moments, second: Moments, slots: int) -> dict[str, Any]:
    """How far slots are from slot `slots`, the last one of training, of two independent estimates [S, C] each.

    For "mean" (by the standard deviation of the last slot) and "var" (relative to it) of:

        quartiles   [S', 3] over columns, of the distance between a slot of one estimate and the last slot of the other
        floor       distance between the two estimates of the same slot: median over columns, mean over the later half
        settled     the first slot from which on WINDOW slots are within TOLERANCE times the floor, in the mean of their
                    medians; None: there is none
        later       mean of the medians over all slots beyond, as a multiple of the floor: 1 is stationary

    at: the slots S' that are kept, from 1. A column whose last slot has no variance in either estimate is left out.
    """
    last = slots - 1
    alive = (first.var[last] > 0) & (second.var[last] > 0)
    (mean_a, var_a), (mean_b, var_b) = ((m.mean[:, alive].double(), m.var[:, alive].double()) for m in (first, second))
    scale = (var_a[last] * var_b[last]).sqrt()
    at = kept_slots(len(mean_a))
    found: dict[str, Any] = {"at": [slot + 1 for slot in at]}
    for part, a, b, unit in (("mean", mean_a, mean_b, scale.sqrt()), ("var", var_a, var_b, scale)):
        # either way round, as columns of their own: a mean of the two would have another median than the floor's
        distance = torch.cat([(a - b[last]).abs() / unit, (b - a[last]).abs() / unit], 1)
        medians = distance.median(1).values
        floor = ((a - b).abs() / unit).median(1).values[slots // 2 : slots].mean().item()
        quartiles = torch.stack([torch.quantile(distance[slot], distance.new_tensor(QUARTILES)) for slot in at])
        found[part] = {
            "quartiles": [[short(value, 3) for value in row] for row in quartiles.tolist()],
            "floor": short(floor),
            "settled": settled_at(medians[:slots].tolist(), TOLERANCE * floor),
            "later": short(medians[slots:].mean().item() / floor) if floor and len(medians) > slots else None,
        }
    return found


def settled_at(distances: list[float], within: float) -> int | None:
    """The first slot, counted from 1, from which on WINDOW distances are `within` in the mean; None if there is none.

    A mean of several, since single slots of a stationary sequence are out by chance now and then.
    """
    for slot in range(len(distances) - WINDOW + 1):
        if fmean(distances[slot : slot + WINDOW]) <= within:
            return slot + 1
    return None


def kept_slots(slots: int) -> list[int]:
    """Slots that are kept in the record: the first ten and then ever fewer, from 0."""
    spread = {round(10 * (slots / 10) ** (k / 30)) - 1 for k in range(31)} if slots > 10 else set()
    return sorted({*range(min(10, slots)), *spread})
