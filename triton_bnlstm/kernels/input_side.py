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


@triton.jit(do_not_specialize=["steps", "rows", "batch"])
def moments_kernel(
    x_ptr,  # [dirs, R, C] rows of all steps
    moments_ptr,  # [2, dirs, T, C] float32 mean and biased variance of each step's live rows; written
    centred_ptr,  # [dirs, R, C] live rows less their mean; written with CENTRE
    first_ptr,  # [T + 1] int64: step t's rows are from first[t + 1] − B on
    count_ptr,  # [T] int32 live rows n of each step, a prefix of its rows
    columns,  # C
    steps,  # T
    rows,  # R
    batch,  # B
    CENTRE: tl.constexpr,
    BR: tl.constexpr,  # rows of a tile
    BC: tl.constexpr,  # columns of a program
):
    """One program per step, block of columns and direction; the batch is walked in tiles, merged in their order."""
    t = tl.program_id(0)
    column = tl.program_id(1) * BC + tl.arange(0, BC)  # [BC]
    direction, directions = tl.program_id(2).to(tl.int64), tl.num_programs(2).to(tl.int64)
    inside = column < columns
    n = tl.load(count_ptr + t)
    row0 = (direction * rows + tl.load(first_ptr + t + 1) - batch) * columns  # its first element
    mean = tl.zeros((BC,), tl.float32)
    squares = tl.zeros((BC,), tl.float32)
    seen = 0.0
    for start in range(0, n, BR):
        row = start + tl.arange(0, BR)  # [BR]
        x = load_tile(x_ptr + row0, row, row < n, column, inside, columns)  # [BC, BR]
        held = tl.minimum(n - start, BR).to(tl.float32)
        tile_mean, tile_squares = moments_of_live_rows(x, row < n, held)
        mean, squares, seen = merge_moments(mean, squares, seen, tile_mean, tile_squares, held)
    at = (direction * steps + t) * columns + column
    tl.store(moments_ptr + at, mean, mask=inside)
    tl.store(moments_ptr + directions * steps * columns + at, squares / tl.maximum(n, 1).to(tl.float32), mask=inside)
    if CENTRE:
        for start in range(0, n, BR):
            row = start + tl.arange(0, BR)
            x = load_tile(x_ptr + row0, row, row < n, column, inside, columns) - mean[:, None]
            place = centred_ptr + row0 + row.to(tl.int64)[None, :] * columns + column[:, None]
            tl.store(place, x.to(centred_ptr.dtype.element_ty), mask=inside[:, None] & (row < n)[None, :])
