"""Backpropagation through time, written by hand in plain PyTorch operations.

Autograd's record of `reference.forward` is right but slow: a node for every operation of every step, and one GEMM and
one addition per step for each weight's gradient. `layer` runs the same forward, keeps only what this backward reads,
and forms weight gradients in a few large GEMMs. When a gradient of a gradient is asked for, the hand-written backward
steps aside and `reference.forward` itself is differentiated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from . import reference
from .held import hold
from .precision import without_autocast
from .reference import Call, Parameters, Problem, Ran, Saved, Used, accumulation_dtype, centre
from .statistics import Population, Statistics
from .transforms import batched, have_tangents, transformed

if TYPE_CHECKING:
    from .meeting import Ranks

# Rows whose pre-activation gradients are held at once: enough for an efficient weight-gradient GEMM, few enough for
# them to stay in a CPU's cache.
_BLOCK_ROWS = 256

INPUTS = 3 + len(Parameters._fields)  # of a direction: x, h_0, c_0 and the parameters

_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input  # (gradient, sigmoid's output, grad_input=)
_tanh_backward = torch.ops.aten.tanh_backward.grad_input


class _NormBackward:
    """Backward of one batch norm y = γ·ẑ in every step: dz = γ·rstd · (dy − Σdy/(n+κ) − ẑ·Σ(dy·ẑ)/(n+κ)).

    What does not depend on dy is made for all steps before the loop, and sums over steps are taken after it.

    Args:
        gamma: [C].
        rstd: [T, C], 1/√(var + ε) of each step.
        inverse: [T], 1/(n+κ), or None for statistics that are constants.
    """

    def __init__(self, gamma: Tensor, rstd: Tensor, inverse: Tensor | None) -> None:
        self.rstd = rstd
        scale = gamma * rstd
        self.scale = scale.unbind()
        self.sum_dy, self.sum_dy_deviation = torch.empty_like(scale), torch.empty_like(scale)
        self.frozen = inverse is None
        if inverse is not None:
            shared = -scale * inverse[:, None]
            self.of_sum, self.of_product = shared.unbind(), (shared * rstd.square()).unbind()

    def sums(self, t: int, dy: Tensor, deviation: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """Σdy and Σ(dy·deviation) of step t, each [C]; kept for the gradients of parameters. Overwrites `out`."""
        sum_dy = torch.sum(dy, 0, out=self.sum_dy[t])
        torch.mul(dy, deviation, out=out)  # not yet the gradient: a place that will be written anyway
        return sum_dy, torch.sum(out, 0, out=self.sum_dy_deviation[t])

    def __call__(
        self,
        t: int,
        dy: Tensor,
        deviation: Tensor,
        mask: Tensor | None,
        out: Tensor,
        sums: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Gradient dz of step t to `out`, which is not dy; dy, deviation, out [n, C].

        dy is zero in rows that mask [n, 1] leaves out. sums: those of all ranks; None: those of these rows.
        """
        sum_dy, product = self.sums(t, dy, deviation, out) if sums is None else sums
        if self.frozen:
            torch.mul(dy, self.scale[t], out=out)
            return
        torch.addcmul(self.of_sum[t] * sum_dy, deviation, self.of_product[t] * product, out=out)
        out.addcmul_(dy, self.scale[t])
        if mask is not None:
            out.mul_(mask)

    def row_sums(self, weight: Tensor, pull: Tensor) -> Tensor:
        """Σ dz over the rows of each step, [T, C], where Σ deviation = n·pull and weight [T, 1] is n/(n+κ).

        From the formula and not from the rows: exactly zero where there are no phantom rows, as rounded rows are not.
        """
        product = weight * pull * self.rstd.square() * self.sum_dy_deviation
        return torch.stack(self.scale) * ((1 - weight) * self.sum_dy - product)

    def gamma_gradient(self) -> Tensor:
        """Σ dy·ẑ over all rows and steps, [C]."""
        return (self.sum_dy_deviation * self.rstd).sum(0)

    def shift_gradient(self) -> Tensor:
        """Σ dy over all rows and steps, [C]: the gradient of whatever is added to y."""
        return self.sum_dy.sum(0)


def _inverse_counts(problem: Problem, dtype: torch.dtype) -> Tensor | None:
    """1/(n_t + κ_t), [T]; None where statistics are constants."""
    if problem.frozen:
        return None
    inverse = problem.rows_of_steps.clamp_min(1).reciprocal()
    if problem.population is not None:
        inverse = inverse * cast(Tensor, problem.population.weight)
    return inverse.to(dtype)


def _blocks(sizes: tuple[int, ...], rows: int) -> list[tuple[int, int]]:
    """Steps [first, last) that hold about `rows` rows each, latest first."""
    blocks, held, last = [], 0, len(sizes)
    for t in reversed(range(last)):
        held += sizes[t]
        if held >= rows or t == 0:
            blocks.append((t, last))
            held, last = 0, t
    return blocks


def backward(
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

    result: output rows [R, H], z_x [R, 4H] and the statistics that normalised it.
    gradients: of output rows, h_n, c_n.

    With statistics over ranks, x, h_0 and c_0 get the gradients of all ranks' losses; of a parameter's gradient this is
    one rank's part, and the sum over the ranks is what means something.
    """
    packing, sizes, ranks = problem.packing, problem.packing.sizes, problem.ranks
    p = parameters
    dtype, wide = p.weight_hh.dtype, accumulation_dtype(p.weight_hh.dtype)
    weight_ih = p.weight_ih.to(dtype)
    rows, z_x, used = result
    steps, columns = len(sizes), p.weight_hh.shape[0]
    inverse = _inverse_counts(problem, wide)
    masks = None if packing.mask is None else packing.mask.split(sizes)
    h_rows, z_x_rows, d_rows = rows.split(sizes), z_x.split(sizes), gradients[0].to(wide).split(sizes)

    # Statistics over whole sequences need the gradients of all rows before they can give that of any row.
    by_sequence = not problem.over_time and not problem.frozen
    norm_hh = _NormBackward(p.gamma_hh.to(wide), torch.stack([step.rstd for step in saved]), inverse)
    if by_sequence:
        inverse_x = problem.whole.count.sum().reciprocal().to(wide)[None]
        norm_ih = _NormBackward(p.gamma_ih.to(wide), used.rstd, inverse_x)
    else:
        norm_ih = _NormBackward(p.gamma_ih.to(wide), used.rstd.expand(steps, -1), inverse)
        mean_x = used.mean.expand(steps, -1).unbind()
    norm_c = None
    if p.gamma_c is not None and p.beta_c is not None:
        rstd_c = torch.stack([cast(Tensor, step.c_rstd) for step in saved])
        norm_c, beta_c = _NormBackward(p.gamma_c.to(wide), rstd_c, inverse), p.beta_c.to(wide)

    d_weight_ih, d_weight_hh = (torch.zeros_like(w, dtype=wide) for w in (p.weight_ih, p.weight_hh))
    d_x = torch.empty_like(x) if x_needs_gradient else None
    blocks = [(0, steps)] if by_sequence else _blocks(sizes, _BLOCK_ROWS)
    most = max(sum(sizes[first:last]) for first, last in blocks)
    d_z_of_block, d_z_x_of_block = (x.new_empty(most, columns, dtype=wide) for _ in range(2))
    # one step's, unless all are wanted in the end: what fits into a cache is used again while it is there
    d_a_all = x.new_empty(most if by_sequence else packing.batch, columns, dtype=wide)

    d_h_n, d_c_n = gradients[1].to(wide), gradients[2]
    d_h, d_c = d_h_n[:0], d_c_n[:0]
    end = x.shape[0]
    for first, last in blocks:
        held = sum(sizes[first:last])
        begin = end - held
        d_z_block, d_z_x_block = d_z_of_block[:held], d_z_x_of_block[:held]
        d_zs, d_zs_x = (s.split(sizes[first:last]) for s in (d_z_block, d_z_x_block))
        d_as = d_a_all.split(sizes) if by_sequence else None
        for t in reversed(range(first, last)):
            n, step = sizes[t], saved[t]
            mask = None if masks is None else masks[t]
            counted, kept = (None, mask) if problem.held else (mask, None)
            if n > d_h.shape[0]:  # sequences whose last step this is
                d_h = torch.cat([d_h, d_h_n[d_h.shape[0] : n]])
                d_c = torch.cat([d_c, d_c_n[d_c.shape[0] : n]])
            i, f, g, o = step.gate_i, step.gate_f, step.gate_g, step.gate_o
            c_before = saved[t - 1].c[:n] if t > 0 else c_0
            d_h_new, d_c_new = d_h + d_rows[t], d_c
            if mask is not None:
                d_h_new, d_c_new = torch.where(mask, d_h_new, 0), torch.where(mask, d_c, 0)

            through = d_h_new * o  # gradient of tanh's output, then of its input, then of c
            if norm_c is None:
                squashed = step.c.tanh()
                _tanh_backward(through, squashed, grad_input=through)
            else:
                c_deviation = cast(Tensor, step.c_deviation)
                squashed = torch.addcmul(beta_c, c_deviation, norm_c.scale[t]).tanh()
                _tanh_backward(through, squashed, grad_input=through)
                dy, through = through, torch.empty_like(through)
                sums_c = None
                if ranks is not None:
                    (sums_c,) = ranks.sum_gradients(t, norm_c.sums(t, dy, c_deviation, through))
                norm_c(t, dy, c_deviation, counted, out=through, sums=sums_c)
            if kept is None:
                d_h_held, d_c_held, d_c_new = d_h, d_c, d_c_new + through
            else:  # what comes to a finished row here is its held state's, in which no gate had a part
                d_h_held, d_c_held = d_h + d_rows[t], d_c + through
                d_c_new = torch.where(kept, d_c_held, 0)

            d_a = d_a_all[:n] if d_as is None else d_as[t]  # [n, 4H]
            d_i, d_f, d_g, d_o = d_a.chunk(4, 1)
            _sigmoid_backward(d_c_new * g, i, grad_input=d_i)
            _sigmoid_backward(d_c_new * c_before, f, grad_input=d_f)
            _tanh_backward(d_c_new * i, g, grad_input=d_g)
            _sigmoid_backward(d_h_new * squashed, o, grad_input=d_o)

            d_z, d_z_x = d_zs[t - first], d_zs_x[t - first]
            sums_hh = sums_ih = None
            if ranks is not None:
                own_hh = norm_hh.sums(t, d_a, step.deviation, d_z)
                if by_sequence:
                    (sums_hh,) = ranks.sum_gradients(t, own_hh)
                else:  # one collective for both
                    own_ih = norm_ih.sums(t, d_a, z_x_rows[t] - mean_x[t], d_z_x)
                    sums_hh, sums_ih = ranks.sum_gradients(t, own_hh, own_ih)
            norm_hh(t, d_a, step.deviation, counted, out=d_z, sums=sums_hh)
            if not by_sequence:
                norm_ih(t, d_a, z_x_rows[t] - mean_x[t], counted, out=d_z_x, sums=sums_ih)

            d_h_old, d_c_old = (d_z.to(dtype) @ p.weight_hh).to(wide), d_c_new * f
            if mask is not None:  # a finished row's state passes through
                if kept is not None:  # and gets what statistics are told by it
                    d_h_held = d_h_held + d_h_old
                d_h_old, d_c_old = torch.where(mask, d_h_old, d_h_held), torch.where(mask, d_c_old, d_c_held)
            d_h, d_c = d_h_old, d_c_old

        if by_sequence:
            x_deviation, sums_ih = z_x - used.mean, None
            if ranks is not None:
                (sums_ih,) = ranks.sum_gradients(0, norm_ih.sums(0, d_a_all, x_deviation, d_z_x_block))
            norm_ih(0, d_a_all, x_deviation, packing.mask, out=d_z_x_block, sums=sums_ih)
        if first > 0 and sizes[first - 1] == sizes[last - 1]:
            h_before = rows[begin - sizes[first] : end - sizes[first]]
        else:
            h_before = torch.cat([h_rows[t - 1][: sizes[t]] if t > 0 else h_0 for t in range(first, last)])
        d_weight_hh += d_z_block.to(dtype).t() @ h_before
        x_block = x[begin:end]
        if used.x_mean is not None:  # made again, so that it need not be kept; rows left out have no gradient
            x_block = centre(x_block, used.x_mean, packing, first, last)
        d_weight_ih += d_z_x_block.to(dtype).t() @ x_block.to(dtype)
        if d_x is not None:
            part = torch.mm(d_z_x_block.to(dtype), weight_ih, out=d_x[begin:end] if d_x.dtype == dtype else None)
            if d_x.dtype != dtype:
                d_x[begin:end] = part
        end = begin

    if used.pull is not None:  # Σ dz ⊗ x̄; without phantom rows a step's Σ dz is zero
        weight = cast(Tensor, cast(Population, problem.population).weight).to(wide)[:, None]
        d_weight_ih.addmm_(norm_ih.row_sums(weight, used.pull).t(), cast(Tensor, used.x_mean))

    d_gammas = norm_ih.gamma_gradient(), norm_hh.gamma_gradient()
    d_cell = (None, None) if norm_c is None else (norm_c.gamma_gradient(), norm_c.shift_gradient())
    found = Parameters(d_weight_ih, d_weight_hh, norm_hh.shift_gradient(), *d_gammas, *d_cell)
    likes = zip(found, p, strict=True)
    d_parameters = Parameters(*cast(Any, (None if d is None or s is None else d.to(s.dtype) for d, s in likes)))
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
        needed: tuple[bool, ...] = ctx.needs_input_grad[2:]
        with without_autocast(gradients[0]):  # as the forward
            if torch.is_grad_enabled() or any(batched(gradient) for gradient in gradients):
                return None, None, *differentiable_backward(tensors[:INPUTS], ctx.problem, gradients, needed)
            return None, None, *_backward_of_saved(tensors, ctx.problem, gradients, needed[0])


def _backward_of_saved(
    tensors: tuple[Any, ...], problem: Problem, gradients: tuple[Any, ...], x_needs_gradient: bool
) -> tuple[Tensor | None, ...]:
    """`backward` of what `_Layer` has saved."""
    (x, h, c, *parameters), results, flat = tensors[:INPUTS], tensors[INPUTS : INPUTS + 6], tensors[INPUTS + 6 :]
    rows, z_x, *used = results
    width = len(Saved._fields)
    saved = [Saved(*flat[k : k + width]) for k in range(0, len(flat), width)]
    result, (d_rows, d_h_n, d_c_n) = (rows, z_x, Used(*used)), gradients
    d_x, d_h, d_c, d_parameters = backward(
        x, h, c, Parameters(*parameters), problem, result, saved, (d_rows, d_h_n, d_c_n), x_needs_gradient
    )
    return d_x, d_h, d_c, *d_parameters


class _LayerOfRanks(torch.autograd.Function):
    """`_Layer` where statistics are made over ranks; one more input and output chains the nodes, see `Ranks.chain`."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, moments: list[Statistics | None], *inputs: Any) -> tuple[Tensor, ...]:
        results = _Layer.forward(ctx, problem, moments, *inputs[:-1])
        ranks = cast("Ranks", problem.ranks)
        ctx.place, ranks.places = ranks.places, ranks.places + 1
        return *results, results[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or any(batched(gradient) for gradient in gradients):
            raise RuntimeError(
                "process_group: with statistics over all ranks there are neither gradients of gradients "
                "(create_graph=True) nor batches of gradients; set process_group=None for them"
            )
        # Saved tensors first: of a checkpoint they come from a forward that runs again now, in which the ranks meet.
        tensors, ranks, needed = ctx.saved_tensors, ctx.problem.ranks, ctx.needs_input_grad
        *pulls, chained = gradients
        with without_autocast(gradients[0]):
            found = ranks.run_backward(
                ctx.place, lambda: _backward_of_saved(tensors, ctx.problem, tuple(pulls), needed[2])
            )
        return None, None, *found, chained if needed[-1] else None


def differentiable_backward(
    inputs: tuple[Any, ...], problem: Problem, gradients: tuple[Tensor, ...], needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """The same gradients from `reference.forward` run again, with a graph of their own if gradients are recorded."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # a view each, so that one tensor in two places gets its two gradients apart
        views: list[Any] = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        x, h, c, *parameters = views
        outputs = reference.forward(x, h, c, Parameters(*parameters), problem)[:3]
    wanted = [view for view, need in zip(views, needed, strict=True) if need]
    found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needed]


def layer(call: Call) -> Ran:
    """One layer and direction over rows, on the reference path."""
    problem = call.problem
    with without_autocast(call.x):
        if not problem.held:
            return _layer(call)
        if problem.over_time:
            call = call._replace(x=hold(call.x, problem.packing))
        ran = _layer(call)
        return ran._replace(rows=torch.where(cast(Tensor, problem.packing.mask), ran.rows, 0))


def _layer(call: Call) -> Ran:
    x, h, c, parameters, problem = call
    c_wide = c.to(accumulation_dtype(parameters.weight_hh.dtype))
    inputs = (x, h, c, *parameters)
    # what transforms, or derives forwards, goes through plain operations; the rest through the backward written here
    plain = transformed() or have_tangents(inputs)
    if not plain and torch.is_grad_enabled() and any(s is not None and s.requires_grad for s in inputs):
        holder: list[Statistics | None] = []
        given = (problem, holder, x, h, c_wide, *parameters)
        if problem.ranks is None:
            rows, h_n, c_n = cast(tuple[Tensor, Tensor, Tensor], _Layer.apply(*given))
        else:
            results = _LayerOfRanks.apply(*given, problem.ranks.chain)
            rows, h_n, c_n, problem.ranks.chain = cast(tuple[Tensor, ...], results)
        moments = holder[0]
    else:
        rows, h_n, c_n, moments, _, _ = reference.forward(x, h, c_wide, parameters, problem)
    return Ran(rows, h_n, c_n.to(c.dtype), moments)
