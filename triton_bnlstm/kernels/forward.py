"""The recurrence in training: every step of a layer, both directions, in one kernel.

A program owns U hidden units and every row of the batch, so the statistics of its columns are its own affair; programs
meet only where h_{t−1} is read (see the page in `kernels/__init__.py`). Launched once per step with t1 = t0 + 1 this is
step mode; launched once for all steps, with a grid barrier between them, it is sequence mode.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .barrier import NOT_MET, arrive, wait
from .common import (
    fill_seats,
    load_input,
    load_slice,
    merge_moments,
    moments_of_live_rows,
    owned_columns,
    product,
    state_rows,
    tanh,
    update_cell,
)

_NAME = tl.constexpr(f"forward_kernel {NOT_MET}")


@triton.jit
def used_statistics(mean, var, own_ptr, population_ptr, weight, at, column, plane, owned, eps, SEATS: tl.constexpr):
    """Record the batch's moments and give what normalises: mean and 1/√(var + ε), each [M].

    own_ptr, population_ptr: means, and `plane` elements further the variances; `at`: where this step's are, of
        which `column` [M] are wanted.
    """
    own_ptr += at
    population_ptr += at
    tl.store(own_ptr + column, mean, mask=owned)
    tl.store(own_ptr + plane + column, var, mask=owned)
    if SEATS:
        population_mean = tl.load(population_ptr + column, mask=owned, other=0.0)
        population_var = tl.load(population_ptr + plane + column, mask=owned, other=1.0)
        mean, var = fill_seats(mean, var, population_mean, population_var, weight)
    return mean, tl.rsqrt(var + eps)


@triton.jit(do_not_specialize=["t0", "t1", "steps", "rows", "batch"])
def forward_kernel(
    h_ptr,  # [dirs, B + R, H] states: h_0, then h of all rows; written
    c_ptr,  # [dirs, B + R, H] float32 cell states likewise; written
    w_ptr,  # [dirs, 4H, H] W_hh
    x_ptr,  # [dirs, R, 4H] W_ih x; NARROW: [dirs, R] float32 x less its mean
    scale_ptr,  # [dirs, T, 4H] float32: the input term is x · scale + shift
    shift_ptr,  # [dirs, T, 4H] float32, bias included
    gamma_ptr,  # [dirs, 4H] float32 γ_hh
    own_hh_ptr,  # [2, dirs, T, 4H] float32 mean and variance of W_hh h over the batch; written
    population_hh_ptr,  # [2, dirs, T, 4H] float32, read with SEATS
    weight_ptr,  # [dirs, T] float32 n/(n+κ), read with SEATS
    affine_ptr,  # [2, dirs, H] float32 γ_c and β_c, read with CELL_NORM
    own_c_ptr,  # [2, dirs, T, H] float32, written with CELL_NORM
    population_c_ptr,  # [2, dirs, T, H] float32, read with CELL_NORM and SEATS
    first_ptr,  # [T + 1] int64: first row of h_ptr that step t reads; it writes from first[t + 1]
    count_ptr,  # [T] int32 live rows n of each step, a prefix of its rows
    scratch_ptr,  # [dirs, B, 5H] float32, used with WALK
    deviation_ptr,  # [dirs, R, 4H] W_hh h less its mean over the batch, written with KEEP_DEVIATIONS
    counter_ptr,  # [dirs, 32] int32 zeros, the grid barrier's; a cache line each
    t0,  # first step of this launch
    t1,  # its end
    steps,  # T
    rows,  # R
    batch,  # B
    eps,
    H: tl.constexpr,
    U: tl.constexpr,  # hidden units of a program
    BB: tl.constexpr,  # batch rows of a tile
    BK: tl.constexpr,  # inner extent of a product
    WALK: tl.constexpr,  # the batch is more than one tile
    RESIDENT: tl.constexpr,  # the slice of W_hh stays on chip
    SYNC: tl.constexpr,  # how programs meet between steps: see `barrier.wait`
    PROGRAMS: tl.constexpr,  # programs of one direction
    NARROW: tl.constexpr,
    KEEP_DEVIATIONS: tl.constexpr,
    SEATS: tl.constexpr,  # vacated seats are taken by phantom rows
    CELL_NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Grid (programs, directions). Steps t0..t1 of the recurrence; statistics are those of the batch, step by step.

    With WALK the batch is walked in tiles three times: products and their moments, gates and cells, and with
    CELL_NORM the states, which wait for the cells' moments.
    """
    EXACT: tl.constexpr = H % BK == 0
    direction = tl.program_id(1).to(tl.int64)
    directions = tl.num_programs(1).to(tl.int64)
    unit, column, owned_unit, owned = owned_columns(U, H)  # [U], [4U], [U], [4U]
    h_ptr += direction * (batch + rows) * H
    c_ptr += direction * (batch + rows) * H
    w_ptr += direction * 4 * H * H
    x_ptr += direction * rows * (1 if NARROW else 4 * H)
    deviation_ptr += direction * rows * 4 * H
    counter_ptr += direction * 32
    plane_hh, plane_c = directions * steps * 4 * H, directions * steps * H
    b0 = tl.arange(0, BB)  # [BB]

    gamma = tl.load(gamma_ptr + direction * 4 * H + column, mask=owned, other=0.0)  # [4U]
    if CELL_NORM:
        gamma_c = tl.load(affine_ptr + direction * H + unit, mask=owned_unit, other=0.0)  # [U]
        beta_c = tl.load(affine_ptr + (directions + direction) * H + unit, mask=owned_unit, other=0.0)
    resident = load_slice(w_ptr, column, owned, 0, H, H, BK, EXACT, RESIDENT)  # tiles [4U, BK]
    if not WALK:  # the cell state stays in registers from step to step
        row0 = tl.load(first_ptr + t0)
        in_seats = owned_unit[:, None] & (b0 < tl.load(count_ptr + t0))[None, :]
        c = tl.load(state_rows(c_ptr, row0, b0, unit, H), mask=in_seats, other=0.0)  # [U, BB]

    for t in range(t0, t1):
        n = tl.load(count_ptr + t)
        source, target = tl.load(first_ptr + t), tl.load(first_ptr + t + 1)  # rows of h_{t−1} and of h_t
        at_step = direction * steps + t
        at_hh, at_c = at_step * 4 * H, at_step * H  # added to pointers, so that columns need 32 bits
        scale = tl.load(scale_ptr + at_hh + column, mask=owned, other=0.0)  # [4U]
        shift = tl.load(shift_ptr + at_hh + column, mask=owned, other=0.0)
        weight = 1.0
        if SEATS:
            weight = tl.load(weight_ptr + at_step)
        count = tl.maximum(n, 1).to(tl.float32)
        share = 1.0 / count

        live = b0 < n  # [BB]
        if not WALK:  # before the wait: the input does not depend on the other programs
            x = load_input(x_ptr, column, owned, target - batch, b0, live, H, NARROW)  # [4U, BB] or [1, BB]
        if SYNC != "none":
            wait(counter_ptr, (t - t0) * PROGRAMS, SYNC, _NAME)

        if not WALK:
            stored = owned_unit[:, None] & live[None, :]  # [U, BB]
            z = product(
                h_ptr + source * H,
                w_ptr,
                resident,
                column,
                owned,
                b0,
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
            mean, squares = moments_of_live_rows(z, live, count)
            if KEEP_DEVIATIONS:
                place = state_rows(deviation_ptr, target - batch, b0, column, 4 * H)  # [4U, BB]
                deviation = (z - mean[:, None]).to(deviation_ptr.dtype.element_ty)
                tl.store(place, deviation, mask=owned[:, None] & live[None, :])
            mean, rstd = used_statistics(
                mean, squares * share, own_hh_ptr, population_hh_ptr, weight, at_hh, column, plane_hh, owned, eps, SEATS
            )
            a = x.to(tl.float32) * scale[:, None] + shift[:, None]
            a += (z - mean[:, None]) * (gamma * rstd)[:, None]  # [4U, BB]
            c_new, o = update_cell(a, c, U, BB)
            c = tl.where(live[None, :], c_new, 0.0)  # [U, BB]; a finished row's last state is in c_ptr
            tl.store(state_rows(c_ptr, target, b0, unit, H), c, mask=stored)
            shown = c
            if CELL_NORM:
                mean, squares = moments_of_live_rows(c, live, count)
                mean, rstd = used_statistics(
                    mean,
                    squares * share,
                    own_c_ptr,
                    population_c_ptr,
                    weight,
                    at_c,
                    unit,
                    plane_c,
                    owned_unit,
                    eps,
                    SEATS,
                )
                shown = (c - mean[:, None]) * (gamma_c * rstd)[:, None] + beta_c[:, None]
            h = o * tanh(shown)
            tl.store(state_rows(h_ptr, target, b0, unit, H), h.to(h_ptr.dtype.element_ty), mask=stored)
        else:
            # Scratch of row b: W_hh h of all gates [4H], then the output gate [H]. A program reads what it wrote.
            scratch = scratch_ptr + direction * batch * (5 * H)
            mean = tl.zeros((4 * U,), tl.float32)
            squares = tl.zeros((4 * U,), tl.float32)
            seen = 0.0
            for start in range(0, n, BB):
                b = start + b0
                live = b < n
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
                )
                held = tl.minimum(n - start, BB).to(tl.float32)
                tile_mean, tile_squares = moments_of_live_rows(z, live, held)
                mean, squares, seen = merge_moments(mean, squares, seen, tile_mean, tile_squares, held)
                place = scratch + b.to(tl.int64)[None, :] * (5 * H) + column[:, None]
                tl.store(place, z, mask=owned[:, None] & live[None, :])
            own_mean = mean
            mean, rstd = used_statistics(
                mean, squares * share, own_hh_ptr, population_hh_ptr, weight, at_hh, column, plane_hh, owned, eps, SEATS
            )
            tl.debug_barrier()  # the scratch is read by other threads than wrote it

            mean_c = tl.zeros((U,), tl.float32)
            squares_c = tl.zeros((U,), tl.float32)
            seen = 0.0
            for start in range(0, n, BB):
                b = start + b0
                live = b < n
                stored = owned_unit[:, None] & live[None, :]
                rows_of_scratch = scratch + b.to(tl.int64)[None, :] * (5 * H)  # [1, BB]
                z = tl.load(rows_of_scratch + column[:, None], mask=owned[:, None] & live[None, :], other=0.0)
                if KEEP_DEVIATIONS:
                    place = state_rows(deviation_ptr, target - batch, b, column, 4 * H)  # [4U, BB]
                    deviation = (z - own_mean[:, None]).to(deviation_ptr.dtype.element_ty)
                    tl.store(place, deviation, mask=owned[:, None] & live[None, :])
                x = load_input(x_ptr, column, owned, target - batch, b, live, H, NARROW)
                a = x.to(tl.float32) * scale[:, None] + shift[:, None]
                a += (z - mean[:, None]) * (gamma * rstd)[:, None]
                c_old = tl.load(state_rows(c_ptr, source, b, unit, H), mask=stored, other=0.0)
                c_new, o = update_cell(a, c_old, U, BB)
                c_new = tl.where(live[None, :], c_new, 0.0)
                tl.store(state_rows(c_ptr, target, b, unit, H), c_new, mask=stored)
                if CELL_NORM:  # h has to wait for the moments of all tiles
                    held = tl.minimum(n - start, BB).to(tl.float32)
                    tile_mean, tile_squares = moments_of_live_rows(c_new, live, held)
                    mean_c, squares_c, seen = merge_moments(mean_c, squares_c, seen, tile_mean, tile_squares, held)
                    tl.store(rows_of_scratch + 4 * H + unit[:, None], o, mask=stored)
                else:
                    h = o * tanh(c_new)
                    tl.store(state_rows(h_ptr, target, b, unit, H), h.to(h_ptr.dtype.element_ty), mask=stored)
            if CELL_NORM:
                var_c = squares_c * share
                mean_c, rstd_c = used_statistics(
                    mean_c, var_c, own_c_ptr, population_c_ptr, weight, at_c, unit, plane_c, owned_unit, eps, SEATS
                )
                tl.debug_barrier()
                for start in range(0, n, BB):
                    b = start + b0
                    stored = owned_unit[:, None] & (b < n)[None, :]
                    c_new = tl.load(state_rows(c_ptr, target, b, unit, H), mask=stored, other=0.0)
                    rows_of_scratch = scratch + b.to(tl.int64)[None, :] * (5 * H)
                    o = tl.load(rows_of_scratch + 4 * H + unit[:, None], mask=stored, other=0.0)
                    shown = (c_new - mean_c[:, None]) * (gamma_c * rstd_c)[:, None] + beta_c[:, None]
                    h = o * tanh(shown)
                    tl.store(state_rows(h_ptr, target, b, unit, H), h.to(h_ptr.dtype.element_ty), mask=stored)

        if SYNC != "none":
            arrive(counter_ptr)
        else:
            tl.debug_barrier()  # one program holds the recurrence: only its own threads have to meet
