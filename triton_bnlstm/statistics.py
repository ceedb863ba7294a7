"""Population statistics: slots, the count-weighted merge, inheritance between slots, phantom rows.

A *slot* holds the statistics of one time step: mean and biased variance of every column, and the number of rows they
stand on. Memory of a slot is measured in rows, so a step that saw one row counts for one row. All functions are pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .packing import Packing


class Moments(NamedTuple):
    """Mean and biased variance of rows, per slot or per step, and how many rows there were.

    Shapes: mean [S, C], var [S, C], count [S] (float64: a discounted count is not a whole number).
    """

    mean: Tensor
    var: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody asks of three tensors

    def clone(self) -> Moments:
        """Copies of the three tensors."""
        return Moments(self.mean.clone(), self.var.clone(), self.count.clone())


class Statistics(NamedTuple):
    """Population statistics of one layer and direction, or the moments of one batch for it.

    ih: of W_x x, [S, 4H] per slot, or [1, 4H] with input_stats="sequence". hh: of W_h h, [S, 4H].
    c: of the cell state, [S, H], or None without cell_norm. rows: 0-d float64, rows B of the last training step.
    """

    ih: Moments
    hh: Moments
    c: Moments | None
    rows: Tensor

    @classmethod
    def unseen(
        cls,
        slots: int,
        hidden_size: int,
        *,
        cell_norm: bool = False,
        input_stats: str = "sequence",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Statistics:
        """Statistics of a layer that has seen nothing: mean 0, variance 1, no rows."""

        def blank(length: int, columns: int) -> Moments:
            return Moments(
                torch.zeros(length, columns, dtype=dtype, device=device),
                torch.ones(length, columns, dtype=dtype, device=device),
                torch.zeros(length, dtype=torch.float64, device=device),
            )

        return cls(
            ih=blank(slots if input_stats == "time" else 1, 4 * hidden_size),
            hh=blank(slots, 4 * hidden_size),
            c=blank(slots, hidden_size) if cell_norm else None,
            rows=torch.zeros((), dtype=torch.float64, device=device),
        )


class Population(NamedTuple):
    """What normalisation takes from the population, step by step.

    ih, hh, c: resolved slots of the steps, (mean, var) each [T, C] ([1, C] for ih over sequences).
    weight: [T] share n/(n+κ) of the batch's own rows in what is used. None: no own rows, statistics are constants.
    """

    ih: tuple[Tensor, Tensor]
    hh: tuple[Tensor, Tensor]
    c: tuple[Tensor, Tensor] | None
    weight: Tensor | None

    def in_dtype(self, dtype: torch.dtype) -> Population:
        """The same in another dtype, but for the weight."""
        ih, hh, c = (None if pair is None else (pair[0].to(dtype), pair[1].to(dtype)) for pair in self[:3])
        assert ih is not None
        assert hh is not None
        return Population(ih, hh, c, self.weight)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of a's and b's rows together, slot by slot (Chan's formula: nothing is squared before it is centred)."""
    count = a.count + b.count
    share = torch.where(count > 0, b.count / count.clamp_min(torch.finfo(count.dtype).tiny), 0)
    share = share.to(a.mean.dtype)[:, None]
    gap = b.mean - a.mean
    # lerp is exact at both its ends
    var = torch.addcmul(torch.lerp(a.var, b.var, share), share * (1 - share) * gap, gap)
    return Moments(torch.lerp(a.mean, b.mean, share), var, count)


def pool(moments: Moments) -> Moments:
    """All slots' rows as the rows of one slot, [1, C]."""
    count = moments.count.sum(0, keepdim=True)
    share = (moments.count / count.clamp_min(1)).to(moments.mean.dtype)[:, None]
    mean = (share * moments.mean).sum(0, keepdim=True)
    var = (share * (moments.var + (moments.mean - mean).square())).sum(0, keepdim=True)
    return Moments(mean, var, count)


def resized(moments: Moments, slots: int) -> Moments:
    """Moments of so many slots: new ones have seen nothing, and those that go are pooled into the new last one."""
    missing = slots - moments.mean.shape[0]
    if missing > 0:
        mean, var = (
            moments.mean.new_zeros(missing, moments.mean.shape[1]),
            moments.var.new_ones(missing, moments.var.shape[1]),
        )
        parts = moments, Moments(mean, var, moments.count.new_zeros(missing))
    else:
        last = pool(Moments(*(s[slots - 1 :] for s in moments)))
        last = last._replace(var=torch.where(last.count[:, None] > 0, last.var, 1))
        parts = Moments(*(s[: slots - 1] for s in moments)), last
    return Moments(*(torch.cat(values) for values in zip(*parts, strict=True)))


def slots_of_steps(steps: Moments, start: int, slots: int) -> tuple[int, Moments]:
    """Rows of steps start, start+1, … as rows of slots: (first slot, moments of the consecutive slots from there).

    All steps from the last slot on are pooled: together they are that slot's rows.
    """
    first = min(start, slots - 1)
    own = slots - 1 - first
    if steps.mean.shape[0] <= own + 1:
        return first, steps
    head, tail = Moments(*(s[:own] for s in steps)), pool(Moments(*(s[own:] for s in steps)))
    return first, Moments(*(torch.cat(pair) for pair in zip(head, tail, strict=True)))


def _merge_into_slots(
    slots: Moments, steps: Moments, start: int, momentum: float | None, rows: Tensor
) -> tuple[Moments, Moments]:
    """One training step's merge into one norm's slots: views of the slots that it touches, and their new values."""
    first, batch = slots_of_steps(steps, start, slots.mean.shape[0])
    known = Moments(*(s[first : first + batch.mean.shape[0]] for s in slots))
    count = known.count
    if momentum is not None:
        count = count * (1 - momentum) ** (batch.count / rows).clamp_max(1)
    dtype = slots.mean.dtype  # FSDP2 may run a layer in a lower precision than its parameters are kept in
    batch = batch._replace(mean=batch.mean.to(dtype), var=batch.var.to(dtype))
    return known, merge(Moments(known.mean, known.var, count), batch)


@torch.no_grad()
def update_statistics_(pairs: list[tuple[Statistics, Statistics]], start: int, momentum: float | None) -> Tensor:
    """`update_statistics` in place, for pairs of statistics and moments together: all of them or none.

    Returns a 0-d bool on the device, whether all new values are finite; where it is false nothing has changed. The
    new values are asked, not the moments: a merge of finite moments can overflow too.
    """
    touched: list[tuple[Moments, Moments]] = []
    for statistics, moments in pairs:
        for slots, steps in zip(statistics[:3], moments[:3], strict=True):
            if slots is not None and steps is not None:
                touched.append(_merge_into_slots(slots, steps, start, momentum, moments.rows))
    finite = all_finite([merged for _, merged in touched])
    for known, merged in touched:
        for old, new in zip(known, merged, strict=True):
            old.copy_(torch.where(finite, new, old))
    for statistics, moments in pairs:
        statistics.rows.copy_(torch.where(finite, moments.rows, statistics.rows))
    return finite


def update_statistics(
    statistics: Statistics, moments: Statistics, *, start: int = 0, momentum: float | None = 0.1
) -> Statistics:
    """Population statistics after a training step, from those before it and the moments that `bn_lstm` returned.

    What a slot knew is discounted by ρ = (1 − momentum)^min(1, n/B) before it takes the n rows that it saw, in one
    merge, so its memory is about B/momentum rows long; momentum=None never forgets. Steps from the last slot on are
    pooled: together they are that slot's rows. Moments that are not finite leave everything as it was.

    Args:
        statistics: S slots.
        moments: of T steps.
        start: slot of the first step.
        momentum: weight of a full batch against what is known, in (0, 1]; None: all rows ever seen weigh the same.

    Raises:
        TypeError, ValueError: start or momentum is out of range.
    """
    checks.integer("start", start, 0)
    if momentum is not None:
        checks.real("momentum", momentum, above=0, maximum=1)
    ih, hh, c, rows = statistics
    copy = Statistics(ih.clone(), hh.clone(), None if c is None else c.clone(), rows.clone())
    update_statistics_([(copy, moments)], start, momentum)
    return copy


def all_finite(norms: Iterable[Moments | None]) -> Tensor:
    """0-d bool: every mean and variance is finite. Stays on the device."""
    extremes = [e for m in norms if m is not None for s in (m.mean, m.var) for e in torch.aminmax(s)]  # NaN is both
    return torch.stack(extremes).isfinite().all()


def _scan(factor: Tensor, offset: Tensor) -> Tensor:
    """y_t = factor_t · y_{t−1} + offset_t along dimension 0, with y_{−1} = 0, in log2(S) passes over [S, C]."""
    step = 1
    while step < offset.shape[0]:
        offset = torch.cat([offset[:step], offset[step:] + factor[step:] * offset[:-step]])
        factor = torch.cat([factor[:step], factor[step:] * factor[:-step]])
        step *= 2
    return offset


def resolve(slots: Moments, rows: Tensor) -> Moments:
    """The statistics that are used: rows that a slot lacks against slot 0 are inherited from its predecessor.

    resolved_0 = slot_0; resolved_t = merge(slot_t, resolved_{t−1} with min(max(N_0 − N_t, 0), rows) rows). A slot never
    seen is its predecessor. `count` is the number of rows that this stands on, inherited ones included.
    """
    inherited = (slots.count[0] - slots.count).clamp_min(0).minimum(rows)
    count = slots.count + inherited
    keep = torch.where(count > 0, slots.count / count.clamp_min(torch.finfo(count.dtype).tiny), 0)
    first = torch.arange(keep.shape[0], device=keep.device) == 0
    keep = torch.where(first, 1, keep).to(slots.mean.dtype)[:, None]
    mean = _scan(1 - keep, keep * slots.mean)
    predecessor = torch.cat([mean[:1], mean[:-1]])
    # every term is a variance or a squared distance: no difference of squares
    var = _scan(1 - keep, keep * slots.var + keep * (1 - keep) * (slots.mean - predecessor).square())
    return Moments(mean, var, count)


def resolve_statistics(statistics: Statistics) -> Statistics:
    """`resolve` for each of the norms; statistics over whole sequences have one slot and are what they are."""
    rows = statistics.rows
    cell = None if statistics.c is None else resolve(statistics.c, rows)
    return Statistics(resolve(statistics.ih, rows), resolve(statistics.hh, rows), cell, rows)


def inherit(slot: Moments, predecessor: Moments, first_count: Tensor, rows: Tensor) -> Moments:
    """One step of the recursion in `resolve`: a slot that has been seen, and its resolved predecessor."""
    inherited = (first_count - slot.count).clamp_min(0).minimum(rows)
    return merge(slot, Moments(predecessor.mean, predecessor.var, inherited))


def _at_steps(resolved: Moments, start: int, steps: int) -> tuple[Tensor, Tensor]:
    """(mean, var) of the slots of steps start..start+steps−1, each [steps, C]; the last slot serves all later steps."""
    slots = resolved.mean.shape[0]
    if start + steps <= slots:
        return resolved.mean[start : start + steps], resolved.var[start : start + steps]
    index = torch.arange(start, start + steps, device=resolved.mean.device).clamp_max(slots - 1)
    return resolved.mean.index_select(0, index), resolved.var.index_select(0, index)


def population_at_steps(
    resolved: Statistics, start: int, steps: int, weight: Tensor | None, over_time: bool
) -> Population:
    """Resolved slots laid out by step. `over_time`: ih has a slot per step too (input_stats="time")."""
    return Population(
        ih=_at_steps(resolved.ih, start, steps) if over_time else (resolved.ih.mean, resolved.ih.var),
        hh=_at_steps(resolved.hh, start, steps),
        c=None if resolved.c is None else _at_steps(resolved.c, start, steps),
        weight=weight,
    )


def phantom_rows(statistics: Statistics, count: Tensor, batch: int, prior_count: float | None) -> Tensor:
    """κ [T] float64: phantom rows in the seats that finished sequences left, at most what the population has seen."""
    kappa = (batch - count).minimum(statistics.hh.count[0])
    return kappa if prior_count is None else kappa.clamp_max(prior_count)


def population_with_phantoms(
    statistics: Statistics, count: Tensor, batch: int, start: int, prior_count: float | None, over_time: bool
) -> Population:
    """Phantom rows for a training batch of B sequences, count [T] of which are left at each step."""
    kappa = phantom_rows(statistics, count, batch, prior_count)
    weight = count / (count + kappa).clamp_min(1)
    steps = count.shape[0]
    resolved = resolve_statistics(_first_slots(statistics, start + steps))
    return population_at_steps(resolved, start, steps, weight, over_time)


def training_population(
    statistics: Statistics, packing: Packing, start: int, prior_count: float | None, over_time: bool
) -> Population | None:
    """Phantom rows for a training batch, from the statistics as they are now; None where no seat is ever vacated."""
    if packing.equal:
        return None
    return population_with_phantoms(statistics, packing.count, packing.batch, start, prior_count, over_time)


def _first_slots(statistics: Statistics, slots: int) -> Statistics:
    """The slots that a short batch depends on: a long population need not be scanned for it."""

    def head(m: Moments) -> Moments:
        return Moments(m.mean[:slots], m.var[:slots], m.count[:slots])

    ih, hh, c, rows = statistics
    return Statistics(head(ih), head(hh), None if c is None else head(c), rows)
