"""The checks of kernels' memory find what they are for: writing beside a tensor, reading beside it, or too early."""

from __future__ import annotations

import pytest
import torch

from tests.support import need_kernels

pytest.importorskip("triton")

import triton
import triton.language as tl

from tests.support.memory import AccessError, guarded_memory
from triton_bnlstm.kernels import launch
from triton_bnlstm.kernels.errors import KernelError

need_kernels()
pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="kernels are compiled here: accesses go unseen")

CPU = torch.device("cpu")


@triton.jit
def copy(from_ptr, to_ptr, length, SIZE: tl.constexpr, LOADED: tl.constexpr):
    """to[:length] = from[:length]; of what is loaded only the first LOADED elements."""
    at = tl.arange(0, SIZE)
    tl.store(to_ptr + at, tl.load(from_ptr + at, mask=at < LOADED, other=0.0), mask=at < length)


def run(source, target, length, loaded=None):
    constants = {"SIZE": 16, "LOADED": length if loaded is None else loaded}
    launch._run(copy, (1,), (source, target), (length,), constants, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_is_right_passes(dtype):
    with guarded_memory() as held:
        target = launch.empty(2, 4, dtype=dtype, device=CPU)
        assert target.isnan().all()
        run(torch.ones(8, dtype=dtype), target, 8)
        again = launch.empty(8, dtype=dtype, device=CPU)
        run(target, again, 8)
    assert (again == 1).all()
    assert [size for _, size in held] == [8, 8]


def test_a_nan_that_was_computed_is_no_unwritten_memory():
    with guarded_memory():
        for nothing in (torch.tensor([0.0]) / 0, torch.tensor([torch.inf]) - torch.inf, torch.tensor([torch.nan])):
            run(nothing, launch.empty(1, dtype=torch.float32, device=CPU), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_reading_what_nobody_has_written(dtype):
    with guarded_memory():
        source, target = (launch.empty(8, dtype=dtype, device=CPU) for _ in range(2))
        source[:7] = 1
        with pytest.raises(KernelError, match=r"nobody has written: test_memory_checks.py:\d+ in copy"):
            run(source, target, 8)


def test_reading_behind_a_tensor():
    """Also where memory goes on: another part of the same tensor is not what the kernel was given."""
    whole = torch.ones(16)
    with guarded_memory(), pytest.raises(KernelError, match="a load beside the tensors"):
        run(whole[:8], launch.empty(8, dtype=torch.float32, device=CPU), 8, loaded=9)


def test_writing_behind_a_tensor():
    with guarded_memory(), pytest.raises(KernelError, match="a store beside the tensors"):
        run(torch.ones(16), launch.empty(8, dtype=torch.float32, device=CPU), 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("beside", [-1, 8])
def test_a_guard_band_is_looked_at(beside, dtype):
    """What a GPU has left of these checks."""
    guard = guarded_memory()
    held = guard.__enter__()
    launch.empty(8, dtype=dtype, device=CPU)
    held[0][0][64 + beside] = 0
    with pytest.raises(AccessError, match="behind a tensor of 8" if beside > 0 else "before a tensor of 8"):
        guard.__exit__(None, None, None)


@triton.jit
def count(to_ptr, at):
    tl.atomic_add(to_ptr + at, 1)


def test_counting_beside_a_tensor():
    with guarded_memory():
        counter = launch.empty(2, dtype=torch.int32, device=CPU).zero_()
        launch._run(count, (1,), (counter,), (1,), {}, {})
        assert counter.tolist() == [0, 1]
        with pytest.raises(KernelError, match="a count beside the tensors"):
            launch._run(count, (1,), (counter,), (2,), {}, {})
