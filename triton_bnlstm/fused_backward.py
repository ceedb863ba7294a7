"""The backward of one layer, both directions, on the Triton kernels: what stands before and behind the recurrence.

Behind the loop each weight's gradient is one product over all rows. As in the forward, W_hh meets states less their
mean over the step's rows: what a product rounds is then relative to deviations, and dz, whose sum over the rows is zero
but for its rounding, is not multiplied with a mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
from .kernels.launch import Rows
from .kernels.launch_backward import Given, Kept, Sums, Wanted
from .reference import Call, Parameters, Problem, centre, input_mean


class Needed(NamedTuple):
    """Which gradients that cost something somebody wants, of any direction."""

    x: bool
    h: bool
    weight_ih: bool
    weight_hh: bool

    @classmethod
    def of(cls, flags: list[tuple[bool, ...]]) -> Needed:
        """From each direction's flags of x, h_0, c_0 and seven parameters."""
        x, h, _, weight_ih, weight_hh, *_ = (any(of_one) for of_one in zip(*flags, strict=True))
        return cls(x, h, weight_ih, weight_hh)


@contextmanager
def _summed_in_float32() -> Iterator[None]:
    """Within it no matrix product of half precision adds partial sums in half precision."""
    matmul = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = [getattr(matmul, name) for name in names]
    if not any(before) or not torch.cuda.is_available():
        yield
        return
    try:
        for name in names:
            setattr(matmul, name, False)
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(matmul, name, value)


def _graph_is_kept() -> bool:
    """Whether the running backward may be followed by another one through the same graph; True if that is not known."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if asked is None else bool(asked())


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


class _Hidden(NamedTuple):
    """Of W_hh h: deviations [dirs, R, 4H] and their table [2, dirs, T, 4H]; states less their mean, and that mean."""

    deviation: Tensor
    table: Tensor
    centred: Tensor | None
    mean: Tensor | None


def _hidden_side(ran: Trained, calls: list[Call], rows: Rows, *, weight_needed: bool) -> _Hidden:
    """W_hh h again from the states, in one product, if it was not kept."""
    problems, parameters = [call.problem for call in calls], [call.parameters for call in calls]
    directions, _, hidden = ran.h.shape
    centred = mean = None
    if weight_needed or ran.deviation is None:
        centred = launch.empty(directions, rows.rows, hidden, dtype=ran.h.dtype, device=ran.h.device)
        if problems[0].packing.mask is not None:
            centred.zero_()
        mean, _ = launch.moments(ran.h, rows, centred, before=True)  # [dirs, T, H]
    deviation = ran.deviation
    if deviation is None:
        assert centred is not None
        deviation = launch.empty(directions, rows.rows, 4 * hidden, dtype=ran.h.dtype, device=ran.h.device)
        for direction, p in enumerate(parameters):
            torch.mm(centred[direction], p.weight_hh.t(), out=deviation[direction])
    if ran.hh is None:
        assert mean is not None
        population_mean, var = populations(problems, "hh")
        relative = population_mean - product_of_means(mean, [p.weight_hh for p in parameters])
        table = torch.stack([relative, (var + problems[0].eps).rsqrt()])
    elif len(ran.hh) == 1:  # nothing but the batch's own mean was taken off
        table = torch.cat([torch.zeros_like(ran.hh), ran.hh])
    else:
        table = ran.hh
    return _Hidden(deviation, table.contiguous(), centred if weight_needed else None, mean)


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
) -> list[Tensor | None]:
    """Gradients of x, h_0, c_0 and the seven parameters, direction after direction.

    Args:
        calls: what was called.
        ran: what the forward left; for constant statistics h, c and x alone.
        gradients: of output rows, h_n and c_n of each direction.
        flags: which gradients are needed.
        layout: of the recurrent kernel, if one is asked for.

    Raises:
        KernelError: a kernel cannot run here.
    """
    problems, parameters = [call.problem for call in calls], [call.parameters for call in calls]
    problem, packing = problems[0], problems[0].packing
    rows, needed = rows_of(packing), Needed.of(flags)
    directions, hidden = len(calls), ran.h.shape[2]
    dtype, device = ran.h.dtype, ran.h.device
    narrow, later = ran.x.dim() == 2, not problem.over_time and not problem.frozen
    reused = not _graph_is_kept()

    of_hidden = _hidden_side(ran, calls, rows, weight_needed=needed.weight_hh)
    d_hidden = of_hidden.deviation
    if ran.deviation is not None and not reused:
        d_hidden = launch.empty(*d_hidden.shape, dtype=dtype, device=device)
    column_needed = narrow and needed.weight_ih and not later
    d_input = None
    if needed.x or (needed.weight_ih and not column_needed):
        if reused and not narrow and not later:
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
        if needed.weight_ih and problem.over_time:  # before gradients are written over it
            pull = _input_pull(ran.x, ih, parameters, rows)
    cell = _cell_table(ran, problems)
    d_c = torch.stack([_given(g[2], call.c, torch.float32) for g, call in zip(gradients, calls, strict=True)])
    sums = launch_backward.backward(
        Kept(of_hidden.deviation, ran.x, ran.c, of_hidden.table, ih, cell),
        Given(
            _row_gradients([g[0] for g in gradients], rows.rows, ran.h),
            torch.stack([_given(g[1], call.h, dtype) for g, call in zip(gradients, calls, strict=True)]),
            d_c,
        ),
        Wanted(d_hidden, d_input, column_needed, later, packing.mask is not None),
        stacked([p.weight_hh.t() for p in parameters]),
        torch.stack(vectors),
        None if cell is None else cell_affine(parameters),
        _inverse_counts(problems),
        rows,
        layout,
    )
    if later and d_input is not None:
        _spread(d_input, ran, vectors[1], vectors[3], sums, rows, packing.count)

    d_weight_hh = d_weight_ih = d_x = d_h = None
    with _summed_in_float32():
        if needed.weight_hh:
            d_weight_hh = _hidden_weight_gradient(d_hidden, of_hidden, vectors[0], sums, share, frozen=problem.frozen)
        if needed.h:
            first = d_hidden[:, : rows.batch]
            d_h = [torch.mm(d, p.weight_hh) for d, p in zip(first, parameters, strict=True)]
        del of_hidden, d_hidden  # their memory is wanted below
        if needed.weight_ih:
            d_weight_ih = _input_weight_gradient(calls, ran, d_input, ih[1], pull, vectors[1], sums, share, rows)
        if needed.x and d_input is not None:
            d_x = [torch.mm(d, p.weight_ih) for d, p in zip(d_input, parameters, strict=True)]

    over_steps = sums.columns.sum(2)  # [.., dirs, 4H]
    of_cells = None if sums.cells is None else sums.cells.sum(2)  # [2, dirs, H]
    of_inputs: list[list[Tensor] | Tensor | None] = [d_x, d_h, d_c, d_weight_ih, d_weight_hh]
    of_inputs += [over_steps[0], over_steps[2], over_steps[1]]  # bias, γ_ih, γ_hh
    of_inputs += [None, None] if of_cells is None else [of_cells[1], of_cells[0]]  # γ_c, β_c
    found: list[Tensor | None] = []
    for k, needs in enumerate(flags):
        for d, like, need in zip(of_inputs, (calls[k].x, calls[k].h, calls[k].c, *parameters[k]), needs, strict=True):
            found.append(d[k].to(like.dtype) if need and d is not None and like is not None else None)
    return found


def _given(gradient: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(like, dtype=dtype) if gradient is None else gradient.to(dtype)


def _row_gradients(gradients: list[Tensor | None], rows: int, h: Tensor) -> Tensor | None:
    """Of the output, [dirs, R, H]; None if nobody has one."""
    if all(gradient is None for gradient in gradients):
        return None
    return stacked([h.new_zeros(rows, h.shape[2]) if gradient is None else gradient for gradient in gradients])


def _hidden_weight_gradient(
    d_hidden: Tensor, side: _Hidden, gamma: Tensor, sums: Sums, share: Tensor | None, *, frozen: bool
) -> list[Tensor]:
    """Of W_hh, each [4H, H]: Σ dz ⊗ (h − h̄), and Σ dz ⊗ h̄ where the rows' dz do not add up to zero."""
    assert side.centred is not None
    assert side.mean is not None
    found = [torch.mm(d.t(), h) for d, h in zip(d_hidden, side.centred, strict=True)]
    if frozen or share is not None:
        row_sums = _row_sums(gamma, side.table[1], share, -side.table[0], sums.columns[0], sums.columns[1])
        rest = torch.bmm(row_sums.mT, side.mean)
        found = [f + r for f, r in zip(found, rest, strict=True)]
    return found


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
) -> list[Tensor]:
    """Of W_ih, each [4H, D]: Σ dz ⊗ (x − x̄), and with phantom rows Σ dz ⊗ x̄; x̄ is zero for constant statistics."""
    problem, narrow = calls[0].problem, ran.x.dim() == 2
    mean: Tensor | None = None
    if problem.frozen:
        x = stacked([call.x for call in calls])
    elif problem.over_time:
        x, mean = (
            (ran.x[:, :, None], None)
            if narrow and share is None
            else centred_input(stacked([call.x for call in calls]), problem.packing, rows)
        )
    else:  # dz adds up to zero over all rows, not over a step's
        x = stacked([_centred_over_all(call.x, problem) for call in calls])
    if len(sums.columns) == 4:
        found = list(sums.columns[3].sum(1)[:, :, None])
    else:
        assert d_input is not None
        found = [torch.mm(d.t(), given.to(d.dtype)) for d, given in zip(d_input, x, strict=True)]
    if mean is not None and share is not None:
        row_sums = _row_sums(gamma, rstd, share, pull, sums.columns[0], sums.columns[2])
        found = [f + r for f, r in zip(found, torch.bmm(row_sums.mT, mean), strict=True)]
    return found
