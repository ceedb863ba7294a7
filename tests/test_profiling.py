"""Tables of kernels' times, and ncu's figures: read from its tables, with a stand-in for the program itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.support import need_kernels

pytest.importorskip("triton")

from bench import profiling
from bench.cases import HOT, Case
from tests.kernel_cases import DEVICE

need_kernels()

CASE = HOT[0]

# As NVIDIA's manual has the raw page: names, units, a line for each launch; thousands are set apart by commas.
TABLE = """\
==PROF== Connected to process 4711 (/usr/bin/python3.11)
something that the program prints, "ID", and goes on
==PROF== Profiling "forward_kernel" - 0: 0%....50%....100% - 12 passes
==PROF== Disconnected from process 4711
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"gpu__time_duration.sum","sm__throughput.avg.pct_of_peak_sustained_elapsed",\
"lts__throughput.avg.pct_of_peak_sustained_elapsed","gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",\
"sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",\
"sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active",\
"smsp__issue_active.avg.pct_of_peak_sustained_active","sm__warps_active.avg.pct_of_peak_sustained_active",\
"launch__registers_per_thread","smsp__average_warp_latency_per_inst_issued.ratio",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio","launch__func_cache_config"
"","","","","","","","","","","","ns","%","%","%","%","%","%","%","register/thread","cycle","inst","inst",""
"0","4711","python3.11","host","forward_kernel","1","7","(256, 1, 1)","(64, 1, 1)","0","9.0",\
"62,000","10.5","20","1.5","3","4.5","12","12.5","178","20","8","1","CachePreferNone"
"1","4711","python3.11","host","backward_kernel","1","7","(128, 1, 1)","(128, 1, 1)","0","9.0",\
"98,304","11","21","2.5","n/a","n/a","13","6.25","222","10","2.5","4","CachePreferNone"
"2","4711","python3.11","host","forward_kernel","1","7","(256, 1, 1)","(64, 1, 1)","0","9.0",\
"64,000","11.5","22","2.5","3","5.5","14","12.5","178","20","6","3","CachePreferNone"
"""


def test_figures_are_means_of_a_kernels_launches():
    found = profiling.parse(TABLE)
    assert set(found) == set(profiling.KERNELS)
    assert found["forward_kernel"] == pytest.approx(
        {
            "duration_ns": 63_000,
            "sm_pct": 11,
            "l2_pct": 21,
            "dram_pct": 2,
            "tensor_pct": 5,
            "issue_pct": 13,
            "occupancy_pct": 12.5,
            "registers": 178,
            "long_scoreboard_stall_pct": 35,
            "barrier_stall_pct": 10,
        }
    )
    assert "tensor_pct" not in found["backward_kernel"]
    assert found["backward_kernel"]["barrier_stall_pct"] == 40
    with pytest.raises(ValueError, match="no table"):
        profiling.parse("==ERROR== nothing\n")


def test_a_table_adds_up_what_has_one_name():
    kernels = profiling.table([("a", 1.0, 2), ("b", 5.0, 1), ("a", 2.5, 3)])
    assert kernels == [{"name": "b", "us": 5.0, "calls": 1}, {"name": "a", "us": 3.5, "calls": 5}]


def test_a_table_is_short():
    long = "k" * 100 + "tail"
    kernels = profiling.table([*((f"k{n}", float(n), 2) for n in range(40)), (long, 100.0, 1)])
    assert len(kernels) == profiling.MOST_KERNELS + 1
    assert len(kernels[0]["name"]) == profiling.LONGEST_NAME
    assert kernels[0]["name"].endswith("tail")
    assert kernels[-1] == {"name": "other", "us": sum(range(16)), "calls": 32}
    assert [k["us"] for k in kernels[:-1]] == sorted((k["us"] for k in kernels[:-1]), reverse=True)


def event(key, device, *, annotation=False, **times):
    kind = SimpleNamespace(name=device)
    return SimpleNamespace(key=key, device_type=kind, count=2, is_user_annotation=annotation, **times)


def test_device_times_by_both_of_their_names():
    new = event("kernel", "CUDA", self_device_time_total=3.0)
    old = event("copy", "CUDA", self_cuda_time_total=4.0)
    operator = event("aten::mm", "CPU", self_cpu_time_total=7.0, self_device_time_total=3.0)
    marked = event("range", "CUDA", annotation=True, self_device_time_total=9.0)
    events = [new, old, operator, marked]
    assert profiling.times_of(events, on_device=True) == [("kernel", 3.0, 2), ("copy", 4.0, 2)]
    assert profiling.times_of(events, on_device=False) == [("aten::mm", 7.0, 2)]


def test_one_call_is_profiled():
    a, calls = torch.randn(8, 8, device=DEVICE), []

    def call():
        calls.append(None)
        for _ in range(3):
            torch.mm(a, a)

    kernels = profiling.kernels_of(call, torch.device(DEVICE))
    assert len(calls) == 2
    assert 3 in [k["calls"] for k in kernels]
    assert min(k["us"] for k in kernels) >= 0
    assert sum(k["us"] for k in kernels) > 0
    if DEVICE == "cpu":
        assert [k["calls"] for k in kernels if k["name"] == "aten::mm"] == [3]


def test_a_training_step_is_profiled():
    case = CASE.toy()
    found = profiling.measure(case, torch.device(DEVICE))
    assert found["case"] == case.key
    assert sum(k["us"] for k in found["kernels"]) > 0
    if DEVICE == "cuda":
        assert {"forward_kernel", "backward_kernel"} <= {k["name"] for k in found["kernels"]}
    json.dumps(found)


def test_what_ncu_runs(monkeypatch):
    """The worker makes two steps of the case that it is told, and marks the second one."""
    steps, marks = [], []
    made = profiling.training_step

    def noting(case, device):
        assert case == CASE.toy()
        step = made(case, device)
        return lambda: (steps.append(len(marks)), step())

    monkeypatch.setattr(profiling, "training_step", noting)
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, lambda name=name: marks.append(name))
    profiling.main(["--case", json.dumps(CASE.toy().as_json()), "--device", DEVICE])
    assert steps == ([0, 1] if DEVICE == "cuda" else [0, 0])
    assert marks == (["start", "stop"] if DEVICE == "cuda" else [])


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a Python text in the place of ncu; gives where it can leave something."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def put(text):
        file = tmp_path / "ncu"
        file.write_text(f"#!{sys.executable}\nimport sys\nleft = {str(tmp_path / 'left')!r}\n{text}")
        file.chmod(0o755)
        return tmp_path / "left"

    return put


def test_figures_from_the_program(program):
    left = program(f"import json\njson.dump(sys.argv[1:], open(left, 'w'))\nprint({TABLE!r})")
    found = profiling.counters(CASE, 60)
    assert found == profiling.parse(TABLE)
    command = json.loads(left.read_text())
    assert command[command.index("--clock-control") + 1] == "none"
    assert "regex:^(forward_kernel|backward_kernel)$" in command
    assert "--replay-mode" not in command
    assert command[-7:-3] == [sys.executable, "-m", "bench.profiling", "--case"]
    assert command[-2:] == ["--limit", "60"]
    case = Case(**json.loads(command[-3]))
    assert (case.steps, case.hidden, case.batch) == (profiling.COUNTED_STEPS, CASE.hidden, CASE.batch)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "print('==PROF== so far')\nprint('==ERROR== no permission')\nprint('bye')\nsys.exit(3)",
            "3: ==ERROR== no perm",
        ),
        ("print('nothing to tell')", "0: nothing to tell"),
        ("sys.exit(1)", "1: it said nothing"),
        ('print(\'"ID","Kernel Name"\')', '0: "ID"'),
        ('print(\'"ID","Nothing"\')\nprint(\'"0","1"\')', "KeyError"),
    ],
)
def test_why_there_are_no_figures(program, text, why):
    program(text)
    (said,) = profiling.counters(CASE, 60).items()
    assert said[0] == "why"
    assert why in said[1]


def test_no_program(program):
    assert profiling.counters(CASE) == {"why": "there is no program ncu"}


def test_a_program_that_hangs_is_ended_and_what_it_runs_ends_itself(program):
    program("import time; time.sleep(60)")
    began = time.monotonic()
    assert profiling.counters(CASE, 3) == {"why": "ncu took more than 3 s"}
    assert time.monotonic() - began < 30
    long = replace(CASE.toy(), steps=2000, columns=1)
    command = [sys.executable, "-m", "bench.profiling", "--case", json.dumps(long.as_json()), "--device", "cpu"]
    environment = {**os.environ, "PATH": os.defpath, "TRITON_INTERPRET": "1"}
    root = Path(profiling.__file__).parents[1]
    ran = subprocess.run([*command, "--limit", "4"], cwd=root, env=environment, capture_output=True, timeout=60)
    assert ran.returncode == 1
