"""Ways into Triton's interpreter: which program runs, what it touches in memory, where in the kernel it stands.

Everything here patches the interpreter of the running process and takes the patch back.
It works on Triton 3.3 to 3.9, whose interpreters differ in arguments that nothing here looks at.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from bench.interpreter import quicken

Place = tuple[int, ...]  # of a program in its grid, always three numbers

_NOT_OF_A_KERNEL = (str(Path(triton.__file__).parent), str(Path(__file__).parent), threading.__file__)
# what tells a reader how far a program is: steps, what it waits for, rows
_TOLD = ("t", "target", "start")


def program_place() -> Place:
    """Place in the grid of the program that the interpreter is running."""
    return tuple(interpreter.interpreter_builder.grid_idx)


def places_of(grid: Place) -> list[Place]:
    """All places of a grid."""
    return list(itertools.product(*map(range, whole(grid))))


def whole(grid: Place) -> Place:
    """A grid with all its three numbers."""
    return (*grid, 1, 1)[:3]


class Access(NamedTuple):
    """What a program is about to do: kind "load", "store" or "atomic"; addresses of the active lanes, in bytes."""

    kind: str
    addresses: np.ndarray[Any, Any]


class Watcher(Protocol):
    """Told of a program's accesses to memory, on the program's own thread."""

    def before(self, access: Access) -> None:
        """What is about to happen."""

    def after(self, access: Access) -> None:
        """It has happened."""


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Within it the interpreter tells `watcher` of each load, store and atomic operation of every kernel."""
    builder = interpreter.interpreter_builder

    def told(kind: str, real: Callable[..., Any], mask_at: int) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            access = Access(kind, active(args, mask_at, args[0] if kind != "atomic" else args[1]))
            watcher.before(access)
            result = real(*args)
            watcher.after(access)
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        # pointers and mask; the unmasked ones of the interpreter go through these
        for name, kind, mask_at in (
            ("create_masked_load", "load", 1),
            ("create_masked_store", "store", 2),
            ("create_atomic_rmw", "atomic", 3),
        ):
            patch.setattr(builder, name, told(kind, getattr(builder, name), mask_at))
        yield


def active(args: tuple[Any, ...], mask_at: int, pointers: Any) -> np.ndarray[Any, Any]:
    """Addresses of the lanes that a mask lets through."""
    found: np.ndarray[Any, Any] = pointers.data[np.broadcast_to(args[mask_at].data, pointers.data.shape)]
    return found


@contextmanager
def as_program(place: Place, grid: Place) -> Iterator[None]:
    """Within it every launch is the one program of a grid that stands at this place: call it with grid (1,)."""
    builder = interpreter.interpreter_builder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "set_grid_dim", lambda *_: setattr(builder, "grid_dim", whole(grid)))
        patch.setattr(builder, "set_grid_idx", lambda *_: setattr(builder, "grid_idx", place))
        # On a CPU the interpreter works on the tensors themselves. Today's torch leaves out the copy onto themselves at
        # its end; one that did it could bring back what another program has just overwritten.
        patch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
        yield


class _PlaceOfThread(threading.local):
    place: Place = (0, 0, 0)


@contextmanager
def threads_as_programs(grid: Place, kernel: Any) -> Iterator[Callable[[Place], None]]:
    """Within it threads run programs of a grid: each calls what is given with its place, then kernel[(1,)](…).

    One at a time: the interpreter is not made for threads. triton.language stays patched from the first to the last.
    """
    own = _PlaceOfThread()

    def enter(place: Place) -> None:
        own.place = place

    builder = type(interpreter.interpreter_builder)
    with as_program((0, 0, 0), grid), pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.interpreter_builder, "set_grid_idx", lambda *_: None)
        patch.setattr(builder, "grid_idx", property(lambda _: own.place, lambda *_: None), raising=False)
        quicken()
        scope = interpreter._patch_lang(kernel.rewrite())  # no program is the first to patch, nor the last
        try:
            yield enter
        finally:
            if scope is not None:
                scope.restore()


def _number(value: Any) -> int | None:
    """A scalar of the interpreter, or a plain number."""
    if isinstance(value, int):
        return value
    if isinstance(value, tl.tensor):
        data = value.handle.data
        if data.size == 1 and np.issubdtype(data.dtype, np.integer):
            return int(data.item())
    return None


def position(frame: FrameType | None) -> str:
    """Where in the kernels a program stands, from its innermost frame: "barrier.py:93 in wait, … (t = 2)"."""
    lines = []
    told: dict[str, int] = {}
    while frame is not None and frame.f_code is not interpreter.GridExecutor.__call__.__code__:
        file = frame.f_code.co_filename
        if not file.startswith(_NOT_OF_A_KERNEL):
            lines.append(f"{Path(file).name}:{frame.f_lineno} in {frame.f_code.co_name}")
            numbers = {name: _number(frame.f_locals.get(name)) for name in _TOLD if name in frame.f_locals}
            told = {name: number for name, number in numbers.items() if number is not None} | told
        frame = frame.f_back
    where = ", called from ".join(lines) or "not in a kernel"
    return where + (f" ({', '.join(f'{name} = {told[name]}' for name in _TOLD if name in told)})" if told else "")


def position_of_thread(thread: threading.Thread) -> str:
    """Where a thread's program stands."""
    return position(sys._current_frames().get(thread.ident or 0))


def own_position() -> str:
    """Where the calling program stands."""
    return position(sys._getframe(1))


def by_steps(kernel: Any, grid: Place, tensors: tuple[Tensor, ...], scalars: Any, constants: dict[str, Any]) -> None:
    """What a launch of all steps is in step mode: a launch of the same kernel for each, one program after another."""
    first, last, *rest = scalars
    constants = {**constants, "SYNC": "none"}
    backwards = "PRODUCT" in constants
    divided = backwards and constants["SPLITS"] * constants["GROUPS"] > 1
    phases = ({"CELLS": False}, {"PRODUCT": False}) if divided else ({},)
    with np.errstate(all="ignore"):
        for t in reversed(range(first, last)) if backwards else range(first, last):
            for phase in phases:
                kernel[grid](*tensors, t, t + 1, *rest, **{**constants, **phase})


def extent(tensor: Tensor) -> tuple[int, int]:
    """First address of a tensor's storage, and the one behind it."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def bits(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The bytes of a tensor's storage; not a copy."""
    found: np.ndarray[Any, Any] = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
    return found
