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
def normalised_input(x_ptr, row0, b, own, ih, weight, live, H: tl.constexpr, NARROW: tl.constexpr):
    """ẑ_x [U, BB, 2, 2] of the rows row0 + b, and with NARROW x itself [BB] (else anything). weight: W_ih's column."""
    if NARROW:
        x = tl.load(x_ptr + row0 + b, mask=live, other=0.0)  # [BB]
        z = x[None, :, None, None] * weight
    else:
        x = live
        z = load_gates(state_rows(x_ptr, row0, b, own[0], 4 * H), own[1][:, None] & live[None, :], H)
    return (z - ih[0]) * ih[1], x


@triton.jit
def normalised_hidden(deviation_ptr, row0, b, own, hh, live, H: tl.constexpr):
    """ẑ_h [U, BB, 2, 2] of the rows row0 + b."""
    z = load_gates(state_rows(deviation_ptr, row0, b, own[0], 4 * H), own[1][:, None] & live[None, :], H)
    return (z - hh[0]) * hh[1]


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
def normalised_cell(c, of_c, CELL_NORM: tl.constexpr):
    """Cell state [U, BB] → ĉ and tanh of what the output gate shows. of_c: mean, 1/σ, γ_c, β_c, each [U, 1]."""
    normalised = c
    shown = c
    if CELL_NORM:
        normalised = (c - of_c[0]) * of_c[1]
        shown = normalised * of_c[2] + of_c[3]
    return normalised, tanh(shown)


@triton.jit
def step_again(
    saved, at, b, live, own, hh, ih, vectors, of_c, H: tl.constexpr, NARROW: tl.constexpr, CELL_NORM: tl.constexpr
):
    """What rows of a step were forward: ẑ_h, ẑ_x, x of one column, gates, c_{t−1}, ĉ and tanh of the shown cell.

    Args:
        saved: pointers to deviations of W_hh h, to W_ih x and to the cell states.
        at: first row of the step in the former two, of c_{t−1} and of c_t.
        b, live: rows of the tile [BB] and which of them exist.
        own: this program's units [U] and which of them exist.
        hh, ih: mean, 1/σ and γ of both norms, [U, 1, 2, 2] each; of_c: mean, 1/σ, γ and β of the cell's, [U, 1].
        vectors: bias and W_ih of one column, [U, 1, 2, 2].
    """
    wanted = own[1][:, None] & live[None, :]  # [U, BB]
    hidden = normalised_hidden(saved[0], at[0], b, own, hh, live, H)  # [U, BB, 2, 2]
    given, x = normalised_input(saved[1], at[0], b, own, ih, vectors[1], live, H, NARROW)
    i, f, g, o = gates_of(hidden * hh[2] + given * ih[2] + vectors[0])  # [U, BB] each
    c_old = tl.load(state_rows(saved[2], at[1], b, own[0], H), mask=wanted, other=0.0)
    c_new = tl.load(state_rows(saved[2], at[2], b, own[0], H), mask=wanted, other=0.0)
    c_hat, through = normalised_cell(c_new, of_c, CELL_NORM)
    return hidden, given, x, i, f, g, o, c_old, c_hat, through


@triton.jit
def output_gradient(given, row0, b, n, n_next, own, H: tl.constexpr, ROWS: tl.constexpr):
    """Gradient of the rows row0 + b of the output, and of h_n where a sequence ends in this step → [U, BB] float32.

    given: pointers to both.
    """
    wanted = own[1][:, None] & (b < n)[None, :]
    last = wanted & (b >= n_next)[None, :]
    d_h = tl.load(state_rows(given[1], 0, b, own[0], H), mask=last, other=0.0).to(tl.float32)
    if ROWS:
        d_h += tl.load(state_rows(given[0], row0, b, own[0], H), mask=wanted, other=0.0).to(tl.float32)
    return d_h


@triton.jit
def first_rows(tile, U: tl.constexpr):
    """The first U rows of a tile [M, BB], whose other rows are zeros."""
    M: tl.constexpr = tile.shape[0]
    if M > U:
        tile = tl.sum(tl.reshape(tile, (M // U, U, tile.shape[1])), 0)
    return tile


@triton.jit
def sum_of_parts(parts_ptr, b, n_next, own, batch, H: tl.constexpr, SPLITS: tl.constexpr):
    """Partial sums [SPLITS, B, H] of one direction, of the rows that were live in the step behind → [U, BB].

    Added in their order.
    """
    wanted = own[1][:, None] & (b < n_next)[None, :]
    place = state_rows(parts_ptr, 0, b, own[0], H)
    total = tl.load(place, mask=wanted, other=0.0, cache_modifier=".cg")  # other programs wrote it
    for _ in tl.static_range(1, SPLITS):
        place += H * batch.to(tl.int64)
        total += tl.load(place, mask=wanted, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def store_norm_gradients(
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
    H: tl.constexpr,
    KEEP_X: tl.constexpr,
    STORE_X: tl.constexpr,
    SUMMED_LATER: tl.constexpr,
):
    """Backward of the hidden and the input norm for the rows row0 + b; gives the input's, [U, BB, 2, 2].

    Args:
        into: pointers to where both go. Of rows n..held zeros are written.
        d_a, hidden, given: gradient of the pre-activations, ẑ_h and ẑ_x, [U, BB, 2, 2].
        hh, ih: mean, 1/σ and γ of both norms, [U, 1, 2, 2].
        sums: over the step's rows, of d_a, d_a·ẑ_h and d_a·ẑ_x, [U, 2, 2].
        inverse: 1/(n+κ).
    """
    live = (b < n)[None, :, None, None]
    stored = own[1][:, None] & (b < held)[None, :]  # [U, BB]
    sum_dy = sums[0][:, None, :, :]
    d_z = norm_gradient(d_a, hidden, hh[1] * hh[2], sum_dy, sums[1][:, None, :, :], inverse)
    d_x = d_a
    if KEEP_X and not SUMMED_LATER:
        d_x = tl.where(live, norm_gradient(d_a, given, ih[1] * ih[2], sum_dy, sums[2][:, None, :, :], inverse), 0.0)
    tl.debug_barrier()  # the same memory may have held what other threads have read above
    store_gates(state_rows(into[0], row0, b, own[0], 4 * H), stored, tl.where(live, d_z, 0.0), H)
    if STORE_X:
        store_gates(state_rows(into[1], row0, b, own[0], 4 * H), stored, d_x, H)
    return d_x
