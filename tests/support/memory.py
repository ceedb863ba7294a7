"""Memory of kernels held to account: what they write stands between guard bands, and each access is looked at.

In the interpreter every load, store and atomic operation of a kernel has to be within one of the tensors that it was
launched with (from a view's first element to its last, not the storage behind it), and a load must not find what nobody
has written: `launch.empty` gives memory full of one NaN that no computation gives. Looked at are launches through
`launch._run`. Which of its tensors an address belongs to is not asked, nor are gaps of a view, and the NaN is lost
where torch changes the dtype. On a GPU the guard bands are left, and that NaN, which shows in results.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from tests.support.interpreter import own_position
from triton_bnlstm.kernels import launch, launch_backward

BAND = 64  # elements on each side
POISON = 12345.0  # that the guard bands hold
# Quiet NaNs, by their bits, that arithmetic does not give: it gives 0x7FC00000 and the like.
_UNWRITTEN = {torch.float32: 0x7FC5A5A5, torch.float16: 0x7E5A, torch.bfloat16: 0x7FDA}
_INTEGERS = {4: torch.int32, 2: torch.int16}


class AccessError(RuntimeError):
    """A kernel has touched memory that is not its own, or read what nobody has written."""


def _unwritten(dtype: torch.dtype) -> Tensor:
    """The NaN of a dtype, as an integer of its size."""
    return torch.tensor(_UNWRITTEN[dtype], dtype=_INTEGERS[dtype.itemsize])


class _Guarded:
    """What kernels have been given to write. held: each with its bands, and the elements between them."""

    def __init__(self) -> None:
        self.held: list[tuple[Tensor, int]] = []

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """As `launch.empty`."""
        size = math.prod(shape)
        whole = torch.full((size + 2 * BAND,), POISON, dtype=dtype, device=device)
        part = whole[BAND : BAND + size]
        if dtype in _UNWRITTEN:
            part.view(_INTEGERS[dtype.itemsize]).copy_(_unwritten(dtype))
        self.held.append((whole, size))
        return part.view(shape)

    def look(self) -> None:
        """Raises:
        AccessError: a band has been written to.
        """
        for whole, size in self.held:
            for name, band in (("before", whole[:BAND]), ("behind", whole[BAND + size :])):
                # compared in its dtype, which rounds it
                if not (band == torch.tensor(POISON, dtype=whole.dtype, device=whole.device)).all():
                    raise AccessError(f"{name} a tensor of {size} elements in {whole.dtype} something has been written")


class _Looking:
    """Looks at the accesses of one launch."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        extents = sorted({_extent(tensor) for tensor in tensors})
        merged: list[tuple[int, int]] = []  # views may overlap
        for first, behind in extents:
            if merged and first < merged[-1][1]:
                merged[-1] = (merged[-1][0], max(behind, merged[-1][1]))
            else:
                merged.append((first, behind))
        self._first = [first for first, _ in merged]
        self._behind = [behind for _, behind in merged]

    def within(self, addresses: np.ndarray[Any, Any], size: int, kind: str) -> None:
        """Raises:
        AccessError: these addresses, of elements of `size` bytes, are not all in one tensor.
        """
        low, high = int(addresses.min()), int(addresses.max()) + size
        k = bisect.bisect_right(self._first, low) - 1
        if k < 0 or high > self._behind[k]:
            raise AccessError(f"a {kind} beside the tensors of its launch: {own_position()}")


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First address of a view, and the one behind it."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@contextmanager
def guarded_memory(*, all_is_written: bool = True) -> Iterator[list[tuple[Tensor, int]]]:
    """Within it kernels' memory is guarded; at its end the bands are looked at.

    all_is_written: in the interpreter a load must not find what nobody has written.
    Gives what has been allocated so far, a list that grows: each with its bands, and the elements between them.

    Raises:
        AccessError: a band has been written to. In the interpreter a kernel that goes wrong raises itself, with an
            `AccessError` in its text.
    """
    guarded = _Guarded()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "empty", guarded.empty)
        if launch.interpreted():
            _look_at_accesses(patch, all_is_written)
        yield guarded.held
    guarded.look()


def _look_at_accesses(patch: pytest.MonkeyPatch, all_is_written: bool) -> None:
    builder = interpreter.interpreter_builder
    load, store, run = builder.create_masked_load, builder.create_masked_store, launch._run
    looking: list[_Looking] = []
    unwritten = {
        interpreter._get_np_dtype(element): (value, np.dtype(f"i{dtype.itemsize}"))
        for element, dtype in ((interpreter.tl.float32, torch.float32), (interpreter.tl.float16, torch.float16))
        for value in [int(_unwritten(dtype))]
    }
    unwritten[np.dtype(np.uint16)] = int(_unwritten(torch.bfloat16)), np.dtype(np.int16)  # how it holds bfloat16

    def looked_at(kernel: Any, grid: Any, tensors: tuple[Tensor, ...], *rest: Any) -> None:
        looking.append(_Looking(tensors))
        try:
            run(kernel, grid, tensors, *rest)
        finally:
            looking.pop()

    def looked_at_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        lanes = np.broadcast_to(mask.data, pointers.data.shape)
        some = looking and lanes.any()
        if some:
            looking[-1].within(pointers.data[lanes], pointers.get_element_ty().primitive_bitwidth // 8, "load")
        found = load(pointers, mask, *rest)
        if some and all_is_written and found.data.dtype in unwritten:
            value, integer = unwritten[found.data.dtype]
            if (found.data.view(integer)[lanes] == value).any():
                raise AccessError(f"a load finds what nobody has written: {own_position()}")
        return found

    def looked_at_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        lanes = np.broadcast_to(mask.data, pointers.data.shape)
        if looking and lanes.any():
            looking[-1].within(pointers.data[lanes], pointers.get_element_ty().primitive_bitwidth // 8, "store")
        return store(pointers, value, mask, *rest)

    add = builder.create_atomic_rmw

    def looked_at_atomic(operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        lanes = np.broadcast_to(mask.data, pointers.data.shape)
        if looking and lanes.any():
            looking[-1].within(pointers.data[lanes], pointers.get_element_ty().primitive_bitwidth // 8, "count")
        return add(operation, pointers, value, mask, *rest)

    patch.setattr(builder, "create_atomic_rmw", looked_at_atomic)
    patch.setattr(builder, "create_masked_load", looked_at_load)
    patch.setattr(builder, "create_masked_store", looked_at_store)
    for module in (launch, launch_backward):
        patch.setattr(module, "_run", looked_at)
