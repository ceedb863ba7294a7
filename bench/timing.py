"""Clocks: device time between events, behind a device kept busy and an L2 swept clean; wall time on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch

# Is told who is at what, by those that may crash or hang.
Tell = Callable[[str, str], None]

# Milliseconds for which the device is kept busy while the host enqueues what is timed, so that the latency of a launch
# is not part of it. An eager loop takes longer than this to enqueue, and so shows what its launches cost.
BUSY_MS = 1.0


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)]


def l2_bytes(device: torch.device) -> int:
    """Of the second-level cache; 0 on a CPU."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


class Sweeper:
    """Writes twice the L2 over and over for about `BUSY_MS`."""

    def __init__(self, device: torch.device) -> None:
        self.buffer = torch.empty(max(2 * l2_bytes(device), 1 << 26), dtype=torch.uint8, device=device)
        self.times = 1
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.buffer.zero_()
        start.record()
        for _ in range(10):
            self.buffer.zero_()
        end.record()
        end.synchronize()
        self.times = max(1, round(10 * BUSY_MS / max(start.elapsed_time(end), 1e-3)))

    def __call__(self) -> None:
        """Enqueue the writes."""
        for _ in range(self.times):
            self.buffer.zero_()


@lru_cache
def sweeper(device: torch.device) -> Sweeper:
    """The device's one."""
    return Sweeper(device)


def sample(stages: list[Callable[[], Any]], device: torch.device) -> list[float]:
    """Seconds of calls made one behind the other, each on the device's own clock; by the host's clock on a CPU."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for stage in stages:
            stage()
            marks.append(time.perf_counter())
        return [after - before for before, after in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(stages) + 1)]
    sweeper(device)()
    events[0].record()
    for stage, event in zip(stages, events[1:], strict=True):
        stage()
        event.record()
    events[-1].synchronize()
    return [a.elapsed_time(b) / 1000 for a, b in pairwise(events)]


def device_seconds(call: Callable[[], Any], device: torch.device, rounds: int = 20) -> list[float]:
    """Seconds of each of `rounds` calls, after one that warms up."""
    call()
    return [sample([call], device)[0] for _ in range(rounds)]


def wall_seconds(call: Callable[[], Any], device: torch.device, rounds: int = 5) -> float:
    """Median seconds on the host's clock of one call, the device idle before and after it."""
    found = []
    for _ in range(rounds):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class CaptureFailed(RuntimeError):
    """Calls could not be captured in a CUDA graph. Later captures of this process may fail for that alone."""


def captured(
    call: Callable[[], Any], pool: Any = None, warm: Callable[[], Any] | None = None
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of one call, and what the call returned, which its replays write anew.

    Args:
        call: what is captured.
        pool: memory pool of another graph whose tensors this one reads.
        warm: called twice before, on a stream of its own; None: the call has been warmed up.

    Raises:
        CaptureFailed: it cannot be captured.
        torch.OutOfMemoryError: there is no memory for it.
    """
    if warm is not None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                warm()
        torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            result = call()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise CaptureFailed(f"{type(error).__name__}: {error}") from error
    return graph, result
