"""The tests that need a GPU, many at a time in processes of their own, and what their failures withhold from timing.

A test that ends its process, hangs, or leaves the device unusable fails alone: those behind it run again in a process
of their own. One that lacked memory, which others had, runs again when it has the device for itself.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..cases import PRECISIONS, Case
from .processes import ROOT, ending, kill

# Not that of the ceilings: it would not see them while other tests run, and the campaign measures them itself.
FILES = ("tests/test_gpu.py", "tests/test_stages.py")
# A warning of somebody else's package must not turn every test red on a machine that nobody has seen before.
PYTEST = [sys.executable, "-m", "pytest", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider"]
CHUNK = 3
# A test compiles up to a dozen kernels, each a matter of seconds, beside other processes that do the same. No process
# gets more than a part of all the time: one that hangs must not use it up.
SECONDS_OF_A_PROCESS, SECONDS_OF_A_TEST, MOST_OF_THE_TIME = 60.0, 30.0, 0.6
# It takes minutes, for which all other processes would wait; `pytest -m gpu` runs it.
LEFT_OUT = ("test_compute_sanitizer",)

_VERDICT = re.compile(r"^(tests/.+?\.py::.+?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b")
_REASON = re.compile(r"^(?:FAILED|ERROR) (tests/.+?\.py::.+?)(?: - (.*))?$")
# What later tests of a process see of an earlier one's error.
_AFTERMATH = ("CUDA error", "device-side assert", "illegal memory access", "unspecified launch failure")
_NO_MEMORY = ("out of memory", "OutOfMemory")

SLOW, OUT_OF_TIME, UNKNOWN = "not finished in good time", "out of time", "there is no such test"

Say = Callable[[str], None]


@dataclass
class Outcome:
    """passed, skipped: how many. failed: messages by test.

    unfinished: for which there was no time. slow: those of them that had more than they should need; a kernel that
    hangs would have stopped with an error.
    """

    passed: int = 0
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    unfinished: list[str] = field(default_factory=list)
    slow: dict[str, str] = field(default_factory=dict)


def collect(limit_s: float, files: tuple[str, ...] = FILES) -> list[str]:
    """Identifiers of all tests that need a GPU.

    Raises:
        RuntimeError: pytest cannot collect them.
    """
    command = [*PYTEST, "--collect-only", "-q", *files]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s)
    found = [line for line in ran.stdout.splitlines() if line.startswith("tests/") and "::" in line]
    found = [line for line in found if not any(name in line for name in LEFT_OUT)]
    if not found:
        raise RuntimeError(f"no GPU tests could be collected: {(ran.stdout + ran.stderr)[-300:]}")
    return found


def chunks(tests: list[str], workers: int = 1) -> deque[list[str]]:
    """Tests that share kernels together, and those that decide what is timed first; few are spread over all workers."""
    size = max(1, min(CHUNK, -(-len(tests) // workers)))
    families: dict[tuple[str, ...], list[str]] = {}
    for test in tests:
        name = test.partition("::")[2].partition("[")[0]
        families.setdefault((name, *sorted(precisions_of(test))), []).append(test)
    first = sorted(families, key=lambda family: ("bfloat16" not in family, family[0] != "test_real_sizes"))
    parts = [families[f][k : k + size] for f in first for k in range(0, len(families[f]), size)]
    return deque(parts)


def precisions_of(test: str) -> set[str]:
    """The precisions that a test's identifier names."""
    return set(re.findall(r"[a-z0-9]+", test.lower())) & set(PRECISIONS)


def read(output: str, chunk: list[str], how: str) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """What a process of pytest -v -rfE has printed: verdicts and messages by test, and tests to run again.

    how: what cut the process off; empty if it came to its own end.
    """
    verdicts, messages = {}, {}
    for line in output.splitlines():
        if match := _VERDICT.match(line):
            verdicts[match[1]] = match[2]
        elif match := _REASON.match(line):
            messages[match[1]] = match[2] or ""
    left = [test for test in chunk if test not in verdicts]
    if left and not how:
        how = "pytest gave no verdict: " + " ".join(output.split())[-200:]
    if left:
        verdicts[left[0]], messages[left[0]] = "FAILED", how
    failed = [test for test in chunk if verdicts.get(test) in ("FAILED", "ERROR")]
    suffering = [t for t in failed[1:] if any(word in messages.get(t, "") for word in _AFTERMATH)]
    again = [*suffering, *left[1:]]
    for test in suffering:
        del verdicts[test]
    return verdicts, messages, again


class Pool:
    """Runs chunks of tests in parallel until all are through or the time is up.

    Args:
        say: told after each chunk how far it is.
        log: takes pytest's output.
        workers: processes at a time.
        deadline: on time.monotonic's clock.
    """

    def __init__(self, say: Say, log: Path, workers: int, deadline: float) -> None:
        self.say, self.log, self.workers, self.deadline = say, log, workers, deadline
        self.outcome = Outcome()
        self.lock = threading.Lock()
        self.again: deque[list[str]] = deque()
        self.alone: list[str] = []
        self.running: set[subprocess.Popen[str]] = set()
        self.total = 0
        self.seen: set[str] = set()
        self.share = 0.0

    def run(self, tests: list[str]) -> Outcome:
        """All of these tests, or as many as there is time for."""
        self.total = len(tests)
        self.share = MOST_OF_THE_TIME * (self.deadline - time.monotonic())
        waiting = chunks(tests, self.workers)
        while waiting:
            threads = [threading.Thread(target=self._serve, args=(waiting,)) for _ in range(self.workers)]
            for thread in threads:
                thread.start()
            try:
                for thread in threads:
                    thread.join()
            except BaseException:
                self.deadline = 0.0
                for process in list(self.running):
                    kill(process)
                raise
            waiting, self.again = self.again, deque()
            if time.monotonic() >= self.deadline:
                self.outcome.unfinished += [test for chunk in waiting for test in chunk]
                waiting = deque()
        for test in self.alone:  # one by one
            self._chunk([test], alone=True)
        return self.outcome

    def _serve(self, waiting: deque[list[str]]) -> None:
        while True:
            try:
                chunk = waiting.popleft()
            except IndexError:
                return
            self._chunk(chunk)

    def _chunk(self, chunk: list[str], alone: bool = False) -> None:
        left = self.deadline - time.monotonic()
        limit = min(SECONDS_OF_A_PROCESS + SECONDS_OF_A_TEST * len(chunk), self.share)
        if left < 5:
            with self.lock:
                self.outcome.unfinished += chunk
            return
        command = [*PYTEST, "-v", "-rfE", "--tb=short", *chunk]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "COLUMNS": "400"},  # or pytest cuts messages
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        with self.lock:
            self.running.add(process)
        try:
            output, _ = process.communicate(timeout=min(left, limit))
            how = "" if process.returncode in (0, 1) else f"the process {ending(process.returncode)}"
            how = UNKNOWN if process.returncode == 4 else how
        except subprocess.TimeoutExpired as error:
            kill(process)
            try:
                output, _ = process.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                output = (error.output or b"").decode(errors="replace")
            how = SLOW if left > limit else OUT_OF_TIME
        with self.lock:
            self.running.discard(process)
            self._note(chunk, output, how, alone)

    def _note(self, chunk: list[str], output: str, how: str, alone: bool) -> None:
        with self.log.open("a", encoding="utf-8") as log:
            log.write(output)
        behind: list[str] = []
        if how == UNKNOWN:  # pytest runs none if it does not know one
            if len(chunk) == 1:
                self.seen.update(chunk)
                self.outcome.skipped += 1
            else:
                self.again.extend([test] for test in chunk)
            return
        if how in (SLOW, OUT_OF_TIME):
            done = {match[1] for line in output.splitlines() if (match := _VERDICT.match(line))}
            left = [test for test in chunk if test not in done]
            chunk = [test for test in chunk if test in done]
            if how == SLOW and left:
                self.outcome.slow[left[0]] = how
                left, behind = left[:1], left[1:]
            self.outcome.unfinished += left
            how = ""
        verdicts, messages, again = read(output, chunk, how)
        again += behind
        for test in chunk:
            verdict, message = verdicts.get(test), messages.get(test, "")
            lacking = verdict in ("FAILED", "ERROR") and any(word in message for word in _NO_MEMORY) and not alone
            if verdict is not None and not lacking:
                self.seen.add(test)
            if verdict in ("FAILED", "ERROR"):
                if lacking:
                    self.alone.append(test)
                else:
                    self.outcome.failed[test] = message[:300]
            elif verdict in ("SKIPPED", "XFAIL"):
                self.outcome.skipped += 1
            elif verdict is not None:
                self.outcome.passed += 1
        if again:
            self.again.append(again)
        found = self.outcome
        counts = f"{found.passed} passed, {found.skipped} skipped, {len(found.failed)} failed"
        self.say(f"GPU tests: {len(self.seen)} of {self.total}: {counts}")


def sizes_of(test: str) -> tuple[int, int] | None:
    """B and H that a test's identifier names, as in "(64, 512, 64)"."""
    found = re.search(r"\((\d+), (\d+), \d+\)", test)
    return (int(found[1]), int(found[2])) if found else None


def withheld(failed: dict[str, str], case: Case) -> dict[str, str]:
    """Who is not to be timed in a case, with the reason: {provider: why}.

    A test that fails withholds the case of its own sizes and precision, in the mode that its message names or in both.
    Other failures are shown and withhold nothing: whoever is timed has been checked against float64 in that very case.
    """
    found: dict[str, str] = {}
    for test, message in failed.items():
        if sizes_of(test) != (case.batch, case.hidden) or case.precision not in precisions_of(test):
            continue
        providers = ["sequence", "sequence, recompute", "sequence, device lengths", "step"]
        if "sequence mode" in message:
            providers = providers[:-1]
        elif "step mode" in message:
            providers = providers[-1:]
        name = test.partition("::")[2]
        for provider in providers:
            found.setdefault(provider, f"its GPU test {name} fails: {message}"[:300])
    return found
