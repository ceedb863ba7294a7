"""Ceilings of a device, and the least times that follow from them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import ceilings as ceilings_module
from bench.cases import CASES, HOT, MODES, PRECISIONS, SMNIST, Case
from bench.ceilings import Ceilings, measure
from bench.floor import MOST_ON_CHIP, Floor, floor
from tests.support import need_kernels

# The interpreter where there is no GPU, and kernels are compiled where there is one.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROOT = Path(__file__).parents[1]

# Round numbers, of which one kind at a time is made to count.
EVEN = Ceilings(1e9, 1e9, 1e-3, 2e-3, dict.fromkeys(PRECISIONS, 1e9))
FREE = Ceilings(1e30, 1e30, 1e-30, 1e-30, dict.fromkeys(PRECISIONS, 1e30))
# As others publish them for an H100.
H100 = Ceilings(
    3.0e12, 5.5e12, 1.1e-6, 1.4e-6, {"bfloat16": 7.9e14, "float16": 7.9e14, "tf32": 3.9e14, "float32": 5e13}
)
NAMES = ("copy_bytes_per_second", "l2_bytes_per_second", "barrier_seconds", "launch_seconds")


def least(case: Case, mode: str, ceilings: Ceilings, multiprocessors: int = 132) -> Floor:
    found = floor(case, mode, ceilings, multiprocessors)
    assert found is not None
    return found


# --- ceilings ---


@pytest.fixture
def kernels():
    """What is needed of Triton."""
    need_kernels()


@pytest.mark.usefixtures("kernels")
def test_every_ceiling_is_measured():
    found = measure(DEVICE, toy=True)
    assert found.why == {}
    figures = [getattr(found, name) for name in NAMES] + [found.flops[precision] for precision in PRECISIONS]
    assert all(math.isfinite(figure) and figure > 0 for figure in figures)


@pytest.mark.gpu
def test_every_ceiling_of_a_gpu_is_plausible():
    found = measure(torch.device("cuda"))
    assert found.why == {}
    assert found.l2_bytes_per_second > found.copy_bytes_per_second > 1e11
    assert 1e-7 < found.barrier_seconds < 1e-5
    assert 1e-7 < found.launch_seconds < 1e-5
    assert found.flops["float16"] > found.flops["float32"] > 1e12


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", NAMES)
def test_one_that_fails_leaves_the_others(name, monkeypatch):
    def fail(*_):
        raise ValueError("no such thing\nat all")

    short = {"copy_bytes_per_second": "_copy", "l2_bytes_per_second": "_l2"}
    monkeypatch.setattr(ceilings_module, short.get(name, "_" + name.removesuffix("_seconds")), fail)
    found = measure(DEVICE, toy=True)
    assert getattr(found, name) is None
    assert found.why == {name: "ValueError: no such thing"}
    assert set(found.flops) == set(PRECISIONS)
    assert floor(HOT[0], "forward", found, 1) is None


@pytest.mark.usefixtures("kernels")
def test_a_precision_that_fails(monkeypatch):
    right = torch.mm

    def mm(a, b, *, out):
        if a.dtype == torch.float16:
            raise RuntimeError("no half")
        return right(a, b, out=out)

    monkeypatch.setattr(torch, "mm", mm)
    found = measure(DEVICE, toy=True)
    assert found.why == {"flops.float16": "RuntimeError: no half"}
    assert set(found.flops) == set(PRECISIONS) - {"float16"}
    case = replace(HOT[0], precision="float16")
    assert floor(case, "forward", found, 1) is None
    assert floor(replace(case, precision="float32"), "forward", found, 1) is not None


def test_a_lost_device_is_not_a_reason(monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(ceilings_module, "_l2", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        measure(DEVICE, toy=True)


def test_without_triton(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("bench.ceiling_kernels", "triton_bnlstm.kernels.launch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    found = measure(DEVICE, toy=True)
    assert set(found.why) == {"l2_bytes_per_second", "barrier_seconds", "launch_seconds"}
    assert all("triton" in reason for reason in found.why.values())
    assert found.copy_bytes_per_second
    assert set(found.flops) == set(PRECISIONS)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_the_precision_of_products_is_as_it_was(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        measure(DEVICE, toy=True)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("kernels")
def test_noise_is_not_a_time(monkeypatch):
    """Where twice the work never takes longer there is no time of a part of it."""
    monkeypatch.setattr(ceilings_module, "device_seconds", lambda *_: [1.0])
    found = measure(DEVICE, toy=True)
    assert found.why["launch_seconds"] == "RuntimeError: twice the work did not take longer"


def test_json():
    found = Ceilings(1.0, None, 2.0, 3.0, {"float32": 4.0}, {"l2_bytes_per_second": "why not"})
    assert Ceilings.of_json(json.loads(json.dumps(found.as_json()))) == found
    assert Ceilings.of_json({**found.as_json(), "source": "0123"}) == found
    assert Ceilings.of_json({}) == Ceilings()


_COMPILE = """
import re, subprocess, tempfile, torch, triton
from pathlib import Path
from bench.aot.cases import Launch
from bench.aot.compiler import compiled
from bench.aot.targets import TARGETS
from bench.ceiling_kernels import read_kernel
some = torch.zeros(4, dtype=torch.int32)
for modifier in ("", ".cg"):
    constants = {"BLOCK": 16384, "MODIFIER": modifier}
    options = {"num_warps": 32, "num_stages": 1}
    launch = Launch(None, read_kernel, (132,), (some, some), (256, 3, 512), constants, options)
    print(compiled(launch, TARGETS["sm90"]).asm["ptx"])
    print("END")
"""


@pytest.mark.usefixtures("kernels")
def test_bytes_of_l2_are_read_sixteen_at_a_time_in_the_loop():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, "-W", "ignore", "-c", _COMPILE]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    texts = found.split("END")[:2]
    for text, load in zip(texts, ("ld.global.v4.b32", "ld.global.cg.v4.b32"), strict=True):
        lines = text.splitlines()
        loads = [k for k, line in enumerate(lines) if load in line]
        assert len(loads) == 4
        assert sum("ld.global" in line for line in lines) == 4
        labels = {line.split(":")[0]: k for k, line in enumerate(lines) if line.startswith("$L")}
        loops = [
            (labels[target], k)
            for k, line in enumerate(lines)
            if "bra" in line and (target := line.split()[-1].strip(";")) in labels and labels[target] < k
        ]
        assert any(first < loads[0] and loads[-1] < last for first, last in loops)


# --- floors ---


def test_memory():
    """4 steps of 3 rows, 5 columns, 8 units: 60 numbers of input, 96 of output, 32·13 of weights, 4 bytes each."""
    case = Case(3, 8, 4, 5, precision="float32")
    ceilings = replace(FREE, copy_bytes_per_second=1e3)
    for mode, numbers in (
        ("inference", 60 + 96 + 416),
        ("forward", 60 + 96 + 416),
        ("backward", 2 * 60 + 2 * 96 + 2 * 416),
        ("training", 3 * (60 + 96 + 416)),
    ):
        found = least(case, mode, ceilings)
        assert found.total_seconds == found.memory_seconds == pytest.approx(4 * numbers / 1e3)
        assert found.binds == "memory"
    half = least(replace(case, precision="bfloat16"), "forward", ceilings)
    assert half.memory_seconds == pytest.approx(2 * (60 + 96 + 416) / 1e3)


def test_memory_of_pixels_layers_and_directions():
    ceilings = replace(FREE, copy_bytes_per_second=1.0)
    pixels = least(Case(3, 8, 4, 1, precision="float32"), "backward", ceilings)
    assert pixels.memory_seconds == pytest.approx(4 * (12 + 2 * 96 + 2 * 32 * 9))  # no gradient of the input
    case = Case(3, 8, 4, 5, precision="float32", layers=2, bidirectional=True)
    weights = 2 * 32 * (5 + 8) + 2 * 32 * (16 + 8)
    assert least(case, "forward", ceilings).memory_seconds == pytest.approx(4 * (60 + 192 + weights))


def test_products():
    case = Case(3, 8, 4, 5, precision="tf32")
    ceilings = replace(FREE, flops={"tf32": 10.0, "float32": 1e30})
    forward = 2 * 12 * 32 * (5 + 8) / 10
    for mode, times in (("inference", 1), ("forward", 1), ("backward", 2), ("training", 3)):
        found = least(case, mode, ceilings)
        assert found.products_seconds == pytest.approx(times * forward)
    assert least(replace(case, precision="float32"), "training", ceilings).products_seconds < 1e-20
    pixels = replace(case, columns=1)
    assert least(pixels, "forward", ceilings).products_seconds == pytest.approx(2 * 12 * 32 * 9 / 10)
    assert least(pixels, "backward", ceilings).products_seconds == pytest.approx(2 * 12 * 32 * (2 * 9 - 1) / 10)
    stacked = replace(case, layers=2, bidirectional=True)
    once = 2 * 2 * 12 * 32 * (5 + 8 + 16 + 8) / 10
    assert least(stacked, "forward", ceilings).products_seconds == pytest.approx(once)


def test_one_multiprocessor_never_meets():
    """Its product alone counts: 3 transitions of 3 rows, 8 units."""
    case = Case(3, 8, 4, 5, precision="float32")
    ceilings = replace(EVEN, flops={"float32": 1e6})
    for mode in ("inference", "forward", "backward"):
        assert least(case, mode, ceilings, 1).chain_seconds == pytest.approx(3 * 2 * 3 * 32 * 8 / 1e6)


@pytest.mark.parametrize(("barrier", "launch"), [(2.0, 9.0), (9.0, 2.0)])
def test_meetings(barrier, launch):
    """Two programs: the cheaper way to meet, once forwards, and once backwards where all of dz is read by all."""
    case = Case(3, 8, 4, 5, precision="float32")
    # a product that alone would take 12 s takes 6 s in two programs, and 2 s between
    ceilings = replace(FREE, barrier_seconds=barrier, launch_seconds=launch, flops={"float32": 256 * 2 * 3 / 6})
    assert least(case, "forward", ceilings, 2).chain_seconds == pytest.approx(3 * (6 + 2))
    assert least(case, "backward", ceilings, 2).chain_seconds == pytest.approx(3 * (6 + 2))
    dear = replace(ceilings, barrier_seconds=7.0, launch_seconds=8.0)
    assert least(case, "forward", dear, 2).chain_seconds == pytest.approx(3 * 12)


def test_the_state_is_read_by_every_program():
    """3 · 8 numbers of 4 bytes, 96 s of L2, by each program; a product that takes one of two multiprocessors 300 s."""
    case = Case(3, 8, 4, 5, precision="float32")
    ceilings = replace(FREE, l2_bytes_per_second=1.0, flops={"float32": 2 * (2 * 3 * 32 * 8) / 300})
    assert least(case, "forward", ceilings, 2).chain_seconds == pytest.approx(3 * 2 * 96)
    # of four multiprocessors, each half as fast, three: 288 s of L2 beside 225 s, where two take 300 s and four 384 s
    assert least(case, "forward", ceilings, 4).chain_seconds == pytest.approx(3 * 3 * 96)


def test_the_backward_exchanges_less_when_its_product_is_divided():
    case = Case(64, 1024, 3, 1024)
    free = replace(FREE, l2_bytes_per_second=H100.l2_bytes_per_second)
    whole = 128 * 64 * 4096 * 2 / H100.l2_bytes_per_second
    divided = least(case, "backward", free).chain_seconds / 2
    assert divided < whole / 8


def test_dividing_the_backwards_product_takes_a_second_meeting():
    """dz is 8,192 bytes, and so are partial sums, written and read, of a product whose rows are divided."""
    case = Case(16, 64, 3, 64)
    ceilings = replace(FREE, l2_bytes_per_second=1.0, barrier_seconds=1000.0, launch_seconds=1e9)
    # a program's product takes 2000 s for each of its units: 4 programs that read all of dz would take 33,768 s
    ceilings = replace(ceilings, flops={"bfloat16": 16 * 8 * 64 * 16 / 2000})
    assert least(case, "backward", ceilings, 16).chain_seconds == pytest.approx(2 * (2 * 1000 + 8192 + 8192))


def test_weights_that_do_not_fit_are_read_again():
    """One program alone with 1024 units has 8 MB of weights, all rows of the batch, and one multiprocessor."""
    case = Case(4, 1024, 2, 1024)
    ceilings = replace(FREE, l2_bytes_per_second=1e6)
    excess = 4 * 1024 * 1024 * 2 - MOST_ON_CHIP
    for mode in ("inference", "forward", "backward"):
        assert least(case, mode, ceilings, 1).chain_seconds == pytest.approx(excess / 1e6)


def test_rows_are_nobody_elses_affair_at_test_time():
    """One program has its rows' whole recurrence where its weights fit."""
    case = Case(128, 128, 11, 128)
    ceilings = replace(FREE, barrier_seconds=1.0, launch_seconds=1.0, flops={"bfloat16": 132e6})
    alone = 8 * 128 * 128 / 1e6  # of one row, in each of 128 programs; a matrix instruction takes eight at least
    assert least(case, "inference", ceilings).chain_seconds == pytest.approx(10 * 8 * alone)
    assert least(case, "forward", ceilings).chain_seconds == pytest.approx(10 * (1 + alone))
    single = replace(case, precision="float32")
    ceilings = replace(ceilings, flops={"float32": 132e6})
    assert least(single, "inference", ceilings).chain_seconds == pytest.approx(10 * alone)


def test_layers_and_directions():
    """Forward 9 transitions a layer; a wavefront has one more for each layer, a layer on two directions all again."""
    one = Case(16, 64, 10, 8)
    step = least(one, "forward", H100).chain_seconds / 9
    assert least(replace(one, layers=3), "forward", H100).chain_seconds == pytest.approx(11 * step)
    assert least(replace(one, bidirectional=True), "forward", H100).chain_seconds == pytest.approx(9 * step)
    both = replace(one, bidirectional=True, layers=3)
    assert least(both, "forward", H100).chain_seconds == pytest.approx(27 * step)


def test_different_lengths():
    """Live rows are what a step costs, and valid ones what is multiplied in all."""
    case = Case(5, 8, 8, 5, precision="float32", lengths="uniform")
    lengths = case.lengths_of_batch()
    assert lengths is not None
    assert max(lengths) == 8 > min(lengths)
    ceilings = replace(FREE, flops={"float32": 1e3})
    found = least(case, "forward", ceilings, 1)
    assert found.chain_seconds == pytest.approx(sum(n - 1 for n in lengths) * 2 * 32 * 8 / 1e3)
    assert found.products_seconds == pytest.approx(sum(lengths) * 2 * 32 * 13 / 1e3)


def test_nothing_follows_a_single_step():
    assert least(Case(3, 8, 1, 5), "training", EVEN).chain_seconds == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES[:24], ids=lambda case: case.key)
def test_never_above_the_sum_of_everything(case, mode):
    """A plain design, all of whose costs are added up: one program a multiprocessor, and a launch for each step."""
    found = least(case, mode, H100)
    flops, size = H100.flops[case.precision], case.dtype.itemsize
    programs = min(132, case.hidden)
    units = math.ceil(case.hidden / programs)
    programs = math.ceil(case.hidden / units)
    state = case.batch * case.hidden * size
    weights = 4 * case.hidden * case.hidden * size
    product = 8 * units * case.hidden * case.batch / (flops / 132)
    forward = H100.launch_seconds + (programs * state + weights) / H100.l2_bytes_per_second + product
    backward = H100.launch_seconds + (programs * 4 * state + weights) / H100.l2_bytes_per_second + product
    step = {"backward": backward, "training": forward + backward}.get(mode, forward)
    total = found.memory_seconds + found.products_seconds + case.layers * case.steps * step
    assert 0 < found.total_seconds < total
    assert found.total_seconds == max(found.memory_seconds, found.products_seconds, found.chain_seconds)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "more",
    [{"hidden": 600}, {"steps": 101}, {"batch": 65}, {"columns": 513}, {"precision": "float32"}, {"layers": 2}],
    ids=lambda more: next(iter(more)),
)
def test_more_work_is_never_faster(mode, more):
    less, found = (least(case, mode, H100) for case in (HOT[0], replace(HOT[0], **more)))
    assert found.memory_seconds >= less.memory_seconds
    assert found.products_seconds >= less.products_seconds
    assert found.chain_seconds >= less.chain_seconds


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_a_faster_device_is_never_slower(mode, name):
    value = getattr(H100, name)
    faster = replace(H100, **{name: value / 2 if name.endswith("seconds") and "per" not in name else value * 2})
    for case in (HOT[0], SMNIST):
        assert least(case, mode, faster).total_seconds <= least(case, mode, H100).total_seconds


def test_training_is_both():
    forward, backward, both = (least(HOT[1], mode, H100) for mode in ("forward", "backward", "training"))
    assert both == forward + backward
    assert both.total_seconds <= forward.total_seconds + backward.total_seconds


def test_steps_at_published_ceilings():
    """Microseconds a step, below what models of whole kernels say (3.1 and 4.3 forwards), and not far below."""
    for case, most in zip(HOT, (3.1, 4.3), strict=True):
        found = least(case, "forward", H100)
        assert found.binds == "chain"
        assert most / 2 < found.total_seconds / case.steps * 1e6 < most


@pytest.mark.parametrize("missing", NAMES)
def test_none_without_a_ceiling(missing):
    assert floor(HOT[0], "forward", replace(H100, **{missing: None}), 132) is None


def test_bad_arguments():
    with pytest.raises(ValueError, match="mode must be one of"):
        floor(HOT[0], "sideways", H100, 132)
    with pytest.raises(ValueError, match="multiprocessors"):
        floor(HOT[0], "forward", H100, 0)
