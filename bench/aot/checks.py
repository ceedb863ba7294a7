"""Starts the compiling processes and judges what comes of them. Needs no Triton."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import meeting
from .targets import NUMBERS, TARGETS

ROOT = Path(__file__).parents[2]


@dataclass
class Request:
    """What one process compiles: all of these for one target.

    Attributes:
        target: a name in `TARGETS`.
        numbers: names in `NUMBERS`.
        variants: names in `cases.VARIANTS`.
        batches, hiddens, directions: B, H, and 1 or 2.
        layout: fields of a `Config` to compile everything in; None for what each device has by default.
        near: compile the layouts beside each default instead of it, see `candidates`.
        skip: names of kernels that need not be compiled, as `naming.name` has them.
        trials: instead of all of these, cases with layouts of their own: fields of `Trial`. A trial's layouts are
            compiled in their order until one is without problems; results tell "trial" and "layout", both indices.
    """

    target: str
    numbers: list[str]
    variants: list[str]
    batches: list[int]
    hiddens: list[int]
    directions: list[int]
    layout: dict[str, Any] | None = None
    near: bool = False
    skip: list[tuple[str, ...]] = field(default_factory=list)
    trials: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of_trials(cls, target: str, trials: Iterable[Trial]) -> Request:
        """These and nothing else."""
        return cls(target, [], [], [], [], [], trials=[asdict(each) for each in trials])


@dataclass
class Trial:
    """One case, and the layouts that it may have.

    Attributes:
        numbers: a name in `NUMBERS`.
        variant: one of `cases.VARIANTS` that has layouts: forward, backward or inference.
        batch, hidden, directions: B, H, and 1 or 2.
        layouts: fields of a `Config` each, of a `BackwardConfig` for the backward, the preferred one first.
    """

    numbers: str
    variant: str
    batch: int
    hidden: int
    directions: int
    layouts: list[dict[str, Any]]


def problems(result: dict[str, Any]) -> list[str]:
    """What is wrong with a kernel; nothing if it is as it should be."""
    if "skipped" in result:
        return []
    if "cannot" in result:
        return [result["cannot"]]
    if "error" in result:
        return [result["error"]]
    target, used = TARGETS[result["target"]], result["resources"]
    device, constants = target.device, result["constants"]
    found = []
    if used["stack"] or used["spills"]:
        found.append(f"spills: {used['stack']} bytes of stack, {used['spills']} spilling instructions or registers")
    if used["shared"] > device.shared_per_program:
        found.append(f"{used['shared']} bytes of shared memory, {target.board} has {device.shared_per_program}")
    dtype = NUMBERS[result["numbers"]].dtype
    multiplies = "PRECISION" in constants and constants.get("PRODUCT", True)  # a step's launch may leave that out
    if multiplies and device.multiplies(dtype, constants["PRECISION"]) and not used["matrix"]:
        found.append("no matrix instruction")
    if constants.get("SYNC", "none") != "none":
        room = device.resident_programs(used["shared"], used["registers"], result["options"]["num_warps"])
        if room < result["programs"]:
            found.append(f"{result['programs']} programs have to run at the same time, and {room} can")
    if used.get("barrier") is not None:
        found += meeting.problems(meeting.Shape(**used["barrier"]), meets=constants.get("SYNC", "none") != "none")
    return found


def results(request: Request, cache: Path) -> Iterator[dict[str, Any]]:
    """Compile in a process of its own, and give each kernel as it comes, with its "problems".

    Args:
        request: what.
        cache: folder for what Triton keeps. What is in it is not compiled again.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(paths)}
    current: dict[str, Any] = {"target": request.target, "numbers": ",".join(request.numbers)}
    with tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.aot.compiler"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            env=environment,
        )
        with process:
            try:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(json.dumps(asdict(request)))
                process.stdin.close()
                for result in _read(process.stdout):
                    if "begin" in result:
                        current = result["begin"]
                    elif "done" in result:  # it is in request.skip
                        yield result
                    else:
                        yield {**result, "problems": problems(result)}
            finally:
                if process.poll() is None and sys.exc_info()[0] is not None:
                    process.kill()
        if process.returncode:
            complaints.seek(0)
            lines = complaints.read().strip().splitlines()
            error = f"the compiling process {_end(process.returncode)}: {lines[-1] if lines else 'it said nothing'}"
            yield {**current, "error": error, "problems": [error]}


def _read(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The lines that are ours: a compiler may print something itself."""
    for line in lines:
        if line.startswith("{"):
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def _end(code: int) -> str:
    return f"exited with {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
