"""Kernels with a grid barrier on a CPU: all programs of a launch at once, each in a process of its own.

Triton's interpreter runs the programs of a grid one after another, so at a barrier the first would wait for ever. Here
each program is a forked process, in which the interpreter runs that one place of the grid. The tensors are copied to
memory that the processes share, and back at the end. The interpreter's atomics are std::atomic on the tensors'
addresses, lock-free for integers, so that they are atomic between processes too. Forked, because a fresh process would
know nothing of what a test has patched, and would import torch and Triton first.
"""

from __future__ import annotations

import itertools
import math
import mmap
import multiprocessing
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from triton_bnlstm.kernels import launch

Place = tuple[int, ...]  # of a program in its grid


class ProgramsError(RuntimeError):
    """A program has failed, or not all have finished in time. `unfinished`: those that had not reported by then."""

    def __init__(self, message: str, unfinished: list[Place]) -> None:
        super().__init__(message)
        self.unfinished = unfinished


def program_place() -> Place:
    """Place in the grid, always three numbers, of the program that the interpreter is running."""
    return tuple(interpreter.interpreter_builder.grid_idx)


class _Shared:
    """Copies of tensors in memory that forked processes share. What was one storage stays one."""

    def __init__(self) -> None:
        self._pairs: dict[int, tuple[Tensor, Tensor]] = {}  # bytes of a storage and their shared copy

    def copy(self, value: Any) -> Any:
        """A tensor → the same view of its storage's shared copy; anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in self._pairs:
            own = torch.empty(0, dtype=torch.uint8).set_(storage)
            shared = torch.frombuffer(mmap.mmap(-1, len(own)), dtype=torch.uint8)
            self._pairs[storage.data_ptr()] = own, shared.copy_(own)
        memory = self._pairs[storage.data_ptr()][1].untyped_storage()
        return torch.empty(0, dtype=value.dtype).set_(memory, value.storage_offset(), value.shape, value.stride())

    def write_back(self) -> None:
        for own, shared in self._pairs.values():
            own.copy_(shared)


def _program(
    place: Place, grid: Place, launched: Callable[[], None], limit: float, report: Connection
) -> None:  # in its own process
    # Ends this process even if nobody is left to kill it. The default action, whatever handler was inherited.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(math.ceil(limit) + 5)
    torch.set_num_threads(1)  # the threads of the parent's pools do not exist here, and would be waited for
    builder = interpreter.interpreter_builder
    builder.set_grid_dim = lambda *_: setattr(builder, "grid_dim", grid)
    builder.set_grid_idx = lambda *_: setattr(builder, "grid_idx", place)
    # On a CPU the interpreter works on the tensors themselves. Today's torch leaves out the copy onto themselves at its
    # end; one that did it could bring back what another program has just overwritten.
    interpreter.GridExecutor._restore_args_dev = lambda *_: None
    atomic = builder.create_atomic_rmw

    def patient_atomic(*args: Any) -> Any:
        found = atomic(*args)
        time.sleep(2e-4)  # there are more programs than cores: one that polls lets the others run
        return found

    builder.create_atomic_rmw = patient_atomic
    try:
        launched()
        report.send(None)
    except BaseException:
        report.send(traceback.format_exc())


def run_at_once(kernel: Any, grid: Place, args: tuple[Any, ...], kwargs: dict[str, Any], limit: float = 60.0) -> None:
    """`kernel[grid](*args, **kwargs)` of an interpreted kernel, with all programs running at the same time.

    Args:
        kernel, grid, args, kwargs: of the launch; tensors are on the CPU and among args.
        limit: seconds after which the programs that have not finished are killed.

    Raises:
        ProgramsError: a program raised or died (the others are then killed at once), or the time is up.
    """
    shared = _Shared()
    copies = tuple(shared.copy(value) for value in args)
    whole_grid = (*grid, 1, 1)[:3]
    places = itertools.product(*map(range, whole_grid))

    def launched() -> None:
        kernel[(1,)](*copies, **kwargs)  # one place, of which `_program` says which it is

    fork = multiprocessing.get_context("fork")
    running: dict[Connection, tuple[Place, Any]] = {}
    started, failed = [], None
    deadline = time.monotonic() + limit
    try:
        for place in places:
            reader, writer = fork.Pipe(duplex=False)
            process = fork.Process(target=_program, args=(place, whole_grid, launched, limit, writer), daemon=True)
            with warnings.catch_warnings():
                # Python 3.12 warns of forks beside threads, whose locks nobody would release in the child. The threads
                # here are the test runner's; a program computes with NumPy on one thread, reports and is gone.
                warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
                process.start()
            started.append(process)
            writer.close()  # so that a process which dies silently is the end of its pipe
            running[reader] = place, process
        while running and failed is None:
            ready = wait(list(running), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for reader in [r for r in running if r in ready]:
                place, process = running.pop(reader)
                try:
                    trouble = reader.recv()
                except EOFError:
                    process.join()
                    trouble = f"died with exit code {process.exitcode}"
                reader.close()
                if trouble is not None and failed is None:
                    failed = f"program {place} of {kernel.__name__} with grid {whole_grid}: {trouble}"
    finally:
        for process in started:
            if process.is_alive() and (running or failed):
                process.kill()
            process.join()
            process.close()
        for reader in running:
            reader.close()
    unfinished = sorted(place for place, _ in running.values())
    if failed is not None:
        raise ProgramsError(failed, unfinished)
    if unfinished:
        raise ProgramsError(
            f"{kernel.__name__} with grid {whole_grid}: not finished after {limit:g} s: "
            + ", ".join(map(str, unfinished)),
            unfinished,
        )
    shared.write_back()


@contextmanager
def programs_at_once(limit: float = 60.0) -> Iterator[list[Place]]:
    """Within it recurrent kernels whose programs have to meet run by `run_at_once`; other launches as ever.

    What a kernel is to write holds NaN before, so that it shows if it is read too early. Gives the grids of the
    launches that ran so, a list that grows.
    """
    grids: list[Place] = []
    run_as_ever = launch._run

    def run(
        kernel: Any,
        grid: Place,
        tensors: tuple[Tensor, ...],
        scalars: tuple[float, ...],
        constants: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        if constants.get("SYNC", "none") == "none":
            run_as_ever(kernel, grid, tensors, scalars, constants, options)
            return
        grids.append(grid)
        run_at_once(kernel, grid, (*tensors, *scalars), {**constants, **options}, limit)

    def holding_nan(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full(shape, math.nan, dtype=dtype, device=device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_run", run)
        patch.setattr(launch, "resident_programs", lambda kernel, launch, rows, device: launch.programs)
        patch.setattr(launch, "empty", holding_nan)
        yield grids
