"""The forward of one layer, both directions, on the Triton kernels: what stands before and behind the recurrence."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from .kernels import launch
from .kernels.rows import CellNorm, Rows
from .packing import Packing
from .reference import Call, Parameters, Problem
from .statistics import Moments, Population, Statistics, pool


def stacked(tensors: list[Tensor]) -> Tensor:
    """One tensor for both directions; no copy where there is one direction."""
    return (tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)).contiguous()


def rows_of(packing: Packing) -> Rows:
    """Which rows exist, as the kernels read it."""
    return Rows(packing.first_rows, packing.valid_rows, len(packing.sizes), sum(packing.sizes), packing.batch)


def in_float32(parameters: list[Parameters], name: str) -> Tensor:
    """A parameter of all directions, float32 [dirs, ·]."""
    return stacked([getattr(p, name).float() for p in parameters])


def _states(first: list[Tensor], rows: Rows, dtype: torch.dtype, masked: bool) -> Tensor:
    """[dirs, B + R, H]: the initial states, and behind them place for those of all rows."""
    hidden, device = first[0].shape[1], first[0].device
    states = launch.empty(len(first), rows.batch + rows.rows, hidden, dtype=dtype, device=device)
    if masked:  # rows that are not live are seen by the caller, as zeros
        states.zero_()
    for direction, state in enumerate(first):
        states[direction, : rows.batch].copy_(state)
    return states


def populations(problems: list[Problem], norm: str) -> Tensor:
    """Mean and variance that one norm takes from the population, [2, dirs, T, C] float32."""
    found = [getattr(problem.population, norm) for problem in problems]
    return torch.stack([stacked([f[k] for f in found]) for k in range(2)])


def cell_affine(parameters: list[Parameters]) -> Tensor:
    """γ_c and β_c, [2, dirs, H] float32."""
    return torch.stack([in_float32(parameters, "gamma_c"), in_float32(parameters, "beta_c")])


def _project(x: Tensor, parameters: list[Parameters]) -> Tensor:
    """W_ih x of all rows, [dirs, R, D] → [dirs, R, 4H]."""
    columns, dtype = parameters[0].weight_hh.shape[0], parameters[0].weight_hh.dtype
    z = launch.empty(x.shape[0], x.shape[1], columns, dtype=dtype, device=x.device)
    for direction, p in enumerate(parameters):
        torch.mm(x[direction].to(dtype), p.weight_ih.to(dtype).t(), out=z[direction])
    return z


def product_of_means(mean: Tensor, weights: list[Tensor]) -> Tensor:
    """A weight times means, [dirs, T, D] float32 → [dirs, T, 4H] float32, whose precision no switch of torch's lowers.

    It is one row per step, so it may cost three products: each factor is split into its first 11 bits, whose products
    TF32 knows exactly, and the rest; rest times rest is left out, 2⁻²² of the whole.
    """

    def split(s: Tensor) -> tuple[Tensor, Tensor]:
        high = (s.view(torch.int32) & ~0x1FFF).view(torch.float32)
        return high, s - high

    weight = stacked([w.float() for w in weights]).mT.contiguous()  # [dirs, D, 4H]
    mean_high, mean_low = split(mean.contiguous())
    if mean.shape[2] == 1:
        return mean * weight
    weight_high, weight_low = split(weight)
    product = torch.bmm(mean_high, weight_high) + torch.bmm(mean_low, weight_high)
    if weights[0].dtype == torch.float32:  # half precisions have no low part
        product += torch.bmm(mean_high, weight_low)
    return product


def centred_input(x: Tensor, packing: Packing, rows: Rows, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """X [dirs, R, D] less the mean of each step's rows, in this dtype (one column: float32); and that mean."""
    if x.shape[2] == 1:
        dtype = torch.float32
    centred = launch.empty(*x.shape, dtype=dtype, device=x.device)
    if packing.mask is not None:  # rows that are not live must not make a product NaN
        centred.zero_()
    x_mean, _ = launch.moments(x, rows, centred)
    return centred, x_mean


def _train_input(
    x: Tensor, parameters: list[Parameters], problems: list[Problem], rows: Rows
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, list[Moments]]:
    """What the recurrence takes of the input x [dirs, R, D]: W_ih x or one column, scale and shift; the mean and 1/σ
    behind them, [2, dirs, T, 4H]; and the moments of W_ih x.

    x's mean over each step's rows is taken off first (the module page of `reference` says why), also where statistics
    are those of whole sequences: it comes back with the step's shift.
    """
    problem = problems[0]
    narrow = x.shape[2] == 1
    centred, x_mean = centred_input(x, problem.packing, rows, parameters[0].weight_hh.dtype)
    if narrow:  # W_ih x is x times a column: its moments are known, and it need not exist
        column = in_float32(parameters, "weight_ih").mT  # [dirs, 1, 4H]
        rest, var = launch.moments(centred, rows)  # what rounding has left of the mean
        mean, var, x = rest * column, var * column.square(), centred[:, :, 0]
    else:
        x = _project(centred, parameters)
        mean, var = launch.moments(x, rows)

    # W_ih x̄ in two parts: that of the mean of all rows, which may be large and is one row, so that float64 can be
    # afforded, and each step's distance from it. A step that is not finite stays the only one.
    count = problem.packing.count
    weights = (count / count.sum()).float()[:, None]
    middle = (weights * x_mean.nan_to_num(0.0, 0.0, 0.0)).sum(1, keepdim=True)  # [dirs, 1, D]
    offset = product_of_means(x_mean - middle, [p.weight_ih for p in parameters])
    large = torch.bmm(middle.double(), stacked([p.weight_ih for p in parameters]).double().mT)
    if problem.over_time:
        own = [Moments(m, v, count) for m, v in zip((mean + offset + large).float(), var, strict=True)]
        relative = mean
        if problem.population is not None:
            share = shares(problems)[:, :, None]
            population_mean, population_var = populations(problems, "ih")
            gap = mean + offset + (large - population_mean).float()
            relative = mean - (1 - share) * gap
            var = share * var + (1 - share) * population_var + share * (1 - share) * gap.square()
    else:
        pooled = [pool(Moments(m, v, count)) for m, v in zip(mean + offset, var, strict=True)]
        own = [m._replace(mean=(m.mean + o).float()) for m, o in zip(pooled, large, strict=True)]
        var = stacked([m.var for m in pooled])
        relative = stacked([m.mean for m in pooled]) - offset

    rstd = (var + problem.eps).rsqrt()
    scale = in_float32(parameters, "gamma_ih")[:, None] * rstd
    shift = _with_bias(parameters, -relative * scale).expand(-1, rows.steps, -1)
    if narrow:
        scale = scale * column
    terms = scale.expand_as(shift).contiguous(), shift.contiguous()
    return x, terms, torch.stack([relative.float(), rstd.expand_as(relative)]), own


def shares(problems: list[Problem]) -> Tensor:
    """n/(n+κ) of every step, [dirs, T] float32."""
    return stacked([cast(Tensor, cast(Population, p.population).weight) for p in problems]).float()


def last_states(states: Tensor, packing: Packing) -> list[Tensor]:
    """Each sequence's state after its own last step, [dirs, B + R, H] → [B, H] per direction."""
    if packing.equal:
        return [state[-packing.batch :].clone() for state in states]
    last = packing.first_rows[packing.lengths] + torch.arange(packing.batch, device=states.device)
    return [state.index_select(0, last) for state in states]


class Trained(NamedTuple):
    """What the kernels give for one layer in training; in evaluation h, c and x alone.

    h, c: [dirs, B + R, H], the initial states first. moments: of each direction.
    x: W_ih x [dirs, R, 4H] less what `ih` says, or x of one column [dirs, R].
    deviation: [dirs, R, 4H] W_hh h less its mean over the batch, where that is kept.
    ih: [2, dirs, T, 4H] mean, relative to x, and 1/σ of the input norm; hh: [2, dirs, T, 4H] of the hidden norm,
        relative to deviation, or [1, dirs, T, 4H] where that mean is zero; cell: [2, dirs, T, H] of the cell norm.
    """

    h: Tensor
    c: Tensor
    moments: list[Statistics]
    x: Tensor
    deviation: Tensor | None
    ih: Tensor | None
    hh: Tensor | None
    cell: Tensor | None


def _used(own: Tensor, population: Tensor | None, share: Tensor | None, eps: float) -> Tensor:
    """Mean used less the batch's own, and 1/σ, from means and variances [2, dirs, T, C]."""
    if population is None or share is None:
        return (own[1:] + eps).rsqrt()
    rest, gap = 1 - share[:, :, None], own[0] - population[0]
    var = (1 - rest) * own[1] + rest * population[1] + rest * (1 - rest) * gap.square()
    return torch.stack([-rest * gap, (var + eps).rsqrt()])


def train(calls: list[Call], keep: str | None, *, clean: bool = False) -> Trained:
    """The forward in training. keep: "preactivations" keeps deviations of W_hh h; clean: zeros where there are none."""
    problems, parameters = [call.problem for call in calls], [call.parameters for call in calls]
    packing, eps = problems[0].packing, problems[0].eps
    rows = rows_of(packing)
    x, terms, ih, own_ih = _train_input(stacked([call.x for call in calls]), parameters, problems, rows)
    masked = packing.mask is not None
    dtype = parameters[0].weight_hh.dtype
    h = _states([call.h for call in calls], rows, dtype, masked)
    c = _states([call.c for call in calls], rows, torch.float32, masked)
    deviation = None
    if keep == "preactivations":
        deviation = launch.empty(len(calls), rows.rows, 4 * h.shape[2], dtype=dtype, device=h.device)
        if clean and masked:
            deviation.zero_()
    population = population_c = share = cell = None
    if problems[0].population is not None:
        population, share = populations(problems, "hh"), shares(problems)
    if parameters[0].gamma_c is not None:
        population_c = None if share is None else populations(problems, "c")
        cell = CellNorm(cell_affine(parameters), population_c)
    own_hh, own_c = launch.train(
        h,
        c,
        stacked([p.weight_hh for p in parameters]),
        x,
        terms,
        in_float32(parameters, "gamma_hh"),
        rows,
        eps,
        population,
        share,
        cell,
        deviation,
    )
    count = packing.count
    batch = count.new_full((), packing.batch)
    moments = []
    for direction, own in enumerate(own_ih):
        hh = Moments(own_hh[0, direction], own_hh[1, direction], count)
        of_c = None if own_c is None else Moments(own_c[0, direction], own_c[1, direction], count)
        moments.append(Statistics(own, hh, of_c, batch))
    if keep is None:
        return Trained(h, c, moments, x, None, ih, own_hh, own_c)
    cell_used = None
    if own_c is not None:
        cell_used = _used(own_c, population_c, share, eps)
        mean_c = own_c[0] + cell_used[0] if share is not None else own_c[0]
        cell_used = torch.stack([mean_c, cell_used[-1]])
    return Trained(h, c, moments, x, deviation, ih, _used(own_hh, population, share, eps), cell_used)


def infer(calls: list[Call], keep_cells: bool) -> tuple[Tensor, Tensor, Tensor]:
    """H [dirs, B + R, H]; c likewise with keep_cells, else the last one, [dirs, B, H]; W_ih x, or x of one column."""
    problems, parameters = [call.problem for call in calls], [call.parameters for call in calls]
    packing, eps = problems[0].packing, problems[0].eps
    rows = rows_of(packing)
    x = stacked([call.x for call in calls])
    if x.shape[2] == 1:
        x = x[:, :, 0].float().contiguous()
        column = in_float32(parameters, "weight_ih").mT
    else:
        x, column = _project(x, parameters), None
    mean_ih, var_ih = populations(problems, "ih")
    mean_hh, var_hh = populations(problems, "hh")
    scale = in_float32(parameters, "gamma_ih")[:, None] * (var_ih + eps).rsqrt()
    scale_hh = in_float32(parameters, "gamma_hh")[:, None] * (var_hh + eps).rsqrt()
    shift = _with_bias(parameters, -mean_ih * scale - mean_hh * scale_hh)
    if column is not None:
        scale = scale * column
    affine_c = None
    if parameters[0].gamma_c is not None:
        mean_c, var_c = populations(problems, "c")
        gamma_c, beta_c = cell_affine(parameters)
        scale_c = gamma_c[:, None] * (var_c + eps).rsqrt()
        affine_c = torch.stack([scale_c, beta_c[:, None] - mean_c * scale_c])
    masked = packing.mask is not None
    h = _states([call.h for call in calls], rows, parameters[0].weight_hh.dtype, masked)
    if keep_cells:
        c = _states([call.c for call in calls], rows, torch.float32, masked)
    else:
        c = stacked([call.c for call in calls]).clone()
    terms = (scale.expand_as(shift).contiguous(), scale_hh.contiguous(), shift.contiguous())
    launch.infer(h, c, stacked([p.weight_hh for p in parameters]), x, terms, rows, affine_c)
    return h, c, x


def _with_bias(parameters: list[Parameters], shift: Tensor) -> Tensor:
    """Shift [dirs, ·, 4H] and the bias."""
    return shift if parameters[0].bias is None else shift + in_float32(parameters, "bias")[:, None]
