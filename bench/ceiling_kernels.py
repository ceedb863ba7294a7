"""Kernels that do one thing as fast as the device can, for `ceilings`."""

from __future__ import annotations

import triton
import triton.language as tl

from triton_bnlstm.kernels.barrier import arrive, wait


@triton.jit
def read_kernel(
    buffer_ptr,  # [blocks, BLOCK] int32
    sink_ptr,  # [programs] int32, takes each program's sum
    blocks,  # of the buffer
    apart,  # blocks from where one program begins to where the next one does
    count,  # blocks that a program reads, round and round
    BLOCK: tl.constexpr,
    MODIFIER: tl.constexpr,  # of the loads, "" or ".cg"
):
    """Reads a buffer, far larger than a first-level cache, again and again."""
    program = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)  # [BLOCK]: a sum that is stored keeps the loads
    at = program * apart % blocks
    for _ in range(count):
        total += tl.load(buffer_ptr + at * BLOCK + offsets, cache_modifier=MODIFIER)  # [BLOCK]
        at += 1
        at = tl.where(at == blocks, 0, at)
    tl.store(sink_ptr + program, tl.sum(total))


@triton.jit
def meet_kernel(
    counter_ptr,  # [32] int32, zero at launch
    meetings,  # how often
    PROGRAMS: tl.constexpr,
    SYNC: tl.constexpr,
    KERNEL: tl.constexpr,
):
    """All programs meet, and do nothing else. SYNC, KERNEL: as `barrier.wait` has them."""
    for k in range(meetings):
        arrive(counter_ptr)
        wait(counter_ptr, (k + 1) * PROGRAMS, SYNC, KERNEL)


@triton.jit
def nothing_kernel(
    anything_ptr,  # a tensor of the device that it is launched on
):
    """Does nothing."""
