"""A launch under a weak memory: what a program stores reaches others by release and acquire alone.

A CPU keeps stores in order and would hide a barrier that does not order anything. Here each program has a view of
memory of its own, brought up to date by nothing but the synchronisation that the kernel itself asks for:

    block barrier    orders a program's threads: what they stored before it is what they read after it, not sooner
    release          an atomic operation publishes what was stored before the program's last block barrier (it is one
                     thread's; other threads' stores are before it only through that barrier)
    acquire          an atomic operation takes what was published through that address; the program's other threads see
                     it from its next block barrier on

A load gives what the view holds, so a kernel that lacks one of the three computes with old values. And each pair of
accesses to one element, of which one is a store and which nothing has put in order, is told as a race, also where the
values happened to be right. Both are stricter than any GPU: a missing block barrier between two threads of a warp, or
stores that happen to drain early, often do no harm there; and what one thread acquires and releases again itself would
need no block barrier between. Atomic operations of a narrower scope than the GPU order nothing between programs.

Known are phases: a program's phase is how many block barriers it has passed; clock[p][q] is the last phase of q of
which p knows everything (vector clocks; the happens-before order of C++ and of PTX, with a program's threads taken
together).
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
import pytest
from torch import Tensor
from triton.runtime import interpreter

from tests.support.interpreter import Place, bits, extent, own_position, places_of, threads_as_programs
from tests.support.launches import OutOfBoundsError
from tests.support.turns import Turns

_WIDE = ("GPU", "SYSTEM")  # scopes that reach other programs
_ACQUIRES = ("ACQUIRE", "ACQUIRE_RELEASE")
_RELEASES = ("RELEASE", "ACQUIRE_RELEASE")
_GIVES_WAY = 0.3  # share of accesses after which another program may run; at atomics and block barriers always


class Outcome(NamedTuple):
    """What a run has shown. races: each pair of places in the kernel once, in words."""

    races: list[str]


class _Written(NamedTuple):
    """One store: in which phase, how many stores were before it in the whole run, where and what."""

    phase: int
    order: int
    at: np.ndarray[Any, Any]
    values: np.ndarray[Any, Any]


class _Space:
    """The elements of all storages of a launch, numbered through. Values are bits in 64-bit integers."""

    def __init__(self, tensors: tuple[Tensor, ...], names: list[str]) -> None:
        self.first, self.behind, self.start, self.sizes = [], [], [], []
        self._bits, self._names = [], []
        self.count = 0
        for (first, behind), tensor, name in sorted(
            {extent(t): (extent(t), t, n) for t, n in zip(tensors, names, strict=True)}.values(), key=lambda s: s[0]
        ):
            size = tensor.element_size()
            self.first.append(first)
            self.behind.append(behind)
            self.start.append(self.count)
            self.sizes.append(size)
            self._bits.append(bits(tensor).view(f"u{size}"))
            self._names.append(name)
            self.count += (behind - first) // size
        sizes = {(extent(t), t.element_size()) for t in tensors}
        assert len(sizes) == len(self.first), "tensors of several element sizes share memory"
        self.values = np.concatenate([part.astype(np.uint64) for part in self._bits])

    def at(self, addresses: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
        """Addresses, all in one storage → numbers of elements."""
        which = int(np.searchsorted(self.first, addresses.min(), side="right")) - 1
        if which < 0 or addresses.max() >= self.behind[which]:
            raise OutOfBoundsError(f"{kind} beside all tensors: {own_position()}")
        found: np.ndarray[Any, Any] = (
            self.start[which] + (addresses - np.uint64(self.first[which])).astype(np.int64) // self.sizes[which]
        )
        return found

    def name(self, element: int) -> str:
        """In words."""
        which = int(np.searchsorted(self.start, element, side="right")) - 1
        return f"{self._names[which]}[{element - self.start[which]}]"

    def write_back(self) -> None:
        """Into the tensors."""
        for start, part in zip(self.start, self._bits, strict=True):
            part[:] = self.values[start : start + len(part)].astype(part.dtype)


class WeakMemory:
    """One run of a kernel under this memory.

    Args:
        kernel, grid, tensors, names: of the launch. The tensors take what all programs together have written.
        seed: of the schedule.
        limit: seconds after which the run is cut off.
    """

    def __init__(
        self,
        kernel: Any,
        grid: Place,
        tensors: tuple[Tensor, ...],
        names: list[str],
        seed: int,
        limit: float = 120.0,
    ) -> None:
        self._kernel, self._grid = kernel, grid
        self._places = places_of(grid)
        programs = len(self._places)
        self._turns = Turns([f"program {place}" for place in self._places], seed, limit)
        self._random = random.Random(seed)
        self._space = space = _Space(tensors, names)

        self._view = np.tile(space.values, (programs, 1))  # [programs, elements]
        self._view_order = np.zeros((programs, space.count), np.int64)  # of the store that the view shows
        self._written: list[list[_Written]] = [[] for _ in range(programs)]
        self._order = 0
        self._clock = np.zeros((programs, programs), np.int64)
        self._phase = np.ones(programs, np.int64)
        self._acquired = np.zeros((programs, programs), np.int64)  # waits for a block barrier
        self._published: dict[int, np.ndarray[Any, Any]] = {}  # by element
        self._counted: dict[int, tuple[int, int, int]] = {}  # who last added to it, in which phase, on which line
        self._seen: list[dict[int, int]] = [{} for _ in range(programs)]  # what a poll has found

        self._writer = np.full(space.count, -1)
        self._write_phase = np.zeros(space.count, np.int64)
        self._write_line = np.zeros(space.count, np.int64)
        self._read_phase = np.zeros((programs, space.count), np.int64)
        self._read_line = np.zeros((programs, space.count), np.int64)
        self._lines: dict[str, int] = {}
        self._races: dict[tuple[str, str, str], str] = {}

    def run(self, call: Any) -> Outcome:
        """call(): the launch of one program with grid (1,).

        Raises:
            StuckError: the programs wait for each other, or do not come to an end.
            NotImplementedError: an atomic operation other than adding to one integer.
            OutOfBoundsError: see there.
        """
        builder = interpreter.interpreter_builder
        with threads_as_programs(self._grid, self._kernel) as enter, pytest.MonkeyPatch.context() as patch:
            patch.setattr(builder, "create_masked_load", self._load)
            patch.setattr(builder, "create_masked_store", self._store)
            patch.setattr(builder, "create_atomic_rmw", self._add)
            patch.setattr(builder, "create_barrier", self._block_barrier)
            for name in ("create_atomic_cas", "create_atomic_load", "create_atomic_store", "create_atomic_poll"):
                patch.setattr(builder, name, self._refuse, raising=False)

            def body(own: int) -> None:
                enter(self._places[own])
                call()

            self._turns.run(body)
        self._space.write_back()
        return Outcome(list(self._races.values()))

    @staticmethod
    def _refuse(*_: Any) -> None:
        raise NotImplementedError(f"an atomic operation that this memory does not know: {own_position()}")

    def _program(self) -> int:
        return self._places.index(tuple(interpreter.interpreter_builder.grid_idx))

    def _line(self) -> int:
        return self._lines.setdefault(own_position().partition(" (")[0], len(self._lines))

    def _tell(self, own: int, other: int, what: str, element: int, line: int, others_line: int) -> None:
        lines = list(self._lines)
        inside = "no block barrier between" if own == other else "nothing has put them in order"
        key = (what, lines[line], lines[others_line])
        places = f"program {self._places[own]} {what} program {self._places[other]}"
        self._races.setdefault(
            key,
            f"{self._space.name(element)}: {places}, {inside}\n"
            f"    the former: {lines[line]}\n    the latter: {lines[others_line]}",
        )

    def _not_after_stores(self, own: int, at: np.ndarray[Any, Any], what: str, line: int) -> None:
        """Tell of the elements whose last store this program does not know of."""
        writer = self._writer[at]
        unknown = (writer >= 0) & (self._write_phase[at] > self._clock[own][writer])
        if unknown.any():
            element = int(at[unknown][0])
            self._tell(own, int(self._writer[element]), what, element, line, int(self._write_line[element]))

    def _load(self, pointers: Any, mask: Any, other: Any, *_: Any) -> Any:
        element_type = pointers.get_element_ty()
        dtype = interpreter._get_np_dtype(element_type)
        found = np.zeros(pointers.data.shape, dtype) if other is None else other.data.astype(dtype, copy=True)
        found = np.array(np.broadcast_to(found, pointers.data.shape))
        lanes = np.broadcast_to(mask.data, pointers.data.shape)
        if lanes.any():
            own, line = self._program(), self._line()
            at = self._space.at(pointers.data[lanes], "load")
            self._not_after_stores(own, at, "reads what is stored by", line)
            self._not_after_counts(own, at, "reads what is counted by", line)
            self._read_phase[own, at] = self._phase[own]
            self._read_line[own, at] = line
            values = self._view[own][at].astype(f"u{dtype.itemsize}")
            found[lanes] = values.view(dtype)
            self._sometimes_give_way(own)
        return interpreter.TensorHandle(found, element_type)

    def _store(self, pointers: Any, value: Any, mask: Any, *_: Any) -> None:
        lanes = np.broadcast_to(mask.data, pointers.data.shape)
        if not lanes.any():
            return
        own, line = self._program(), self._line()
        at = self._space.at(pointers.data[lanes], "store")
        self._not_after_stores(own, at, "stores over what is stored by", line)
        self._not_after_counts(own, at, "stores over what is counted by", line)
        for element in self._published.keys() & set(at.tolist()):
            del self._published[element]  # nobody acquires what was published before through a plain store
        for other in range(len(self._places)):
            unknown = self._read_phase[other, at] > self._clock[own][other]
            if unknown.any():
                element = int(at[unknown][0])
                others_line = int(self._read_line[other, element])
                self._tell(own, other, "stores over what is read by", element, line, others_line)
        data = np.ascontiguousarray(np.broadcast_to(value.data, pointers.data.shape)[lanes])
        values = data.view(f"u{data.itemsize}").astype(np.uint64)
        self._order += 1
        self._space.values[at] = values
        self._written[own].append(_Written(int(self._phase[own]), self._order, at, values))
        self._writer[at], self._write_phase[at], self._write_line[at] = own, self._phase[own], line
        self._sometimes_give_way(own)

    def _add(self, operation: Any, pointer: Any, value: Any, mask: Any, order: Any, scope: Any) -> Any:
        kind = str(operation).rpartition(".")[2]
        if kind != "ADD" or pointer.data.size != 1 or not mask.data.all() or value.data.item() < 0:
            raise NotImplementedError(f"only one counter, in integers and upwards, not {kind}: {own_position()}")
        own, line = self._program(), self._line()
        self._turns.give_way(own)
        at = self._space.at(pointer.data.reshape(-1), "atomic operation")
        element, added = int(at[0]), int(value.data.item())
        self._not_after_stores(own, at, "counts where there is stored by", line)
        if not added and self._seen[own].get(element) == int(self._space.values[element]):
            self._turns.wait(own, element)  # a poll that would find what it has found before
        found = int(self._space.values[element])
        order, wide = str(order).rpartition(".")[2], str(scope).rpartition(".")[2] in _WIDE
        if wide and order in _ACQUIRES and element in self._published:
            self._acquired[own] = np.maximum(self._acquired[own], self._published[element])
        if wide and order in _RELEASES:
            clock = self._clock[own].copy()
            clock[own] = self._phase[own] - 1
            self._published[element] = np.maximum(self._published.get(element, np.zeros_like(clock)), clock)
        if added:
            self._space.values[element] = found + added
            self._counted[element] = own, int(self._phase[own]), line
            self._turns.happened(element)
        self._seen[own][element] = found
        self._turns.give_way(own)
        return interpreter.TensorHandle(np.full_like(value.data, found), value.dtype.scalar)

    def _not_after_counts(self, own: int, at: np.ndarray[Any, Any], what: str, line: int) -> None:
        """Tell of a counter among these elements that has grown, and this program does not know."""
        for element in self._counted.keys() & set(at.tolist()):
            other, phase, others_line = self._counted[element]
            if phase > self._clock[own][other]:
                self._tell(own, other, what, element, line, others_line)

    def _block_barrier(self, *_: Any) -> None:
        own = self._program()
        known = np.maximum(self._clock[own], self._acquired[own])
        known[own] = self._phase[own]
        for other in np.flatnonzero(known > self._clock[own]):
            for store in self._written[other]:
                if self._clock[own][other] < store.phase <= known[other]:
                    self._show(own, store)
        self._clock[own] = known
        self._phase[own] += 1
        self._turns.give_way(own)

    def _show(self, own: int, store: _Written) -> None:
        """A store into a view, where that does not show a later one."""
        later = store.order > self._view_order[own][store.at]
        at = store.at[later]
        self._view[own][at] = store.values[later]
        self._view_order[own][at] = store.order

    def _sometimes_give_way(self, own: int) -> None:
        if self._random.random() < _GIVES_WAY:
            self._turns.give_way(own)
