"""Every provider in every case and mode, as pytest-benchmark shows, saves and compares it.

All providers of a case are timed together, in turns, on the device's own clock; what pytest-benchmark measures is that
clock, put forward by one sample after the other. Without a GPU each provider is only checked against float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch

from bench import records
from bench.cases import Case
from bench.ceilings import Ceilings
from bench.ceilings import measure as measure_ceilings
from bench.environment import cpu_name, versions
from bench.floor import floor
from bench.records import Result

pytest.importorskip("pytest_benchmark", reason="pip install -e '.[bench]'")

# torch.compile and a GPU's libraries warn of things that are not ours
pytestmark = pytest.mark.filterwarnings("default")


class DeviceClock:
    """A timer that shows device time: seconds of all samples so far."""

    def __init__(self) -> None:
        self.now = 0.0
        self.samples: Iterator[float] = iter(())

    def __call__(self) -> float:
        """Seconds."""
        return self.now

    def advance(self) -> None:
        """To the end of the next sample."""
        self.now += next(self.samples, 0.0)


CLOCK = DeviceClock()


@lru_cache
def ceilings() -> Ceilings:
    """The present device's."""
    return measure_ceilings(torch.device("cuda", torch.cuda.current_device()))


def extra_info(case: Case, mode: str, result: Result) -> dict[str, Any]:
    """What has to be known to read the figure, and to take it again."""
    timing = result.modes[mode]
    info = {**case.as_json(), "mode": mode, "provider": result.provider, "timed": timing.how, **versions()}
    info |= {"errors": result.errors, "saved_bytes": result.saved_bytes, "peak_bytes": result.peak_bytes}
    info |= {"wall_us": timing.wall_us, "first_call_s": result.first_call_s, "layout": result.layout}
    info |= {"us_per_step": timing.us[0] / case.steps, "source": result.source}
    if not torch.cuda.is_available():
        return info | {"device": f"{cpu_name()} (CPU)"}
    info["device"] = torch.cuda.get_device_name()
    least = floor(case, mode, ceilings(), torch.cuda.get_device_properties().multi_processor_count)
    if least is not None:
        info |= {"floor_us": 1e6 * least.total_seconds, "floor_percent": 1e8 * least.total_seconds / timing.us[0]}
    return info


@pytest.mark.benchmark(timer=CLOCK, warmup=False)
def test_layer(case: Case, mode: str, provider: str, benchmark: Any, measured: Callable[..., Result | None]) -> None:
    """Right in outputs and gradients; and, on a GPU, so fast."""
    result = measured(case, provider)
    if result is None:
        pytest.skip("on a CPU only eager loops are timed: that says nothing about the kernels")
    if result.status == records.CANNOT:
        pytest.skip(result.why)
    assert result.status == records.OK, result.why
    timing = result.modes.get(mode)
    samples = timing.samples_us if timing else []
    benchmark.group = f"{case.key}, {mode}"
    if timing is not None:
        if not torch.cuda.is_available():
            benchmark.group = f"CPU, eager reference path, not the kernels: {benchmark.group}"
        benchmark.extra_info.update(extra_info(case, mode, result))
    CLOCK.samples = iter([us / 1e6 for us in samples])
    benchmark.pedantic(CLOCK.advance, rounds=max(1, len(samples)), iterations=1)
