"""Launches of sequence mode, caught on their way to the device: what they work on, and what step mode makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.interpreter import Access, Place, bits, by_steps, extent, own_position, program_place, watching
from triton_bnlstm.kernels import launch

NOT_COMPARED = "counter_ptr"  # step mode has no barrier


class OutOfBoundsError(RuntimeError):
    """A program has touched memory that belongs to none of the launch's tensors."""


class Copies:
    """Copies of tensors in memory of a kind. What was one storage stays one."""

    def __init__(self, memory: Callable[[int], Tensor] = lambda size: torch.empty(size, dtype=torch.uint8)) -> None:
        self._memory = memory
        self._made: dict[int, tuple[Tensor, Tensor]] = {}  # bytes of a storage and their copy, by the storage's address

    def of(self, value: Any) -> Any:
        """A tensor → the same view of its storage's copy; anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in self._made:
            own = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._made[storage.data_ptr()] = own, self._memory(len(own)).copy_(own)
        memory = self._made[storage.data_ptr()][1].untyped_storage()
        return torch.empty(0, dtype=value.dtype).set_(memory, value.storage_offset(), value.shape, value.stride())

    def again(self) -> None:
        """Copy once more."""
        for own, copy in self._made.values():
            copy.copy_(own)

    def write_back(self) -> None:
        """What the copies hold → what they were made of."""
        for own, copy in self._made.values():
            own.copy_(copy)


class Recorded(NamedTuple):
    """A launch of all steps in which programs meet.

    Attributes:
        kernel, grid, scalars, constants, options: of the launch.
        tensors: as they were before it; nothing writes to them.
        expected: the bytes of each tensor's storage after it, by step mode.
        shared: indices of tensors that one program writes and another one reads or writes.
    """

    kernel: Any
    grid: Place
    tensors: tuple[Tensor, ...]
    scalars: tuple[float, ...]
    constants: dict[str, Any]
    options: dict[str, Any]
    expected: tuple[np.ndarray[Any, Any], ...]
    shared: tuple[int, ...]

    @property
    def names(self) -> list[str]:
        """Of the tensors, as the kernel calls them."""
        return list(self.kernel.arg_names[: len(self.tensors)])

    def call(self, tensors: tuple[Tensor, ...]) -> None:
        """The launch with other tensors, as one program; see `interpreter.as_program`."""
        with np.errstate(all="ignore"):
            self.kernel[(1,)](*tensors, *self.scalars, **self.constants, **self.options)

    def differing(self, tensors: tuple[Tensor, ...]) -> list[str]:
        """Names of tensors that are not, to the bit, what step mode makes of them."""
        return [
            name
            for name, tensor, expected in zip(self.names, tensors, self.expected, strict=True)
            if name != NOT_COMPARED and not np.array_equal(bits(tensor), expected)
        ]


class _Sharing:
    """Finds out which tensors programs share: who wrote an element first, and who else comes to it."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self._extents = {extent(tensor) for tensor in tensors}
        self._writers = {first: np.full(last - first, -1) for first, last in self._extents}
        self._places: list[Place] = []
        self.shared: set[int] = set()  # first addresses of storages

    def before(self, access: Access) -> None:
        place = program_place()
        if place not in self._places:
            self._places.append(place)
        own = self._places.index(place)
        inside = 0
        for first, last in self._extents:
            at = access.addresses[(access.addresses >= first) & (access.addresses < last)] - np.uint64(first)
            inside += at.size
            if at.size:
                writers = self._writers[first]
                if ((writers[at] != -1) & (writers[at] != own)).any():
                    self.shared.add(first)
                if access.kind == "store":
                    writers[at] = own

        if inside != access.addresses.size:
            raise OutOfBoundsError(f"{access.kind} beside all tensors: {own_position()}")

    def after(self, access: Access) -> None:
        pass


def record(
    kernel: Any,
    grid: Place,
    tensors: tuple[Tensor, ...],
    scalars: tuple[float, ...],
    constants: dict[str, Any],
    options: dict[str, Any],
) -> Recorded:
    """Run a launch in step mode instead, on the tensors themselves, and note what it was."""
    copies = Copies()
    before = tuple(copies.of(tensor) for tensor in tensors)
    sharing = _Sharing(tensors)
    with watching(sharing):
        by_steps(kernel, grid, tensors, scalars, constants)
    expected = tuple(bits(tensor).copy() for tensor in tensors)
    shared = tuple(
        k
        for k, (tensor, name) in enumerate(zip(tensors, kernel.arg_names, strict=False))
        if extent(tensor)[0] in sharing.shared or name == NOT_COMPARED
    )
    return Recorded(kernel, grid, before, scalars, constants, options, expected, shared)


def meets(constants: dict[str, Any]) -> bool:
    """Whether the programs of a launch with these constants meet."""
    return bool(constants.get("SYNC", "none") != "none")


def holds_steps(constants: dict[str, Any]) -> bool:
    """Whether programs meet, or one holds a whole recurrence, whose threads then meet."""
    return meets(constants) or constants.get("PROGRAMS") == 1


@contextmanager
def intercepting(instead: Callable[..., None], of: Callable[[dict[str, Any]], bool] = meets) -> Iterator[None]:
    """Within it launches with such constants go to `instead`, which takes what `launch._run` takes.

    What a kernel is to write holds NaN before, so that it shows if it is read too early.
    """
    run_as_ever = launch._run

    def run(kernel: Any, grid: Place, tensors: Any, scalars: Any, constants: dict[str, Any], options: Any) -> None:
        (instead if of(constants) else run_as_ever)(kernel, grid, tensors, scalars, constants, options)

    def holding_nan(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full(shape, math.nan, dtype=dtype, device=device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_run", run)
        patch.setattr(launch, "resident_programs", lambda kernel, prepared, rows, device: prepared.programs)
        patch.setattr(launch, "empty", holding_nan)
        yield


@contextmanager
def recording() -> Iterator[list[Recorded]]:
    """Within it launches of all steps are recorded; gives the list, which grows."""
    found: list[Recorded] = []
    with intercepting(lambda *launched: found.append(record(*launched)), holds_steps):
        yield found
