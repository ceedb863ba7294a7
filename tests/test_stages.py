"""Kernels without a stage: they leave out what they say and nothing else, and the library gets its own kernels back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from tests.support import need_kernels

pytest.importorskip("triton")

from bench import stage_kernels, stages
from bench.cases import HOT, Case
from bench.problem import Problem
from tests.kernel_cases import DEVICE, backward, step_mode
from tests.support.memory import guarded_memory
from triton_bnlstm.kernels import launch, launch_backward
from triton_bnlstm.kernels.config import use_config
from triton_bnlstm.kernels.errors import KernelError

need_kernels()

CASE = Case(5, 20, 2, 4, "float32")  # H is more than one part of a product
ALL = [(way, stage) for way in stages.WAYS for stage in stages.STAGES[way]]


def results(problem, way):
    """Output, or gradients; of a layer of its own, so that its running statistics are always the same."""
    layer = problem.copy_of_layer(backend="triton")
    leaves = [problem.x, *layer.parameters()]
    layouts = step_mode(units=32), backward(units=32, splits=2)  # as few programs as can be: they are interpreted
    with use_config(layouts[0], backward=layouts[1]), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        output = problem.call_layer(layer, problem.x, True)
        found = [output] if way == "forward" else torch.autograd.grad(output, leaves, problem.pull)
    return [s.detach().cpu() for s in found]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("way", "stage"), ALL)
def test_a_stage_is_left_out_and_comes_back(way, stage):
    """What is not written is NaN, and nothing is written beside a tensor."""
    problem = Problem(CASE, torch.device(DEVICE))
    with guarded_memory():
        whole = results(problem, way)
    assert all(s.isfinite().all() for s in whole)
    # without its stores a step reads what the one before has not written
    with stages.left_out(way, stage), guarded_memory(all_is_written=stage != "stores"):
        without = results(problem, way)
    # in step mode there is no barrier: without it is the same arithmetic
    assert same(whole, without) == (stage == "barrier")
    assert same(whole, results(problem, way))


@pytest.mark.parametrize("way", stages.WAYS)
def test_only_the_kernel_of_that_way_is_another(way):
    kernels = launch.forward_kernel, launch_backward.backward_kernel
    with stages.left_out(way, "gates"):
        inside = launch.forward_kernel, launch_backward.backward_kernel
        assert launch.interpreted() == (DEVICE == "cpu")
    assert [a is b for a, b in zip(kernels, inside, strict=True)] == [way == "backward", way == "forward"]
    assert (launch.forward_kernel, launch_backward.backward_kernel) == kernels


def test_the_kernel_comes_back_after_an_error():
    before = launch.forward_kernel
    with pytest.raises(ZeroDivisionError), stages.left_out("forward", "gates"):
        raise ZeroDivisionError
    assert launch.forward_kernel is before


def test_functions_on_the_way_are_copies_and_the_originals_stay():
    made = stages.variant("backward", "gates").fn.__globals__
    own = stages._KERNELS["backward"].fn.__globals__
    assert made["step_again"] is not own["step_again"]
    gates = made["step_again"].fn.__globals__["gates_of"].fn.__globals__
    assert gates["sigmoid"] is stage_kernels.no_sigmoid
    assert made["wait"] is own["wait"]
    assert own["step_again"].fn.__globals__["gates_of"].fn.__globals__["sigmoid"] is not stage_kernels.no_sigmoid


def test_the_barrier_is_replaced():
    for way in stages.WAYS:
        names = stages.variant(way, "barrier").fn.__globals__
        assert (names["wait"], names["arrive"]) == (stage_kernels.no_wait, stage_kernels.no_arrive)


def test_what_a_kernel_does_not_call_cannot_be_left_out(monkeypatch):
    monkeypatch.setitem(stages.STAGES["forward"], "unheard", {"wait": stage_kernels.no_wait, "nothing": None})
    monkeypatch.setitem(stages.STAGES["backward"], "unspoken", {"tl.nothing": None})
    with pytest.raises(ValueError, match="forward_kernel calls no nothing"):
        stages.variant("forward", "unheard")
    with pytest.raises(ValueError, match=r"backward_kernel calls no tl\.nothing"):
        stages.variant("backward", "unspoken")
    with pytest.raises(KeyError):
        stages.variant("forward", "parts")


def test_stages_of_a_layout():
    assert set(stages.STAGES["forward"]) - set(stages.stages_of("forward", step_mode())) == {"barrier"}
    assert set(stages.STAGES["backward"]) - set(stages.stages_of("backward", backward())) == {"barrier", "parts"}
    divided = stages.stages_of("backward", backward(splits=2, sequence=True))
    assert divided == list(stages.STAGES["backward"])


@pytest.mark.skipif(DEVICE != "cpu", reason="where there is a GPU it is measured on that")
def test_a_dry_run_measures_every_stage():
    case = HOT[0].toy()
    forward, gradients = stages.measure(case, torch.device("cpu"))
    for record, way, absent in ((forward, "forward", set()), (gradients, "backward", {"parts"})):
        assert (record["case"], record["way"], record["failed"]) == (case.key, way, {})
        assert set(record["without_us"]) == set(stages.STAGES[way]) - absent
        assert min(record["whole_us"], *record["without_us"].values()) > 0
        assert record["how"] == "cpu"
        assert record["layout"]["sequence"]
        json.dumps(record)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", ["equal", "uniform"])
def test_every_stage_on_a_gpu(lengths):
    case = Case(32, 128, 12, 16, "float16", lengths=lengths)
    for record in stages.measure(case, torch.device("cuda"), rounds=2):
        assert record["failed"] == {}
        assert {"product", "gates", "statistics", "barrier"} <= set(record["without_us"])
        assert min(record["whole_us"], *record["without_us"].values()) > 0
        assert record["how"] == ("graph" if lengths == "equal" else "events")


@pytest.fixture
def few_stages(monkeypatch):
    """One stage that works, one whose stand-in takes other arguments."""
    broken = {"sigmoid": stage_kernels.no_input}
    for way in stages.WAYS:
        monkeypatch.setitem(stages.STAGES, way, {"broken": broken, "gates": stages.STAGES[way]["gates"]})


def test_a_variant_that_fails_is_told_and_the_others_go_on(few_stages):
    records = stages.measure(CASE.toy(), torch.device(DEVICE), rounds=1)
    assert [set(record["failed"]) for record in records] == [{"broken"}] * 2
    assert all(record["failed"]["broken"].startswith("KernelError: ") for record in records)
    assert [set(record["without_us"]) for record in records] == [{"gates"}] * 2
    assert all(record["whole_us"] > 0 for record in records)


def test_step_mode_where_sequence_mode_cannot_run(few_stages, monkeypatch):
    class NoSequence(stages._Timed):
        def __init__(self, problem, way, stage, layout, *, graphed):
            if layout.sequence:
                raise KernelError("too many programs")
            super().__init__(problem, way, stage, layout, graphed=graphed)

    monkeypatch.setattr(stages, "_Timed", NoSequence)
    records = stages.measure(CASE.toy(), torch.device(DEVICE), rounds=1)
    for record in records:
        assert not record["layout"]["sequence"]
        assert record["whole_us"] > 0
        assert "KernelError: too many programs" in record["failed"]["whole, sequence mode"]


def test_nothing_runs_at_all(monkeypatch):
    def fail(*_, **__):
        raise KernelError("no such luck\nand more")

    monkeypatch.setattr(stages, "_Timed", fail)
    for record in stages.measure(CASE.toy(), torch.device(DEVICE)):
        assert record["whole_us"] is None
        assert record["without_us"] == {}
        assert set(record["failed"].values()) == {"KernelError: no such luck"}


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: an illegal memory access was encountered"), MemoryError()], ids=["lost", "full"]
)
def test_what_nothing_can_follow_is_raised(error, few_stages, monkeypatch):
    class Fatal(stages._Timed):
        def __init__(self, problem, way, stage, layout, *, graphed):
            if stage is not None:
                raise error
            super().__init__(problem, way, stage, layout, graphed=graphed)

    monkeypatch.setattr(stages, "_Timed", Fatal)
    with pytest.raises(type(error)):
        stages.measure(CASE.toy(), torch.device(DEVICE), rounds=1)


# Compiles whole kernels and variants with one cache, and prints what of each is in the machine code.
MACHINE_CODE = """
import json, re, sys
from contextlib import nullcontext
from bench import stages
from bench.aot import cases, compiler
from bench.aot.targets import NUMBERS, TARGETS

target, found = TARGETS["sm90"], {}
for way, variant, left_out in json.loads(sys.argv[1]):
    for stage in ("", *left_out):
        with stages.left_out(way, stage) if stage else nullcontext():
            noted = cases.launches(target.device, NUMBERS["bf16"], cases.Case(variant, 64, 256, 1))
            (launch,) = (each for each in noted if each.mode == "sequence")
        kernel = compiler.compiled(launch, target)
        sass = kernel.asm["sass"]
        found[f"{way} {stage}"] = {
            "hash": kernel.hash,
            "name": kernel.metadata.name,
            "matrix": len(re.findall(r"\\bHG?MMA\\b", sass)),
            "exponentials": len(re.findall(r"\\bMUFU\\.EX2\\b", sass)),
            "shuffles": len(re.findall(r"\\bSHFL\\b", sass)),
            "polls": kernel.asm["ptx"].count("ld.acquire.gpu"),
        }
print(json.dumps(found))
"""


# What of the machine code a stage takes with it. Not every stage in both kernels: each takes a second or two.
TAKES = {"barrier": "polls", "product": "matrix", "statistics": "shuffles", "gates": "exponentials"}
COMPILED = {
    "forward": ("forward/keep", ["barrier", "product", "gates"]),
    "backward": ("backward/plain", ["product", "statistics"]),
}


def test_machine_code_lacks_the_stage_and_only_that(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(stages.__file__).parents[1])}
    asked = json.dumps([(way, *what) for way, what in COMPILED.items()])
    command = [sys.executable, "-c", MACHINE_CODE, asked]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert len({code["hash"] for code in found.values()}) == len(found) == 7
    for way, (_, left_out) in COMPILED.items():
        whole = found[f"{way} "]
        assert whole["name"] == f"{way}_kernel"
        assert min(whole[what] for what in TAKES.values()) > 0
        for stage in left_out:
            code, gone = found[f"{way} {stage}"], TAKES[stage]
            assert code["name"] == f"{way}_kernel_without_{stage}"
            kept = {"polls", "matrix", "exponentials"} - {gone}
            assert {what: code[what] for what in kept} == {what: whole[what] for what in kept}, (way, stage)
            # what gives tiles their layout is left of the product
            assert code[gone] <= (whole[gone] // 8 if gone == "matrix" else 0), (way, stage)


def test_each_way_has_its_own_time_in_microseconds(monkeypatch, few_stages):
    monkeypatch.setattr(stages, "sample", lambda calls, device: [1e-3, 5e-3][: len(calls)])
    forward, backward = stages.measure(CASE.toy(), torch.device(DEVICE), rounds=1)
    assert (forward["way"], forward["whole_us"]) == ("forward", pytest.approx(1000))
    assert (backward["way"], backward["whole_us"]) == ("backward", pytest.approx(5000))
    assert backward["without_us"] == {"gates": pytest.approx(5000)}
    skipped = stages.measure(CASE.toy(), torch.device(DEVICE), rounds=1, skip={"forward, gates": "it crashed"})
    assert skipped[0]["failed"]["gates"] == "it crashed"
    assert "gates" not in skipped[0]["without_us"]
