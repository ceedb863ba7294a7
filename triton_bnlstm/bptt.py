"""Backpropagation through time, written by hand in plain PyTorch operations.

Autograd's record of `reference.forward` is right but slow: a node for every operation of every step, and one GEMM and
one addition per step for each weight's gradient. `layer` runs the same forward, keeps only what this backward reads,
and forms weight gradients in a few large GEMMs. When a gradient of a gradient is asked for, the hand-written backward
steps aside and `reference.forward` itself is differentiated.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from . import reference
from .reference import Parameters, Problem, Saved, Used, accumulation_dtype
from .statistics import Statistics

# Rows whose pre-activation gradients are held at once: enough for an efficient weight-gradient GEMM, few enough for
# them to stay in a CPU's cache.
_BLOCK_ROWS = 512

_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input  # (gradient, sigmoid's output, grad_input=)
_tanh_backward = torch.ops.aten.tanh_backward.grad_input


def _norm_backward(
    dy: Tensor,
    deviation: Tensor,
    scale: Tensor,
    rstd: Tensor,
    inverse: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    sum_dy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Backward of y = γ·ẑ over rows: writes the gradient of z to `out` and returns the sums Σdy and Σdy·ẑ.

    dz = scale · (dy − Σdy/(n+κ) − ẑ·Σ(dy·ẑ)/(n+κ)), with ẑ = deviation·rstd and scale = γ·rstd.
    dy, deviation, out [n, C]; scale, rstd, sum_dy [C]; inverse is 1/(n+κ), or None for statistics that are constants.
    dy is zero in rows that mask [n, 1] leaves out.
    """
    if sum_dy is None:
        sum_dy = dy.sum(0)
    sum_dy_z = (dy * deviation).sum(0) * rstd
    if inverse is None:
        torch.mul(dy, scale, out=out)
        return sum_dy, sum_dy_z
    shared = scale * inverse
    torch.addcmul(-shared * sum_dy, deviation, -shared * rstd * sum_dy_z, out=out).addcmul_(dy, scale)
    if mask is not None:
        out.mul_(mask)
    return sum_dy, sum_dy_z


def _inverse_counts(problem: Problem, dtype: torch.dtype) -> list[Tensor | None]:
    """1/(n_t + κ_t) per step."""
    if problem.frozen:
        return [None] * len(problem.packing.sizes)
    inverse = problem.packing.count.clamp_min(1).reciprocal()
    if problem.population is not None:
        inverse = inverse * cast(Tensor, problem.population.weight)
    return list(inverse.to(dtype).unbind())


def _blocks(sizes: tuple[int, ...], rows: int) -> list[tuple[int, int]]:
    """Steps [first, last) that hold about `rows` rows each, latest first."""
    blocks, held, last = [], 0, len(sizes)
    for t in reversed(range(last)):
        held += sizes[t]
        if held >= rows or t == 0:
            blocks.append((t, last))
            held, last = 0, t
    return blocks


def _backward(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    parameters: Parameters,
    problem: Problem,
    result: tuple[Tensor, Tensor, Used],
    saved: list[Saved],
    gradients: tuple[Tensor, Tensor, Tensor],
    x_needs_gradient: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Parameters]:
    """Gradients of x, h_0, c_0 and the parameters.

    result: output rows [R, H], W_x x [R, 4H] and the statistics that normalised it.
    gradients: of output rows, h_n, c_n.
    """
    packing, sizes = problem.packing, problem.packing.sizes
    p = parameters
    dtype, wide = p.weight_hh.dtype, accumulation_dtype(p.weight_hh.dtype)
    hidden = p.weight_hh.shape[1]
    rows, z_x, used = result
    steps = len(sizes)
    gamma_ih, gamma_hh = p.gamma_ih.to(wide), p.gamma_hh.to(wide)
    gamma_c, beta_c = (None if s is None else s.to(wide) for s in (p.gamma_c, p.beta_c))
    inverses = _inverse_counts(problem, wide)
    masks = None if packing.mask is None else packing.mask.split(sizes)
    mean_x, rstd_x, scale_x = (s.expand(steps, -1).unbind() for s in (used.mean, used.rstd, gamma_ih * used.rstd))
    h_rows, z_x_rows, d_rows = rows.split(sizes), z_x.split(sizes), gradients[0].to(wide).split(sizes)

    d_weight_ih, d_weight_hh = (torch.zeros_like(w, dtype=wide) for w in (p.weight_ih, p.weight_hh))
    d_bias, d_gamma_ih, d_gamma_hh = (torch.zeros_like(gamma_hh) for _ in range(3))
    d_gamma_c, d_beta_c = (torch.zeros(hidden, dtype=wide, device=x.device) for _ in range(2))
    d_x = torch.empty_like(x) if x_needs_gradient else None
    # Statistics over whole sequences need the gradients of all rows before they can give that of any row.
    by_sequence = not problem.over_time and not problem.frozen

    blocks = _blocks(sizes, x.shape[0] if by_sequence else _BLOCK_ROWS)
    most = max(sum(sizes[first:last]) for first, last in blocks)
    gates_of_block, d_z_of_block, d_z_x_of_block = (x.new_empty(most, 4 * hidden, dtype=wide) for _ in range(3))

    d_h_n, d_c_n = gradients[1].to(wide), gradients[2]
    d_h, d_c = d_h_n[:0], d_c_n[:0]
    end = x.shape[0]
    for first, last in blocks:
        held = sum(sizes[first:last])
        begin = end - held
        d_a_block, d_z_block, d_z_x_block = (s[:held] for s in (gates_of_block, d_z_of_block, d_z_x_of_block))
        d_as, d_zs, d_zs_x = (s.split(sizes[first:last]) for s in (d_a_block, d_z_block, d_z_x_block))
        for t in reversed(range(first, last)):
            n, step, inverse = sizes[t], saved[t], inverses[t]
            mask = None if masks is None else masks[t]
            if n > d_h.shape[0]:  # sequences whose last step this is
                d_h = torch.cat([d_h, d_h_n[d_h.shape[0] : n]])
                d_c = torch.cat([d_c, d_c_n[d_c.shape[0] : n]])
            i, f, g, o = step.gate_i, step.gate_f, step.gate_g, step.gate_o
            c_before = saved[t - 1].c[:n] if t > 0 else c_0
            d_h_new, d_c_new = d_h + d_rows[t], d_c
            if mask is not None:
                d_h_new, d_c_new = d_h_new * mask, d_c * mask

            d_squashed = d_h_new * o
            if gamma_c is None or beta_c is None:
                squashed = step.c.tanh()
                d_c_new = d_c_new + _tanh_backward(d_squashed, squashed, grad_input=d_squashed)
            else:
                deviation, rstd = cast(Tensor, step.c_deviation), cast(Tensor, step.c_rstd)
                scale = gamma_c * rstd
                squashed = torch.addcmul(beta_c, deviation, scale).tanh()
                dy = _tanh_backward(d_squashed, squashed, grad_input=d_squashed)
                d_normed = torch.empty_like(dy)
                sum_dy, sum_dy_z = _norm_backward(dy, deviation, scale, rstd, inverse, mask, d_normed)
                d_beta_c += sum_dy
                d_gamma_c += sum_dy_z
                d_c_new = d_c_new + d_normed

            d_a = d_as[t - first]  # [n, 4H]
            d_i, d_f, d_g, d_o = d_a.chunk(4, 1)
            _sigmoid_backward(d_c_new * g, i, grad_input=d_i)
            _sigmoid_backward(d_c_new * c_before, f, grad_input=d_f)
            _tanh_backward(d_c_new * i, g, grad_input=d_g)
            _sigmoid_backward(d_h_new * squashed, o, grad_input=d_o)

            d_z = d_zs[t - first]
            scale = gamma_hh * step.rstd
            sum_da, sum_da_z = _norm_backward(d_a, step.deviation, scale, step.rstd, inverse, mask, d_z)
            d_bias += sum_da
            d_gamma_hh += sum_da_z
            if not by_sequence:
                deviation, d_z_x = z_x_rows[t] - mean_x[t], d_zs_x[t - first]
                _, sum_da_z = _norm_backward(d_a, deviation, scale_x[t], rstd_x[t], inverse, mask, d_z_x, sum_da)
                d_gamma_ih += sum_da_z

            d_h_old, d_c_old = (d_z.to(dtype) @ p.weight_hh).to(wide), d_c_new * f
            if mask is not None:  # a finished row's state passes through
                d_h_old, d_c_old = torch.where(mask, d_h_old, d_h), torch.where(mask, d_c_old, d_c)
            d_h, d_c = d_h_old, d_c_old

        if by_sequence:
            inverse = packing.count.sum().reciprocal().to(wide)
            _, d_gamma_ih = _norm_backward(
                d_a_block, z_x - used.mean, scale_x[0], rstd_x[0], inverse, packing.mask, d_z_x_block, d_bias
            )
        h_before = [h_rows[t - 1][: sizes[t]] if t > 0 else h_0 for t in range(first, last)]
        d_weight_hh += d_z_block.to(dtype).t() @ torch.cat(h_before)
        d_weight_ih += d_z_x_block.to(dtype).t() @ x[begin:end]
        if d_x is not None:
            torch.mm(d_z_x_block.to(dtype), p.weight_ih, out=d_x[begin:end])
        end = begin

    d_parameters = Parameters(
        d_weight_ih.to(dtype),
        d_weight_hh.to(dtype),
        None if p.bias is None else d_bias.to(dtype),
        d_gamma_ih.to(dtype),
        d_gamma_hh.to(dtype),
        None if gamma_c is None else d_gamma_c.to(dtype),
        None if gamma_c is None else d_beta_c.to(dtype),
    )
    return d_x, d_h.to(h_0.dtype), d_c, d_parameters


class _Layer(torch.autograd.Function):
    """`reference.forward` with the backward above; inputs are x, h_0, c_0 and the seven parameters."""

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, moments: list[Statistics | None], *inputs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        saved: list[Saved] = []
        x, h, c, *parameters = inputs
        rows, h_n, c_n, own, z_x, used = reference.forward(x, h, c, Parameters(*parameters), problem, saved)
        moments.append(own)
        flat = [tensor for step in saved for tensor in step]
        ctx.problem = problem
        ctx.save_for_backward(*inputs, rows, z_x, *used, *flat)
        return rows, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        tensors: tuple[Any, ...] = ctx.saved_tensors
        inputs, results, flat = tensors[:10], tensors[10:14], tensors[14:]
        needed: tuple[bool, ...] = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            return None, None, *_differentiable_backward(inputs, ctx.problem, gradients, needed)
        rows, z_x, mean, rstd = results
        width = len(Saved._fields)
        saved = [Saved(*flat[k : k + width]) for k in range(0, len(flat), width)]
        x, h, c, *parameters = inputs
        result = rows, z_x, Used(mean, rstd)
        d_x, d_h, d_c, d_parameters = _backward(
            x, h, c, Parameters(*parameters), ctx.problem, result, saved, gradients, needed[0]
        )
        return None, None, d_x, d_h, d_c, *d_parameters


def _differentiable_backward(
    inputs: tuple[Any, ...], problem: Problem, gradients: tuple[Tensor, ...], needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """The same gradients with a graph of their own, from `reference.forward` run again."""
    # a view each, so that one tensor in two places gets its two gradients apart
    views: list[Any] = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    x, h, c, *parameters = views
    outputs = reference.forward(x, h, c, Parameters(*parameters), problem)[:3]
    wanted = [view for view, need in zip(views, needed, strict=True) if need]
    found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needed]


def layer(
    x: Tensor, h: Tensor, c: Tensor, parameters: Parameters, problem: Problem
) -> tuple[Tensor, Tensor, Tensor, Statistics | None]:
    """One layer and direction over rows: output rows [R, H], h_n and c_n [B, H], the batch's moments (None if frozen).

    Args:
        x: [R, D] input rows.
        h, c: [B, H] states before the first step, in the order of the rows.
        parameters: of this layer and direction.
        problem: rows, population and options.
    """
    c_wide = c.to(accumulation_dtype(parameters.weight_hh.dtype))
    if torch.is_grad_enabled() and any(s is not None and s.requires_grad for s in (x, h, c, *parameters)):
        holder: list[Statistics | None] = []
        rows, h_n, c_n = cast(tuple[Tensor, Tensor, Tensor], _Layer.apply(problem, holder, x, h, c_wide, *parameters))
        moments = holder[0]
    else:
        rows, h_n, c_n, moments, _, _ = reference.forward(x, h, c_wide, parameters, problem)
    return rows, h_n, c_n.to(c.dtype), moments
