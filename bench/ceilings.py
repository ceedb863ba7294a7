"""What a device can do at most, measured: bytes from memory and from L2, meetings, launches, products.

Each is measured with the simplest program that does nothing else, as what `floor` sets a layer's work against; a
ceiling that is too low would make a floor too high, so where there are several ways the fastest one counts.

    copy        bytes read and written of a copy that no cache can hold, by the copy engine or by a kernel
    L2          bytes that one program on each multiprocessor reads of a buffer that stays in L2 and is too large for a
                first-level cache, in 16-byte loads, through that cache or past it; beginning at different places, or
                all at the same one as those that read one state do, whose requests some devices merge on the way
    barrier     one meeting of one program per multiprocessor, or of eight, by `kernels.barrier`
    launch      one kernel of a CUDA graph that waits for the one before it
    products    multiplications and additions of a large matrix product, by precision

The last four are differences of two sizes, or so long that what surrounds them does not count. On a CPU kernels run in
Triton's interpreter, in one program, and there is no graph: figures that mean nothing, from the same code.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import product
from typing import Any

import torch

from .cases import PRECISIONS
from .timing import captured, device_seconds, l2_bytes

# What an error says when the device can do nothing more in this process.
_LOST = (
    *("illegal memory access", "illegal instruction", "illegal address", "invalid program counter"),
    *("device-side assert", "unspecified launch failure", "misaligned address", "hardware stack error"),
    *("launch timed out", "uncorrectable", "context is destroyed"),
)


def device_is_lost(error: BaseException) -> bool:
    """Whether the device is of no use to this process after this error."""
    return any(words in str(error) for words in _LOST)


@dataclass(frozen=True)
class Ceilings:
    """What a device can do at most; None where it could not be measured.

    Attributes:
        copy_bytes_per_second: of device memory, read and written.
        l2_bytes_per_second: read by all multiprocessors together.
        barrier_seconds: of one meeting of programs, the least of several numbers of them.
        launch_seconds: from one kernel of a CUDA graph to the next one, which waits for it.
        flops: additions and multiplications per second of matrix products, by precision; those that were measured.
        why: reasons of those that were not, by name, "flops.float16" for a precision.
    """

    copy_bytes_per_second: float | None = None
    l2_bytes_per_second: float | None = None
    barrier_seconds: float | None = None
    launch_seconds: float | None = None
    flops: dict[str, float] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)

    @classmethod
    def of_json(cls, found: dict[str, Any]) -> Ceilings:
        """The same again; what is stored beside it is passed over."""
        return cls(**{f.name: found[f.name] for f in fields(cls) if f.name in found})


@dataclass(frozen=True)
class _Sizes:
    """Of what is measured.

    Attributes:
        copied: bytes of a copy, if a quarter of the free memory holds them.
        read: bytes of the buffer in L2, if a third of that holds them. block: int32 elements that a program reads at
            once. reads: blocks that it reads.
        meetings, launches: how many.
        extent: of the square matrices; of float32 ones half of it where products of those are slow.
        rounds: how often each is timed.
    """

    copied: int = 1 << 30
    read: int = 16 << 20
    block: int = 1024 * 16  # 4 loads of 16 bytes on their way in each thread of 32 warps
    reads: int = 512
    meetings: int = 1000
    launches: int = 500
    extent: int = 8192
    rounds: int = 10


# On a GPU still long enough for its clock.
_TOY = _Sizes(copied=1 << 26, read=1 << 20, reads=64, meetings=100, launches=50, extent=512, rounds=3)
_TOY_ON_CPU = _Sizes(copied=1 << 16, read=1 << 10, block=64, reads=8, meetings=8, launches=8, extent=64, rounds=3)


def _each(work: Callable[[int], Callable[[], Any]], number: int, device: torch.device, rounds: int) -> float:
    """Seconds of one of `number` like things, from that many and twice as many: what surrounds them falls out."""
    for _ in range(3):  # a machine that others use may lose the first
        few, many = (min(device_seconds(work(n), device, rounds)) for n in (number, 2 * number))
        if many > few:
            return (many - few) / number
    raise RuntimeError("twice the work did not take longer")


def _programs(device: torch.device) -> int:
    """One for each multiprocessor."""
    from triton_bnlstm.kernels.launch import interpreted

    if interpreted():
        return 1
    if device.type != "cuda":
        raise RuntimeError("kernels run on a CPU only in Triton's interpreter: set TRITON_INTERPRET=1 before the start")
    return torch.cuda.get_device_properties(device).multi_processor_count


def _copy(device: torch.device, sizes: _Sizes) -> float:
    count = sizes.copied // 4
    if device.type == "cuda":
        count = min(count, torch.cuda.mem_get_info(device)[0] // 16)
    source, target = torch.zeros(count, device=device), torch.empty(count, device=device)
    ways: tuple[Callable[[], Any], ...] = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    seconds = min(statistics.median(device_seconds(way, device, sizes.rounds)) for way in ways)
    return 2 * source.nbytes / seconds


def _l2(device: torch.device, sizes: _Sizes) -> float:
    from .ceiling_kernels import read_kernel

    programs = _programs(device)
    size = min(sizes.read, l2_bytes(device) // 3 or sizes.read)
    blocks = max(1, size // (4 * sizes.block))
    buffer = torch.ones(blocks, sizes.block, dtype=torch.int32, device=device)
    sink = torch.zeros(programs, dtype=torch.int32, device=device)

    def work(apart: int, modifier: str) -> Callable[[int], Callable[[], Any]]:
        constants = {"BLOCK": sizes.block, "MODIFIER": modifier}
        # 32 warps: a second program does not fit beside one, so none finds in the first-level cache what another read
        options = {"num_warps": 32, "num_stages": 1, "enable_fp_fusion": True}

        def reads(count: int) -> Callable[[], Any]:
            return lambda: read_kernel[(programs,)](buffer, sink, blocks, apart, count, **constants, **options)

        return reads

    ways = product((0, max(1, blocks // programs)), ("", ".cg"))
    seconds = min(_each(work(*way), sizes.reads, device, sizes.rounds) for way in ways)
    if int(sink[0]) != 2 * sizes.reads * sizes.block:
        raise RuntimeError(f"programs read {int(sink[0])} ones of {2 * sizes.reads * sizes.block}")
    return 4 * sizes.block * programs / seconds


def _barrier(device: torch.device, sizes: _Sizes) -> float:
    if torch.version.hip is not None:
        raise RuntimeError("the barrier is written for CUDA devices")
    from triton_bnlstm.kernels.barrier import MOST_ARRIVALS, NOT_MET
    from triton_bnlstm.kernels.launch import interpreted

    from .ceiling_kernels import meet_kernel

    most = _programs(device)
    counter = torch.zeros(32, dtype=torch.int32, device=device)
    # not "assert", whose call behind the wait is a matter of kernels and not of meeting
    sync = {"SYNC": "interpreted" if interpreted() else "drain", "KERNEL": f"meet_kernel {NOT_MET}"}
    options = {"num_warps": 4, "launch_cooperative_grid": True, "enable_fp_fusion": True}

    def work(programs: int, meetings: int) -> Callable[[], Any]:
        def meet() -> None:
            counter.zero_()
            meet_kernel[(programs,)](counter, meetings, PROGRAMS=programs, **sync, **options)

        return meet

    # a few programs may meet sooner than all: the least is what no design can do better than
    few = min(8, most)
    seconds = min(_each(partial(work, n), sizes.meetings, device, sizes.rounds) for n in {few, most})
    if int(counter[0]) >= MOST_ARRIVALS:
        raise RuntimeError(f"meet_kernel {NOT_MET}")
    return seconds


def _launch(device: torch.device, sizes: _Sizes) -> float:
    from .ceiling_kernels import nothing_kernel

    _programs(device)
    anything = torch.zeros(1, device=device)

    def work(launches: int) -> Callable[[], Any]:
        def launch() -> None:
            for _ in range(launches):
                nothing_kernel[(1,)](anything, num_warps=1, enable_fp_fusion=True)

        # without a graph it is the host that takes its time: on a CPU there is nothing else
        return captured(launch, warm=launch)[0].replay if device.type == "cuda" else launch

    return _each(work, sizes.launches, device, sizes.rounds)


def _products(device: torch.device, sizes: _Sizes, precision: str) -> float:
    dtype = getattr(torch, precision.replace("tf32", "float32"))
    extent = sizes.extent // 2 if precision == "float32" else sizes.extent
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        # random: products of zeros take less power, and so run at a higher clock than any of use
        a, b = (torch.randn(extent, extent, device=device).to(dtype) for _ in range(2))
        c = torch.empty_like(a)
        seconds = statistics.median(device_seconds(lambda: torch.mm(a, b, out=c), device, sizes.rounds))
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * extent**3 / seconds


def measure(device: torch.device, *, toy: bool = False) -> Ceilings:
    """All ceilings of a device, in seconds. One that fails is None, and `Ceilings.why` has the reason.

    Args:
        device: CUDA, or the CPU, where all is small and kernels need Triton's interpreter.
        toy: sizes that only show that everything runs.

    Raises:
        Exception: the device cannot be used any more, as after an illegal memory access.
    """
    sizes = (_TOY if toy else _Sizes()) if device.type == "cuda" else _TOY_ON_CPU
    why: dict[str, str] = {}

    def attempt(name: str, measurement: Callable[..., float], *arguments: str) -> float | None:
        try:
            return measurement(device, sizes, *arguments)
        except Exception as error:  # of torch, of Triton, of a compiler or driver: each has its own
            if device_is_lost(error):
                raise
            lines = str(error).strip().splitlines()
            why[name] = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
            return None

    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        found = {
            "copy_bytes_per_second": attempt("copy_bytes_per_second", _copy),
            "l2_bytes_per_second": attempt("l2_bytes_per_second", _l2),
            "barrier_seconds": attempt("barrier_seconds", _barrier),
            "launch_seconds": attempt("launch_seconds", _launch),
        }
        products = {precision: attempt(f"flops.{precision}", _products, precision) for precision in PRECISIONS}
        if device.type == "cuda":
            torch.cuda.empty_cache()  # gigabytes that nobody needs again
    flops = {precision: rate for precision, rate in products.items() if rate is not None}
    return Ceilings(**found, flops=flops, why=why)
