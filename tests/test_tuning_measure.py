"""What measures on a device, run in the interpreter: nothing wrong is ever timed, and nothing of the caller's changes.

Its times mean nothing here, and nobody looks at them.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.support.tuning import BY
from triton_bnlstm import BNLSTM, fused_backward, fused_forward
from triton_bnlstm.kernels.config import INTERPRETER, Config
from triton_bnlstm.kernels.errors import KernelError
from triton_bnlstm.tuning import choice, space
from triton_bnlstm.tuning.sample import relative_error
from triton_bnlstm.tuning.tuner import TuningError, Unfit, tune
from triton_bnlstm.tuning.work import FLAGS, Work

launch = pytest.importorskip("triton_bnlstm.kernels.launch")
run = pytest.importorskip("triton_bnlstm.kernels.run")
measure = pytest.importorskip("triton_bnlstm.tuning.measure")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_gpu.py has its own")

CPU = torch.device("cpu")
WORK = Work("forward", 6, 5, 1, torch.float32)
STEPS = 4


def bench_of(work=WORK):
    return measure.bench_of(work, CPU, STEPS)


@pytest.mark.parametrize("kernel", ["forward", "backward", "inference", "moments", "save"])
@pytest.mark.parametrize(("dtype", "directions", "flags"), [(torch.float32, 2, "all"), (torch.float16, 1, "none")])
def test_every_kernels_work_is_measured(kernel, flags, dtype, directions):
    """The default is right, and so is a layout beside it; both are timed."""
    given = FLAGS[kernel] if flags == "all" else ()
    work = Work(kernel, 6, 5, directions, dtype, "ieee", given, 6 if kernel == "moments" else 0)
    bench = bench_of(work)
    bench.prepare(bench.default)
    ready = [bench.default]
    for layout in [*bench.structures(), *bench.neighbours(bench.default)][1:4]:
        if isinstance(layout, Config) and layout.sequence and space.programs(work, layout) > directions:
            with pytest.raises(Unfit, match="at the same time"):  # its programs cannot meet in the interpreter
                bench.prepare(layout)
        else:
            bench.prepare(layout)
            ready.append(layout)
    assert len(ready) > 1
    assert all(bench.sample(layout) > 0 for layout in ready)


def test_gradients_and_statistics_are_compared_too():
    names = set(bench_of(replace(WORK, flags=("cell_norm", "seats"))).layer.expected)
    assert {"output 0", "h_n 0", "c_n 0", "mean 0", "variance 0", "d_x 0", "d_h 0", "d_c 0"} <= names
    assert {f"d_{name} 0" for name in ("weight_ih", "weight_hh", "bias", "gamma_hh", "gamma_c", "beta_c")} <= names


@pytest.mark.parametrize("broken", ["states", "statistics", "gradient", "not finite"])
def test_a_layout_that_computes_something_wrong_is_never_timed(monkeypatch, broken):
    """1 % off, in one place of what a kernel gives."""
    train, backward = fused_forward.train, fused_backward.backward

    def wrong_train(calls, keep):
        ran = train(calls, keep)
        if broken == "states":
            ran.h[0, -1] *= 1.01
        elif broken == "not finite":
            ran.h[0, -1, -1] = float("nan")
        elif broken == "statistics":
            ran.moments[0].hh.var[-1] *= 1.01
        return ran

    def wrong_backward(*arguments, **options):
        found = backward(*arguments, **options)
        if broken == "gradient":
            found[4] *= 1.01  # of W_hh
        return found

    bench = bench_of()
    monkeypatch.setattr(fused_forward, "train", wrong_train)
    monkeypatch.setattr(fused_backward, "backward", wrong_backward)
    with pytest.raises(Unfit, match=r"off by .* \(at most"):
        bench.prepare(bench.default)
    with pytest.raises(KeyError):
        bench.sample(bench.default)
    with pytest.raises(TuningError, match="off by"):
        tune(WORK, bench, by=BY, case={}, seconds=5)


def test_moments_that_are_wrong(monkeypatch):
    real = launch.moments
    work = Work.of_moments(6, 5, 1, torch.float32, centre=True)
    for place in ("moments", "centred"):
        bench = bench_of(work)

        def wrong(x, rows, centred=None, *, place=place, **options):
            found = real(x, rows, centred, **options)
            (found if place == "moments" else centred).mul_(1.001)
            return found

        monkeypatch.setattr(launch, "moments", wrong)
        with pytest.raises(Unfit, match="moments off by"):
            bench.prepare(bench.default)
        monkeypatch.setattr(launch, "moments", real)


def test_half_precision_may_lose_what_the_reference_path_loses():
    for dtype, most in ((torch.float32, 4e-4), (torch.float16, 4e-2)):
        limits = bench_of(replace(WORK, dtype=dtype)).layer.limits
        assert all(limit <= most * (5 if name.startswith("d_") else 1) for name, limit in limits.items())


def test_a_layout_that_needs_too_much_is_not_launched(monkeypatch):
    bench = bench_of()
    assert bench.recurrence  # made by a call that runs
    monkeypatch.setattr(launch, "_run", lambda *_: pytest.fail("launched"))
    with pytest.raises(Unfit, match="2 programs of forward_kernel have to run at the same time"):
        bench.prepare(replace(bench.default, units=4))
    with pytest.raises(Unfit, match="does not fit into registers"):
        bench.prepare(replace(bench.default, units=64, batch_tile=128))

    def broken(self, config):
        raise KernelError("forward_kernel: PassManager::run failed")

    monkeypatch.setattr(launch.Recurrence, "why_not", broken)
    with pytest.raises(Unfit, match="PassManager"):
        bench.prepare(replace(bench.default, warps=8))


def test_moments_that_need_too_much_are_not_launched(monkeypatch):
    """They are compiled and loaded before, as the other kernels are; which is nothing in the interpreter."""
    bench = bench_of(Work.of_moments(6, 5, 1, torch.float32, centre=True))
    asked = []

    def loaded(kernel, grid, tensors, scalars, constants, options):
        asked.append((kernel.__name__, constants["BR"], options["num_warps"]))
        raise KernelError("moments_kernel: out of resources")

    monkeypatch.setattr(run, "interpreted", lambda: False)
    monkeypatch.setattr(run, "loaded", loaded)
    real = run.run
    monkeypatch.setattr(launch, "_run", lambda *of: real(*of) if run._only_loaded.get() else pytest.fail("launched"))
    with pytest.raises(Unfit, match="out of resources"):
        bench.prepare(bench.default)
    assert asked == [("moments_kernel", bench.default.rows, bench.default.warps)]


def test_what_is_saved_is_compared_in_the_layouts_that_calls_get(monkeypatch):
    """Tuned ones, where there are: both when it is looked at and when it is timed."""
    seen = []
    real = measure.SaveBench.call_of

    def call_of(self, layout):
        call = real(self, layout)
        return lambda: (seen.append(choice._analytic_only.get()), call())[1]

    monkeypatch.setattr(measure.SaveBench, "call_of", call_of)
    bench = bench_of(replace(WORK, kernel="save"))
    bench.prepare(bench.default)
    bench.sample(bench.default)
    assert len(seen) >= 2
    assert not any(seen)
    seen.clear()
    other = bench_of()
    monkeypatch.setattr(other, "call_of", lambda layout: lambda: seen.append(choice._analytic_only.get()))
    other.prepare(other.default)
    other.sample(other.default)
    assert seen  # the other kernels' tuning is undisturbed by what was tuned before
    assert all(seen)


@pytest.mark.parametrize("flags", [("seats",), ("fill",)])
def test_another_default_device_does_not_matter(flags):
    work = replace(WORK, kernel="backward" if "fill" in flags else "forward", flags=flags)
    torch.set_default_device("meta")
    try:
        bench = bench_of(work)
        bench.prepare(bench.default)
    finally:
        torch.set_default_device(None)


def test_too_little_memory_says_nothing_about_a_layout(monkeypatch):
    bench = bench_of()

    def full(self, config):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(launch.Recurrence, "why_not", full)
    with pytest.raises(TuningError, match="too little memory"):
        bench.prepare(bench.default)


def test_from_the_first_to_the_last():
    """The search on real kernels: every layout it tries is compiled, looked at and timed, or told why not."""
    bench = bench_of()
    found = tune(WORK, bench, by=BY, case={}, seconds=20, rounds=3)
    assert isinstance(found.layout, Config)
    assert found.candidate(found.default).microseconds > 0
    assert any("at the same time" in each.failed for each in found.candidates)
    assert found.gain is not None


def test_nothing_of_the_callers_changes():
    """Neither random numbers nor modes, precision, warnings or a graph that is being made."""
    before = torch.get_rng_state()
    x = torch.randn(3, requires_grad=True)
    state = torch.get_rng_state()
    y = x * x
    torch.set_float32_matmul_precision("high")
    try:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
            warnings.simplefilter("error")
            for kernel in ("forward", "backward", "inference"):
                bench = bench_of(replace(WORK, kernel=kernel))
                bench.prepare(bench.default)
                bench.sample(bench.default)
            assert torch.is_inference_mode_enabled()
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    y.sum().backward()
    assert torch.equal(x.grad, 2 * x)
    assert not torch.equal(before, state)


def test_a_recurrence_is_noted_only_where_it_is_asked_for():
    layer = BNLSTM(2, 5, max_length=4, backend="triton")
    with launch.observed() as seen:
        layer(torch.randn(3, 4, 2))[0].sum().backward()
    kernels = [each.kernel.__name__ for each in seen]
    assert kernels[0] == "forward_kernel"
    layer(torch.randn(3, 4, 2))
    assert [each.kernel.__name__ for each in seen] == kernels
    assert INTERPRETER.backend == "cpu"


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_an_error_is_a_number_that_can_be_compared(broken):
    """NaN is neither within a limit nor beyond it, and lost beside another error."""
    expected = torch.ones(5, dtype=torch.float64)
    wrong = expected.clone()
    wrong[2] = broken
    assert relative_error(expected, expected) == 0
    assert relative_error(1.01 * expected, expected) == pytest.approx(0.01)
    assert relative_error(wrong, expected) == float("inf")
    assert relative_error(expected[:4], expected) == float("inf")


def test_what_passes_is_within_each_limit_and_finite():
    """One number that is not finite is enough, and so is an error just beyond its limit."""
    sample = bench_of().layer
    right = dict(sample.expected)
    assert sample.why_wrong(right) is None
    for name in ("output 0", "variance 0", "d_weight_hh 0"):
        for broken in (float("nan"), float("inf"), float("-inf")):
            wrong = right[name].clone()
            wrong.view(-1)[-1] = broken
            assert f"{name} off by" in sample.why_wrong({**right, name: wrong})
        for share, passes in ((0.9, True), (1.1, False), (3.9, False)):
            off = right[name] * (1 + share * sample.limits[name])
            assert (sample.why_wrong({**right, name: off}) is None) == passes, (name, share)


def test_centred_rows_that_are_not_finite(monkeypatch):
    """Their moments may be right all the same."""
    real = launch.moments

    def wrong(x, rows, centred, **options):
        found = real(x, rows, centred, **options)
        centred.view(-1)[-1] = float("nan")
        return found

    bench = bench_of(Work.of_moments(6, 5, 1, torch.float32, centre=True))
    monkeypatch.setattr(launch, "moments", wrong)
    with pytest.raises(Unfit, match="moments off by inf"):
        bench.prepare(bench.default)


@pytest.mark.parametrize("flags", [("before",), ("before", "centre")])
def test_moments_of_the_rows_before_each_step(monkeypatch, flags):
    """As the backward takes them, of h; those of the steps' own rows are others, and other directions lie elsewhere."""
    real = launch.moments
    work = Work("moments", 0, 5, 2, torch.float32, "ieee", flags, 6)
    bench = bench_of(work)
    bench.prepare(bench.default)
    assert bench.x.shape == (2, (STEPS + 1) * 5, 6)

    def own_rows(x, rows, centred=None, *, before=False, **options):
        return real(x[:, 5:].contiguous() if before else x, rows, centred, **options)

    def as_if_own_rows(x, rows, centred=None, *, before=False, **options):
        return real(x, rows, centred, **options)

    for wrong in (own_rows, as_if_own_rows):
        monkeypatch.setattr(launch, "moments", wrong)
        with pytest.raises(Unfit, match="moments off by"):
            bench_of(work).prepare(bench.default)


# What a device's graphs are captured on


@pytest.fixture
def captures(monkeypatch):
    """torch.cuda's names for captures, on a CPU: streams that captures were on, and what torch warns of."""
    seen = SimpleNamespace(streams=[], warns="")

    class Stream:
        def __init__(self, device=None):
            self.device = device

        def wait_stream(self, stream):
            pass

    class Graph:
        def replay(self):
            pass

        def pool(self):
            return (0, 1)

    @contextmanager
    def graph(graph, pool=None, stream=None, capture_error_mode="global"):
        seen.streams.append(stream)
        yield
        if seen.warns:
            warnings.warn(seen.warns, UserWarning, stacklevel=1)

    for name, value in {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": graph,
        "device": lambda device: nullcontext(),
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda device=None: Stream(),  # not one to capture on
        "synchronize": lambda device=None: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return seen


def test_a_graph_is_captured_on_a_stream_of_its_device(captures):
    """torch's own stream for captures belongs to the first device that captured anything."""
    device = torch.device("cuda", 1)
    timed = measure._Timed(device)
    timed.add(bench_of().default, lambda: None)
    (stream,) = captures.streams
    assert stream is not None
    assert stream.device == device


def test_an_empty_graph_is_an_error(captures):
    """Its replays would be the fastest of all. Other warnings are none of ours."""
    timed, layout = measure._Timed(torch.device("cuda", 1)), bench_of().default
    captures.warns = "something else"
    with pytest.warns(UserWarning, match="something else"):
        timed.add(layout, lambda: None)
    captures.warns = (
        "The CUDA Graph is empty. This usually means that the graph was attempted to be captured on wrong device or "
        "stream."
    )
    for action in ("ignore", "default", "error"):  # whatever the process does with warnings
        with warnings.catch_warnings():
            warnings.simplefilter(action)
            with pytest.raises(TuningError, match=r"cannot be captured .* The CUDA Graph is empty"):
                timed.add(layout, lambda: None)
