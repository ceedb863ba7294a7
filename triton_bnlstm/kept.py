"""Lists of tensors with known shapes: the operators of `ops` take and give what elsewhere has names and gaps.

What is kept for the backward is in tensors of one dimension, with room for as many rows and steps as shapes alone
allow: how many there are, lengths decide, which a compiler does not know.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from . import dispatch
from .backend import why_no_kernels
from .reference import Parameters, Problem, Saved, Used, accumulation_dtype
from .statistics import Moments, Population, Statistics


class Setting(NamedTuple):
    """What an operator takes besides tensors.

    steps: T, read where `rows` is set. rows: x holds rows [R, D] of sequences sorted by length, as a PackedSequence
    does. bias, cell_norm: which parameters there are. over_time: statistics of W_ih x are per step. frozen: statistics
    are the population's. reverse: the one direction is the second one. eps: ε. backend: never None. save: never "auto".
    autotune: see `BNLSTM`.
    """

    steps: int
    rows: bool
    bias: bool
    cell_norm: bool
    over_time: bool
    frozen: bool
    reverse: bool
    eps: float
    backend: str
    save: str
    autotune: str | None


class Sizes(NamedTuple):
    """T, B, the most rows R that there can be, directions, H, D; symbolic while a compiler traces."""

    steps: int
    batch: int
    rows: int
    directions: int
    hidden: int
    columns: int

    @classmethod
    def of(cls, x: Tensor, h_0: Tensor, s: Setting) -> Sizes:
        """Of an operator's arguments."""
        steps, rows = (s.steps, x.shape[0]) if s.rows else (x.shape[0], x.shape[0] * x.shape[1])
        directions, batch, hidden = h_0.shape
        return cls(steps, batch, rows, directions, hidden, x.shape[-1])


def on_its_own(tensor: Tensor, length: int | None = None) -> Tensor:
    """Contiguous, in memory of which it takes all; with zeros behind it up to `length`."""
    missing = 0 if length is None else length - tensor.shape[0]
    if missing:
        return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


def _by_direction(tensors: list[Tensor], directions: int) -> list[list[Tensor]]:
    width = len(tensors) // directions
    return [tensors[k * width : (k + 1) * width] for k in range(directions)]


# Parameters


def list_of_parameters(parameters: list[Parameters]) -> list[Tensor]:
    """Those that there are, direction after direction."""
    return [tensor for p in parameters for tensor in p if tensor is not None]


def parameters_of_list(tensors: list[Tensor], directions: int, s: Setting) -> list[Parameters]:
    """The other way round."""
    found = []
    for own in _by_direction(tensors, directions):
        rest = iter(own)
        weights = next(rest), next(rest)
        bias = next(rest) if s.bias else None
        found.append(Parameters(*weights, bias, *rest))
    return found


# Population


def list_of_population(population: Population) -> list[Tensor]:
    """Means and variances of the norms, and in training the weight; copies, as an operator's results must be."""
    pairs = [population.ih, population.hh] + ([] if population.c is None else [population.c])
    weights = [] if population.weight is None else [population.weight]
    return [s.clone() for s in (*(s for pair in pairs for s in pair), *weights)]


def populations_of_list(tensors: list[Tensor], directions: int, steps: int, s: Setting) -> list[Population | None]:
    """The other way round, of the first `steps` steps; the list is empty where nothing is taken from a population."""
    if not tensors:
        return [None] * directions
    found: list[Population | None] = []
    for own in _by_direction(tensors, directions):
        mean, var, *by_step = (*(own[:2]), *(tensor[:steps] for tensor in own[2:]))
        ih = (mean[:steps], var[:steps]) if s.over_time else (mean, var)
        c = (by_step[2], by_step[3]) if s.cell_norm else None
        found.append(Population(ih, (by_step[0], by_step[1]), c, None if s.frozen else by_step[-1]))
    return found


# Moments


def list_of_moments(found: list[Statistics]) -> list[Tensor]:
    """The rows of each step, then means and variances of each direction's norms."""
    return [found[0].hh.count, *(s for own in found for norm in own[:3] if norm is not None for s in norm[:2])]


def moments_of_all_steps(found: list[Statistics], steps: int, over_time: bool) -> list[Tensor]:
    """`list_of_moments` as an operator gives it: of T steps, with zeros in those that have no rows."""
    count, *listed = list_of_moments(found)
    width = len(listed) // len(found)
    of_sequences = [not over_time and k % width < 2 for k in range(len(listed))]
    whole = [on_its_own(s, None if once else steps) for s, once in zip(listed, of_sequences, strict=True)]
    return [on_its_own(count, steps).clone(), *whole]


def moments_of_list(
    listed: list[Tensor], directions: int, batch: int, *, over_time: bool, cell_norm: bool
) -> list[Statistics]:
    """The other way round."""
    count = listed[0]
    rows = count.new_full((), batch)
    found = []
    for own in _by_direction(listed[1:], directions):
        ih = Moments(own[0], own[1], count if over_time else count.sum(0, keepdim=True))
        cell = Moments(own[4], own[5], count) if cell_norm else None
        found.append(Statistics(ih, Moments(own[2], own[3], count), cell, rows))
    return found


# What is kept for the backward


class Shape(NamedTuple):
    """Of one kept tensor."""

    sizes: tuple[int, ...]
    dtype: torch.dtype

    def numel(self) -> int:
        """Elements; symbolic as the sizes."""
        total = 1
        for size in self.sizes:
            total = total * size
        return total


def takes_kernels(s: Setting, like: Tensor) -> bool:
    """Whether what is kept is what the kernels keep; the reference path may still run, if a kernel fails."""
    if s.backend != "auto":
        return s.backend == "triton"
    return like.device.type in dispatch.KERNEL_DEVICES and why_no_kernels(like.device, like.dtype) is None


def kept_shapes(n: Sizes, s: Setting, like: Tensor, *, seats: bool) -> list[Shape]:
    """Of everything that is kept for n.rows rows of n.steps steps. seats: phantom rows take vacated seats."""
    dtype, wide = like.dtype, accumulation_dtype(like.dtype)
    t, r, h, columns = n.steps, n.rows, n.hidden, 4 * n.hidden
    if takes_kernels(s, like):
        return _kept_by_kernels(n, s, dtype, seats=seats)
    slots = t if s.over_time else 1
    one = [Shape((r, h), dtype), Shape((r, columns), wide), Shape((slots, columns), wide)]  # rows, z_x, its 1/σ
    if not s.frozen:
        one += [Shape((slots, columns), wide), Shape((slots, n.columns), wide)]  # mean used, x̄
        if seats and s.over_time:
            one.append(Shape((t, columns), wide))  # pull
    one += [Shape((r, columns), wide), Shape((t, columns), wide)]  # deviation, 1/σ of the hidden norm
    one += [Shape((r, h), wide)] * 5  # gates, c
    if s.cell_norm:
        one += [Shape((r, h), wide), Shape((t, h), wide)]
    return one * n.directions


def _kept_by_kernels(n: Sizes, s: Setting, dtype: torch.dtype, *, seats: bool) -> list[Shape]:
    """As in `fused_forward.Trained`."""
    directions, t, r, h = n.directions, n.steps, n.rows, n.hidden
    states = directions, n.batch + r, h
    pre_activation = Shape((directions, r, 4 * h), dtype)
    kept = [Shape(states, dtype), Shape(states, torch.float32)]
    kept.append(Shape((directions, r), torch.float32) if n.columns == 1 else pre_activation)
    if s.frozen:
        return kept
    if s.save == "preactivations":
        kept.append(pre_activation)
    kept += [Shape((k, directions, t, 4 * h), torch.float32) for k in (2, 2 if seats else 1)]
    if s.cell_norm:
        kept.append(Shape((2, directions, t, h), torch.float32))
    return kept


def put(tensors: list[Tensor], room: list[Shape]) -> list[Tensor]:
    """Each flat, with as much room as its shape there has, filled with zeros; not copied where there is none left."""
    kept = []
    for tensor, shape in zip(tensors, room, strict=True):
        flat = on_its_own(tensor).view(-1)
        if flat.numel() != shape.numel():
            flat = torch.cat([flat, flat.new_zeros(shape.numel() - flat.numel())])
        kept.append(flat)
    return kept


def take(kept: list[Tensor], shapes: list[Shape]) -> list[Tensor]:
    """What `put` has put there, in its own shapes."""
    return [flat[: shape.numel()].view(shape.sizes) for flat, shape in zip(kept, shapes, strict=True)]


def flat_of_reference(rows: Tensor, z_x: Tensor, used: Used, saved: list[Saved]) -> list[Tensor]:
    """What one direction of the reference path keeps, as `kept_shapes` lists it."""
    tensors = [rows, z_x, used.rstd]
    if used.x_mean is not None:
        tensors += [used.mean, used.x_mean]
    if used.pull is not None:
        tensors.append(used.pull)
    tensors += [torch.cat([step.deviation for step in saved]), torch.stack([step.rstd for step in saved])]
    tensors += [torch.cat([cast(Tensor, step[k]) for step in saved]) for k in range(2, 7)]  # gates and c
    if saved[0].c_deviation is not None:
        tensors.append(torch.cat([cast(Tensor, step.c_deviation) for step in saved]))
        tensors.append(torch.stack([cast(Tensor, step.c_rstd) for step in saved]))
    return tensors


def reference_of_flat(
    tensors: list[Tensor], problem: Problem, *, seats: bool, cell_norm: bool
) -> tuple[tuple[Tensor, Tensor, Used], list[Saved]]:
    """The other way round, as `bptt.backward` takes it."""
    rest, sizes = iter(tensors), problem.packing.sizes
    rows, z_x, rstd = next(rest), next(rest), next(rest)
    if problem.frozen:
        used = Used(cast(Population, problem.population).ih[0], rstd, None, None)
    else:
        used = Used(next(rest), rstd, next(rest), next(rest) if seats and problem.over_time else None)
    steps = [next(rest).split(sizes), next(rest).unbind(), *(next(rest).split(sizes) for _ in range(5))]
    nothing = [None] * len(sizes)
    of_cell = (next(rest).split(sizes), next(rest).unbind()) if cell_norm else (nothing, nothing)
    return (rows, z_x, used), [Saved(*step) for step in zip(*steps, *of_cell, strict=True)]
