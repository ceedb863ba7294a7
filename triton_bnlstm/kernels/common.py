"""What the recurrent kernels share: the recurrent product, moments of rows, gates.

Tiles have *hidden units on the first axis and batch rows on the second*, so that a sum over the batch runs along
registers. A program owns U hidden units, that is 4U gate columns; tile row r is gate r % 4 (order i, f, g, o) of unit
r // 4. H and B in comments are the hidden size and the batch, BB the rows of a tile, BK the inner extent of a product.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def owned_columns(U: tl.constexpr, H: tl.constexpr):
    """This program's units [U], its gate columns of 4H [4U], and which of them exist (bool [U], [4U])."""
    first = tl.program_id(0) * U
    unit = first + tl.arange(0, U)  # [U]
    row = tl.arange(0, 4 * U)  # [4U]
    unit_of_row = first + row // 4
    return unit, (row % 4) * H + unit_of_row, unit < H, unit_of_row < H


@triton.jit
def load_weights(w_ptr, row, exists, k0, WIDTH: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr):
    """Columns k0..k0+BK of the rows `row` [M] of a matrix [·, WIDTH] → [M, BK], zero where there is none."""
    k = k0 + tl.arange(0, BK)  # [BK]
    rows = w_ptr + row.to(tl.int64)[:, None] * WIDTH  # [M, 1]
    if EXACT:
        return tl.load(rows + k[None, :], mask=exists[:, None], other=0.0)
    return tl.load(rows + k[None, :], mask=exists[:, None] & (k < WIDTH)[None, :], other=0.0)


@triton.jit
def load_slice(
    w_ptr,
    row,
    exists,
    first,
    WIDTH: tl.constexpr,
    EXTENT: tl.constexpr,
    BK: tl.constexpr,
    EXACT: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """With RESIDENT what `product` reads of the matrix, as a tuple of tiles [M, BK]; else an empty one."""
    tiles = ()
    if RESIDENT:
        for i in tl.static_range((EXTENT + BK - 1) // BK):
            tile = load_weights(w_ptr, row, exists, first + i * BK, WIDTH, BK, EXACT)
            tiles = tiles + (tile,)  # type: ignore[assignment] # noqa: RUF005  # Triton knows no starred tuple
    return tiles


@triton.jit
def load_state(h_ptr, b, live, k0, WIDTH: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr):
    """Columns k0..k0+BK of the rows b of [·, WIDTH], transposed → [BK, BB], zero in rows that are not live."""
    k = k0 + tl.arange(0, BK)  # [BK]
    rows = h_ptr + b.to(tl.int64)[None, :] * WIDTH  # [1, BB]
    # .cg: other programs wrote these rows, and nobody reads them twice: past the L1 cache, where the copy allows it
    if EXACT:
        return tl.load(rows + k[:, None], mask=live[None, :], other=0.0, cache_modifier=".cg")
    return tl.load(rows + k[:, None], mask=live[None, :] & (k < WIDTH)[:, None], other=0.0, cache_modifier=".cg")


@triton.jit
def state_rows(pointer, row0, b, unit, H: tl.constexpr):
    """Pointers [U, BB] to units of the rows row0 + b of a state [·, H]."""
    return pointer + (row0 + b.to(tl.int64))[None, :] * H + unit[:, None]


@triton.jit
def load_input(x_ptr, column, owned, row0, b, live, H: tl.constexpr, NARROW: tl.constexpr):
    """The input of the rows row0 + b: W_ih x [R, 4H] → [4U, BB]; with NARROW x itself [R] → [1, BB].

    As it stands in memory: loaded before the recurrent product and used after it, it should take few registers.
    """
    if NARROW:
        x = tl.load(x_ptr + row0 + b, mask=live, other=0.0)[None, :]
    else:  # one return: Triton compiles what stands behind another one, and wants the same shape there
        rows = x_ptr + (row0 + b.to(tl.int64))[None, :] * (4 * H)  # [1, BB]
        x = tl.load(rows + column[:, None], mask=owned[:, None] & live[None, :], other=0.0)
    return x


@triton.jit
def multiply(w, h, z, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """Z [4U, BB] + w [4U, BK] · h [BK, BB], accumulated in float32."""
    if INTERPRETED:  # the interpreter's product is wrong for bfloat16
        w = w.to(tl.float32)
        h = h.to(tl.float32)
    return tl.dot(w, h, z, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def product(
    h_ptr,
    w_ptr,
    resident,
    row,
    exists,
    b,
    live,
    first,
    WIDTH: tl.constexpr,
    EXTENT: tl.constexpr,
    BK: tl.constexpr,
    EXACT: tl.constexpr,
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Rows `row` [M] of a matrix [·, WIDTH] times the rows b of h [·, WIDTH], over columns first..first+EXTENT.

    resident: with RESIDENT what `load_slice` gave, loaded before the first step; else anything, and the matrix is
        streamed from w_ptr.
    EXACT: all parts of BK columns are within WIDTH.

    Returns:
        [M, BB] float32.
    """
    z = tl.zeros((row.shape[0], b.shape[0]), tl.float32)  # [M, BB]
    if RESIDENT:
        states = ()
        for i in tl.static_range((EXTENT + BK - 1) // BK):  # all loads on their way before a product waits for one
            tile = load_state(h_ptr, b, live, first + i * BK, WIDTH, BK, EXACT)
            states = states + (tile,)  # type: ignore[assignment] # noqa: RUF005
        for i in tl.static_range((EXTENT + BK - 1) // BK):
            z = multiply(resident[i], states[i], z, PRECISION, INTERPRETED)
    else:
        for k0 in range(0, EXTENT, BK):
            w = load_weights(w_ptr, row, exists, first + k0, WIDTH, BK, EXACT)
            h = load_state(h_ptr, b, live, first + k0, WIDTH, BK, EXACT)
            z = multiply(w, h, z, PRECISION, INTERPRETED)
    return z


@triton.jit
def moments_of_live_rows(z, live, n):
    """Mean and sum of squared deviations over the live columns of z [M, BB] → [M], [M]. n of them are live.

    Columns that are not live hold 0.
    """
    mean = tl.sum(z, 1) * (1.0 / n)  # one division for all rows: each takes four instructions more than a product
    deviation = tl.where(live[None, :], z - mean[:, None], 0.0)
    return mean, tl.sum(deviation * deviation, 1)


@triton.jit
def merge_moments(mean, squares, n, other_mean, other_squares, other_n):
    """Chan's merge of (mean, sum of squared deviations, rows) of two sets of rows."""
    total = n + other_n
    gap = other_mean - mean
    share = other_n / total
    return mean + share * gap, squares + other_squares + n * share * gap * gap, total


@triton.jit
def fill_seats(mean, var, population_mean, population_var, weight):
    """Moments of the batch's rows and the phantom rows together; `weight` n/(n+κ) is the batch's share."""
    gap = mean - population_mean
    rest = 1.0 - weight
    return mean - rest * gap, weight * var + rest * population_var + weight * rest * gap * gap


_INTERPRETED = tl.constexpr(not isinstance(owned_columns, triton.runtime.JITFunction))  # it knows no libdevice
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def reciprocal(x):
    """1 / x for x from 1 to infinity, by one instruction. Beyond 2¹²⁶ it may be 0 instead of some 1e-38."""
    return 1.0 / x if _INTERPRETED else libdevice.fast_dividef(1.0, x)


@triton.jit
def sigmoid(x):
    """1 / (1 + e⁻ˣ)."""
    return reciprocal(1.0 + tl.exp2(x * -_LOG2_E))  # `exp` would scale what is not a normal number; here that may be 0


@triton.jit
def tanh(x):
    """By one exponential, right at both infinities; near 0, where that would cancel, by an odd polynomial."""
    far = 1.0 - 2.0 * reciprocal(1.0 + tl.exp2(x * (2.0 * _LOG2_E)))
    y = x * x
    near = x + x * y * (-0.33333240 + y * (0.13324237 - y * 0.05143003))  # of least error up to 1/4: 3e-9 of the result
    return tl.where(y < 0.0625, near, far)


@triton.jit
def split_gates(a, U: tl.constexpr, BB: tl.constexpr):
    """Pre-activations [4U, BB] with gates interleaved → i, f, g, o, each [U, BB]."""
    pairs = tl.permute(tl.reshape(a, (U, 2, 2, BB)), (0, 3, 1, 2))  # [U, BB, 2, 2]: gate = 2·high + low
    i_g, f_o = tl.split(pairs)  # [U, BB, 2] each
    i, g = tl.split(i_g)
    f, o = tl.split(f_o)
    return i, f, g, o


@triton.jit
def update_cell(a, c, U: tl.constexpr, BB: tl.constexpr):
    """Pre-activations [4U, BB] and cell state [U, BB] → new cell state and output gate, [U, BB] each."""
    i, f, g, o = split_gates(a, U, BB)
    return sigmoid(f) * c + sigmoid(i) * tanh(g), sigmoid(o)
