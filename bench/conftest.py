"""`pytest bench`: pytest-benchmark's comparisons on a GPU; without one the same tests at toy sizes, without timings."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from bench.cases import CASES, MODES, Case
from bench.environment import current_device
from bench.measure import measure
from bench.providers import PROVIDERS, USUAL
from bench.records import Result

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported

# What a CPU may be timed on, if it is asked for: eager loops at a size that takes them some tenths of a second.
ON_CPU = (Case(64, 256, 100, 64, "float32"), Case(64, 256, 100, 64, "float32", lengths="uniform"))
EAGER = ("reference", "F.batch_norm loop", "nn.LSTM")


def timed_on_cpu(config: pytest.Config) -> bool:
    """Whether there is no GPU, and timings were asked for all the same."""
    return not torch.cuda.is_available() and bool(config.getoption("benchmark_enable", False))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Without a GPU nothing is timed unless --benchmark-enable asks for it."""
    if not torch.cuda.is_available() and hasattr(config.option, "benchmark_disable"):
        config.option.benchmark_disable = not config.option.benchmark_enable
        if config.option.benchmark_disable:
            torch.set_num_threads(1)  # toy tensors: more threads would only wait for each other


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Case by case, so that one case's providers are measured together and then forgotten."""
    if "provider" not in metafunc.fixturenames:
        return
    modes: tuple[str, ...] = MODES
    if torch.cuda.is_available():
        cases = list(CASES)
    elif timed_on_cpu(metafunc.config):
        cases = list(ON_CPU)
    else:  # the check covers all modes at once
        cases, modes = list({case.toy().key: case.toy() for case in CASES}.values()), ("training",)
    chosen = [(case, mode, name) for case in cases for mode in modes for name in USUAL]
    labels = {name: f"{name} ({p.note})" if "norm" in p.note else name for name, p in PROVIDERS.items()}
    names = [f"{case.key}-{mode}-{labels[name]}" for case, mode, name in chosen]
    metafunc.parametrize(("case", "mode", "provider"), chosen, ids=names)


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Callable[[Case, str], Result | None]:
    """The result of a provider in a case; timed in turns with all others of the case that this session has tests for.

    None where it is not timed: on a CPU, where timings were asked for, only eager loops are.
    """
    wanted: dict[str, set[str]] = {}
    for item in request.session.items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if "provider" in parameters:
            wanted.setdefault(parameters["case"].key, set()).add(parameters["provider"])
    kept: dict[str, dict[str, Result]] = {}
    device = current_device()
    timed = device.type == "cuda" or timed_on_cpu(request.config)

    def of(case: Case, provider: str) -> Result | None:
        if not timed:
            return measure(case, device, [PROVIDERS[provider]], timed=False)[0]
        if case.key not in kept:
            kept.clear()
            names = [name for name in USUAL if name in wanted[case.key]]
            if timed_on_cpu(request.config):
                names = [name for name in names if name in EAGER]
            found = measure(case, device, [PROVIDERS[name] for name in names], timed=timed)
            kept[case.key] = {result.provider: result for result in found}
        return kept[case.key].get(provider)

    return of
