"""Apply the defects of `tests.mutants` to copies of the library, and see which tests fail.

    python -m tests.mutation                 all mutants and all their tests, ten minutes; writes tests/MUTANTS.md
    python -m tests.mutation --only gates    those whose name has this in it, on the terminal

A copy is tested in a process forked from one that has imported torch, Triton and pytest, but nothing of the project.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from queue import Queue
from typing import Any

from tests.mutants import MUTANTS, TESTS, Mutant

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "tests" / "MUTANTS.md"
MOST_SECONDS = 180  # of a mutant's tests, which take twenty; one that hangs has noticed too
_NOT_PYTHON = re.compile(r"\b(Name|Syntax|Indentation|Attribute|UnboundLocal|Import|Type|Key)Error\b.*")
_KILL_WITH_PARENT = 1  # PR_SET_PDEATHSIG
BEGIN = "| Defect | in | caught by |"


class StaleMutantError(ValueError):
    """A mutant's text is not, or not once, in the file that it changes."""


def edited(text: str, mutant: Mutant) -> str:
    """A file's text with a mutant's edits.

    Raises:
        StaleMutantError: see there.
    """
    for old, new in mutant.edits:
        if text.count(old) != 1:
            raise StaleMutantError(f"{mutant.name}: {text.count(old)} times in {mutant.file}: {old!r}")
        text = text.replace(old, new)
    return text


def copy_with(mutant: Mutant | None, folder: Path) -> None:
    """The library and its tests into a folder, with a mutant's edits.

    Raises:
        StaleMutantError: see there.
    """
    for name in ("triton_bnlstm", "tests", "bench"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    if mutant is not None:
        file = folder / "triton_bnlstm" / mutant.file
        file.write_text(edited(file.read_text(encoding="utf-8"), mutant), encoding="utf-8")


class _Verdicts:
    """A pytest plugin: how each test ended; one that stumbled over the mutant's own Python is "broken"."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed or report.when == "call":
            stumbled = report.failed and _NOT_PYTHON.search(report.longreprtext)
            self.of[report.nodeid] = f"broken: {stumbled.group()}" if stumbled else report.outcome


def _serve() -> None:
    """Of each line of standard input, a folder and tests as JSON, a line with their outcomes."""
    import numpy  # noqa: F401  # what takes long to import, and is the same for all copies
    import pytest
    import torch  # noqa: F401
    import triton.runtime.interpreter  # noqa: F401

    answers = os.dup(1)
    for line in sys.stdin:
        folder, tests = json.loads(line)
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)  # with all that it starts
            ctypes.CDLL(None).prctl(_KILL_WITH_PARENT, signal.SIGKILL)
            signal.alarm(MOST_SECONDS)
            output = os.open(Path(folder, "output.txt"), os.O_CREAT | os.O_WRONLY, 0o600)
            os.dup2(output, 1)
            os.dup2(output, 2)
            for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "triton_bnlstm", "bench")]:
                del sys.modules[name]
            os.chdir(folder)
            sys.path[:] = [str(folder), *(p for p in sys.path if p not in ("", str(ROOT)))]
            verdicts = _Verdicts()
            quiet = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--tb=short", "--schedules", "2"]
            code = pytest.main([*quiet, *tests], plugins=[verdicts])
            Path(folder, "verdicts.json").write_text(json.dumps([int(code), verdicts.of]), encoding="utf-8")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        os.write(answers, (json.dumps({"signal": -os.waitstatus_to_exitcode(status)}) + "\n").encode())


class Server:
    """Runs tests on copies of the library; see `serving`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def outcomes(self, mutant: Mutant | None, tests: Sequence[str]) -> dict[str, str]:
        """Of each test "passed", "failed", "skipped", "crashed", or "hung" if it did not end within `MOST_SECONDS`.

        Args:
            mutant: None for the library as it is.
            tests: pytest's identifiers.

        Raises:
            StaleMutantError: see there.
            RuntimeError: the tests could not be run: then a mutant has not been caught, it is broken.
        """
        with tempfile.TemporaryDirectory() as name:
            copy_with(mutant, Path(name))
            found = self._run(Path(name), tests)
            if found is None and len(tests) > 1:  # one has taken the others with it
                found = {}
                for test in tests:
                    found |= self._run(Path(name), [test]) or {test: "crashed"}
            return found or dict.fromkeys(tests, "crashed")

    def _run(self, folder: Path, tests: Sequence[str]) -> dict[str, str] | None:
        """In one process; None if that has crashed, or did not come to the end of several tests."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(folder), list(tests)]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the process that runs tests has ended")
        signalled = json.loads(answer)["signal"]
        if signalled == signal.SIGALRM and len(tests) == 1:
            return dict.fromkeys(tests, "hung")
        if signalled:
            return None
        code, outcomes = json.loads(Path(folder, "verdicts.json").read_text(encoding="utf-8"))
        missing = [test for test in tests if outcomes.get(test, "broken").startswith("broken")]
        if missing or code not in (0, 1):
            output = Path(folder, "output.txt").read_text(encoding="utf-8", errors="replace")[-3000:]
            raise RuntimeError(f"pytest ended with {code}, no verdict of {', '.join(missing)}:\n{output}")
        return {test: outcomes[test] for test in tests}


@contextmanager
def serving() -> Iterator[Server]:
    """A process that has imported what takes long, to be forked for each copy."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_BNLSTM_"))}
    environment |= {"TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", "from tests import mutation; mutation._serve()"],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # whoever presses Ctrl-C means this process, which then ends that one
    )
    with process:
        try:
            yield Server(process)
        finally:
            process.kill()


def short(test: str) -> str:
    """A test's identifier without its folder."""
    return test.removeprefix("tests/").replace(".py::", " ")


def caught(outcomes: dict[str, str]) -> list[str]:
    """Tests that noticed."""
    return [test for test, outcome in outcomes.items() if outcome in ("failed", "crashed", "hung")]


def table(found: Iterable[tuple[Mutant, list[str]]]) -> str:
    """The page that is kept: each mutant with the tests that have caught it, the named one first."""
    lines = [
        "# Which test catches which defect",
        "",
        "Written by `python -m tests.mutation`, which applies each defect of `tests/mutants.py` to a copy of the",
        "library and runs these tests on it; all of them pass without one. In bold the test that CI holds to it.",
        "",
    ]
    letters = dict(zip(TESTS, string.ascii_uppercase, strict=False))
    lines += [f"- **{letters[test]}** `{short(test)}`" for test in TESTS]
    lines += ["", BEGIN, "|---|---|---|"]
    for mutant, tests in found:
        marks = ", ".join(f"**{letters[t]}**" if t == mutant.caught_by else letters[t] for t in TESTS if t in tests)
        lines.append(f"| {mutant.name} | `{mutant.file}` | {marks} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """The command line. The exit status: 1 if a mutant's own test has not caught it."""
    made = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.partition("\n")[0])
    made.add_argument("--only", metavar="TEXT", help="mutants whose name has this in it; the table stays as it is")
    made.add_argument("--jobs", type=int, default=2, metavar="N", help="at the same time (default: %(default)s)")
    arguments = made.parse_args(argv)
    if arguments.jobs < 1:
        made.error(f"--jobs must be 1 or more, got {arguments.jobs}")
    chosen = [m for m in MUTANTS if arguments.only is None or arguments.only in m.name]
    if not chosen:
        made.error(f"--only {arguments.only}: no mutant has that in its name")
    print(f"{len(TESTS)} tests on the library as it is, then on {len(chosen)} mutants of it", flush=True)
    survivors = []

    def tried(mutant: Mutant | None) -> tuple[list[str], float]:
        began, server = time.monotonic(), servers.get()
        try:
            return caught(server.outcomes(mutant, TESTS)), time.monotonic() - began
        except (RuntimeError, StaleMutantError) as error:  # broken, which is not caught; the others go on
            print(error, file=sys.stderr, flush=True)
            return [], time.monotonic() - began
        finally:
            servers.put(server)

    found = []
    with ExitStack() as stack:
        servers: Queue[Server] = Queue()
        for _ in range(arguments.jobs):
            servers.put(stack.enter_context(serving()))
        wrong, _ = tried(None)
        if wrong:
            print(f"fails without any defect: {', '.join(wrong)}", file=sys.stderr)
            return 1
        pool = ThreadPoolExecutor(arguments.jobs)
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        for k, (mutant, (tests, seconds)) in enumerate(zip(chosen, pool.map(tried, chosen), strict=True), 1):
            found.append((mutant, tests))
            if mutant.caught_by not in tests:
                survivors.append(mutant)
            said = "caught" if mutant.caught_by in tests else "NOT CAUGHT BY ITS TEST"
            how_many = f"{len(tests)} of {len(TESTS)} tests, {seconds:.0f} s"
            print(f"[{k}/{len(chosen)}] {mutant.name}: {said}; {how_many}", flush=True)
            if arguments.only is not None:
                print("".join(f"    {short(test)}\n" for test in tests), end="")
    if arguments.only is None and not survivors:
        TABLE.write_text(table(found), encoding="utf-8")
        print(f"wrote {TABLE.relative_to(ROOT)}")
    return 1 if survivors else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted; the table is as it was", file=sys.stderr)
        sys.exit(130)
