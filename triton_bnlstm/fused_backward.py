"""The backward of one layer, both directions, on the Triton kernels: what stands before and behind the recurrence.

Behind the loop each weight's gradient is one product over all rows. As in the forward, W_hh meets states less their
mean over the step's rows: what a product rounds is then relative to deviations, and dz, whose sum over the rows is zero
but for its rounding, is not multiplied with a mean.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .fused_forward import (
    Trained,
    cell_affine,
    centred_input,
    in_float32,
    populations,
    product_of_means,
    rows_of,
    shares,
    stacked,
)
from .kernels import launch, launch_backward
from .kernels.config import BackwardConfig
from .kernels.launch_backward import Given, Kept, Sums, Wanted
from .kernels.rows import Block, Rows
from .packing import Packing
from .reference import Call, Parameters, Problem, centre, input_mean

# Rows from which products are efficient: of so many at least a block of steps is made, where W_hh h is made again.
_BLOCK_ROWS = 4096


class Needed(NamedTuple):
    """Which gradients that cost something are wanted, for each direction."""

    x: list[bool]
    h: list[bool]
    weight_ih: list[bool]
    weight_hh: list[bool]

    @classmethod
    def of(cls, flags: list[tuple[bool, ...]]) -> Needed:
        """From each direction's flags of x, h_0, c_0 and seven parameters."""
        x, h, _, weight_ih, weight_hh, *_ = (list(of_one) for of_one in zip(*flags, strict=True))
        return cls(x, h, weight_ih, weight_hh)


def _inverse_counts(problems: list[Problem]) -> Tensor:
    """1/(n_t + κ_t), [dirs, T] float32; zeros where statistics are constants."""
    count = problems[0].packing.count
    if problems[0].frozen:
        return torch.zeros(len(problems), len(count), dtype=torch.float32, device=count.device)
    inverse = count.clamp_min(1).reciprocal().float().expand(len(problems), -1)
    return (inverse if problems[0].population is None else inverse * shares(problems)).contiguous()


def _input_table(ran: Trained, problems: list[Problem], steps: int) -> Tensor:
    """[2, dirs, T, 4H] mean and 1/σ of the input norm."""
    if ran.ih is not None:
        return ran.ih
    mean, var = populations(problems, "ih")
    return torch.stack([mean, (var + problems[0].eps).rsqrt()]).expand(-1, -1, steps, -1).contiguous()


def _hidden_table(ran: Trained, problems: list[Problem]) -> Tensor:
    """[2, dirs, T, 4H] mean, relative to what was taken off W_hh h, and 1/σ of the hidden norm.

    With constant statistics the mean is still absolute: what is taken off is only known block by block.
    """
    if ran.hh is None:
        mean, var = populations(problems, "hh")
        return torch.stack([mean, (var + problems[0].eps).rsqrt()])
    if len(ran.hh) == 1:  # nothing but the batch's own mean was taken off
        return torch.cat([torch.zeros_like(ran.hh), ran.hh])
    return ran.hh.contiguous()


def _blocks(packing: Packing, most: int) -> list[Block]:
    """All steps in up to eight blocks of about as many rows, `most` or more; the last steps first."""
    every = sum(packing.sizes)
    enough = max(most, -(-every // 8))
    blocks, last, held, begin = [], len(packing.sizes), 0, every
    for t in reversed(range(len(packing.sizes))):
        held += packing.sizes[t]
        begin -= packing.sizes[t]
        if (held >= enough and begin >= enough // 2) or t == 0:
            blocks.append(Block(t, last, begin, held))
            last, held = t, 0
    return blocks


class _HiddenSide:
    """W_hh h on its way back: from the states to deviations, and from their gradients to those of W_hh and h_0.

    Block by block where deviations are made again, so that these and their gradients are never there for all rows.
    """

    def __init__(self, ran: Trained, calls: list[Call], rows: Rows, *, weight_needed: list[bool], reuse: bool) -> None:
        self.ran, self.rows, self.weight_needed = ran, rows, weight_needed
        self.problem, self.weights = calls[0].problem, [call.parameters.weight_hh for call in calls]
        self.table = _hidden_table(ran, [call.problem for call in calls])
        self.again = ran.deviation is None
        packing = self.problem.packing
        self.blocks = _blocks(packing, _BLOCK_ROWS) if self.again else [Block.whole(rows)]
        if ran.deviation is not None and reuse:
            self.memory = ran.deviation
        else:  # behind a block's rows those of the step behind it
            place = max(block.rows for block in self.blocks) + (rows.batch if len(self.blocks) > 1 else 0)
            self.memory = self._empty(place, 4 * ran.h.shape[2])
        self.total: list[Tensor | None] = [None] * len(calls)
        self.mean: Tensor | None = None
        if any(weight_needed) or self.again:
            self.mean = launch.empty(
                *(2, len(calls), rows.steps, ran.h.shape[2]), dtype=torch.float32, device=ran.h.device
            )

    def _empty(self, rows: int, columns: int) -> Tensor:
        return launch.empty(len(self.weights), rows, columns, dtype=self.ran.h.dtype, device=self.ran.h.device)

    def prepare(self, block: Block) -> tuple[Tensor, Tensor | None]:
        """Deviations for this block of steps, in the memory that takes their gradients; and states less their mean."""
        if self.mean is None:
            assert self.ran.deviation is not None
            return self.ran.deviation, None
        centred = self._empty(block.rows, self.ran.h.shape[2])
        if self.problem.packing.mask is not None:
            centred.zero_()
        launch.moments(self.ran.h, self.rows, centred, before=True, block=block, into=self.mean)
        if self.ran.deviation is not None:
            return self.ran.deviation, centred
        if block is not self.blocks[0]:  # what stood first in the block before belongs behind this one
            behind = self.problem.packing.sizes[block.last]
            self.memory[:, block.rows : block.rows + behind] = self.memory[:, :behind].clone()
        for direction, weight in enumerate(self.weights):
            torch.mm(centred[direction], weight.t(), out=self.memory[direction, : block.rows])
        if self.ran.hh is None:
            steps = slice(block.first, block.last)
            self.table[0, :, steps] -= product_of_means(self.mean[0, :, steps], self.weights)
        return self.memory, centred

    def finish(self, block: Block, centred: Tensor | None) -> None:
        """Add this block's part of W_hh's gradient: Σ dz ⊗ (h − h̄), in directions that need it."""
        for direction, needed in enumerate(self.weight_needed):
            if needed and centred is not None:
                part = _mm_in_float32(self.memory[direction, : block.rows].t(), centred[direction])
                total = self.total[direction]
                self.total[direction] = part if total is None else total.add_(part)

    def weight_gradient(self, gamma: Tensor, sums: Sums, share: Tensor | None) -> list[Tensor | None]:
        """Of W_hh, each [4H, H]: what has been added up, and Σ dz ⊗ h̄ where the rows' dz do not add up to zero."""
        if self.mean is None or (share is None and not self.problem.frozen):
            return self.total
        row_sums = _row_sums(gamma, self.table[1], share, -self.table[0], sums.columns[0], sums.columns[1])
        rest = torch.bmm(row_sums.mT, self.mean[0])
        return [None if t is None else t + r for t, r in zip(self.total, rest, strict=True)]

    def state_gradient(self, needed: list[bool]) -> list[Tensor | None]:
        """Of h_0, each [B, H], when all blocks are done."""
        return _times_weights(self.memory[:, : self.rows.batch], self.weights, needed)


def _times_weights(d: Tensor, weights: list[Tensor], needed: list[bool]) -> list[Tensor | None]:
    """Rows d [dirs, ·, 4H] times each direction's weight [4H, ·], where that is needed."""
    return [torch.mm(d[k], weight) if needed[k] else None for k, weight in enumerate(weights)]


# torch 2.8 and later, on CUDA devices: products of half precision whose partial sums stay float32, however cuBLAS
# divides them. Elsewhere they are torch's matrix products, with its settings.
_WIDE_PRODUCTS = "dtype" in torch.ops.aten.mm.overloads() and torch.version.hip is None


def _mm_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """A product over all rows, float32."""
    if _WIDE_PRODUCTS and a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).float()


def _cell_table(ran: Trained, problems: list[Problem]) -> Tensor | None:
    if not problems[0].frozen or problems[0].population is None or problems[0].population.c is None:
        return ran.cell
    mean, var = populations(problems, "c")
    return torch.stack([mean, (var + problems[0].eps).rsqrt()]).contiguous()


def _row_sums(
    gamma: Tensor, rstd: Tensor, share: Tensor | None, pull: Tensor | None, sum_dy: Tensor, sum_product: Tensor
) -> Tensor:
    """Σ dz over the rows of each step, [dirs, T, 4H].

    From the formula and not from the rows: exactly zero where there are no phantom rows, as rounded rows are not.
    share: n/(n+κ), and pull: the batch's mean less the one used; None where statistics are constants.
    """
    scale = gamma[:, None] * rstd
    if share is None or pull is None:
        return scale * sum_dy
    weight = share[:, :, None]
    return scale * ((1 - weight) * sum_dy - weight * pull * rstd * sum_product)


def _input_pull(x: Tensor, table: Tensor, parameters: list[Parameters], rows: Rows) -> Tensor:
    """The batch's mean of W_ih x less the one used, [dirs, T, 4H], where x or W_ih x is less some mean.

    table: [2, dirs, T, 4H], the mean used. What rounding has left in x of the mean taken off, it has too.
    """
    if x.dim() == 2:
        mean = launch.moments(x[:, :, None], rows)[0] * in_float32(parameters, "weight_ih").mT
    else:
        mean = launch.moments(x, rows)[0]
    return mean - table[0]


def _spread(d: Tensor, ran: Trained, gamma: Tensor, column: Tensor, sums: Sums, rows: Rows, count: Tensor) -> None:
    """Backward of an input norm over all steps, on the gradient of its output d [dirs, R, 4H], in place."""
    assert ran.ih is not None
    mean, rstd = ran.ih[0], ran.ih[1, :, 0]
    found = sums.columns.sum(2) / count.sum().float()  # [.., dirs, 4H]
    launch_backward.finish(d, ran.x, column, mean, torch.stack([rstd, gamma * rstd, found[0], found[2]]), rows)


def backward(
    calls: list[Call],
    ran: Trained,
    gradients: list[tuple[Tensor | None, Tensor | None, Tensor | None]],
    flags: list[tuple[bool, ...]],
    layout: BackwardConfig | None,
    *,
    reuse: bool,
) -> list[Tensor | None]:
    """Gradients of x, h_0, c_0 and the seven parameters, direction after direction.

    Args:
        calls: what was called.
        ran: what the forward left; for constant statistics h, c and x alone.
        gradients: of output rows, h_n and c_n of each direction.
        flags: which gradients are needed.
        layout: of the recurrent kernel, if one is asked for.
        reuse: gradients may be written over what the forward left; if this raises, it is lost.

    Raises:
        KernelError: a kernel cannot run here.
    """
    problems, parameters = [call.problem for call in calls], [call.parameters for call in calls]
    problem, packing = problems[0], problems[0].packing
    rows, needed = rows_of(packing), Needed.of(flags)
    directions, hidden = len(calls), ran.h.shape[2]
    dtype, device = ran.h.dtype, ran.h.device
    narrow, later = ran.x.dim() == 2, not problem.over_time and not problem.frozen
    hidden_side = _HiddenSide(ran, calls, rows, weight_needed=needed.weight_hh, reuse=reuse)
    column_needed = narrow and any(needed.weight_ih) and not later
    d_input = None
    if any(needed.x) or (any(needed.weight_ih) and not column_needed):
        if reuse and not narrow and not later:
            d_input = ran.x
        else:
            d_input = launch.empty(directions, rows.rows, 4 * hidden, dtype=dtype, device=device)

    vectors = [in_float32(parameters, name) for name in ("gamma_hh", "gamma_ih")]
    vectors.append(torch.zeros_like(vectors[0]) if parameters[0].bias is None else in_float32(parameters, "bias"))
    vectors.append(in_float32(parameters, "weight_ih")[:, :, 0] if narrow else vectors[0])
    ih = _input_table(ran, problems, rows.steps)
    share = pull = None
    if not problem.frozen and problem.population is not None:
        share = shares(problems)
        if any(needed.weight_ih) and problem.over_time:  # before gradients are written over it
            pull = _input_pull(ran.x, ih, parameters, rows)
    cell = _cell_table(ran, problems)
    d_c = torch.stack([_given(g[2], call.c, torch.float32) for g, call in zip(gradients, calls, strict=True)])
    given = Given(
        _row_gradients([g[0] for g in gradients], rows.rows, ran.h),
        torch.stack([_given(g[1], call.h, dtype) for g, call in zip(gradients, calls, strict=True)]),
        d_c,
    )
    sums = Sums.empty(rows, directions, hidden, device, column=column_needed, cell=cell is not None)
    wanted = Wanted(hidden_side.memory, d_input, column_needed, later, packing.mask is not None)
    weight = stacked([p.weight_hh.t() for p in parameters])
    of_columns, affine_c = torch.stack(vectors), None if cell is None else cell_affine(parameters)
    inverse = _inverse_counts(problems)
    for block in hidden_side.blocks:
        deviation, centred = hidden_side.prepare(block)
        kept = Kept(deviation, ran.x, ran.c, hidden_side.table, ih, cell)
        launch_backward.backward(
            *(kept, given, wanted, weight, of_columns, affine_c, inverse, rows, sums, block), explicit=layout
        )
        hidden_side.finish(block, centred)
        del kept, deviation, centred
    if later and d_input is not None:
        _spread(d_input, ran, vectors[1], vectors[3], sums, rows, packing.count)

    d_weight_hh = hidden_side.weight_gradient(vectors[0], sums, share)
    d_h = hidden_side.state_gradient(needed.h)
    del hidden_side, wanted, given  # what is theirs alone is free for what follows
    d_weight_ih = _input_weight_gradient(
        *(calls, ran, d_input, ih[1], pull, vectors[1], sums, share, rows), needed=needed.weight_ih
    )
    d_x: list[Tensor | None] = [None] * directions
    if d_input is not None:
        d_x = _times_weights(d_input, [p.weight_ih.to(dtype) for p in parameters], needed.x)

    over_steps = sums.columns.sum(2)  # [.., dirs, 4H]
    of_cells = None if sums.cells is None else sums.cells.sum(2)  # [2, dirs, H]
    found: list[Tensor | None] = []
    for k, needs in enumerate(flags):
        of_vectors = over_steps[0, k], over_steps[2, k], over_steps[1, k]  # bias, γ_ih, γ_hh
        of_cell = (None, None) if of_cells is None else (of_cells[1, k], of_cells[0, k])  # γ_c, β_c
        d_inputs = (d_x[k], d_h[k], d_c[k], d_weight_ih[k], d_weight_hh[k], *of_vectors, *of_cell)
        likes = (calls[k].x, calls[k].h, calls[k].c, *parameters[k])
        for d, like, need in zip(d_inputs, likes, needs, strict=True):
            found.append(_own_copy(d, like.dtype) if need and d is not None and like is not None else None)
    return found


def _own_copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In this dtype, and not part of something larger that it would keep."""
    tensor = tensor.to(dtype)
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def _given(gradient: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(like, dtype=dtype) if gradient is None else gradient.to(dtype)


def _row_gradients(gradients: list[Tensor | None], rows: int, h: Tensor) -> Tensor | None:
    """Of the output, [dirs, R, H]; None if nobody has one."""
    if all(gradient is None for gradient in gradients):
        return None
    return stacked([h.new_zeros(rows, h.shape[2]) if gradient is None else gradient for gradient in gradients])


def _centred_over_all(x: Tensor, problem: Problem) -> Tensor:
    """X [R, D] less the mean of all rows; zero in rows that are not live."""
    centred = centre(x, input_mean(x, problem), problem.packing)
    return centred if problem.packing.mask is None else torch.where(problem.packing.mask, centred, 0)


def _input_weight_gradient(
    calls: list[Call],
    ran: Trained,
    d_input: Tensor | None,
    rstd: Tensor,
    pull: Tensor | None,
    gamma: Tensor,
    sums: Sums,
    share: Tensor | None,
    rows: Rows,
    *,
    needed: list[bool],
) -> list[Tensor | None]:
    """Of W_ih, each [4H, D]: Σ dz ⊗ (x − x̄), and with phantom rows Σ dz ⊗ x̄; x̄ is zero for constant statistics."""
    if not any(needed):
        return [None] * len(needed)
    problem, narrow = calls[0].problem, ran.x.dim() == 2
    mean: Tensor | None = None
    if not problem.over_time and not problem.frozen:  # dz adds up to zero over all rows, not over a step's
        x = stacked([_centred_over_all(call.x, problem) for call in calls])
    elif problem.frozen:
        x = stacked([call.x for call in calls])
    elif not narrow or share is not None:
        x, mean = centred_input(stacked([call.x for call in calls]), problem.packing, rows, ran.h.dtype)
    found: list[Tensor | None] = []
    for k, need in enumerate(needed):
        total = None
        if need and len(sums.columns) == 4:
            total = sums.columns[3, k].sum(0)[:, None]
        elif need:
            assert d_input is not None
            total = _mm_in_float32(d_input[k].t(), x[k].to(d_input.dtype))
        if total is not None and mean is not None and share is not None:
            row_sums = _row_sums(gamma, rstd, share, pull, sums.columns[0], sums.columns[2])[k]
            total = torch.addmm(total, row_sums.t(), mean[k])
        found.append(total)
    return found
