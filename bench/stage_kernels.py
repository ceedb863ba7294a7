"""Stand-ins for stages of the recurrent kernels, with the signatures and shapes of what they take the place of.

Each does next to nothing, but what it gives differs from element to element and from step to step, and the compiler
does not know it: else what comes behind would be computed once for a whole tile, before the loop, or not at all. Sums
over the batch are the exception: every element keeps its own arithmetic where they are one number.

Products and loads also decide how tiles are spread over threads. Where all of them went, the rest of the kernel would
be another one, with twice the shuffles; so a small part of them stays.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_bnlstm.kernels.common import load_state, multiply
from triton_bnlstm.kernels.gradients import join_gates, part_gates

# No value that a kernel stores: what is written only where a value is this one is computed, and not written. Every
# dtype of states has it, so that no compiler can tell that a comparison with it fails.
_NEVER = tl.constexpr(-12288.0)


@triton.jit
def _number_of(pointer):
    """An address as a small float32: one that moves from step to step gives another number in each."""
    return (pointer.to(tl.int64) >> 4).to(tl.int32).to(tl.float32) * 1e-9


@triton.jit
def _small(index):
    """Indices → small float32."""
    return index.to(tl.float32) * 1e-3


@triton.jit
def no_wait(counter_ptr, target, SYNC: tl.constexpr, KERNEL: tl.constexpr):
    """`barrier.wait` for the program's own threads alone, which still keeps loads of the state behind it."""
    tl.debug_barrier()


@triton.jit
def no_arrive(counter_ptr):
    """`barrier.arrive` for the program's own threads alone."""
    tl.debug_barrier()


@triton.jit
def no_product(
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
    """`common.product` → [M, BB] float32; of its inner extent 16 are left, as what is behind it has its layout."""
    value = _number_of(h_ptr)
    z = _small(row)[:, None] + (_small(b) + value)[None, :]
    w = (tl.zeros((row.shape[0], 16), tl.float32) + value).to(w_ptr.dtype.element_ty)
    h = (tl.zeros((16, b.shape[0]), tl.float32) + value).to(h_ptr.dtype.element_ty)
    return multiply(w, h, z, PRECISION, INTERPRETED)


@triton.jit
def no_state(h_ptr, b, live, k0, WIDTH: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr):
    """`common.load_state` → [BK, BB]: the first columns wherever others are asked for, so that one load serves all."""
    return load_state(h_ptr, b, live, 0, WIDTH, BK, EXACT)


@triton.jit
def no_moments(z, live, n):
    """`common.moments_of_live_rows` → [M], [M]."""
    zero = tl.zeros((z.shape[0],), tl.float32)
    return zero + n * 1e-3, zero + n


@triton.jit
def no_sigmoid(x):
    """`common.sigmoid` near 0."""
    return 0.5 + 0.25 * x


@triton.jit
def no_tanh(x):
    """`common.tanh` near 0, but for a factor that keeps it an operation."""
    return 0.875 * x


@triton.jit
def no_input(x_ptr, column, owned, row0, b, live, H: tl.constexpr, NARROW: tl.constexpr):
    """`common.load_input` → [4U, BB]; with NARROW [1, BB]."""
    of_row = (_small(b) + _small(row0))[None, :]
    x = of_row if NARROW else _small(column)[:, None] + of_row
    return x.to(x_ptr.dtype.element_ty)


@triton.jit
def no_store(pointer, value, mask):
    """`tl.store` of something that is still computed."""
    tl.store(pointer, value, mask=mask & (value.to(tl.float32) == _NEVER))


@triton.jit
def one_gate(place, wanted, H: tl.constexpr):
    """`gradients.load_gates` with one load of four, as what is behind it has its layout → [U, BB, 2, 2] float32."""
    i = tl.load(place, mask=wanted, other=0.0).to(tl.float32)
    return join_gates(i, i, i, i)


@triton.jit
def no_sum(tile, axis: tl.constexpr):
    """`tl.sum` over the rows: [U, BB] → [U], [U, BB, 2, 2] → [U, 2, 2]."""
    if len(tile.shape) == 4:
        total = tl.full((tile.shape[0], tile.shape[2], tile.shape[3]), 1e-3, tl.float32)
    else:
        total = tl.full((tile.shape[0],), 1e-3, tl.float32)
    return total


@triton.jit
def no_sum_of_parts(parts_ptr, b, n_next, own, batch, H: tl.constexpr, SPLITS: tl.constexpr):
    """`gradients.sum_of_parts` → [U, BB]."""
    return _small(own[0])[:, None] + (_small(b) + _small(n_next))[None, :]


@triton.jit
def no_store_gates(place, wanted, tile, H: tl.constexpr):
    """`gradients.store_gates` of something that is still computed."""
    i, f, g, o = part_gates(tile)
    dtype = place.dtype.element_ty
    tl.store(place, i.to(dtype), mask=wanted & (i == _NEVER))
    tl.store(place + H, f.to(dtype), mask=wanted & (f == _NEVER))
    tl.store(place + 2 * H, g.to(dtype), mask=wanted & (g == _NEVER))
    tl.store(place + 3 * H, o.to(dtype), mask=wanted & (o == _NEVER))
