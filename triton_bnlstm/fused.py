"""One layer, both directions, on the Triton kernels; their backward is that of `bptt`, on what the kernels leave.

The kernels keep h and c of all rows and the moments of all steps. Gates and pre-activations are made again from these
when the backward wants them.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from . import bptt, reference
from .kernels import launch
from .kernels.launch import CellNorm, Rows
from .packing import Packing
from .reference import Call, Pair, Parameters, Problem, Ran, Saved, Used
from .statistics import Moments, Population, Statistics, pool


def _stack(tensors: list[Tensor]) -> Tensor:
    """One tensor for both directions; no copy where there is one direction."""
    return (tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)).contiguous()


def _rows(packing: Packing) -> Rows:
    return Rows(packing.first_rows, packing.valid_rows, len(packing.sizes), sum(packing.sizes), packing.batch)


def _float(parameters: list[Parameters], name: str) -> Tensor:
    """A parameter of all directions, float32 [dirs, ·]."""
    return _stack([getattr(p, name).float() for p in parameters])


def _states(first: list[Tensor], rows: Rows, dtype: torch.dtype, masked: bool) -> Tensor:
    """[dirs, B + R, H]: the initial states, and behind them place for those of all rows."""
    hidden, device = first[0].shape[1], first[0].device
    states = launch.empty(len(first), rows.batch + rows.rows, hidden, dtype=dtype, device=device)
    if masked:  # rows that are not live are seen by the caller, as zeros
        states.zero_()
    for direction, state in enumerate(first):
        states[direction, : rows.batch].copy_(state)
    return states


def _populations(problems: list[Problem], norm: str) -> Tensor:
    """Mean and variance that one norm takes from the population, [2, dirs, T, C] float32."""
    found = [getattr(problem.population, norm) for problem in problems]
    return torch.stack([_stack([f[k] for f in found]) for k in range(2)])


def _cell_affine(parameters: list[Parameters]) -> Tensor:
    """γ_c and β_c, [2, dirs, H] float32."""
    return torch.stack([_float(parameters, "gamma_c"), _float(parameters, "beta_c")])


def _project(x: Tensor, parameters: list[Parameters]) -> Tensor:
    """W_ih x of all rows, [dirs, R, D] → [dirs, R, 4H]."""
    columns = parameters[0].weight_ih.shape[0]
    z = launch.empty(x.shape[0], x.shape[1], columns, dtype=x.dtype, device=x.device)
    for direction, p in enumerate(parameters):
        torch.mm(x[direction], p.weight_ih.t(), out=z[direction])
    return z


def _product_of_means(mean: Tensor, parameters: list[Parameters]) -> Tensor:
    """W_ih · mean, [dirs, T, D] float32 → [dirs, T, 4H] float32, whose precision no switch of torch's lowers.

    It is one row per step, so it may cost three products: each factor is split into its first 11 bits, whose products
    TF32 knows exactly, and the rest; rest times rest is left out, 2⁻²² of the whole.
    """

    def split(s: Tensor) -> tuple[Tensor, Tensor]:
        high = (s.view(torch.int32) & ~0x1FFF).view(torch.float32)
        return high, s - high

    weight = _float(parameters, "weight_ih").mT.contiguous()  # [dirs, D, 4H]
    mean_high, mean_low = split(mean.contiguous())
    if mean.shape[2] == 1:
        return mean * weight
    weight_high, weight_low = split(weight)
    product = torch.bmm(mean_high, weight_high) + torch.bmm(mean_low, weight_high)
    if parameters[0].weight_ih.dtype == torch.float32:  # half precisions have no low part
        product += torch.bmm(mean_high, weight_low)
    return product


def _train_input(
    x: Tensor, parameters: list[Parameters], problems: list[Problem], rows: Rows
) -> tuple[Tensor, tuple[Tensor, Tensor], list[Moments]]:
    """What the recurrence takes of the input x [dirs, R, D]: itself, scale and shift; and the moments of W_ih x.

    x's mean over each step's rows is taken off first (the module page of `reference` says why), also where statistics
    are those of whole sequences: it comes back with the step's shift.
    """
    problem = problems[0]
    narrow = x.shape[2] == 1
    centred = launch.empty(*x.shape, dtype=torch.float32 if narrow else x.dtype, device=x.device)
    x_mean, _ = launch.moments(x, rows, centred)  # [dirs, T, D]
    if narrow:  # W_ih x is x times a column: its moments are known, and it need not exist
        column = _float(parameters, "weight_ih").mT  # [dirs, 1, 4H]
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
    offset = _product_of_means(x_mean - middle, parameters)
    large = torch.bmm(middle.double(), _stack([p.weight_ih for p in parameters]).double().mT)
    if problem.over_time:
        own = [Moments(m, v, count) for m, v in zip((mean + offset + large).float(), var, strict=True)]
        relative = mean
        if problem.population is not None:
            share = _shares(problems)[:, :, None]
            population_mean, population_var = _populations(problems, "ih")
            gap = mean + offset + (large - population_mean).float()
            relative = mean - (1 - share) * gap
            var = share * var + (1 - share) * population_var + share * (1 - share) * gap.square()
    else:
        pooled = [pool(Moments(m, v, count)) for m, v in zip(mean + offset, var, strict=True)]
        own = [m._replace(mean=(m.mean + o).float()) for m, o in zip(pooled, large, strict=True)]
        var = _stack([m.var for m in pooled])
        relative = _stack([m.mean for m in pooled]) - offset

    scale = _float(parameters, "gamma_ih")[:, None] * (var + problem.eps).rsqrt()
    shift = _with_bias(parameters, -relative * scale).expand(-1, rows.steps, -1)
    if narrow:
        scale = scale * column
    return x, (scale.expand_as(shift).contiguous(), shift.contiguous()), own


def _shares(problems: list[Problem]) -> Tensor:
    """n/(n+κ) of every step, [dirs, T] float32."""
    return _stack([cast(Tensor, cast(Population, p.population).weight) for p in problems]).float()


def _last_states(states: Tensor, packing: Packing) -> list[Tensor]:
    """Each sequence's state after its own last step, [dirs, B + R, H] → [B, H] per direction."""
    if packing.equal:
        return [state[-packing.batch :].clone() for state in states]
    last = packing.first_rows[packing.lengths] + torch.arange(packing.batch, device=states.device)
    return [state.index_select(0, last) for state in states]


class _Trained(NamedTuple):
    """What the kernels give for one layer in training: h and c [dirs, B + R, H] and each direction's moments."""

    h: Tensor
    c: Tensor
    moments: list[Statistics]


def _train(calls: list[Call]) -> _Trained:
    problems, parameters = [call.problem for call in calls], [call.parameters for call in calls]
    packing, eps = problems[0].packing, problems[0].eps
    rows = _rows(packing)
    x, terms, own_ih = _train_input(_stack([call.x for call in calls]), parameters, problems, rows)
    masked = packing.mask is not None
    h = _states([call.h for call in calls], rows, parameters[0].weight_hh.dtype, masked)
    c = _states([call.c for call in calls], rows, torch.float32, masked)
    seats = problems[0].population is not None
    cell = None
    if parameters[0].gamma_c is not None:
        cell = CellNorm(_cell_affine(parameters), _populations(problems, "c") if seats else None)
    own_hh, own_c = launch.train(
        h,
        c,
        _stack([p.weight_hh for p in parameters]),
        x,
        terms,
        _float(parameters, "gamma_hh"),
        rows,
        eps,
        _populations(problems, "hh") if seats else None,
        _shares(problems) if seats else None,
        cell,
    )
    count = packing.count
    batch = count.new_full((), packing.batch)
    moments = []
    for direction, ih in enumerate(own_ih):
        hh = Moments(own_hh[0, direction], own_hh[1, direction], count)
        of_c = None if own_c is None else Moments(own_c[0, direction], own_c[1, direction], count)
        moments.append(Statistics(ih, hh, of_c, batch))
    return _Trained(h, c, moments)


def _infer(calls: list[Call], keep_cells: bool) -> tuple[Tensor, Tensor]:
    """H [dirs, B + R, H]; c likewise with keep_cells, else the last one, [dirs, B, H]."""
    problems, parameters = [call.problem for call in calls], [call.parameters for call in calls]
    packing, eps = problems[0].packing, problems[0].eps
    rows = _rows(packing)
    x = _stack([call.x for call in calls])
    if x.shape[2] == 1:
        x = x[:, :, 0].float()
        column = _float(parameters, "weight_ih").mT
    else:
        x, column = _project(x, parameters), None
    mean_ih, var_ih = _populations(problems, "ih")
    mean_hh, var_hh = _populations(problems, "hh")
    scale = _float(parameters, "gamma_ih")[:, None] * (var_ih + eps).rsqrt()
    scale_hh = _float(parameters, "gamma_hh")[:, None] * (var_hh + eps).rsqrt()
    shift = _with_bias(parameters, -mean_ih * scale - mean_hh * scale_hh)
    if column is not None:
        scale = scale * column
    affine_c = None
    if parameters[0].gamma_c is not None:
        mean_c, var_c = _populations(problems, "c")
        gamma_c, beta_c = _cell_affine(parameters)
        scale_c = gamma_c[:, None] * (var_c + eps).rsqrt()
        affine_c = torch.stack([scale_c, beta_c[:, None] - mean_c * scale_c])
    masked = packing.mask is not None
    h = _states([call.h for call in calls], rows, parameters[0].weight_hh.dtype, masked)
    if keep_cells:
        c = _states([call.c for call in calls], rows, torch.float32, masked)
    else:
        c = _stack([call.c for call in calls]).clone()
    terms = (scale.expand_as(shift).contiguous(), scale_hh.contiguous(), shift.contiguous())
    launch.infer(h, c, _stack([p.weight_hh for p in parameters]), x.contiguous(), terms, rows, affine_c)
    return h, c


def _with_bias(parameters: list[Parameters], shift: Tensor) -> Tensor:
    """Shift [dirs, ·, 4H] and the bias."""
    return shift if parameters[0].bias is None else shift + _float(parameters, "bias")[:, None]


def _gates_again(
    call: Call, rows: Tensor, cells: Tensor, own_hh: Pair | None, own_c: Pair | None
) -> tuple[Tensor, Used, list[Saved]]:
    """Gates and deviations of all rows, made from their states: z_x, its statistics, and each step's `Saved`.

    rows: h of all rows [R, H]. cells: c_0 and c of all rows [B + R, H]. own_hh, own_c: the batch's moments of both
    norms of the recurrence, None when frozen.
    """
    p, problem, packing = call.parameters, call.problem, call.problem.packing
    z_x, used, _ = reference.project_input(call.x, p.weight_ih, problem)
    norm_hh = _Recorded(problem, own_hh, "hh")
    norm_c = None if p.gamma_c is None else _Recorded(problem, own_c, "c")
    scale_x = p.gamma_ih.float() * used.rstd
    shift = -used.mean * scale_x if p.bias is None else p.bias.float() - used.mean * scale_x
    steps = len(packing.sizes)
    scale_x, shift = (s.expand(steps, -1) for s in (scale_x, shift))
    gamma_hh, weight_hh = p.gamma_hh.float(), p.weight_hh.float()
    saved, h, c = [], call.h, call.c
    parts = zip(*(s.split(packing.sizes) for s in (rows, cells[packing.batch :], z_x)), strict=True)
    for t, (h_new, c_new, z_t) in enumerate(parts):
        n = h_new.shape[0]
        deviation, rstd = norm_hh(t, F.linear(h[:n].float(), weight_hh))
        a = torch.addcmul(shift[t], z_t, scale_x[t]).addcmul_(deviation, gamma_hh * rstd)
        i, f, g, o, _ = reference.update_cell(a, c[:n])
        c_deviation, c_rstd = (None, None) if norm_c is None else norm_c(t, c_new)
        saved.append(Saved(deviation, rstd, i, f, g, o, c_new, c_deviation, c_rstd))
        h, c = h_new, c_new
    return z_x, used, saved


class _Recorded:
    """A norm of the recurrence with the moments that the kernels recorded."""

    def __init__(self, problem: Problem, own: Pair | None, norm: str) -> None:
        population = problem.population
        mean, var = getattr(population, norm) if own is None else own
        if own is not None and population is not None:
            share = cast(Tensor, population.weight).float()[:, None]
            mean, var = reference.with_phantom_rows((mean, var), getattr(population, norm), share)
        self.mean, self.rstd = mean, (var + problem.eps).rsqrt()

    def __call__(self, t: int, z: Tensor) -> tuple[Tensor, Tensor]:
        return z - self.mean[t], self.rstd[t]


def _results(h: Tensor, h_n: list[Tensor], c_n: list[Tensor], packing: Packing) -> list[Tensor]:
    """Rows [R, H], h_n and c_n [B, H] of each direction."""
    results = []
    for direction in range(h.shape[0]):
        rows = h[direction, packing.batch :]
        # The same memory as a tensor of its own: autograd refuses in-place operations on views made in a Function.
        rows = h.new_empty(0).set_(h.untyped_storage(), rows.storage_offset(), rows.shape, rows.stride())
        results += [rows, h_n[direction], c_n[direction]]
    return results


_INPUTS, _OUTPUTS = 3 + len(Parameters._fields), 3  # of a direction


def _calls_of(inputs: tuple[Any, ...], problems: list[Problem]) -> list[Call]:
    calls = []
    for direction, problem in enumerate(problems):
        x, h, c, *parameters = inputs[direction * _INPUTS : (direction + 1) * _INPUTS]
        calls.append(Call(x, h, c, Parameters(*parameters), problem))
    return calls


class _Layer(torch.autograd.Function):
    """The kernels' forward and the backward of `bptt`. Inputs of each direction: x, h_0, c_0 and seven parameters."""

    @staticmethod
    def forward(ctx: Any, problems: list[Problem], found: list[Statistics], *inputs: Any) -> tuple[Tensor, ...]:
        calls = _calls_of(inputs, problems)
        packing = problems[0].packing
        if problems[0].frozen:
            h, c = _infer(calls, keep_cells=True)
        else:
            h, c, moments = _train(calls)
            found += moments
        results = _results(h, _last_states(h, packing), _last_states(c, packing), packing)
        ctx.problems = problems
        of_norms = [s for m in found for norm in (m.hh, m.c) if norm is not None for s in (norm.mean, norm.var)]
        ctx.save_for_backward(*inputs, *results[::_OUTPUTS], c, *of_norms)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        tensors: tuple[Any, ...] = ctx.saved_tensors
        problems: list[Problem] = ctx.problems
        places = iter(tensors)
        inputs = tuple(islice(places, len(problems) * _INPUTS))
        outputs = tuple(islice(places, len(problems)))
        cells = next(places)
        found: list[Tensor | None] = []
        with torch.autocast(cells.device.type, enabled=False):  # as the forward
            for direction, call in enumerate(_calls_of(inputs, problems)):
                own = slice(direction * _INPUTS, (direction + 1) * _INPUTS)
                needed = ctx.needs_input_grad[2:][own]
                wanted = gradients[direction * _OUTPUTS : (direction + 1) * _OUTPUTS]
                own_hh = own_c = None
                if not call.problem.frozen:
                    own_hh = next(places), next(places)
                    own_c = None if call.parameters.gamma_c is None else (next(places), next(places))
                if not any(needed):
                    found += [None] * _INPUTS
                    continue
                if torch.is_grad_enabled():
                    found += bptt.differentiable_backward(inputs[own], call.problem, wanted, needed)
                    continue
                z_x, used, saved = _gates_again(call, outputs[direction], cells[direction], own_hh, own_c)
                result = outputs[direction], z_x, used
                d_x, d_h, d_c, d_parameters = bptt.backward(*call, result, saved, wanted, needed[0])
                found += [d_x, d_h, d_c, *d_parameters]
        return None, None, *found


def layer(calls: list[Call]) -> list[Ran]:
    """All directions of one layer; they share their packing and options. `bptt.layer` tells what each gives.

    Raises:
        KernelError: a kernel cannot run here; nothing has changed.
    """
    dtypes = [call.c.dtype for call in calls]
    calls = [call._replace(c=call.c.float()) for call in calls]
    problems = [call.problem for call in calls]
    inputs = [s for call in calls for s in (call.x, call.h, call.c, *call.parameters)]
    moments: list[Statistics] = []
    with torch.autocast(calls[0].x.device.type, enabled=False):
        if torch.is_grad_enabled() and any(s is not None and s.requires_grad for s in inputs):
            results = cast(tuple[Tensor, ...], _Layer.apply(problems, moments, *inputs))
        elif problems[0].frozen:
            with torch.no_grad():
                h, c_n = _infer(calls, keep_cells=False)
                packing = problems[0].packing
                results = tuple(_results(h, _last_states(h, packing), [c.clone() for c in c_n], packing))
        else:
            with torch.no_grad():
                h, c, moments = _train(calls)
                packing = problems[0].packing
                results = tuple(_results(h, _last_states(h, packing), _last_states(c, packing), packing))
    ran = []
    for direction in range(len(calls)):
        rows, h_n, c_n = results[direction * _OUTPUTS : (direction + 1) * _OUTPUTS]
        ran.append(Ran(rows, h_n, c_n.to(dtypes[direction]), moments[direction] if moments else None))
    return ran
