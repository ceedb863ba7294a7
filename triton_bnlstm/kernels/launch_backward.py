"""Launching the backward of the recurrence: from tensors to kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import launch
from .backward import backward_kernel
from .backward_config import default_backward_config
from .config import BackwardConfig, Config
from .input_side import finish_kernel
from .launch import Arguments, _work, product_precision, recur
from .rows import Block, Case, Rows
from .run import run

_run = run  # as in `launch`


class Kept(NamedTuple):
    """What the recurrence's forward left.

    deviation: [dirs, R, 4H] W_hh h less some mean, or that of a block's rows.
    x: [dirs, R, 4H] W_ih x, or [dirs, R] float32 x of one column, less
        some mean. c: [dirs, B + R, H] float32.
    hh, ih: [2, dirs, T, 4H] float32 mean, relative to the tensors above, and 1/σ of both norms. cell: [2, dirs, T, H]
        likewise, None without cell norm.
    """

    deviation: Tensor
    x: Tensor
    c: Tensor
    hh: Tensor
    ih: Tensor
    cell: Tensor | None


class Given(NamedTuple):
    """Gradients that come in: of rows [dirs, R, H] or None, of h_n [dirs, B, H], of c_n [dirs, B, H] float32.

    The last one is written over with the gradient of c_0.
    """

    rows: Tensor | None
    h_n: Tensor
    c_n: Tensor


class Wanted(NamedTuple):
    """Where gradients go.

    hidden: [dirs, R, 4H] of W_hh h; or of a block's rows, with those of the step behind it behind them.
    input: [dirs, R, 4H] of W_ih x, None if nobody needs it.
    column: whether the sums include that of W_ih's one column.
    summed_later: the input norm's statistics are those of all steps: `input` takes pre-activations' gradients.
    fill: rows that are not live are written too, as zeros.
    """

    hidden: Tensor
    input: Tensor | None
    column: bool
    summed_later: bool
    fill: bool


class Sums(NamedTuple):
    """Over the rows of each step, float32.

    columns: [3, dirs, T, 4H] of da, da·ẑ_h, da·ẑ_x; [4, ..], dz_x·x too, where one column's gradient is wanted.
    cells: [2, dirs, T, H] of dy and dy·ĉ of the cell norm, None without.
    """

    columns: Tensor
    cells: Tensor | None

    @classmethod
    def empty(cls, rows: Rows, directions: int, hidden: int, device: torch.device, *, column: bool, cell: bool) -> Sums:
        """Place for them."""

        def floats(*shape: int) -> Tensor:
            return launch.empty(*shape, dtype=torch.float32, device=device)

        columns = floats(4 if column else 3, directions, rows.steps, 4 * hidden)
        return cls(columns, floats(2, directions, rows.steps, hidden) if cell else None)


def backward(
    kept: Kept,
    given: Given,
    wanted: Wanted,
    weight: Tensor,
    vectors: Tensor,
    affine_c: Tensor | None,
    inverse: Tensor,
    rows: Rows,
    sums: Sums,
    block: Block | None = None,
    explicit: BackwardConfig | None = None,
) -> None:
    """The recurrence backwards. Writes what `wanted` names, given.c_n and sums.

    Args:
        kept, given, wanted: see there. wanted.hidden may be kept.deviation, and wanted.input kept.x.
        weight: [dirs, H, 4H] W_hh transposed, contiguous.
        vectors: [4, dirs, 4H] float32 γ_hh, γ_ih, bias, W_ih of one column.
        affine_c: [2, dirs, H] float32 γ_c, β_c.
        inverse: [dirs, T] float32 1/(n+κ), zeros for statistics that are constants.
        rows: which rows exist.
        sums: takes the sums of the steps.
        block: only these steps; those behind it have been done, and given.c_n is what they have left there.
        explicit: the layout that is asked for.

    Raises:
        KernelError: see there.
    """
    directions, hidden, _ = weight.shape
    device = weight.device

    def floats(*shape: int) -> Tensor:
        return launch.empty(*shape, dtype=torch.float32, device=device)

    nothing = vectors  # in the place of a pointer that is not used
    tensors = (
        wanted.hidden,
        nothing if wanted.input is None else wanted.input,
        *(kept.deviation, kept.x, kept.c, weight),
        nothing if given.rows is None else given.rows,
        *(given.h_n, given.c_n, kept.hh, kept.ih),
        nothing if kept.cell is None else kept.cell,
        vectors,
        nothing if affine_c is None else affine_c,
        *(inverse, sums.columns),
        nothing if sums.cells is None else sums.cells,
        *(rows.first, rows.count),
    )

    def arguments(config: Config) -> Arguments:
        assert isinstance(config, BackwardConfig)
        walk = rows.batch > config.batch_tile
        parts = scratch = nothing
        if config.divided:
            parts = floats(directions, config.splits, rows.batch, hidden)
        if walk:
            scratch = floats(directions, rows.batch, 5 * hidden)
        constants = {
            "SPLITS": config.splits,
            "GROUPS": config.groups,
            "PB": config.product_tile(rows.batch),
            "ONE_TILE": config.groups * config.product_tile(rows.batch) >= rows.batch,
            "WALK": walk,
        }
        found = Arguments((config.programs(hidden), directions), (*tensors, parts, scratch), in_block, constants)
        if config.divided:
            found = found._replace(phases=({"CELLS": False}, {"PRODUCT": False}), meetings=2)
        return found

    in_block = (wanted.hidden.shape[1], 0 if block is None else block.first_row)
    shared = {
        "PRODUCT": True,
        "CELLS": True,
        "NARROW": kept.x.dim() == 2,
        "ROWS": given.rows is not None,
        "STORE_X": wanted.input is not None,
        "SUMMED_LATER": wanted.summed_later,
        "COLUMN": wanted.column,
        "FILL": wanted.fill,
        "CELL_NORM": kept.cell is not None,
        "PRECISION": product_precision(weight.dtype, device),
    }
    case = Case(device, weight.dtype, directions, hidden)
    flags = {"cell_norm": kept.cell is not None, "narrow": kept.x.dim() == 2, "fill": wanted.fill}
    work = _work("backward", case, rows, str(shared["PRECISION"]), flags)
    recur(
        *(backward_kernel, arguments, shared, case, rows, default_backward_config, work),
        explicit=explicit,
        backwards=True,
        block=block,
    )


def finish(d: Tensor, z: Tensor, column: Tensor, mean: Tensor, terms: Tensor, rows: Rows) -> None:
    """Backward of a norm whose statistics are those of all rows, on the gradient of its output, in place.

    Args:
        d: [dirs, R, 4H] gradient of the norm's output; becomes that of its input.
        z: [dirs, R, 4H] the norm's input less some mean; or [dirs, R] float32, times column.
        column: [dirs, 4H] float32 W_ih of one column.
        mean: [dirs, T, 4H] float32 mean, relative to z.
        terms: [4, dirs, 4H] float32 1/σ, γ/σ, mean of dy and mean of dy·ẑ over all rows.
        rows: which rows exist.

    Raises:
        KernelError: see there.
    """
    directions, _, columns = d.shape
    grid = (rows.steps, triton.cdiv(columns, 64), directions)
    _run(
        finish_kernel,
        grid,
        (d, z, column, mean, terms, rows.first, rows.count),
        (columns, rows.steps, rows.rows, rows.batch),
        {"NARROW": z.dim() == 2, "BR": 64, "BC": 64},
        {"num_warps": 8},
    )
