"""How kernels are laid out, and the numbers of a device that decide about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

# Elements [4U, BB] of a pre-activation tile: more than this spill registers with eight warps (read from SASS, as all
# limits here; `python -m bench.aot` looks). Half of it where the batch is walked and for elements of four bytes,
# a quarter on AMD.
MOST_TILE = 4096
# Inner extent of a product whose operands both stay: with more, a thread's addresses in shared memory stop being one
# base and small offsets, and take the registers; in Triton 3.3 hundreds of them.
RESIDENT_INNER = 64
# Registers of a thread that a whole state may take on its way to shared memory, beside half of the largest tile.
MOST_REGISTERS_OF_STATE = 128
# Bytes of shared memory left to the compiler: conversions between layouts of a tile, and what it keeps for itself.
SPARE_SHARED = 18 * 1024


@dataclass(frozen=True)
class Config:
    """Layout of one launch.

    Attributes:
        sequence: one cooperative launch for all steps; else a launch per step.
        units: hidden units U of a program, a power of two, at least 4 (a product needs 16 rows).
        batch_tile: batch rows of a tile, a power of two, at least 16.
        inner: inner extent of one product, a power of two, at least 16.
        resident: the program's slice of W_hh stays on chip through all steps; else it is streamed at each step.
        warps: warps of a program.
        stages: depth of the pipeline that streams.
    """

    sequence: bool
    units: int
    batch_tile: int
    inner: int
    resident: bool
    warps: int
    stages: int

    def __post_init__(self) -> None:
        for name, least in (("units", 4), ("batch_tile", 16), ("inner", 16), ("warps", 1)):
            value = getattr(self, name)
            if value < least or value & (value - 1):
                raise ValueError(f"{name} must be a power of two and at least {least}, got {value}")
        if self.stages < 1:
            raise ValueError(f"stages must be at least 1, got {self.stages}")

    @property
    def product_rows(self) -> int:
        """Rows of the product that a program makes in a step: its gate columns."""
        return 4 * self.units


@dataclass(frozen=True)
class BackwardConfig(Config):
    """Layout of one launch of the recurrence's backward.

    Attributes:
        splits: parts into which the inner extent 4H of the product W_hhᵀ dz is divided, a power of two.
        groups: parts into which its rows are divided, a power of two. Where splits·groups is more than 1, programs
            meet twice in a step, and a product has units·splits·groups rows.
    """

    splits: int = 1
    groups: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("splits", "groups"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, got {value}")

    @property
    def product_rows(self) -> int:
        """Rows of the product that a program makes in a step: units of h."""
        return self.units * self.splits * self.groups

    @property
    def divided(self) -> bool:
        """Whether partial sums are exchanged."""
        return self.splits * self.groups > 1

    def programs(self, hidden: int) -> int:
        """Programs of one direction: as many as have units, or parts of the product."""
        return max(-(-hidden // self.units), self.splits * self.groups * -(-hidden // self.product_rows))

    def product_tile(self, batch: int) -> int:
        """Rows of the batch in a tile of the divided product."""
        return max(16, min(self.batch_tile, power_of_two(batch) // self.groups))


@dataclass(frozen=True)
class MomentsConfig:
    """Layout of a launch that takes the moments of all steps.

    Attributes:
        rows: rows of a tile, a power of two.
        columns: columns of a program, a power of two.
        warps: warps of a program.
    """

    rows: int
    columns: int
    warps: int

    def __post_init__(self) -> None:
        for name, least in (("rows", 16), ("columns", 16), ("warps", 1)):
            value = getattr(self, name)
            if value < least or value & (value - 1):
                raise ValueError(f"{name} must be a power of two and at least {least}, got {value}")


@dataclass(frozen=True)
class SaveConfig:
    """What a forward in training leaves for its backward; chosen by tuning where `save` is "auto".

    Attributes:
        recompute: W_hh h is made again, instead of being kept.
    """

    recompute: bool


def default_moments_config(columns: int) -> MomentsConfig:
    """The layout for so many columns that nobody has tuned."""
    return MomentsConfig(64, 64, 8) if columns > 16 else MomentsConfig(64, 16, 4)


@dataclass(frozen=True)
class Device:
    """Numbers of a device that decide about layouts.

    Attributes:
        backend: "cuda", "hip", or "cpu" for Triton's interpreter.
        capability: compute capability as a number, 90 for 9.0; 0 where there is none.
        multiprocessors: streaming multiprocessors or compute units.
        shared_per_program: most shared memory of a program, bytes.
        shared_per_multiprocessor: bytes.
        registers_per_multiprocessor: 32-bit registers.
        threads_per_multiprocessor: most resident threads.
        warp: threads of a warp.
        name: architecture of an AMD device, "gfx942"; others have it from their capability.
    """

    backend: str
    capability: int
    multiprocessors: int
    shared_per_program: int
    shared_per_multiprocessor: int
    registers_per_multiprocessor: int
    threads_per_multiprocessor: int
    warp: int = 32
    name: str = ""

    @property
    def architecture(self) -> str:
        """Short name of what code is compiled for: "sm90", "gfx942", "cpu"."""
        return self.name or (f"sm{self.capability}" if self.backend == "cuda" else self.backend)

    def multiplies(self, dtype: torch.dtype, precision: str) -> bool:
        """Whether products of this dtype run on matrix units; else they are many single multiply-adds."""
        if self.backend == "hip":
            return True
        if self.capability < 80:
            return False
        return dtype != torch.float32 or precision == "tf32"

    def may_meet(self, programs: int, *, alone: bool, steps: int) -> bool:
        """Whether a launch of one sequence-mode grid may be chosen: each program has a multiprocessor to itself.

        Args:
            programs: of the launch.
            alone: each of them holds a recurrence of its own, and meets nobody.
            steps: T; a single step needs no meeting.
        """
        able = self.backend == "cuda" and self.capability >= 70 and steps > 1
        return able and (alone or programs <= self.multiprocessors)

    def multiplies_in_groups(self, rows: int) -> bool:
        """Whether products of so many rows are those of four warps together: from 64 rows on, Hopper and B200.

        Those take their operands from shared memory as a whole; beside a resident slice they spill.
        """
        return self.capability // 10 in (9, 10) and rows >= 64

    def resident_programs(self, shared: int, registers: int, warps: int) -> int:
        """Programs that run at the same time on the whole device.

        Args:
            shared: bytes of a program.
            registers: of a thread.
            warps: of a program.
        """
        per_warp = -(-registers * self.warp // 256) * 256  # registers are given to warps in units of 256
        fit = [self.threads_per_multiprocessor // (warps * self.warp), 32]
        fit.append(self.registers_per_multiprocessor // (per_warp * warps) if registers else 1)
        fit.append(self.shared_per_multiprocessor // (shared + 1024))  # the system keeps 1 KB of each program's
        return self.multiprocessors * min(fit)


INTERPRETER = Device("cpu", 0, 1, 1 << 30, 1 << 30, 1 << 30, 1 << 30)


def device_of(device: torch.device) -> Device:
    """Numbers of a torch device; a CPU's are the interpreter's."""
    if device.type == "cpu":
        return INTERPRETER
    return _accelerator(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache
def _accelerator(index: int) -> Device:
    from triton.runtime import driver  # not at the top: layouts can be chosen where there is no Triton

    p = torch.cuda.get_device_properties(index)
    limits = driver.active.utils.get_device_properties(index)
    hip = torch.version.hip is not None
    return Device(
        backend="hip" if hip else "cuda",
        capability=0 if hip else 10 * p.major + p.minor,
        multiprocessors=p.multi_processor_count,
        shared_per_program=limits["max_shared_mem"],
        shared_per_multiprocessor=p.shared_memory_per_multiprocessor,
        registers_per_multiprocessor=limits["max_num_regs"],  # a block may have all of them
        threads_per_multiprocessor=p.max_threads_per_multi_processor,
        warp=p.warp_size,
        name=str(p.gcnArchName).partition(":")[0] if hip else "",
    )


def power_of_two(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << max(n - 1, 0).bit_length()


class _Explicit(NamedTuple):
    config: Config | None = None
    backward: BackwardConfig | None = None
    moments: MomentsConfig | None = None


_NOTHING = _Explicit()
_explicit: ContextVar[_Explicit] = ContextVar("triton_bnlstm_config", default=_NOTHING)


@contextmanager
def use_config(
    config: Config | None = None, *, backward: BackwardConfig | None = None, moments: MomentsConfig | None = None
) -> Iterator[None]:
    """Kernels of calls within it are laid out like this, whatever has been tuned; one that cannot run so raises.

    Args:
        config: of forward and inference kernels; None: tuned, or the device's default.
        backward: of the backward kernel of these calls, wherever it is run.
        moments: of the input side's kernel.

    Raises:
        TypeError: one of them is not a layout of that kind.
    """
    if isinstance(config, BackwardConfig) or not isinstance(config, Config | None):
        raise TypeError(f"config must be a Config, got {type(config).__name__}")
    if not isinstance(backward, BackwardConfig | None):
        raise TypeError(f"backward must be a BackwardConfig, got {type(backward).__name__}")
    if not isinstance(moments, MomentsConfig | None):
        raise TypeError(f"moments must be a MomentsConfig, got {type(moments).__name__}")
    token = _explicit.set(_Explicit(config, backward, moments))
    try:
        yield
    finally:
        _explicit.reset(token)


def explicit_config() -> Config | None:
    """The layout that `use_config` asks for."""
    return _explicit.get().config


def explicit_backward_config() -> BackwardConfig | None:
    """The backward kernel's layout that `use_config` asks for."""
    return _explicit.get().backward


def explicit_moments_config() -> MomentsConfig | None:
    """The input side's layout that `use_config` asks for."""
    return _explicit.get().moments
