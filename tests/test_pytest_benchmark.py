"""`pytest bench` as its users run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.cases import Case
from bench.records import Result, Timing

pytest.importorskip("pytest_benchmark")
ROOT = Path(__file__).parents[1]
# a process of its own is not one of pytest-xdist's, which are never timed
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
# other tests run beside: more threads than one only wait for each other, at a multiple of the work
ENVIRONMENT["OMP_NUM_THREADS"] = "1"


def run(*options):
    command = [sys.executable, "-m", "pytest", "bench", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU")
def test_timings_on_a_cpu_are_asked_for_and_say_what_they_are(tmp_path):
    file = tmp_path / "timings.json"
    which = "not uniform and inference and (loop or sequence)"
    ran = run("-k", which, "--benchmark-enable", f"--benchmark-json={file}", f"--benchmark-storage={tmp_path}/kept")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "only eager loops are timed" in ran.stdout
    (benchmark,) = json.loads(file.read_text())["benchmarks"]
    assert benchmark["group"].startswith("CPU, eager reference path, not the kernels")
    info = benchmark["extra_info"]
    assert info["provider"] == "F.batch_norm loop"
    assert info["mode"] == "inference"
    assert (info["batch"], info["hidden"], info["steps"]) == (64, 256, 100)
    assert "(CPU)" in info["device"]
    assert info["torch"] == torch.__version__
    assert info["saved_bytes"] > 0
    assert 0 < info["errors"]["outputs"] < 1e-4
    # what pytest-benchmark saw are the samples, to its clock's rounding
    assert benchmark["stats"]["median"] == pytest.approx(info["us_per_step"] * 100 / 1e6, rel=0.05)
    assert benchmark["stats"]["rounds"] >= 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU")
def test_without_a_gpu_nothing_is_timed_and_wrong_results_fail(tmp_path):
    ran = run("-k", "B6-H8-T3-D4-float32-training-reference")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "1 passed" in ran.stdout
    assert "checked at toy sizes, nothing is timed" in ran.stdout
    assert "Median" not in ran.stdout
    ran = run("-k", "B6-H8-T3-D4-float32-training-reference", "--benchmark-only")
    assert "1 passed" in ran.stdout
    ran = run("--benchmark-save=mine")
    assert ran.returncode == 4
    assert "--benchmark-save=mine: no GPU, so nothing is timed" in ran.stderr
    spoilt = tmp_path / "spoil.py"
    spoilt.write_text("from bench import checking\nchecking.BOUNDS['float32'] = 1e-12\n")
    command = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import spoil, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    )
    ran = subprocess.run(
        [
            sys.executable,
            "-c",
            command,
            "bench",
            "-k",
            "B6-H8-T3-D4-float32-training-reference",
            "-p",
            "no:cacheprovider",
        ],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1
    assert "off by" in ran.stdout


def test_on_a_gpu_each_figure_comes_with_the_floor(monkeypatch):
    from bench import test_layers
    from bench.ceilings import Ceilings
    from bench.floor import floor

    case = Case(64, 512, 100, 512)
    ceilings = Ceilings(3e12, 5.5e12, 1.1e-6, 1.4e-6, {"bfloat16": 7.9e14})
    monkeypatch.setattr(test_layers, "ceilings", lambda: ceilings)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(multi_processor_count=132))
    least = floor(case, "training", ceilings, 132)
    assert least is not None
    us = 4e6 * least.total_seconds
    result = Result(case.key, "sequence", modes={"training": Timing((us, us, us), 5, "graph")})
    info = test_layers.extra_info(case, "training", result)
    assert info["floor_percent"] == pytest.approx(25)
    assert info["floor_us"] == pytest.approx(us / 4)
    assert info["us_per_step"] == pytest.approx(us / 100)
    assert (info["device"], info["timed"]) == ("a GPU", "graph")
