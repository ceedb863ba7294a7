"""Pieces of the recurrence's backward: gates as one tile, what a step was forward, gradients of gates and norms.

A tile of pre-activations is [U, BB, 2, 2]: units, batch rows, and the gate 2·high + low on the last two axes, which lie
in one thread, so that joining and parting gates moves nothing between threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import sigmoid, state_rows, tanh


@triton.jit
def join_gates(i, f, g, o):
    """Four tiles → one whose last two axes say which gate: high, low of 2·high + low."""
    return tl.join(tl.join(i, g), tl.join(f, o))


@triton.jit
def part_gates(tile):
    """[.., 2, 2] → i, f, g, o."""
    i_g, f_o = tl.split(tile)
    i, g = tl.split(i_g)
    f, o = tl.split(f_o)
    return i, f, g, o


@triton.jit
def gate_columns(unit, H: tl.constexpr):
    """Columns of 4H of the units [U] → [U, 2, 2], gates as `join_gates` has them."""
    gate = 2 * tl.arange(0, 2)[:, None] + tl.arange(0, 2)[None, :]  # [2, 2]
    return unit[:, None, None] + gate[None, :, :] * H


@triton.jit
def load_columns(pointer, column, owned):
    """A row [4H] → [U, 1, 2, 2], to meet tiles [U, BB, 2, 2]."""
    return tl.load(pointer + column, mask=owned, other=0.0)[:, None, :, :]


@triton.jit
def load_gates(place, wanted, H: tl.constexpr):
    """place: pointers [U, BB] to gate i, the others are H apart → [U, BB, 2, 2] float32, zero where not wanted."""
    return join_gates(
        tl.load(place, mask=wanted, other=0.0),
        tl.load(place + H, mask=wanted, other=0.0),
        tl.load(place + 2 * H, mask=wanted, other=0.0),
        tl.load(place + 3 * H, mask=wanted, other=0.0),
    ).to(tl.float32)


@triton.jit
def store_gates(place, wanted, tile, H: tl.constexpr):
    """The reverse of `load_gates`, in the memory's dtype."""
    i, f, g, o = part_gates(tile.to(place.dtype.element_ty))
    tl.store(place, i, mask=wanted)
    tl.store(place + H, f, mask=wanted)
    tl.store(place + 2 * H, g, mask=wanted)
    tl.store(place + 3 * H, o, mask=wanted)


@triton.jit
def normalised_input(
    x_ptr, row0, b, live, unit, wanted, column_weight, mean, rstd, H: tl.constexpr, NARROW: tl.constexpr
):
    """ẑ_x [U, BB, 2, 2] of the rows row0 + b, and with NARROW x itself [BB] (else anything)."""
    if NARROW:
        x = tl.load(x_ptr + row0 + b, mask=live, other=0.0)  # [BB]
        z = x[None, :, None, None] * column_weight
    else:
        x = live
        z = load_gates(state_rows(x_ptr, row0, b, unit, 4 * H), wanted, H)
    return (z - mean) * rstd, x


@triton.jit
def gates_of(a):
    """Pre-activations [U, BB, 2, 2] → i, f, g, o after their non-linearities."""
    i, f, g, o = part_gates(a)
    return sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)


@triton.jit
def norm_gradient(dy, normalised, scale, sum_dy, sum_product, inverse):
    """Backward of y = γ ẑ: γ/σ · (dy − Σdy/(n+κ) − ẑ Σ(dy ẑ)/(n+κ)); inverse is 1/(n+κ), 0 for constants."""
    return scale * (dy - inverse * sum_dy - normalised * (inverse * sum_product))


@triton.jit
def pre_activation_gradient(d_h, d_c, through, i, f, g, o, c_old):
    """Gradient of the gates' pre-activations [U, BB, 2, 2]; through: tanh of the (normalised) cell state."""
    return join_gates(
        d_c * g * i * (1.0 - i), d_c * c_old * f * (1.0 - f), d_c * i * (1.0 - g * g), d_h * through * o * (1.0 - o)
    )


@triton.jit
def sum_of_parts(parts_ptr, b, unit, wanted, batch, H: tl.constexpr, SPLITS: tl.constexpr):
    """Partial sums [SPLITS, H, B] of one direction → [U, BB], added in their order."""
    place = parts_ptr + unit.to(tl.int64)[:, None] * batch + b[None, :]
    total = tl.load(place, mask=wanted, other=0.0, cache_modifier=".cg")  # other programs wrote it
    for _ in tl.static_range(1, SPLITS):
        place += H * batch.to(tl.int64)
        total += tl.load(place, mask=wanted, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def normalised_cell(c, norm, CELL_NORM: tl.constexpr):
    """Cell state [U, BB] → ĉ and tanh of what the output gate shows. norm: mean, 1/σ, γ_c, β_c, each [U, 1]."""
    normalised = c
    shown = c
    if CELL_NORM:
        normalised = (c - norm[0]) * norm[1]
        shown = normalised * norm[2] + norm[3]
    return normalised, tanh(shown)


@triton.jit
def step_again(
    deviation_ptr,
    x_ptr,
    c_ptr,
    row0,
    source,
    target,
    b,
    live,
    unit,
    owned_unit,
    hh,
    ih,
    bias,
    column_weight,
    cell_norm,
    H: tl.constexpr,
    NARROW: tl.constexpr,
    CELL_NORM: tl.constexpr,
):
    """What rows of a step were forward: ẑ_h, ẑ_x, x of one column, gates, c_{t−1}, ĉ and tanh of the shown cell.

    hh, ih: mean, 1/σ and γ of both norms, [U, 1, 2, 2] each.
    """
    wanted = owned_unit[:, None] & live[None, :]  # [U, BB]
    hidden = (load_gates(state_rows(deviation_ptr, row0, b, unit, 4 * H), wanted, H) - hh[0]) * hh[1]  # [U, BB, 2, 2]
    given, x = normalised_input(x_ptr, row0, b, live, unit, wanted, column_weight, ih[0], ih[1], H, NARROW)
    i, f, g, o = gates_of(hidden * hh[2] + given * ih[2] + bias)  # [U, BB] each
    c_old = tl.load(state_rows(c_ptr, source, b, unit, H), mask=wanted, other=0.0)
    c_new = tl.load(state_rows(c_ptr, target, b, unit, H), mask=wanted, other=0.0)
    c_hat, through = normalised_cell(c_new, cell_norm, CELL_NORM)
    return hidden, given, x, i, f, g, o, c_old, c_hat, through


@triton.jit
def load_output_gradient(
    d_rows_ptr, d_h_ptr, row0, b, live, n_next, unit, owned_unit, H: tl.constexpr, ROWS: tl.constexpr
):
    """Gradient of the rows row0 + b of the output, and of h_n where a sequence ends in this step → [U, BB] float32."""
    wanted = owned_unit[:, None] & live[None, :]
    last = wanted & (b >= n_next)[None, :]
    d_h = tl.load(state_rows(d_h_ptr, 0, b, unit, H), mask=last, other=0.0).to(tl.float32)
    if ROWS:
        d_h += tl.load(state_rows(d_rows_ptr, row0, b, unit, H), mask=wanted, other=0.0).to(tl.float32)
    return d_h
