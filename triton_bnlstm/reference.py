"""The equations in plain PyTorch: the oracle that kernels are held against, and what runs where there are none.

One layer, one direction, over rows (see `packing`). `forward` is the method, written to be read; autograd goes through
it as often as one likes. What the library calls is `bptt.layer`: this forward with a backward written by hand.

Shapes: R rows of T steps, n = n_t rows in step t, B sequences, D input features, H hidden units, C = 4H gate columns in
the order i, f, g, o. Statistics, gates and cell state are float32 (float64 for float64 parameters) whatever the
parameters' dtype; matrix products are in the parameters' dtype.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import Packing
from .statistics import Moments, Population, Statistics


class Parameters(NamedTuple):
    """Parameters of one layer and direction; gate order i, f, g, o.

    weight_ih [4H, D], weight_hh [4H, H], bias [4H] or None, gamma_ih [4H], gamma_hh [4H]; with cell norm also
    gamma_c [H] and beta_c [H], else None.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor | None
    gamma_ih: Tensor
    gamma_hh: Tensor
    gamma_c: Tensor | None = None
    beta_c: Tensor | None = None


def update_cell(a: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pre-activation a [n, 4H] and cell state [n, H] → gates i, f, g, o and the new cell state, each [n, H]."""
    i, f, g, o = a.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.contiguous().tanh(), o.sigmoid()  # tanh of a strided view is slow
    return i, f, g, o, torch.addcmul(f * c, i, g)


class Problem(NamedTuple):
    """All that a layer needs besides tensors with gradients.

    population: None when every seat is taken in every training step; its weight is None when statistics are constants.
    over_time: statistics of W_x x per time step; False: one set over all rows.
    """

    packing: Packing
    population: Population | None
    over_time: bool
    eps: float

    @property
    def frozen(self) -> bool:
        """Statistics are constants of the population: nothing is computed from the rows."""
        return self.population is not None and self.population.weight is None


class Used(NamedTuple):
    """Statistics that normalise the rows of all steps: mean and 1/√(var + ε), each [T, C] or [1, C]."""

    mean: Tensor
    rstd: Tensor


class Saved(NamedTuple):
    """What one step leaves for its backward (n rows)."""

    deviation: Tensor  # [n, 4H] W_h h − mean used
    rstd: Tensor  # [4H]
    gate_i: Tensor  # [n, H], after the non-linearity; likewise f, g, o
    gate_f: Tensor
    gate_g: Tensor
    gate_o: Tensor
    c: Tensor  # [n, H] new cell state, before a finished row gets its old one back
    c_deviation: Tensor | None  # [n, H] with cell norm: c − mean used
    c_rstd: Tensor | None  # [H]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of statistics, gates and cell state."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def moments_of_rows(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of rows [n, .., C], and the deviations z − mean that the variance is made of."""
    mean = z.mean(0)
    deviation = z - mean
    return mean, (deviation * deviation).mean(0), deviation


def _moments_of_valid_rows(z: Tensor, mask: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of those rows [.., n, C] that mask [.., n, 1] keeps, `count` of them; the others must be finite."""
    mean = (z * mask).sum(-2) / count
    deviation = z - mean.unsqueeze(-2)
    return mean, (deviation * mask).square().sum(-2) / count, deviation


def _fill_seats(mean: Tensor, var: Tensor, population: tuple[Tensor, Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of the batch's rows and the phantom rows together; `weight` is the batch's share of them."""
    gap = mean - population[0]
    mixed = weight * var + (1 - weight) * population[1] + weight * (1 - weight) * gap.square()
    return mean - (1 - weight) * gap, mixed  # in this form exact at weight 1


def _input_moments(z: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Moments of W_x x [R, C] in all steps at once: [T, C], or [1, C] over sequences."""
    packing = problem.packing
    count = packing.count.to(z.dtype)
    if not problem.over_time:
        mask = packing.mask
        mean, var, _ = moments_of_rows(z) if mask is None else _moments_of_valid_rows(z, mask, count.sum())
        return mean[None], var[None]
    by_step = (-1, packing.batch, z.shape[1])
    if packing.mask is not None:
        mask, count = packing.mask.view(-1, packing.batch, 1), count.clamp_min(1)[:, None]
        mean, var, _ = _moments_of_valid_rows(z.view(by_step), mask, count)
        return mean, var
    if _one_step_at_a_time(z, packing):
        found = [moments_of_rows(part) for part in z.split(packing.sizes)]
        return torch.stack([mean for mean, _, _ in found]), torch.stack([var for _, var, _ in found])
    mean, var, _ = moments_of_rows(z.view(by_step).transpose(0, 1))
    return mean, var


def _one_step_at_a_time(z: Tensor, packing: Packing) -> bool:
    """Steps differ in their number of rows; or z is on a CPU, where a step's rows stay in the cache between the passes
    over them, so that it takes half the time of all steps at once.
    """
    return packing.sizes[-1] != packing.batch or z.device.type == "cpu"


def _use_input_statistics(z: Tensor, problem: Problem) -> tuple[Used, Moments | None]:
    """Statistics of the input norm for all steps, and the batch's own moments (None when frozen)."""
    population = problem.population
    if population is not None and population.weight is None:
        mean, var = population.ih
        return Used(mean, (var + problem.eps).rsqrt()), None
    mean, var = _input_moments(z, problem)
    count = problem.packing.count
    own = Moments(mean.detach(), var.detach(), count if problem.over_time else count.sum(0, keepdim=True))
    if population is not None and problem.over_time:
        weight = cast(Tensor, population.weight).to(z.dtype)[:, None]
        mean, var = _fill_seats(mean, var, population.ih, weight)
    return Used(mean, (var + problem.eps).rsqrt()), own


class _StepNorm:
    """A norm inside the recurrence: the hidden pre-activation's or the cell state's.

    Called once per step; collects the batch's moments as it goes.
    """

    def __init__(self, problem: Problem, population: tuple[Tensor, Tensor] | None, dtype: torch.dtype) -> None:
        self.problem = problem
        steps = len(problem.packing.sizes)
        self.frozen = problem.frozen
        self.population = [] if population is None else list(zip(*(s.unbind() for s in population), strict=True))
        if self.population and len(self.population) != steps:
            raise AssertionError("population is not laid out by step")
        weight = None if problem.population is None else problem.population.weight
        self.weight = [] if weight is None else weight.to(dtype).unbind()
        self.count = problem.packing.count.to(dtype).clamp_min(1).unbind()
        self.means: list[Tensor] = []
        self.vars: list[Tensor] = []

    def __call__(self, t: int, z: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Z [n, C] → deviation from the mean used [n, C], 1/√(var + ε) [C]."""
        eps = self.problem.eps
        if self.frozen:
            mean, var = self.population[t]
            return z - mean, (var + eps).rsqrt()
        own = moments_of_rows(z) if mask is None else _moments_of_valid_rows(z, mask, self.count[t])
        mean, var, deviation = own
        self.means.append(mean)
        self.vars.append(var)
        if mask is not None or z.shape[0] < self.problem.packing.batch:
            mean, var = _fill_seats(mean, var, self.population[t], self.weight[t])
            deviation = z - mean
        return deviation, (var + eps).rsqrt()

    def moments(self) -> Moments:
        """The batch's own moments, [T, C]."""
        return Moments(torch.stack(self.means).detach(), torch.stack(self.vars).detach(), self.problem.packing.count)


def forward(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    parameters: Parameters,
    problem: Problem,
    saved: list[Saved] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Statistics | None, Tensor, Used]:
    """Equations (6)–(8) of Cooijmans et al. over all rows.

    Args:
        x: [R, D] input rows.
        h, c: [B, H] states before the first step, in the order of the rows; c in the accumulation dtype.
        parameters: of this layer and direction.
        problem: rows, population and options.
        saved: a list that takes what the hand-written backward needs.

    Returns:
        output rows [R, H]; h_n and c_n [B, H], each sequence's at its own last step; the batch's moments (None when
        statistics are frozen); W_x x [R, 4H] and the statistics that normalise it.
    """
    weight_ih, weight_hh, bias, gamma_ih, gamma_hh, gamma_c, beta_c = parameters
    packing, population = problem.packing, problem.population
    wide = accumulation_dtype(weight_hh.dtype)

    z_x = F.linear(x, weight_ih).to(wide)  # [R, 4H]
    used, own_ih = _use_input_statistics(z_x, problem)
    scale = gamma_ih.to(wide) * used.rstd  # [T, 4H]
    shift = -used.mean * scale if bias is None else bias.to(wide) - used.mean * scale
    steps = len(packing.sizes)
    scales, shifts = (s.expand(steps, -1).unbind() for s in (scale, shift))

    norm_hh = _StepNorm(problem, None if population is None else population.hh, wide)
    norm_c = None if gamma_c is None else _StepNorm(problem, None if population is None else population.c, wide)
    gamma_hh = gamma_hh.to(wide)
    gamma_c, beta_c = (None if p is None else p.to(wide) for p in (gamma_c, beta_c))
    masks = None if packing.mask is None else packing.mask.split(packing.sizes)

    outputs: list[Tensor] = []
    finished_h, finished_c = [], []
    # without a graph h is written where it stays, instead of being gathered afterwards
    places = None
    if masks is None and not torch.is_grad_enabled():
        rows = h.new_empty(x.shape[0], h.shape[1])
        places = rows.split(packing.sizes)
    for t, (n, z_t) in enumerate(zip(packing.sizes, z_x.split(packing.sizes), strict=True)):
        if n < h.shape[0]:
            finished_h.append(h[n:])
            finished_c.append(c[n:])
            h, c = h[:n], c[:n]
        mask = None if masks is None else masks[t]

        deviation, rstd = norm_hh(t, F.linear(h, weight_hh).to(wide), mask)
        a = torch.addcmul(shifts[t], z_t, scales[t]).addcmul_(deviation, gamma_hh * rstd)  # [n, 4H]
        i, f, g, o, c_new = update_cell(a, c)
        if norm_c is None:
            c_deviation = c_rstd = None
            squashed = c_new.tanh()
        else:
            assert gamma_c is not None
            assert beta_c is not None
            c_deviation, c_rstd = norm_c(t, c_new, mask)
            squashed = torch.addcmul(beta_c, c_deviation, gamma_c * c_rstd).tanh()
        if saved is not None:
            saved.append(Saved(deviation, rstd, i, f, g, o, c_new, c_deviation, c_rstd))
        if places is not None:
            h, c = torch.mul(o, squashed, out=places[t]), c_new
            continue
        h_new = (o * squashed).to(weight_hh.dtype)
        if mask is None:
            h, c = h_new, c_new
            outputs.append(h)
        else:
            h, c = torch.where(mask, h_new, h), torch.where(mask, c_new, c)
            outputs.append(torch.where(mask, h_new, 0))

    h_n, c_n = torch.cat([h, *reversed(finished_h)]), torch.cat([c, *reversed(finished_c)])
    moments = None
    if own_ih is not None:
        seats = packing.count.new_full((), packing.batch)  # a tensor made from a number would wait for the device
        moments = Statistics(own_ih, norm_hh.moments(), None if norm_c is None else norm_c.moments(), seats)
    return torch.cat(outputs) if places is None else rows, h_n, c_n, moments, z_x, used
