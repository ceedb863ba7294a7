"""Kernels with a grid barrier on a CPU: all programs of a launch at once, each in a process of its own.

Triton's interpreter runs the programs of a grid one after another, so at a barrier the first would wait for ever. Here
each program is a forked process, in which the interpreter runs that one place of the grid. The tensors are copied to
memory that the processes share. The interpreter's atomics are std::atomic on the tensors' addresses, lock-free for
integers, so that they are atomic between processes too. Forked, because a fresh process would know nothing of what a
test has patched, and would import torch and Triton first.

The processes stay, and run the launch again with other delays: see `Programs`.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import multiprocessing
import os
import random
import signal
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

from tests.support.interpreter import Access, Place, as_program, extent, own_position, places_of, watching, whole
from tests.support.launches import Copies, intercepting

MOST_PROGRAMS = 16
_KILL_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_POLL = 2e-4  # s that a program sleeps after an atomic operation: there are more programs than cores


class ProgramsError(RuntimeError):
    """A program has failed, or not all have finished in time. `unfinished`: those that had not reported by then."""

    def __init__(self, message: str, unfinished: list[Place]) -> None:
        super().__init__(message)
        self.unfinished = unfinished


class Delays:
    """Naps around a program's accesses to shared tensors, as a seed says.

    Four kinds of schedule, by seed modulo 4: short naps everywhere; one program of the grid slow; rare long naps; naps
    around atomic operations only.

    Args:
        shared: first address of each shared storage, and the one behind it.
    """

    def __init__(self, shared: list[tuple[int, int]], place: Place, grid: Place) -> None:
        self._shared, self._place, self._places = shared, place, places_of(grid)
        self.begin(0)

    def begin(self, seed: int) -> None:
        """From here on the naps of this seed."""
        slow = random.Random(seed).choice(self._places) == self._place
        self._random = random.Random(f"{seed} {self._place}")  # a string's seed is the same in every process
        self._share, self._longest, self._atomics_only = (
            (0.25, 4e-4, False),
            (0.5, 1.5e-3, False) if slow else (0.0, 0.0, False),
            (0.03, 8e-3, False),
            (0.5, 1e-3, True),
        )[seed % 4]

    def before(self, access: Access) -> None:
        if access.addresses.size and (access.kind == "atomic" or not self._atomics_only):
            address = int(access.addresses.flat[0])
            if any(first <= address < behind for first, behind in self._shared):
                self._nap()

    after = before

    def _nap(self) -> None:
        if self._random.random() < self._share:
            time.sleep(self._random.random() * self._longest)


class _Task(NamedTuple):
    """What a process gets: whose delays, and after how many seconds it is given up."""

    seed: int | None
    limit: float


class _Process(NamedTuple):
    """A program's process, with the ends of its pipes: tasks go in, results and positions come out."""

    place: Place
    process: Any
    tasks: Connection
    results: Connection
    positions: Connection


def _serve(
    place: Place,
    grid: Place,
    call: Any,
    delays: Delays | None,
    tasks: Connection,
    results: Connection,
    told: Connection,
) -> None:  # in its own process
    ctypes.CDLL(None).prctl(_KILL_WITH_PARENT, signal.SIGKILL)
    # Ends this process even if nobody is left to kill it. The default action, whatever handler was inherited.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, lambda *_: told.send(own_position()))
    torch.set_num_threads(1)  # the threads of the parent's pools do not exist here, and would be waited for
    builder = interpreter.interpreter_builder
    with as_program(place, grid), nullcontext() if delays is None else watching(delays):
        atomic = builder.create_atomic_rmw

        def patient_atomic(*args: Any) -> Any:
            found = atomic(*args)
            time.sleep(_POLL)
            return found

        builder.create_atomic_rmw = patient_atomic
        while True:
            task = tasks.recv()
            signal.alarm(math.ceil(task.limit) + 15)
            if delays is not None:
                delays.begin(task.seed or 0)
            try:
                call()
                trouble = None
            except BaseException:
                trouble = traceback.format_exc()
            signal.alarm(0)
            results.send(trouble)


def _shared_memory(size: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=torch.uint8)[:size]


class Programs:
    """All programs of a launch, one process each, which run it as often as is asked for. A context manager.

    Args:
        kernel, grid, args, kwargs: of the launch; tensors are on the CPU and among args.
        shared: indices in args of the tensors around whose accesses programs are delayed.

    Attributes:
        args: args with the tensors that the processes work on.
    """

    def __init__(
        self, kernel: Any, grid: Place, args: tuple[Any, ...], kwargs: dict[str, Any], shared: tuple[int, ...] = ()
    ) -> None:
        self._name, self._grid = f"{kernel.__name__} with grid {whole(grid)}", whole(grid)
        if math.prod(grid) > MOST_PROGRAMS:
            raise ValueError(f"{self._name}: at most {MOST_PROGRAMS} programs can run at once here")
        self._copies = Copies(_shared_memory)
        self.args = tuple(self._copies.of(value) for value in args)
        self._delayed = [extent(self.args[k]) for k in shared]
        self._kernel, self._kwargs = kernel, kwargs
        self._processes: list[_Process] = []

    def __enter__(self) -> Programs:
        fork = multiprocessing.get_context("fork")
        try:
            for place in places_of(self._grid):
                delays = Delays(self._delayed, place, self._grid) if self._delayed else None
                (task_in, task_out), (result_in, result_out), (told_in, told_out) = (fork.Pipe(False) for _ in range(3))
                args = (place, self._grid, self._launch, delays, task_in, result_out, told_out)
                process = fork.Process(target=_serve, args=args, daemon=True)
                with warnings.catch_warnings():
                    # Python 3.12 warns of forks beside threads, whose locks nobody would release in the child. The
                    # threads here are the test runner's; a program computes with NumPy on one thread, and reports.
                    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
                    process.start()
                self._processes.append(_Process(place, process, task_out, result_in, told_in))
                for end in (task_in, result_out, told_out):
                    end.close()  # so that a process which dies silently is the end of its pipe
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._processes:
            each.process.kill()
            each.process.join()
            each.process.close()
            for end in each[2:]:
                end.close()
        self._processes = []

    def _launch(self) -> None:
        with np.errstate(all="ignore"):  # rows and columns that do not exist are computed too, then thrown away
            self._kernel[(1,)](*self.args, **self._kwargs)

    def reset(self) -> None:
        """The tensors as they were at first."""
        self._copies.again()

    def write_back(self) -> None:
        """What the processes have written → the tensors of args that were given."""
        self._copies.write_back()

    def run(self, limit: float, seed: int | None = None) -> None:
        """The launch, once.

        Args:
            limit: seconds after which programs that have not finished are asked where they are, and killed.
            seed: of the delays.

        Raises:
            ProgramsError: a program raised or died (the others are then killed at once), or the time is up. The
                processes cannot be used again.
        """
        if not self._processes:
            raise ProgramsError(f"{self._name}: its processes have ended", [])
        for each in self._processes:
            with suppress(OSError):  # one that has died has the end of its pipe to show, below
                each.tasks.send(_Task(seed, limit))
        running = {each.results: each for each in self._processes}
        deadline = time.monotonic() + limit
        failed = None
        while running and failed is None:
            ready = wait(list(running), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for results in [r for r in running if r in ready]:
                each = running.pop(results)
                try:
                    trouble = results.recv()
                except EOFError:
                    each.process.join()
                    trouble = f"died with exit code {each.process.exitcode}"
                if trouble is not None and failed is None:
                    failed = f"program {each.place} of {self._name}: {trouble}"
        unfinished = sorted(each.place for each in running.values())
        if failed is None and unfinished:
            where = "".join(f"\n  program {each.place}: {self._where(each, running)}" for each in self._processes)
            places = ", ".join(map(str, unfinished))
            failed = f"{self._name}: not finished after {limit:g} s: {places}{where}"
        if failed is not None:
            self.__exit__()
            raise ProgramsError(failed, unfinished)

    @staticmethod
    def _where(each: _Process, running: dict[Connection, _Process]) -> str:
        """What a program says of its position; a program that is not in Python's hands says nothing."""
        if each.results not in running:
            return "finished"
        os.kill(each.process.pid, signal.SIGUSR1)
        try:
            return str(each.positions.recv()) if each.positions.poll(2.0) else "does not answer"
        except EOFError:
            return "died"


def run_at_once(kernel: Any, grid: Place, args: tuple[Any, ...], kwargs: dict[str, Any], limit: float = 60.0) -> None:
    """`kernel[grid](*args, **kwargs)` of an interpreted kernel, with all programs running at the same time.

    Raises:
        ProgramsError: see `Programs.run`.
    """
    with Programs(kernel, grid, args, kwargs) as programs:
        programs.run(limit)
        programs.write_back()


@contextmanager
def programs_at_once(limit: float = 60.0) -> Iterator[list[Place]]:
    """Within it recurrent kernels whose programs have to meet run by `run_at_once`; other launches as ever.

    What a kernel is to write holds NaN before, so that it shows if it is read too early. Gives the grids of the
    launches that ran so, a list that grows.
    """
    grids: list[Place] = []

    def run(
        kernel: Any,
        grid: Place,
        tensors: tuple[Tensor, ...],
        scalars: tuple[float, ...],
        constants: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        grids.append(grid)
        run_at_once(kernel, grid, (*tensors, *scalars), {**constants, **options}, limit)

    with intercepting(run):
        yield grids
