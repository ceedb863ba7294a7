"""Which kernels a training step launches and how long each takes; and what NVIDIA's `ncu` counts in the recurrent ones.

`python -m bench.profiling --case JSON` is what `ncu` runs: two training steps, of which the second is to be profiled.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .cases import Case
from .problem import Problem, product_precision
from .timing import synchronize

MOST_KERNELS = 25
LONGEST_NAME = 80
# T where `ncu` counts: it runs a kernel some twenty times, and what is counted is per step or a share.
COUNTED_STEPS = 20
KERNELS = ("forward_kernel", "backward_kernel")

# Whole sections, as NVIDIA defines them for each architecture: a metric that a device lacks is then only missing.
_SECTIONS = (
    *("SpeedOfLight", "ComputeWorkloadAnalysis", "SchedulerStats"),
    *("WarpStateStats", "Occupancy", "LaunchStats"),
)
# What is taken of them, by the names that it gets; of several metrics the first that there is.
_METRICS = {
    "duration_ns": ("gpu__time_duration.sum",),
    "sm_pct": ("sm__throughput.avg.pct_of_peak_sustained_elapsed",),
    "l2_pct": ("lts__throughput.avg.pct_of_peak_sustained_elapsed",),
    "dram_pct": (
        "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    ),
    "issue_pct": (
        "sm__inst_issued.avg.pct_of_peak_sustained_active",
        "smsp__issue_active.avg.pct_of_peak_sustained_active",
    ),
    "occupancy_pct": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
    "registers": ("launch__registers_per_thread",),
}
# Matrix units, which each architecture counts by other names: the busiest of them.
_TENSOR = re.compile(r"sm__(?:inst_executed_)?pipe_tensor\w*\.avg\.pct_of_peak_sustained_active")
# Cycles that a warp waits for between two of its instructions, by why, and in all.
_STALLS = {
    f"{name}_stall_pct": f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio"
    for name in ("long_scoreboard", "short_scoreboard", "barrier", "membar", "wait", "math_pipe_throttle")
}
_BETWEEN = ("smsp__average_warp_latency_per_inst_issued.ratio", "smsp__average_warps_active_per_inst_issued.ratio")


def _short(name: str) -> str:
    """At most `LONGEST_NAME` characters; the ends of long names tell most."""
    behind = 30
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - behind - 3]}...{name[-behind:]}"


def table(times: Iterable[tuple[str, float, int]]) -> list[dict[str, Any]]:
    """Entries of kernels, those of the same name added up, the longest first; what is too many is "other".

    Args:
        times: name, microseconds, calls.

    Returns:
        name, us, calls of each; one more than `MOST_KERNELS` at most.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, us, calls in times:
        entry = found.setdefault(_short(name), {"name": _short(name), "us": 0.0, "calls": 0})
        entry["us"] += us
        entry["calls"] += calls
    ordered = sorted(found.values(), key=lambda entry: -entry["us"])
    rest = ordered[MOST_KERNELS:]
    if rest:
        total = {key: sum(entry[key] for entry in rest) for key in ("us", "calls")}
        ordered[MOST_KERNELS:] = [{"name": "other", **total}]
    return ordered


def times_of(events: Iterable[Any], *, on_device: bool) -> list[tuple[str, float, int]]:
    """Name, own microseconds and calls of averaged profiler events.

    Args:
        events: of `torch.profiler.profile.key_averages()`; torch's versions name device times differently.
        on_device: those of kernels and copies on the device; else of operators on the host.
    """
    found = []
    for event in events:
        if (event.device_type.name != "CPU") != on_device or getattr(event, "is_user_annotation", False):
            continue
        if on_device:
            us = getattr(event, "self_device_time_total", None)
            us = event.self_cuda_time_total if us is None else us
        else:
            us = event.self_cpu_time_total
        found.append((event.key, float(us), int(event.count)))
    return found


def kernels_of(call: Callable[[], Any], device: torch.device) -> list[dict[str, Any]]:
    """Device time of each kernel of one call, after one that warms up; on a CPU the operators' own time.

    Returns:
        name, us and calls, see `table`.
    """
    on_device = device.type == "cuda"
    call()
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if on_device else ProfilerActivity.CPU]) as profiler:
        call()
        synchronize(device)
    return table(times_of(profiler.key_averages(), on_device=on_device))


def training_step(case: Case, device: torch.device) -> Callable[[], Any]:
    """A training step of a case on the kernels, in the layouts that they have by default."""
    problem = Problem(case, device)
    layer = problem.copy_of_layer(backend="triton")
    leaves = [*layer.parameters(), *([problem.x] if problem.x.requires_grad else [])]

    def step() -> Any:
        return torch.autograd.grad(problem.call_layer(layer, problem.x, True), leaves, problem.pull)

    return step


def measure(case: Case, device: torch.device) -> dict[str, Any]:
    """Profile of a training step on the kernels.

    Args:
        case, device: what and where; on a CPU Triton's interpreter has to run the kernels.

    Returns:
        case (its key), kernels (see `kernels_of`).

    Raises:
        KernelError: the kernels cannot run here.
    """
    with product_precision(case):
        return {"case": case.key, "kernels": kernels_of(training_step(case, device), device)}


def parse(text: str) -> dict[str, dict[str, float]]:
    """What `ncu --csv --page raw` has printed → metrics by kernel, each the mean of that kernel's launches.

    The table begins with the line of its columns' names, among which all metrics are, and a line of their units; in
    front of it stands whatever the program has printed.

    Raises:
        ValueError: there is no such table.
    """
    lines = text.splitlines()
    first = next((k for k, line in enumerate(lines) if line.startswith('"ID",')), None)
    if first is None:
        raise ValueError("ncu printed no table")
    taken: dict[str, dict[str, list[float]]] = {}
    for row in csv.DictReader(line for line in lines[first:] if line.startswith('"')):
        if not row["ID"].strip():
            continue  # units
        numbers = {name: number for name, value in row.items() if (number := _number(value)) is not None}
        of_kernel = taken.setdefault(row["Kernel Name"], {})
        for name, value in _metrics(numbers).items():
            of_kernel.setdefault(name, []).append(value)
    return {
        kernel: {name: sum(values) / len(values) for name, values in metrics.items()}
        for kernel, metrics in taken.items()
    }


def _number(text: Any) -> float | None:
    try:
        return float(str(text).replace(",", ""))  # thousands are set apart
    except ValueError:
        return None


def _metrics(numbers: dict[str, float]) -> dict[str, float]:
    """Those that are kept of a launch's, under their own names."""
    found = {}
    for name, candidates in _METRICS.items():
        there = [numbers[candidate] for candidate in candidates if candidate in numbers]
        if there:
            found[name] = there[0]
    tensor = [value for metric, value in numbers.items() if _TENSOR.fullmatch(metric)]
    if tensor:
        found["tensor_pct"] = max(tensor)
    between = next((numbers[name] for name in _BETWEEN if numbers.get(name)), None)
    if between is not None:
        found |= {name: 100 * numbers[metric] / between for name, metric in _STALLS.items() if metric in numbers}
    return found


def _command(program: str, case: Case, limit_s: float) -> list[str]:
    shown = ["--csv", "--page", "raw", "--print-units", "base"]
    # Clocks stay what they are. A kernel is run again for each group of counters, which suits cooperative launches:
    # what it has written is put back before, the barrier's counter too.
    counted = ["--clock-control", "none", "--profile-from-start", "off", "--kernel-name-base", "function"]
    counted += ["--kernel-name", f"regex:^({'|'.join(KERNELS)})$"]
    sections = [word for section in _SECTIONS for word in ("--section", section)]
    worker = [sys.executable, "-m", "bench.profiling", "--case", json.dumps(case.as_json()), "--limit", str(limit_s)]
    return [program, *shown, *counted, *sections, *worker]


def _output(command: list[str], limit_s: float) -> tuple[int, str]:
    """Exit status and all that was printed. In the caller's own group of processes, so that it ends with the caller.

    Raises:
        subprocess.TimeoutExpired: it took too long.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=Path(__file__).parents[1],
    )
    with process:
        try:
            text, _ = process.communicate(timeout=limit_s)
        except BaseException:
            process.kill()  # what it profiles ends itself
            raise
    return process.returncode, text


def counters(case: Case, limit_s: float = 240.0) -> dict[str, Any]:
    """What `ncu` counts in the recurrent kernels of a training step of at most `COUNTED_STEPS` steps.

    Args:
        case: what.
        limit_s: seconds for all of it.

    Returns:
        By kernel: duration_ns of a launch, shares of the device's peaks (sm_pct, l2_pct, dram_pct, tensor_pct,
        issue_pct, occupancy_pct), registers of a thread, and why warps waited between two instructions, in shares of
        that time (long_scoreboard_stall_pct and others). Or why, if there is nothing.
    """
    program = shutil.which("ncu")
    if program is None:
        return {"why": "there is no program ncu"}
    try:
        command = _command(program, replace(case, steps=min(case.steps, COUNTED_STEPS)), limit_s)
        status, text = _output(command, limit_s)
        try:
            found = parse(text)
        except ValueError:
            found = {}
        return dict(found) or {"why": _reason(status, text)}
    except subprocess.TimeoutExpired:
        return {"why": f"ncu took more than {limit_s:g} s"}
    except Exception as error:
        return {"why": f"{type(error).__name__}: {error}"[:300]}


def _reason(status: int, text: str) -> str:
    """Why ncu has no figures: its own last complaint, or else the last line that was printed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    complaints = [line for line in lines if re.match(r"==(ERROR|WARNING)==", line)]
    return f"ncu exited with {status}: {(complaints or lines or ['it said nothing'])[-1]}"[:300]


def main(argv: list[str] | None = None) -> None:
    """What is profiled: a training step that compiles everything, and one between the profiler's marks."""
    parser = argparse.ArgumentParser(prog="python -m bench.profiling", description=__doc__)
    parser.add_argument("--case", type=json.loads, required=True, help="fields of a case, in JSON")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=float, default=0.0, help="seconds after which it ends itself; 0: never")
    arguments = parser.parse_args(argv)
    if arguments.limit:
        # no child of who started ncu: it has to see to its own end, or it would go on holding the GPU
        timer = threading.Timer(arguments.limit, os._exit, [1])
        timer.daemon = True
        timer.start()
    case, device = Case(**arguments.case), torch.device(arguments.device)
    with product_precision(case):
        step = training_step(case, device)
        step()
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.profiler.start()
        step()
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
