"""Every test from the same seed, on the threads that it was given; kernels in the interpreter where there is no GPU."""

from __future__ import annotations

import argparse
import os
from functools import partial

import pytest
import torch

try:
    from hypothesis import settings
except ModuleNotFoundError:  # the tests that need a GPU do without
    settings = None  # type: ignore[assignment, misc]

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported

# CI machines are slow and shared: a deadline would test the machine. Derandomised: a red run is red again.
if settings is not None:
    settings.register_profile("ci", deadline=None, derandomize=True)
    settings.load_profile("ci")

# Tensors here are tiny: more threads would only wait for each other, for minutes where cores are shared.
torch.set_num_threads(1)


def _at_least(least: int, text: str) -> int:
    if int(text) < least:
        raise argparse.ArgumentTypeError(f"must be {least} or more, got {text}")
    return int(text)


def pytest_addoption(parser: pytest.Parser) -> None:
    """How many schedules tests/test_schedules.py tries, and which."""
    group = parser.getgroup("schedules of programs that meet")
    group.addoption("--schedules", type=partial(_at_least, 1), metavar="N", help="of each case (default: 20)")
    group.addoption(
        "--first-schedule",
        type=partial(_at_least, 0),
        default=0,
        metavar="SEED",
        help="first seed (default: %(default)s)",
    )


@pytest.fixture(autouse=True, scope="session")
def _quick_interpreter():
    try:
        from bench.interpreter import quicken
    except ModuleNotFoundError:  # no Triton: nothing to quicken
        return
    quicken()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, and counted, where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))


@pytest.fixture(autouse=True, scope="session")
def _nobodys_cache(tmp_path_factory):
    """What somebody has tuned on this machine must not decide about a test, nor a test about what it finds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_BNLSTM_CACHE_DIR", str(tmp_path_factory.mktemp("tuning")))
        patch.delenv("TRITON_BNLSTM_AUTOTUNE", raising=False)
        yield


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Results of jobs that several processes run together, by number of processes and job: [rank]."""
    from tests.support.rank_results import results_in

    return results_in(tmp_path_factory.getbasetemp())


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def bands():
    """Guard bands around every tensor that a kernel writes, and a look at each of its accesses; gives those tensors."""
    from tests.support.memory import guarded_memory

    with guarded_memory() as held:
        yield held


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Where the time went, file by file; what two processes do at once counts twice."""
    seconds: dict[str, float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                file = report.nodeid.partition("::")[0]
                seconds[file] = seconds.get(file, 0.0) + report.duration
    if sum(seconds.values()) > 60:
        terminalreporter.section("seconds by file")
        for file in sorted(seconds, key=lambda file: -seconds[file])[:15]:
            terminalreporter.write_line(f"{seconds[file]:7.1f} {file}")
