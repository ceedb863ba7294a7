"""Compiles kernels for one target and reads from the machine code what they need. Run as a process of its own.

`python -m bench.aot.compiler` reads one request as JSON from its standard input (see `checks.Request`) and writes two
lines of JSON per kernel: {"begin": ...} before it compiles, then what came of it. A compiler that meets a target it
cannot handle may abort its process; whoever started this one then knows which kernel it was.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from triton_bnlstm.kernels.config import BackwardConfig, Config, use_config

from . import machine, meeting
from .candidates import candidates
from .cases import Case, Launch, cases, launches
from .checks import Request, Trial, problems
from .naming import name
from .targets import NUMBERS, TARGETS, Target

_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_ALIGNED = ["tt.divisibility", 16]
_BELOW_2_GB = ["tt.pointer_range", 32]

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)")


@dataclass
class Resources:
    """What a compiled kernel needs.

    Attributes:
        shared: bytes of shared memory of a program.
        registers: of a thread; AMD: vector registers, accumulation registers included.
        stack: bytes of local memory of a thread.
        spills: instructions that store to or load from it; AMD: vector registers that are spilled.
        matrix: matrix instructions, by their first word.
        instructions: in all.
        loop: those of the time loop, by class; see `machine`.
        barrier: fields of a `meeting.Shape`; None on AMD, which has no sequence mode.
    """

    shared: int
    registers: int
    stack: int
    spills: int
    matrix: dict[str, int]
    instructions: int
    loop: dict[str, int] = field(default_factory=dict)
    barrier: dict[str, Any] | None = None


def nvidia_resources(usage: str, sass: str, shared: int, *, steps: bool = True) -> Resources:
    """usage, sass: what `cuobjdump -res-usage` and `nvdisasm -c` say. steps: the kernel has a time loop."""
    found = _USAGE.search(usage)
    if found is None:
        raise ValueError(f"no resource usage in {usage!r}")
    registers, stack, local = map(int, found.groups())
    code = machine.sass(sass)
    opcodes = Counter(instruction.opcode.partition(".")[0] for instruction in code.instructions)
    matrix = {opcode: count for opcode, count in opcodes.items() if machine.MATRIX.match(opcode)}
    loop = machine.loop_counts(code, steps=steps)
    spills = opcodes["LDL"] + opcodes["STL"]
    return Resources(shared, registers, stack + local, spills, matrix, len(code.instructions), loop)


def amd_resources(assembly: str, shared: int, *, steps: bool = True) -> Resources:
    """assembly: of the one kernel, with its metadata. steps: the kernel has a time loop."""

    def number(key: str) -> int:
        found = re.search(rf"^\s+\.{key}:\s+(\d+)$", assembly, re.MULTILINE)
        if found is None:
            raise ValueError(f"no .{key} in the assembly's metadata")
        return int(found.group(1))

    code = machine.amd(assembly)
    opcodes = Counter(instruction.opcode for instruction in code.instructions)
    matrix = {opcode: count for opcode, count in opcodes.items() if machine.MATRIX.match(opcode)}
    spills = number("vgpr_spill_count")  # scalar ones go to vector registers, not to memory
    stack = number("private_segment_fixed_size")
    loop = machine.loop_counts(code, steps=steps)
    return Resources(shared, number("vgpr_count"), stack, spills, matrix, len(code.instructions), loop)


def _specialised(launch: Launch, target: Target) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Types, constants and properties of the arguments as Triton's launcher derives them from their values.

    Tensors are taken to be aligned to 16 bytes, as torch allocates them, and to be smaller than 2 GB.
    """
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    properties: dict[Any, Any] = {}
    values: tuple[Any, ...] = (*launch.tensors, *launch.scalars)
    for k, parameter in enumerate(launch.kernel.params):
        if parameter.name in launch.constants:
            signature[parameter.name] = "constexpr"
            constants[(k,)] = launch.constants[parameter.name]
            continue
        value: Any = values[k]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            properties[(k,)] = [_ALIGNED, _BELOW_2_GB] if target.device.backend == "hip" else [_ALIGNED]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif parameter.do_not_specialize or (value != 1 and value % 16):
            signature[parameter.name] = "i32"
        elif value == 1:
            signature[parameter.name] = "constexpr"
            constants[(k,)] = 1
        else:
            signature[parameter.name] = "i32"
            properties[(k,)] = [_ALIGNED]
    return signature, constants, properties


def compiled(launch: Launch, target: Target) -> Any:
    """The kernel of a launch, compiled for a target."""
    signature, constants, properties = _specialised(launch, target)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=properties)
    return triton.compile(
        source,
        target=GPUTarget(target.device.backend, target.arch, target.device.warp),
        options={**launch.options, "enable_fp_fusion": True},
    )


def read_resources(kernel: Any, target: Target, *, steps: bool) -> Resources:
    """What a compiled kernel needs, from its machine code. steps: it has a time loop."""
    shared = int(kernel.metadata.shared)
    if target.device.backend == "hip":
        return amd_resources(kernel.asm["amdgcn"], shared, steps=steps)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(kernel.asm["cubin"])

        def output(tool: str, option: str) -> str:
            return subprocess.run([tools / tool, option, file], capture_output=True, text=True, check=True).stdout

        usage, code = output("cuobjdump", "-res-usage"), output("nvdisasm", "-c")
    found = nvidia_resources(usage, code, shared, steps=steps)
    return replace(found, barrier=asdict(meeting.shape(meeting.ptx(kernel.asm["ptx"]))))


def description(launch: Launch, target: Target, numbers: str) -> dict[str, Any]:
    """A launch in JSON's own types."""
    return {
        "target": target.name,
        "numbers": numbers,
        "kernel": launch.name,
        **launch.case._asdict(),
        "mode": launch.mode,
        "programs": math.prod(launch.grid),
        "constants": launch.constants,
        "options": launch.options,
    }


def why_no_compiler(target: Target) -> str | None:
    """Why this Triton cannot compile for a target to the end; None if it can."""
    if target.device.backend == "hip":
        backend = importlib.import_module("triton.backends.amd.compiler").HIPBackend
        try:
            getattr(backend, "path_to_rocm_lld", str)()  # later ones link themselves
        except Exception as error:  # it raises no class of its own
            return str(error)
    return None


def run(request: Request) -> None:
    """Compile everything that is asked for, each different kernel once."""
    target = TARGETS[request.target]
    reason = why_no_compiler(target)
    if reason is not None:
        what = {"target": target.name, "numbers": ",".join(request.numbers)}
        print(json.dumps({**what, "skipped": f"Triton {triton.__version__}: {reason}"}), flush=True)
        return
    for k, fields in enumerate(request.trials):
        _try(target, k, Trial(**fields))
    skip = {tuple(each) for each in request.skip}
    seen = set()
    layout = nullcontext() if request.layout is None else use_config(Config(**request.layout))
    with layout:
        for numbers in request.numbers:
            for case in cases(request.variants, request.batches, request.hiddens, request.directions):
                found = _near(target, numbers, case) if request.near else _launches(target, numbers, case)
                for launch in found:
                    key = repr((launch.kernel, _specialised(launch, target), launch.options))
                    if key in seen:
                        continue
                    seen.add(key)
                    known = name(description(launch, target, numbers))
                    if known in skip:
                        print(json.dumps({"done": known}), flush=True)
                    else:
                        _report(launch, target, numbers)


def _try(target: Target, number: int, trial: Trial) -> None:
    """Compile a trial's layouts, one after the other, until one is without problems."""
    case = Case(trial.variant, trial.batch, trial.hidden, trial.directions)
    kind = BackwardConfig if trial.variant.startswith("backward/") else Config
    for k, fields in enumerate(trial.layouts):
        layout, of = kind(**fields), {"trial": number, "layout": k}
        with use_config(backward=layout) if isinstance(layout, BackwardConfig) else use_config(layout):
            found = [launch for launch in _launches(target, trial.numbers, case, of) if "U" in launch.constants]
        # steps launch the same again
        different = {repr((_specialised(launch, target), launch.options)): launch for launch in found}
        told = [_report(launch, target, trial.numbers, of) for launch in different.values()]
        if told and not any(problems(result) for result in told):
            return


def _launches(target: Target, numbers: str, case: Case, of: dict[str, int] | None = None) -> Iterator[Launch]:
    """What a case launches; launching code that fails is reported as a kernel would be, and the next case goes on.

    of: what a report says beside.
    """
    what = {"target": target.name, "numbers": numbers, "kernel": case.variant, **(of or {})}
    print(json.dumps({"begin": what}), flush=True)
    try:
        yield from list(launches(target.device, NUMBERS[numbers], case))
    except Exception as error:
        print(json.dumps({**what, "error": f"launching fails: {type(error).__name__}: {error}"}), flush=True)


def _near(target: Target, numbers: str, case: Case) -> Iterator[Launch]:
    """What a case launches in each of the layouts beside its default; those that cannot run are reported as such."""
    for layout, why_not in candidates(target.device, NUMBERS[numbers], case):
        if why_not is not None:
            what = {"target": target.name, "numbers": numbers, "kernel": case.variant, **case._asdict()}
            print(json.dumps({**what, "config": asdict(layout), "cannot": why_not}), flush=True)
            continue
        with use_config(backward=layout) if isinstance(layout, BackwardConfig) else use_config(layout):
            found = list(_launches(target, numbers, case))
        yield from (launch for launch in found if "U" in launch.constants)


def _report(launch: Launch, target: Target, numbers: str, of: dict[str, int] | None = None) -> dict[str, Any]:
    """Compile a kernel and print what came of it, which is returned, too. of: what is said beside."""
    what = {**description(launch, target, numbers), **(of or {})}
    print(json.dumps({"begin": what}), flush=True)
    began = time.perf_counter()
    try:
        kernel = compiled(launch, target)
        seconds = time.perf_counter() - began
        used = read_resources(kernel, target, steps="SYNC" in launch.constants)
        result: dict[str, Any] = {"resources": asdict(used), "seconds": seconds}
    except Exception as error:  # whatever a compiler may raise: it is what is looked for
        deepest: BaseException = error
        while deepest.__cause__ is not None:  # Triton's outermost error shows a call, the innermost one the reason
            deepest = deepest.__cause__
        result = {"error": f"{type(deepest).__name__}: {deepest}"}
    told = {**what, **result}
    print(json.dumps(told), flush=True)
    return told


if __name__ == "__main__":
    run(Request(**json.load(sys.stdin)))
