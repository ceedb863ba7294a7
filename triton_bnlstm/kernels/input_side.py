"""Moments of all steps at once, for the input side: of x, whose mean is taken off on the way, and of W_ih x.

Batch norm does not see shifts, so x's mean over the live rows of each step is taken off before the GEMM W_ih x: what
the GEMM then rounds is relative to deviations, and W_ih · mean is added to the mean that is recorded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import merge_moments, moments_of_live_rows


@triton.jit
def load_tile(x_ptr, row, live, column, inside, columns):
    """Rows `row` [BR] of x [·, columns] in some columns [BC] → [BC, BR] float32, 0 where not live."""
    place = x_ptr + row.to(tl.int64)[None, :] * columns + column[:, None]
    return tl.load(place, mask=inside[:, None] & live[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["steps", "rows", "batch", "first_step", "block_rows", "block_first"])
def moments_kernel(
    x_ptr,  # [dirs, R, C] rows of all steps; BEFORE: [dirs, B + R, C] states, the initial ones first
    moments_ptr,  # [2, dirs, T, C] float32 mean and biased variance of each step's live rows; written
    centred_ptr,  # [dirs, block_rows, C] live rows less their mean; written with CENTRE
    first_ptr,  # [T + 1] int64: step t's rows are from first[t + 1] − B on; BEFORE: the rows before it from first[t] on
    count_ptr,  # [T] int32 live rows n of each step, a prefix of its rows
    columns,  # C
    steps,  # T
    rows,  # R
    batch,  # B
    first_step,  # of the block of steps that this launch is for
    block_rows,  # rows that centred_ptr has place for
    block_first,  # the first of them, among R
    CENTRE: tl.constexpr,
    BEFORE: tl.constexpr,
    BR: tl.constexpr,  # rows of a tile
    BC: tl.constexpr,  # columns of a program
):
    """One program per step, block of columns and direction; the batch is walked in tiles, merged in their order."""
    t = first_step + tl.program_id(0)
    column = tl.program_id(1) * BC + tl.arange(0, BC)  # [BC]
    direction, directions = tl.program_id(2).to(tl.int64), tl.num_programs(2).to(tl.int64)
    inside = column < columns
    n = tl.load(count_ptr + t)
    row0 = tl.load(first_ptr + t + 1) - batch
    if BEFORE:
        x_ptr += (direction * (rows + batch) + tl.load(first_ptr + t)) * columns
    else:
        x_ptr += (direction * rows + row0) * columns
    centred_ptr += (direction * block_rows + row0 - block_first) * columns
    mean = tl.zeros((BC,), tl.float32)
    squares = tl.zeros((BC,), tl.float32)
    seen = 0.0
    for start in range(0, n, BR):
        row = start + tl.arange(0, BR)  # [BR]
        x = load_tile(x_ptr, row, row < n, column, inside, columns)  # [BC, BR]
        held = tl.minimum(n - start, BR).to(tl.float32)
        tile_mean, tile_squares = moments_of_live_rows(x, row < n, held)
        mean, squares, seen = merge_moments(mean, squares, seen, tile_mean, tile_squares, held)
    at = (direction * steps + t) * columns + column
    tl.store(moments_ptr + at, mean, mask=inside)
    tl.store(moments_ptr + directions * steps * columns + at, squares / tl.maximum(n, 1).to(tl.float32), mask=inside)
    if CENTRE:
        for start in range(0, n, BR):
            row = start + tl.arange(0, BR)
            x = load_tile(x_ptr, row, row < n, column, inside, columns) - mean[:, None]
            place = centred_ptr + row.to(tl.int64)[None, :] * columns + column[:, None]
            tl.store(place, x.to(centred_ptr.dtype.element_ty), mask=inside[:, None] & (row < n)[None, :])


@triton.jit(do_not_specialize=["steps", "rows", "batch"])
def finish_kernel(
    d_ptr,  # [dirs, R, C] gradient of the norm's output; becomes that of its input
    z_ptr,  # [dirs, R, C] input of the norm; NARROW: [dirs, R] float32, times column_ptr
    column_ptr,  # [dirs, C] float32, read with NARROW
    mean_ptr,  # [dirs, T, C] float32 mean, relative to z_ptr
    terms_ptr,  # [4, dirs, C] float32 1/σ, γ/σ, and Σdy and Σdy·ẑ over the rows of all steps, divided by their number
    first_ptr,  # [T + 1] int64: step t's rows are from first[t + 1] − B on
    count_ptr,  # [T] int32 live rows n of each step
    columns,  # C
    steps,  # T
    rows,  # R
    batch,  # B
    NARROW: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Backward of a norm over all steps' rows, for a step, block of columns and direction."""
    t = tl.program_id(0)
    column = tl.program_id(1) * BC + tl.arange(0, BC)  # [BC]
    direction, directions = tl.program_id(2).to(tl.int64), tl.num_programs(2).to(tl.int64)
    inside = column < columns
    n = tl.load(count_ptr + t)
    row0 = direction * rows + tl.load(first_ptr + t + 1) - batch
    at, plane = direction * columns + column, directions * columns
    mean = tl.load(mean_ptr + (direction * steps + t) * columns + column, mask=inside, other=0.0)[:, None]  # [BC, 1]
    rstd = tl.load(terms_ptr + at, mask=inside, other=0.0)[:, None]
    scale = tl.load(terms_ptr + plane + at, mask=inside, other=0.0)[:, None]
    sum_dy = tl.load(terms_ptr + 2 * plane + at, mask=inside, other=0.0)[:, None]
    sum_product = tl.load(terms_ptr + 3 * plane + at, mask=inside, other=0.0)[:, None]
    for start in range(0, n, BR):
        row = start + tl.arange(0, BR)  # [BR]
        live = row < n
        if NARROW:
            x = tl.load(z_ptr + row0 + row, mask=live, other=0.0)
            z = x[None, :] * tl.load(column_ptr + at, mask=inside, other=0.0)[:, None]
        else:
            z = load_tile(z_ptr + row0 * columns, row, live, column, inside, columns)  # [BC, BR]
        dy = load_tile(d_ptr + row0 * columns, row, live, column, inside, columns)
        d = scale * (dy - sum_dy - (z - mean) * rstd * sum_product)
        place = d_ptr + (row0 + row.to(tl.int64))[None, :] * columns + column[:, None]
        tl.store(place, d.to(d_ptr.dtype.element_ty), mask=inside[:, None] & live[None, :])
