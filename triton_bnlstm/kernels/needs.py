"""What a compiled kernel needs, and how many of its programs a device holds at the same time."""

from __future__ import annotations

from typing import Any, NamedTuple

from .config import Device
from .rows import Rows
from .run import interpreted, loaded


class Needs(NamedTuple):
    """What a compiled kernel needs: bytes of shared memory of a program, registers of a thread, spilled bytes."""

    shared: int
    registers: int
    spills: int


_compiled: dict[Any, Needs] = {}


def compiled(kernel: Any, launch: Any, rows: Rows, changes: dict[str, Any] | None = None) -> Needs:
    """What this kernel needs; compiles and loads it if need be, and launches nothing.

    Raises:
        KernelError: it does not compile, or needs more than the device has.
    """
    h = launch.arguments.tensors[0]
    constants = {**launch.constants, **(changes or {})}
    key = (kernel.__name__, h.device, h.dtype, *sorted(constants.items()), *sorted(launch.options.items()))
    if key not in _compiled:
        made = loaded(kernel, *launch.call(0, rows.steps, rows, changes))
        _compiled[key] = Needs(made.metadata.shared, made.n_regs, made.n_spills)
    return _compiled[key]


def resident_programs(kernel: Any, launch: Any, rows: Rows, device: Device) -> int:
    """Programs of this compiled kernel that the device can hold at the same time; compiles it if need be."""
    if launch.constants["SYNC"] == "none":
        return launch.programs
    if interpreted():
        return 1
    needs = compiled(kernel, launch, rows)
    return device.resident_programs(needs.shared, needs.registers, launch.options["num_warps"])
