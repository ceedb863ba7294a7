"""The recurrence backwards: every step of a layer, both directions, in one kernel, with both batch norms.

A program owns the U hidden units that it owns forward, and every row of the batch, so the column sums that a batch
norm's backward needs are its own affair. What programs exchange is dz_t, the gradient of W_hh h_{t−1}, of which
dh_{t−1} = W_hhᵀ dz_t needs all columns. How that product is divided is the layout's affair:

    SPLITS · GROUPS = 1   a program multiplies for its own units: it reads all of dz_t, and programs meet once a step
    else                  a program takes one of SPLITS parts of the inner extent 4H and one of GROUPS parts of the
                          rows, for CW = U·SPLITS·GROUPS units; partial sums are exchanged behind a second barrier

Launched once for all steps this is sequence mode; in step mode a step is one launch, or two where the product is
divided: PRODUCT alone, then CELLS alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .barrier import NOT_MET, arrive, wait
from .common import load_slice, owned_columns, product, state_rows
from .gradients import (
    first_rows,
    gate_columns,
    load_columns,
    load_gates,
    norm_gradient,
    normalised_hidden,
    normalised_input,
    output_gradient,
    pre_activation_gradient,
    step_again,
    store_gates,
    store_norm_gradients,
    sum_of_parts,
)

_NAME = tl.constexpr(f"backward_kernel {NOT_MET}")


@triton.jit
def product_of_rows(
    d_z_ptr,
    w_ptr,
    resident,
    which,
    b,
    n,
    H: tl.constexpr,
    EXTENT: tl.constexpr,
    BK: tl.constexpr,
    EXACT: tl.constexpr,
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """W_hhᵀ dz for the first n of the rows b of d_z_ptr [·, 4H] → [MADE, BB] float32.

    which: units of h [MADE], which of them exist, and where this program's part of the inner extent begins.
    """
    return product(
        d_z_ptr,
        w_ptr,
        resident,
        which[0],
        which[1],
        b,
        b < n,
        which[2],
        4 * H,
        EXTENT,
        BK,
        EXACT,
        RESIDENT,
        PRECISION,
        INTERPRETED,
    )


@triton.jit(do_not_specialize=["t0", "t1", "steps", "rows", "batch", "block_rows", "block_first"])
def backward_kernel(
    d_z_ptr,  # [dirs, block_rows, 4H] gradient of W_hh h; written. May be the memory of deviation_ptr
    d_x_ptr,  # [dirs, R, 4H] gradient of W_ih x, or with SUMMED_LATER of the pre-activation; written with STORE_X
    deviation_ptr,  # [dirs, block_rows, 4H] W_hh h less some mean
    x_ptr,  # [dirs, R, 4H] W_ih x; NARROW: [dirs, R] float32. May be the memory of d_x_ptr
    c_ptr,  # [dirs, B + R, H] float32 cell states: c_0, then c of all rows
    w_ptr,  # [dirs, H, 4H] W_hh transposed
    d_rows_ptr,  # [dirs, R, H] gradient of the output, read with ROWS
    d_h_ptr,  # [dirs, B, H] gradient of h_n
    d_c_ptr,  # [dirs, B, H] float32 gradient of c_n; becomes that of c_0
    hh_ptr,  # [2, dirs, T, 4H] float32 mean, relative to what deviation_ptr holds, and 1/σ of the hidden norm
    ih_ptr,  # [2, dirs, T, 4H] float32 mean, relative to what x_ptr holds, and 1/σ of the input norm
    of_c_ptr,  # [2, dirs, T, H] float32 mean and 1/σ of the cell norm, read with CELL_NORM
    vectors_ptr,  # [4, dirs, 4H] float32 γ_hh, γ_ih, bias; W_ih of the one column, read with NARROW
    affine_ptr,  # [2, dirs, H] float32 γ_c and β_c, read with CELL_NORM
    inverse_ptr,  # [dirs, T] float32 1/(n+κ), 0 where statistics are constants
    sums_ptr,  # [4, dirs, T, 4H] float32 sums over a step's rows of da, da·ẑ_h, da·ẑ_x; dz_x·x with COLUMN; written
    sums_c_ptr,  # [2, dirs, T, H] float32 sums of dy and dy·ĉ of the cell norm; written with CELL_NORM
    first_ptr,  # [T + 1] int64: step t reads rows of c_ptr from first[t] on; its own are from first[t + 1] on
    count_ptr,  # [T] int32 live rows n of each step, a prefix of its rows
    parts_ptr,  # [dirs, SPLITS, B, H] float32, used where the product is divided
    scratch_ptr,  # [dirs, B, 5H] float32, used with WALK
    counter_ptr,  # [dirs, 32] int32 zeros, the grid barrier's; a cache line each
    t0,  # first step of this launch, the last one to be done
    t1,  # its end
    steps,  # T
    rows,  # R
    batch,  # B
    block_rows,  # rows of d_z_ptr and deviation_ptr: those of steps t0..t1, and behind them step t1's, or all R
    block_first,  # the first of them, among R
    H: tl.constexpr,
    U: tl.constexpr,  # hidden units of a program
    BB: tl.constexpr,  # batch rows of a tile
    BK: tl.constexpr,  # inner extent of a product
    SPLITS: tl.constexpr,  # parts of the inner extent 4H
    GROUPS: tl.constexpr,  # parts of the rows
    PB: tl.constexpr,  # batch rows of a tile of the divided product
    ONE_TILE: tl.constexpr,  # which is all that a program has of them
    PRODUCT: tl.constexpr,  # this launch computes dh
    CELLS: tl.constexpr,  # this launch computes the rest of the step
    WALK: tl.constexpr,  # the batch is more than one tile
    RESIDENT: tl.constexpr,  # the program's part of W_hhᵀ stays on chip
    SYNC: tl.constexpr,  # how programs meet: see `barrier.wait`
    PROGRAMS: tl.constexpr,  # programs of one direction
    NARROW: tl.constexpr,  # the input is one column
    ROWS: tl.constexpr,  # the output has a gradient
    STORE_X: tl.constexpr,
    SUMMED_LATER: tl.constexpr,  # the input norm's statistics are those of all steps, and so are its sums
    COLUMN: tl.constexpr,  # the gradient of W_ih's one column is wanted
    FILL: tl.constexpr,  # every step holds B rows; the gradients of those that are not live are zeros
    CELL_NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Grid (programs, directions). Steps t1 − 1 … t0 of the recurrence, backwards.

    With WALK the batch is walked in tiles three times: with CELL_NORM for that norm's sums, then for gradients of
    pre-activations and their sums, then for those of W_hh h and W_ih x.
    """
    DIVIDED: tl.constexpr = SPLITS * GROUPS > 1
    CW: tl.constexpr = U * SPLITS * GROUPS
    MADE: tl.constexpr = CW if CW >= 16 else 16  # rows of a product; what is too many of them is zeros
    EXTENT: tl.constexpr = ((4 * H + BK - 1) // BK + SPLITS - 1) // SPLITS * BK
    EXACT: tl.constexpr = SPLITS * EXTENT == 4 * H
    KEEP_X: tl.constexpr = STORE_X or COLUMN
    direction = tl.program_id(1).to(tl.int64)
    directions = tl.num_programs(1).to(tl.int64)
    _, _, owned_unit, _ = owned_columns(U, H)  # [U]
    # Said to begin anywhere: else a thread loads neighbouring units at once, and has each unit's sums to exchange with
    # other threads. So it holds one unit, and what rows it holds more are added up before.
    unit = tl.multiple_of(tl.program_id(0) * U + tl.arange(0, U), 1)
    in_block = (direction * block_rows - block_first) * 4 * H
    d_z_ptr += in_block
    d_x_ptr += direction * rows * 4 * H
    deviation_ptr += in_block
    x_ptr += direction * rows * (1 if NARROW else 4 * H)
    c_ptr += direction * (batch + rows) * H
    w_ptr += direction * 4 * H * H
    d_rows_ptr += direction * rows * H
    d_h_ptr += direction * batch * H
    d_c_ptr += direction * batch * H
    parts_ptr += direction * SPLITS * H * batch
    counter_ptr += direction * 32
    plane_hh, plane_c = directions * steps * 4 * H, directions * steps * H
    own, saved = (unit, owned_unit), (deviation_ptr, x_ptr, c_ptr)
    outputs, into = (d_rows_ptr, d_h_ptr), (d_z_ptr, d_x_ptr)
    b0 = tl.arange(0, BB)  # [BB]

    # this program's part of the product: CW units, EXTENT of the inner extent, every GROUPS-th tile of the rows
    place = tl.program_id(0)
    part, group = place % SPLITS, place // SPLITS % GROUPS
    made = place // (SPLITS * GROUPS) * CW + tl.arange(0, MADE)  # [MADE] units of h
    exists = (made < H) & (tl.arange(0, MADE) < CW)
    which = (made, exists, part * EXTENT)
    own_part = parts_ptr + part.to(tl.int64) * batch * H
    resident = ()
    if PRODUCT:
        resident = load_slice(w_ptr, made, exists, which[2], 4 * H, EXTENT, BK, EXACT, RESIDENT)  # of [MADE, BK]

    if CELLS:
        column = gate_columns(unit, H)  # [U, 2, 2]
        owned = owned_unit[:, None, None] & (column >= 0)
        of_columns = vectors_ptr + direction * 4 * H
        gamma_hh = load_columns(of_columns, column, owned)  # [U, 1, 2, 2]
        gamma_ih = load_columns(of_columns + directions * 4 * H, column, owned)
        bias = load_columns(of_columns + 2 * directions * 4 * H, column, owned)
        vectors = (bias, bias)
        if NARROW:
            vectors = (bias, load_columns(of_columns + 3 * directions * 4 * H, column, owned))
        gamma_c = tl.zeros((U, 1), tl.float32)
        beta_c = tl.zeros((U, 1), tl.float32)
        if CELL_NORM:
            gamma_c = tl.load(affine_ptr + direction * H + unit, mask=owned_unit, other=0.0)[:, None]
            beta_c = tl.load(affine_ptr + (directions + direction) * H + unit, mask=owned_unit, other=0.0)[:, None]
        if not WALK:  # stays in registers from step to step; rows that have not begun hold the gradient of c_n
            seated = owned_unit[:, None] & (b0 < batch)[None, :]
            d_c = tl.load(state_rows(d_c_ptr, 0, b0, unit, H), mask=seated, other=0.0)  # [U, BB]

    for done in range(t1 - t0):
        t = t1 - 1 - done
        n = tl.load(count_ptr + t)
        n_next = tl.load(count_ptr + t + 1, mask=t + 1 < steps, other=0)
        source, target = tl.load(first_ptr + t), tl.load(first_ptr + t + 1)  # rows of c_{t−1} and of c_t
        row0 = target - batch
        d_z_next = d_z_ptr + (tl.load(first_ptr + t + 2, mask=t + 1 < steps, other=batch) - batch) * (4 * H)
        held = batch if FILL else n  # rows of this step in d_z and d_x
        at_step = direction * steps + t

        if CELLS:
            at_hh = at_step * 4 * H + column  # [U, 2, 2]
            at_c = at_step * H + unit  # [U]
            at = (row0, source, target)
            inverse = tl.load(inverse_ptr + at_step)
            hh = (load_columns(hh_ptr, at_hh, owned), load_columns(hh_ptr + plane_hh, at_hh, owned), gamma_hh)
            ih = (load_columns(ih_ptr, at_hh, owned), load_columns(ih_ptr + plane_hh, at_hh, owned), gamma_ih)
            of_c = (gamma_c, gamma_c, gamma_c, beta_c)
            if CELL_NORM:
                mean_c = tl.load(of_c_ptr + at_c, mask=owned_unit, other=0.0)[:, None]  # [U, 1]
                rstd_c = tl.load(of_c_ptr + plane_c + at_c, mask=owned_unit, other=0.0)[:, None]
                of_c = (mean_c, rstd_c, gamma_c, beta_c)
            scale_c = of_c[1] * gamma_c
            live = b0 < n  # [BB]
            if not WALK:  # before the wait: nothing here depends on the other programs
                hidden, given, x, i, f, g, o, c_old, c_hat, through = step_again(
                    saved, at, b0, live, own, hh, ih, vectors, of_c, H, NARROW, CELL_NORM
                )

        if SYNC != "none":
            wait(counter_ptr, done * PROGRAMS * (2 if DIVIDED else 1), SYNC, _NAME)
        if PRODUCT and DIVIDED:
            if ONE_TILE:
                row_of_part = group * PB + tl.arange(0, PB)
                partial = product_of_rows(
                    d_z_next,
                    w_ptr,
                    resident,
                    which,
                    row_of_part,
                    n_next,
                    H,
                    EXTENT,
                    BK,
                    EXACT,
                    RESIDENT,
                    PRECISION,
                    INTERPRETED,
                )  # [MADE, PB]
                tl.store(
                    state_rows(own_part, 0, row_of_part, made, H),
                    partial,
                    mask=exists[:, None] & (row_of_part < n_next)[None, :],
                )
            else:
                for start in range(group * PB, n_next, GROUPS * PB):
                    row_of_part = start + tl.arange(0, PB)
                    partial = product_of_rows(
                        d_z_next,
                        w_ptr,
                        resident,
                        which,
                        row_of_part,
                        n_next,
                        H,
                        EXTENT,
                        BK,
                        EXACT,
                        RESIDENT,
                        PRECISION,
                        INTERPRETED,
                    )
                    tl.store(
                        state_rows(own_part, 0, row_of_part, made, H),
                        partial,
                        mask=exists[:, None] & (row_of_part < n_next)[None, :],
                    )
            if SYNC != "none":
                arrive(counter_ptr)
                wait(counter_ptr, (2 * done + 1) * PROGRAMS, SYNC, _NAME)

        if CELLS and not WALK:
            d_h = output_gradient(outputs, row0, b0, n, n_next, own, H, ROWS)  # [U, BB]
            if DIVIDED:
                d_h += sum_of_parts(parts_ptr, b0, n_next, own, batch, H, SPLITS)
            else:
                partial = product_of_rows(
                    d_z_next, w_ptr, resident, which, b0, n_next, H, EXTENT, BK, EXACT, RESIDENT, PRECISION, INTERPRETED
                )
                d_h += first_rows(partial, U)
            d_c_new = d_h * o * (1.0 - through * through)
            if CELL_NORM:
                sum_c, product_c = tl.sum(d_c_new, 1), tl.sum(d_c_new * c_hat, 1)  # [U]
                tl.store(sums_c_ptr + at_c, sum_c, mask=owned_unit)
                tl.store(sums_c_ptr + plane_c + at_c, product_c, mask=owned_unit)
                d_c_new = norm_gradient(d_c_new, c_hat, scale_c, sum_c[:, None], product_c[:, None], inverse)
            d_c_new = tl.where(live[None, :], d_c + d_c_new, 0.0)
            d_a = pre_activation_gradient(d_h, d_c_new, through, i, f, g, o, c_old)  # [U, BB, 2, 2]
            d_c = tl.where(live[None, :], d_c_new * f, d_c)  # a finished row's passes through
            sums = (tl.sum(d_a, 1), tl.sum(d_a * hidden, 1), tl.sum(d_a * given, 1))  # [U, 2, 2] each
            d_x = store_norm_gradients(
                into,
                row0,
                b0,
                n,
                held,
                own,
                d_a,
                hidden,
                given,
                hh,
                ih,
                sums,
                inverse,
                H,
                KEEP_X,
                STORE_X,
                SUMMED_LATER,
            )
            if COLUMN:
                tl.store(sums_ptr + 3 * plane_hh + at_hh, tl.sum(d_x * x[None, :, None, None], 1), mask=owned)
            tl.store(sums_ptr + at_hh, sums[0], mask=owned)
            tl.store(sums_ptr + plane_hh + at_hh, sums[1], mask=owned)
            tl.store(sums_ptr + 2 * plane_hh + at_hh, sums[2], mask=owned)

        if CELLS and WALK:
            # Scratch of row b: gradients of pre-activations [4H], then dh [H]. A program reads what it wrote.
            scratch = scratch_ptr + direction * batch * (5 * H)
            sum_c = tl.zeros((U,), tl.float32)
            product_c = tl.zeros((U,), tl.float32)
            for start in range(0, n, BB):
                b = start + b0
                live = b < n
                wanted = owned_unit[:, None] & live[None, :]  # [U, BB]
                d_h = output_gradient(outputs, row0, b, n, n_next, own, H, ROWS)
                if DIVIDED:
                    d_h += sum_of_parts(parts_ptr, b, n_next, own, batch, H, SPLITS)
                else:
                    partial = product_of_rows(
                        d_z_next,
                        w_ptr,
                        resident,
                        which,
                        b,
                        n_next,
                        H,
                        EXTENT,
                        BK,
                        EXACT,
                        RESIDENT,
                        PRECISION,
                        INTERPRETED,
                    )
                    d_h += first_rows(partial, U)
                tl.store(state_rows(scratch + 4 * H, 0, b, unit, 5 * H), d_h, mask=wanted)
                if CELL_NORM:
                    hidden, given, x, i, f, g, o, c_old, c_hat, through = step_again(
                        saved, at, b, live, own, hh, ih, vectors, of_c, H, NARROW, CELL_NORM
                    )
                    d_c_new = d_h * o * (1.0 - through * through)
                    sum_c += tl.sum(d_c_new, 1)
                    product_c += tl.sum(d_c_new * c_hat, 1)
            if CELL_NORM:
                tl.store(sums_c_ptr + at_c, sum_c, mask=owned_unit)
                tl.store(sums_c_ptr + plane_c + at_c, product_c, mask=owned_unit)
            tl.debug_barrier()  # the scratch is read by other threads than wrote it

            sum_dy = tl.zeros((U, 2, 2), tl.float32)
            sum_hidden = tl.zeros((U, 2, 2), tl.float32)
            sum_given = tl.zeros((U, 2, 2), tl.float32)
            for start in range(0, n, BB):
                b = start + b0
                live = b < n
                wanted = owned_unit[:, None] & live[None, :]
                hidden, given, x, i, f, g, o, c_old, c_hat, through = step_again(
                    saved, at, b, live, own, hh, ih, vectors, of_c, H, NARROW, CELL_NORM
                )
                d_h = tl.load(state_rows(scratch + 4 * H, 0, b, unit, 5 * H), mask=wanted, other=0.0)
                d_c_new = d_h * o * (1.0 - through * through)
                if CELL_NORM:
                    d_c_new = norm_gradient(d_c_new, c_hat, scale_c, sum_c[:, None], product_c[:, None], inverse)
                d_c_place = state_rows(d_c_ptr, 0, b, unit, H)
                d_c_new = tl.where(live[None, :], tl.load(d_c_place, mask=wanted, other=0.0) + d_c_new, 0.0)
                d_a = pre_activation_gradient(d_h, d_c_new, through, i, f, g, o, c_old)
                tl.debug_barrier()  # where a tile is small, several threads have read the same place
                tl.store(d_c_place, d_c_new * f, mask=wanted)
                store_gates(state_rows(scratch, 0, b, unit, 5 * H), wanted, d_a, H)
                sum_dy += tl.sum(d_a, 1)
                sum_hidden += tl.sum(d_a * hidden, 1)
                sum_given += tl.sum(d_a * given, 1)
            tl.debug_barrier()

            sums = (sum_dy, sum_hidden, sum_given)
            sum_column = tl.zeros((U, 2, 2), tl.float32)
            for start in range(0, held, BB):
                b = start + b0
                live = b < n
                d_a = load_gates(state_rows(scratch, 0, b, unit, 5 * H), owned_unit[:, None] & live[None, :], H)
                hidden = normalised_hidden(deviation_ptr, row0, b, own, hh, live, H)
                given, x = normalised_input(x_ptr, row0, b, own, ih, vectors[1], live, H, NARROW)
                d_x = store_norm_gradients(
                    into,
                    row0,
                    b,
                    n,
                    held,
                    own,
                    d_a,
                    hidden,
                    given,
                    hh,
                    ih,
                    sums,
                    inverse,
                    H,
                    KEEP_X,
                    STORE_X,
                    SUMMED_LATER,
                )
                if COLUMN:
                    sum_column += tl.sum(d_x * x[None, :, None, None], 1)
            tl.store(sums_ptr + at_hh, sum_dy, mask=owned)
            tl.store(sums_ptr + plane_hh + at_hh, sum_hidden, mask=owned)
            tl.store(sums_ptr + 2 * plane_hh + at_hh, sum_given, mask=owned)
            if COLUMN:
                tl.store(sums_ptr + 3 * plane_hh + at_hh, sum_column, mask=owned)

        if SYNC != "none":
            arrive(counter_ptr)
        else:
            tl.debug_barrier()  # one program holds the recurrence: only its own threads have to meet

    if CELLS and not WALK:
        tl.store(state_rows(d_c_ptr, 0, b0, unit, H), d_c, mask=seated)
