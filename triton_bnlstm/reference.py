"""The equations in plain PyTorch: the oracle that kernels are held against, and what runs where there are none.

One layer, one direction, over rows (see `packing`). `forward` is the method, written to be read; autograd goes through
it as often as one likes. What the library calls is `bptt.layer`: this forward with a backward written by hand.

Shapes: R rows of T steps, n = n_t rows in step t, B sequences, D input features, H hidden units, C = 4H gate columns in
the order i, f, g, o. Statistics, gates and cell state are float32 (float64 for float64 parameters) whatever the
parameters' dtype; matrix products are in W_hh's dtype, which autocast may have made another than that of the rest.

In training the mean x̄ of a step's rows (over sequences: of all rows) is taken off x before W_x meets it. Batch norm
does not see shifts, so nothing changes but the rounding: z_x = W_x (x − x̄) is rounded relative to deviations, and not
to a mean that may be large. With constant statistics x stays as it is: there a row's result must not depend on its
batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import Packing
from .statistics import Moments, Population, Statistics
from .transforms import transformed

if TYPE_CHECKING:
    from .meeting import Ranks

Pair = tuple[Tensor, Tensor]  # mean and variance


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
    ranks: in training, those whose rows the statistics are made of; None: this process's rows alone.
    held: sequences that have ended are counted with their last state in the statistics of a step, see `held`. Then the
        packing has a mask, x its last rows again over time, and there are neither a population nor ranks.
    """

    packing: Packing
    population: Population | None
    over_time: bool
    eps: float
    ranks: Ranks | None = None
    held: bool = False

    @property
    def whole(self) -> Packing:
        """The rows that statistics are made of: its counts, steps and batch are those of all ranks."""
        return self.packing if self.ranks is None else self.ranks.whole

    @property
    def frozen(self) -> bool:
        """Statistics are constants of the population: nothing is computed from the rows."""
        return self.population is not None and self.population.weight is None

    @property
    def counted(self) -> Tensor | None:
        """Mask [R, 1] of the rows that a step's statistics are made of; None: of all rows."""
        return None if self.held else self.packing.mask

    @property
    def counted_inputs(self) -> Tensor | None:
        """The same for statistics of W_x x, which over sequences are of valid rows alone."""
        return self.counted if self.over_time else self.packing.mask

    @property
    def rows_of_steps(self) -> Tensor:
        """[T] float64, how many rows a step's statistics are made of."""
        count = self.whole.count
        return count.sign() * self.packing.batch if self.held else count


class Call(NamedTuple):
    """One layer and direction to be computed: x [R, D]; h and c [B, H] before the first step, in the rows' order."""

    x: Tensor
    h: Tensor
    c: Tensor
    parameters: Parameters
    problem: Problem


class Ran(NamedTuple):
    """What a call gives: rows [R, H], h_n and c_n [B, H], the batch's moments (None when statistics are frozen)."""

    rows: Tensor
    h_n: Tensor
    c_n: Tensor
    moments: Statistics | None


class Used(NamedTuple):
    """Statistics that normalise the rows of all steps, each [T, C] or [1, C]."""

    mean: Tensor  # relative to what z_x holds: of W_x (x − x̄) in training, of W_x x where statistics are constants
    rstd: Tensor  # 1/√(var + ε)
    x_mean: Tensor | None  # x̄ [T, D] or [1, D]; None where statistics are constants
    pull: Tensor | None  # [T, C] batch's own mean − mean used; None where there are no phantom rows


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


def _moments_of_any_rows(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of rows [n, C], zeros where there are none."""
    return moments_of_rows(z)[:2] if len(z) else (z.new_zeros(z.shape[1]),) * 2


def _fill_seats(gap: Tensor, var: Tensor, population_var: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What phantom rows take off the batch's mean, and the variance of its rows and phantom rows together.

    gap: the batch's mean − the population's. `weight` is the batch's share of the rows; at 1 both are exact.
    """
    mixed = weight * var + (1 - weight) * population_var + weight * (1 - weight) * gap.square()
    return (1 - weight) * gap, mixed


def with_phantom_rows(own: Pair, population: Pair, weight: Tensor) -> Pair:
    """Mean and variance of the batch's rows and the phantom rows together, from those of each."""
    pull, var = _fill_seats(own[0] - population[0], own[1], population[1], weight)
    return own[0] - pull, var


def input_mean(x: Tensor, problem: Problem) -> Tensor:
    """x̄ in the accumulation dtype: mean of each step's valid rows [T, D], or [1, D] over sequences.

    Any constant near the mean would do: results do not depend on it but for rounding, so it has no gradient.
    """
    packing, wide, mask = problem.packing, accumulation_dtype(x.dtype), problem.counted_inputs
    x, count = x.detach(), (problem.rows_of_steps if problem.over_time else problem.whole.count).to(wide)
    if problem.ranks is not None:
        total = torch.stack([part.sum(0, dtype=wide) for part in x.split(packing.sizes)])
        total = problem.ranks.sum_in_order(total)
        return total / count[:, None] if problem.over_time else (total.sum(0) / count.sum())[None]
    if mask is not None:
        x = torch.where(mask, x, 0)
    if not problem.over_time:
        return (x.sum(0, dtype=wide) / count.sum())[None]
    if packing.sizes[-1] == packing.batch:
        total = x.unflatten(0, (-1, packing.batch)).sum(1, dtype=wide)
    else:
        total = torch.stack([part.sum(0, dtype=wide) for part in x.split(packing.sizes)])
    return total / count.clamp_min(1)[:, None]


def centre(x: Tensor, mean: Tensor, packing: Packing, first: int = 0, last: int | None = None) -> Tensor:
    """X − x̄ for the rows x [.., D] of steps [first, last), rounded to x's dtype; mean [T, D] or [1, D]."""
    if mean.shape[0] == 1:
        return (x - mean).to(x.dtype)
    sizes, mean = packing.sizes[first:last], mean[first:last]
    if sizes[0] == sizes[-1]:
        return (x.unflatten(0, (len(sizes), sizes[0])) - mean[:, None]).to(x.dtype).flatten(0, 1)
    held = packing.count[first:last].long()
    return (x - mean.repeat_interleave(held, 0, output_size=x.shape[0])).to(x.dtype)


def _input_moments(z: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Moments of z_x [R, C] in all steps at once: [T, C], or [1, C] over sequences."""
    packing, mask = problem.packing, problem.counted_inputs
    count = packing.count.to(z.dtype)
    if problem.ranks is not None:
        found = [_moments_of_any_rows(part) for part in (z.split(packing.sizes) if problem.over_time else [z])]
        return problem.ranks.merge_steps(*(torch.stack(moments) for moments in zip(*found, strict=True)))
    if not problem.over_time:
        mean, var, _ = moments_of_rows(z) if mask is None else _moments_of_valid_rows(z, mask, count.sum())
        return mean[None], var[None]
    by_step = (-1, packing.batch, z.shape[1])
    if mask is not None:
        mask, count = mask.view(-1, packing.batch, 1), count.clamp_min(1)[:, None]
        mean, var, _ = _moments_of_valid_rows(z.view(by_step), mask, count)
        return mean, var
    if _one_step_at_a_time(z, packing):
        parts = [moments_of_rows(part) for part in z.split(packing.sizes)]
        return torch.stack([mean for mean, _, _ in parts]), torch.stack([var for _, var, _ in parts])
    mean, var, _ = moments_of_rows(z.view(by_step).transpose(0, 1))
    return mean, var


def _one_step_at_a_time(z: Tensor, packing: Packing) -> bool:
    """Steps differ in their number of rows; or z is on a CPU, where a step's rows stay in the cache between the passes
    over them, so that it takes half the time of all steps at once.
    """
    return packing.sizes[-1] != packing.batch or z.device.type == "cpu"


def _use_input_statistics(
    z: Tensor, x_mean: Tensor | None, weight_ih: Tensor, problem: Problem
) -> tuple[Used, Moments | None]:
    """Statistics of the input norm for all steps, and the batch's own moments of W_x x (None when frozen).

    z: W_x (x − x̄), or W_x x when frozen, where x_mean is None.
    """
    population = problem.population
    if x_mean is None:
        mean, var = cast(Population, population).ih
        return Used(mean, (var + problem.eps).rsqrt(), None, None), None
    mean, var = _input_moments(z, problem)
    # W_x x̄ may be large and its distance from the population small. It is one row per step, so float64 costs little,
    # and neither autocast nor TF32 rounds it.
    offset = F.linear(x_mean.double(), weight_ih.double())
    if problem.ranks is not None:
        offset = problem.ranks.of_first(offset)
    own_count = problem.rows_of_steps if problem.over_time else problem.whole.count.sum(0, keepdim=True)
    own = Moments((mean + offset).to(z.dtype).detach(), var.detach(), own_count)
    pull = None
    if population is not None and problem.over_time:
        weight = cast(Tensor, population.weight).to(z.dtype)[:, None]
        gap = (mean + (offset - population.ih[0])).to(z.dtype)
        pull, var = _fill_seats(gap, var, population.ih[1], weight)
        mean = mean - pull
    return Used(mean, (var + problem.eps).rsqrt(), x_mean, pull), own


def project_input(
    x: Tensor, weight_ih: Tensor, problem: Problem, dtype: torch.dtype
) -> tuple[Tensor, Used, Moments | None]:
    """z_x of all rows [R, 4H] in the accumulation dtype, the statistics that normalise it, and the batch's moments.

    dtype: of the product.
    """
    x_mean = None if problem.frozen else input_mean(x, problem)
    if x_mean is not None:
        x = centre(x, x_mean, problem.packing)
        if problem.counted_inputs is not None:
            x = torch.where(problem.counted_inputs, x, 0)  # −x̄ is finite, W_x x̄ need not be
    z_x = F.linear(x.to(dtype), weight_ih.to(dtype)).to(accumulation_dtype(dtype))
    return z_x, *_use_input_statistics(z_x, x_mean, weight_ih, problem)


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
        ranks = self.problem.ranks
        if ranks is not None:
            mean, var = ranks.merge_step(t, *_moments_of_any_rows(z))
            deviation = z - mean
        else:
            own = moments_of_rows(z) if mask is None else _moments_of_valid_rows(z, mask, self.count[t])
            mean, var, deviation = own
        self.means.append(mean)
        self.vars.append(var)
        if mask is not None or self.problem.whole.sizes[t] < self.problem.whole.batch:
            population_mean, population_var = self.population[t]
            pull, var = _fill_seats(mean - population_mean, var, population_var, self.weight[t])
            deviation = z - (mean - pull)
        return deviation, (var + eps).rsqrt()

    def moments(self) -> Moments:
        """The batch's own moments, [T, C]."""
        return Moments(torch.stack(self.means).detach(), torch.stack(self.vars).detach(), self.problem.rows_of_steps)


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
        output rows [R, H], beyond a sequence's end 0 (held: h as it stays, which a step's statistics are made of); h_n
        and c_n [B, H], each sequence's at its own last step; the batch's moments (None when statistics are frozen);
        z_x [R, 4H] and the statistics that normalise it.
    """
    weight_ih, weight_hh, bias, gamma_ih, gamma_hh, gamma_c, beta_c = parameters
    packing, population = problem.packing, problem.population
    wide = accumulation_dtype(weight_hh.dtype)

    z_x, used, own_ih = project_input(x, weight_ih, problem, weight_hh.dtype)
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
    plain = transformed()  # vmap cannot write what is batched into what is not
    add_product = Tensor.addcmul if plain else Tensor.addcmul_
    if masks is None and not torch.is_grad_enabled() and not plain:
        rows = h.new_empty(x.shape[0], h.shape[1], dtype=weight_hh.dtype)
        places = rows.split(packing.sizes)
    for t, (n, z_t) in enumerate(zip(packing.sizes, z_x.split(packing.sizes), strict=True)):
        if n < h.shape[0]:
            finished_h.append(h[n:])
            finished_c.append(c[n:])
            h, c = h[:n], c[:n]
        mask = None if masks is None else masks[t]
        counted = None if problem.held else mask

        deviation, rstd = norm_hh(t, F.linear(h, weight_hh).to(wide), counted)
        a = add_product(torch.addcmul(shifts[t], z_t, scales[t]), deviation, gamma_hh * rstd)  # [n, 4H]
        i, f, g, o, c_new = update_cell(a, c)
        if norm_c is None:
            c_deviation = c_rstd = None
            squashed = c_new.tanh()
        else:
            assert gamma_c is not None
            assert beta_c is not None
            c_seen = torch.where(mask, c_new, c) if problem.held and mask is not None else c_new
            c_deviation, c_rstd = norm_c(t, c_seen, counted)
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
            outputs.append(h if problem.held else torch.where(mask, h_new, 0))

    h_n, c_n = torch.cat([h, *reversed(finished_h)]), torch.cat([c, *reversed(finished_c)])
    moments = None
    if own_ih is not None:
        seats = packing.count.new_full((), problem.whole.batch)  # a tensor made from a number would wait for the device
        moments = Statistics(own_ih, norm_hh.moments(), None if norm_c is None else norm_c.moments(), seats)
    return torch.cat(outputs) if places is None else rows, h_n, c_n, moments, z_x, used
