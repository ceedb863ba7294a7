"""The recurrence with constant statistics: no reduction over the batch, so the batch may be split.

Each norm is a scale and a shift per step. A program owns U hidden units and BB rows of the batch; rows that differ in
their tile have nothing to do with each other, so that in sequence mode only programs of the same rows meet.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .barrier import NOT_MET, arrive, wait
from .common import load_input, load_slice, owned_columns, product, state_rows, tanh, update_cell

_NAME = tl.constexpr(f"inference_kernel {NOT_MET}")


@triton.jit(do_not_specialize=["t0", "t1", "steps", "rows", "batch"])
def inference_kernel(
    h_ptr,  # [dirs, B + R, H] states: h_0, then h of all rows; written
    c_ptr,  # float32 cell states, written: [dirs, B, H], or with KEEP_CELLS [dirs, B + R, H] like h_ptr
    w_ptr,  # [dirs, 4H, H] W_hh
    x_ptr,  # [dirs, R, 4H] W_ih x; NARROW: [dirs, R] float32 x
    scale_ptr,  # [dirs, T, 4H] float32: the input term is x · scale + shift; NARROW: times the weights of x
    scale_hh_ptr,  # [dirs, T, 4H] float32: the hidden term is (W_hh h) · scale_hh
    shift_ptr,  # [dirs, T, 4H] float32: bias and the shifts of both norms
    affine_c_ptr,  # [2, dirs, T, H] float32 scale and shift of the cell norm, read with CELL_NORM
    first_ptr,  # [T + 1] int64: first row of h_ptr that step t reads; it writes from first[t + 1]
    count_ptr,  # [T] int32 live rows n of each step, a prefix of its rows
    counter_ptr,  # [dirs, tiles, 32] int32 zeros, the grid barriers'; a cache line each
    t0,  # first step of this launch
    t1,  # its end
    steps,  # T
    rows,  # R
    batch,  # B
    H: tl.constexpr,
    U: tl.constexpr,  # hidden units of a program
    BB: tl.constexpr,  # batch rows of a program
    BK: tl.constexpr,  # inner extent of a product
    RESIDENT: tl.constexpr,  # the slice of W_hh stays on chip
    SYNC: tl.constexpr,  # how programs meet between steps: see `barrier.wait`
    PROGRAMS: tl.constexpr,  # programs of one direction and tile
    NARROW: tl.constexpr,
    KEEP_CELLS: tl.constexpr,  # the cell states of all rows are wanted, for a backward
    CELL_NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Grid (programs, tiles, directions). Steps t0..t1 of the recurrence."""
    tile = tl.program_id(1)
    EXACT: tl.constexpr = H % BK == 0
    direction = tl.program_id(2).to(tl.int64)
    directions = tl.num_programs(2).to(tl.int64)
    unit, column, owned_unit, owned = owned_columns(U, H)  # [U], [4U], [U], [4U]
    h_ptr += direction * (batch + rows) * H
    c_ptr += direction * (batch + rows if KEEP_CELLS else batch) * H
    w_ptr += direction * 4 * H * H
    x_ptr += direction * rows * (1 if NARROW else 4 * H)
    counter_ptr += (direction * tl.num_programs(1) + tile) * 32
    b = tile * BB + tl.arange(0, BB)  # [BB]

    resident = load_slice(w_ptr, column, owned, 0, H, H, BK, EXACT, RESIDENT)  # tiles [4U, BK]
    row0 = tl.load(first_ptr + t0) if KEEP_CELLS else 0
    in_seats = owned_unit[:, None] & (b < batch)[None, :]
    if KEEP_CELLS:
        in_seats &= (b < tl.load(count_ptr + t0))[None, :]
    c = tl.load(state_rows(c_ptr, row0, b, unit, H), mask=in_seats, other=0.0)  # [U, BB]

    for t in range(t0, t1):
        live = b < tl.load(count_ptr + t)  # [BB]
        stored = owned_unit[:, None] & live[None, :]  # [U, BB]
        source, target = tl.load(first_ptr + t), tl.load(first_ptr + t + 1)  # rows of h_{t−1} and of h_t
        at_step = direction * steps + t
        at_hh, at_c = at_step * 4 * H + column, at_step * H + unit  # [4U], [U]
        scale = tl.load(scale_ptr + at_hh, mask=owned, other=0.0)  # [4U]
        shift = tl.load(shift_ptr + at_hh, mask=owned, other=0.0)
        scale_hh = tl.load(scale_hh_ptr + at_hh, mask=owned, other=0.0)
        # before the wait: the input does not depend on the other programs
        x = load_input(x_ptr, column, owned, target - batch, b, live, H, NARROW)  # [4U, BB] or [1, BB]
        if SYNC != "none":
            wait(counter_ptr, (t - t0) * PROGRAMS, SYNC, _NAME)
        z = product(
            h_ptr + source * H,
            w_ptr,
            resident,
            column,
            owned,
            b,
            live,
            0,
            H,
            H,
            BK,
            EXACT,
            RESIDENT,
            PRECISION,
            INTERPRETED,
        )  # [4U, BB]
        a = x.to(tl.float32) * scale[:, None] + shift[:, None] + z * scale_hh[:, None]  # [4U, BB]
        c_new, o = update_cell(a, c, U, BB)
        c = tl.where(live[None, :], c_new, c)  # [U, BB]
        shown = c_new
        if CELL_NORM:
            scale_c = tl.load(affine_c_ptr + at_c, mask=owned_unit, other=0.0)  # [U]
            shift_c = tl.load(affine_c_ptr + directions * steps * H + at_c, mask=owned_unit, other=0.0)
            shown = c_new * scale_c[:, None] + shift_c[:, None]
        h = o * tanh(shown)
        tl.store(state_rows(h_ptr, target, b, unit, H), h.to(h_ptr.dtype.element_ty), mask=stored)
        if KEEP_CELLS:
            tl.store(state_rows(c_ptr, target, b, unit, H), c, mask=stored)
        if SYNC != "none":
            arrive(counter_ptr)
        else:
            tl.debug_barrier()  # one program holds these rows: only its own threads have to meet

    if not KEEP_CELLS:
        tl.store(state_rows(c_ptr, 0, b, unit, H), c, mask=in_seats)
