"""Threads that take turns: one runs at a time, and a seed says who is next. The same seed gives the same run."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Hashable

import numpy as np

from tests.support.interpreter import position_of_thread


class StuckError(RuntimeError):
    """Programs wait for something that does not come, or do not come to an end."""


_ROUNDS = 50  # in which all look once more at what they wait for, before they count as stuck


class _AbandonedError(BaseException):
    """Ends a thread whose run is over."""


class Turns:
    """Runs bodies, one thread each.

    Args:
        names: of the bodies, in reports.
        seed: of the choices. Three policies, by seed modulo 3: anybody is next; one is held back until the others
            cannot go on; who runs mostly runs on.
        limit: seconds after which a run is cut off.
    """

    def __init__(self, names: list[object], seed: int, limit: float = 120.0) -> None:
        self._names = names
        self._limit = limit
        self._deadline = time.monotonic() + limit
        self._idle_rounds = 0
        self._random = random.Random(seed)
        self._policy = seed % 3
        self._held_back = self._random.randrange(len(names))
        self._may_run = [threading.Semaphore(0) for _ in names]
        self._running = set(range(len(names)))
        self._waiting: dict[int, Hashable] = {}
        self._trouble: BaseException | None = None
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def run(self, body: Callable[[int], None]) -> None:
        """All bodies, to their ends.

        Raises:
            StuckError: see there; with every program's position.
            BaseException: what the first body that failed has raised.
        """

        def thread(own: int) -> None:
            self._may_run[own].acquire()
            try:
                if self._trouble is None:
                    with np.errstate(all="ignore"):
                        body(own)
            except BaseException as error:
                while error.__cause__ is not None:  # the interpreter wraps what goes through it
                    error = error.__cause__
                self._trouble = self._trouble or error  # what was first is what counts
            self._running.discard(own)
            self._next(own)

        self._threads = [threading.Thread(target=thread, args=(k,), daemon=True) for k in range(len(self._names))]
        for each in self._threads:
            each.start()
        self._may_run[self._choose(-1)].release()
        if not self._over.wait(self._limit + 5.0):  # one of them goes round without ever giving way
            raise StuckError(f"not finished after {self._limit:g} s:\n{self._positions()}")
        for each in self._threads:
            each.join()
        if self._trouble is not None:
            raise self._trouble

    def give_way(self, own: int) -> None:
        """Let another one run, or go on."""
        self._next(own)
        if self._trouble is not None:
            raise _AbandonedError

    def wait(self, own: int, event: Hashable) -> None:
        """Let others run until `happened(event)`, or until nobody else can run."""
        self._waiting[own] = event
        self.give_way(own)

    def happened(self, event: Hashable) -> None:
        """Those that wait for it may go on."""
        self._waiting = {k: e for k, e in self._waiting.items() if e != event}
        self._idle_rounds = 0

    def _positions(self) -> str:
        where = (f"{self._names[k]}: {position_of_thread(self._threads[k])}" for k in sorted(self._running))
        return "\n".join(where)

    def _choose(self, own: int) -> int:
        ready = sorted(self._running - self._waiting.keys())
        if not ready:
            return -1
        if self._policy == 1 and len(ready) > 1:
            ready = [k for k in ready if k != self._held_back]
        if self._policy == 2 and own in ready and self._random.random() < 0.9:
            return own
        return self._random.choice(ready)

    def _next(self, own: int) -> None:
        if self._trouble is not None:
            self._waiting.clear()  # all of them are to end
        elif self._running and not self._running - self._waiting.keys():
            self._idle_rounds += 1
            if self._idle_rounds > _ROUNDS:
                self._trouble = StuckError(f"no program can go on:\n{self._positions()}")
            self._waiting.clear()
        elif time.monotonic() > self._deadline:
            self._trouble = StuckError(f"not finished after {self._limit:g} s:\n{self._positions()}")
            self._waiting.clear()
        chosen = self._choose(own)
        if chosen == own:
            return
        if chosen == -1:
            self._over.set()
            return
        self._may_run[chosen].release()
        if own in self._running:
            self._may_run[own].acquire()
