"""Clocks; and the paths for a GPU, walked with a device that only pretends."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch

from bench import measure, providers, timing
from bench.cases import Case
from bench.problem import Problem
from bench.providers import Provider

CPU = torch.device("cpu")
CASE = Case(5, 6, 4, 3, "float32")


def named(name, build):
    return Provider(name, build)


# Clocks


def test_percentiles_and_medians(monkeypatch):
    assert timing.percentiles([5.0, 1.0, 2.0, 3.0, 4.0, 100.0]) == (3.5, 2.0, 5.0)
    times = iter([0.0, 1.0, 10.0, 15.0, 20.0, 22.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(times))
    assert timing.wall_seconds(lambda: None, CPU, 3) == 2.0


# A GPU that only pretends


class Event:
    clock = 0.0

    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self):
        Event.clock += 1.0
        self.at = Event.clock

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return other.at - self.at


class Stream:
    def wait_stream(self, other):
        assert isinstance(other, Stream)


class Graph:
    def replay(self):
        pass

    def pool(self):
        return (0, 1)


class Properties:
    L2_cache_size = 1 << 20


@pytest.fixture
def pretended(monkeypatch):
    """torch.cuda's names that are used, for tensors on a CPU; and a device that says it is a GPU."""
    calls: list[str] = []

    @contextlib.contextmanager
    def capture(graph, pool=None):
        assert isinstance(graph, Graph)
        calls.append("shared" if pool else "capture")
        yield

    for name, value in {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": capture,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: Stream(),
        "synchronize": lambda device=None: None,
        "get_device_properties": lambda device=None: Properties,
        "memory_allocated": lambda device=None: 100,
        "max_memory_allocated": lambda device=None: 350,
        "reset_peak_memory_stats": lambda device=None: None,
    }.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, value)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, device=None, **options: empty(*shape, **options))
    forget = timing.sweeper.cache_clear
    forget()
    yield calls
    forget()


def pretend(problem):
    problem.device = torch.device("cuda", 0)
    return problem


def test_graphs_share_memory_and_are_timed_by_events(pretended, monkeypatch):
    monkeypatch.setattr(measure, "Problem", lambda case, device: pretend(Problem(case, CPU)))
    chosen = [named("eager", providers.reference)]
    chosen.append(named("graphed", lambda problem: replace(providers.reference(problem), graphed=True)))
    found = {r.provider: r for r in measure.measure(CASE, torch.device("cuda", 0), chosen, rounds=6)}
    assert pretended == ["capture", "capture", "shared"]
    assert found["eager"].modes["training"].how == "events"
    assert found["graphed"].modes["training"].how == "graph"
    for result in found.values():
        assert result.status == "ok", result.why
        assert result.peak_bytes == 250
        # the pretended clock ticks a millisecond with each event
        assert result.modes["forward"].us == result.modes["inference"].us == pytest.approx((1000, 1000, 1000))
        assert result.modes["training"].us[0] == pytest.approx(2000)


def refuse(*arguments, **options):
    raise timing.CaptureFailed("operation not permitted when stream is capturing")


def test_what_cannot_be_captured_is_named_and_timed_without_a_graph_if_that_is_asked_for(pretended, monkeypatch):
    monkeypatch.setattr(measure, "Problem", lambda case, device: pretend(Problem(case, CPU)))
    monkeypatch.setattr(measure, "captured", refuse)
    gpu, graphed = torch.device("cuda", 0), lambda problem: replace(providers.reference(problem), graphed=True)
    meant = named("meant", lambda problem: replace(graphed(problem), replayed=True))
    with pytest.raises(measure.CannotCapture, match="not permitted") as caught:
        measure.measure(CASE, gpu, [named("eager", graphed)], rounds=1)
    assert caught.value.provider == "eager"
    plain = {"eager": "no capture", "meant": "no capture"}
    eager, nothing = measure.measure(CASE, gpu, [named("eager", graphed), meant], rounds=1, plain=plain)
    assert eager.modes["training"].how == "events; no graph: no capture"
    assert (nothing.status, nothing.why) == ("failed", "it cannot be captured in a graph: no capture")


def test_a_failed_capture_is_told_as_such(pretended):
    def fail():
        raise ValueError("no")

    with pytest.raises(timing.CaptureFailed, match="ValueError: no"):
        timing.captured(fail)


def test_forward_and_backward_are_replayed_in_this_order_and_share_their_memory(pretended, monkeypatch):
    replayed, made = [], []

    def captured(call, pool=None, warm=None):
        graph = Graph()
        name = "inference" if not made else "forward" if len(made) == 1 else "backward"
        made.append((name, pool, warm is not None))
        graph.replay = lambda: replayed.append(name)
        graph.pool = lambda: name
        return graph, call()

    monkeypatch.setattr(measure, "captured", captured)
    problem = pretend(Problem(CASE, CPU))
    runner = measure.runner_of(problem, replace(providers.reference(problem), graphed=True))
    assert made == [("inference", None, True), ("forward", None, True), ("backward", "forward", False)]
    runner.forward(), runner.backward(), runner.infer()
    assert replayed == ["forward", "backward", "inference"]
    made.clear()
    model = replace(providers.reference(problem), graphed=True, graphed_inference=False)
    made.append("none for evaluation")
    runner = measure.runner_of(problem, model)
    assert (runner.how, runner.how_inference) == ("graph", "events")


def test_the_sweep_is_between_samples_and_before_the_clock(pretended, monkeypatch):
    order = []
    monkeypatch.setattr(timing, "sweeper", lambda device: lambda: order.append("sweep"))
    record = Event.record
    monkeypatch.setattr(Event, "record", lambda self: (order.append("event"), record(self)))
    seconds = timing.sample([lambda: order.append("a"), lambda: order.append("b")], torch.device("cuda", 0))
    assert order == ["sweep", "event", "a", "event", "b", "event"]
    assert seconds == [1e-3, 1e-3]


def test_the_device_is_kept_busy_for_about_a_millisecond(pretended):
    swept = timing.sweeper(torch.device("cuda", 0))
    assert swept.buffer.numel() >= 2 * Properties.L2_cache_size
    assert swept.times == 10  # ten writes take a tick, which is a millisecond
