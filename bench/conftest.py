"""`pytest bench`: pytest-benchmark's comparisons on a GPU; without one the same tests at toy sizes, without timings."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

import pytest
import torch

from bench.cases import CASES, MODES, Case
from bench.environment import current_device
from bench.measure import CannotCapture, measure
from bench.providers import PROVIDERS, usual
from bench.records import Result

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported

# What a CPU may be timed on, if it is asked for: eager loops at a size that takes them some tenths of a second.
ON_CPU = (Case(64, 256, 100, 64, "float32"), Case(64, 256, 100, 64, "float32", lengths="uniform"))
EAGER = ("reference", "F.batch_norm loop", "nn.LSTM")
# Options of pytest-benchmark's that make no sense where nothing is timed.
OF_TIMINGS = tuple(f"--benchmark-{name}" for name in ("save", "autosave", "json", "compare"))


def timed_on_cpu(config: pytest.Config) -> bool:
    """Whether there is no GPU, and timings were asked for all the same."""
    return not torch.cuda.is_available() and bool(config.getoption("benchmark_enable", False))


def cases_of(config: pytest.Config) -> list[Case]:
    """All cases on a GPU; eager loops' on a CPU that is to be timed; else every kind of case once, at toy sizes."""
    if torch.cuda.is_available():
        return list(CASES)
    if timed_on_cpu(config):
        return list(ON_CPU)
    return list({case.toy().key: case.toy() for case in CASES}.values())


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Without a GPU nothing is timed unless --benchmark-enable asks for it."""
    if torch.cuda.is_available() or timed_on_cpu(config) or not hasattr(config.option, "benchmark_disable"):
        return
    for argument in config.invocation_params.args:
        if str(argument).startswith(OF_TIMINGS):
            raise pytest.UsageError(
                f"{argument}: no GPU, so nothing is timed; --benchmark-enable times eager loops on the CPU"
            )
    config.option.benchmark_disable = True
    config.option.benchmark_only = False  # these tests are all that there is to be left
    torch.set_num_threads(1)  # toy tensors: more threads would only wait for each other
    with contextlib.suppress(ModuleNotFoundError):  # there may be no Triton
        from bench.interpreter import quicken

        quicken()


def pytest_report_header(config: pytest.Config) -> str | None:
    """What is about to be done where there is no GPU."""
    if torch.cuda.is_available():
        return None
    if timed_on_cpu(config):
        return "bench: no GPU: eager loops are timed on the CPU, which says nothing about the kernels"
    return "bench: no GPU: outputs and gradients are checked at toy sizes, nothing is timed"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Case by case, so that one case's providers are measured together and then forgotten."""
    if "provider" not in metafunc.fixturenames:
        return
    cases = cases_of(metafunc.config)
    timed = torch.cuda.is_available() or timed_on_cpu(metafunc.config)
    modes = MODES if timed else ("training",)  # the check covers all modes at once
    chosen = [(case.key, mode, name) for case in cases for mode in modes for name in usual(case)]
    kinds = ("no batch norm", "layer norm")
    labels = {name: f"{name} ({p.note})" if p.note in kinds else name for name, p in PROVIDERS.items()}
    names = [f"{key}-{mode}-{labels[name]}" for key, mode, name in chosen]
    metafunc.parametrize(("key", "mode", "provider"), chosen, ids=names)


@pytest.fixture
def case(request: pytest.FixtureRequest, key: str) -> Case:
    """The case of this key."""
    return next(case for case in cases_of(request.config) if case.key == key)


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Callable[[Case, str], Result | None]:
    """The result of a provider in a case; timed in turns with all others of the case that this session has tests for.

    None where it is not timed: on a CPU, where timings were asked for, only eager loops are.
    """
    wanted: dict[str, tuple[set[str], set[str]]] = {}
    for item in request.session.items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if "provider" in parameters:
            names, modes = wanted.setdefault(parameters["key"], (set(), set()))
            names.add(parameters["provider"])
            modes.add(parameters["mode"])
    kept: dict[str, dict[str, Result]] = {}
    device = current_device()
    timed = device.type == "cuda" or timed_on_cpu(request.config)

    def of(case: Case, provider: str) -> Result | None:
        if not timed:
            return measure(case, device, [PROVIDERS[provider]], timed=False)[0]
        if case.key not in kept:
            kept.clear()
            asked, modes = wanted[case.key]
            names = [name for name in PROVIDERS if name in asked]
            if timed_on_cpu(request.config):
                names = [name for name in names if name in EAGER]
            plain: dict[str, str] = {}
            while True:
                try:
                    found = measure(case, device, [PROVIDERS[name] for name in names], modes=modes, plain=plain)
                    break
                except CannotCapture as error:
                    plain[error.provider] = str(error)
            kept[case.key] = {result.provider: result for result in found}
        return kept[case.key].get(provider)

    return of
