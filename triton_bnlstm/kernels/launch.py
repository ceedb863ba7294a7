"""Launching: from tensors to kernels, in the mode that the layout says, with every failure turned into one error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .barrier import MOST_ARRIVALS, NOT_MET, check_kernel
from .config import BackwardConfig, Config, Device, default_config, device_of, explicit_config
from .errors import KernelError, tell_once
from .forward import forward_kernel
from .inference import inference_kernel
from .input_side import moments_kernel


class Rows(NamedTuple):
    """Which rows exist, as the kernels read it.

    first: [T + 1] int64 row of the states that step t reads; it writes from first[t + 1]. Its own rows of tensors
        without the B initial states stand from first[t + 1] − B on.
    count: [T] int32 live rows of each step, a prefix of its rows.
    steps, rows, batch: T, R, B.
    """

    first: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    steps: int
    rows: int
    batch: int


class Block(NamedTuple):
    """Some steps: first..last, the first of their rows among all R, and how many rows they have."""

    first: int
    last: int
    first_row: int
    rows: int

    @classmethod
    def whole(cls, rows: Rows) -> Block:
        """All steps."""
        return cls(0, rows.steps, 0, rows.rows)


class CellNorm(NamedTuple):
    """affine: [2, dirs, H] γ_c and β_c. population: [2, dirs, T, H], or None where no seat is vacated."""

    affine: Tensor
    population: Tensor | None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: TRITON_INTERPRET=1 when they were imported."""
    return not isinstance(forward_kernel, triton.runtime.JITFunction)


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Every tensor that a kernel writes comes from here."""
    return torch.empty(shape, dtype=dtype, device=device)


def product_precision(dtype: torch.dtype, device: torch.device) -> str:
    """Precision of float32 products: "tf32" where torch's switches for CUDA matrix products allow it, else "ieee"."""
    if dtype != torch.float32 or device.type != "cuda" or torch.version.hip is not None:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    setting = getattr(matmul, "fp32_precision", None)  # since torch 2.9; mixing it with the old switch raises
    allowed = matmul.allow_tf32 if setting is None else setting == "tf32"
    return "tf32" if allowed and device_of(device).capability >= 80 else "ieee"


def moments(
    x: Tensor,
    rows: Rows,
    centred: Tensor | None = None,
    *,
    before: bool = False,
    block: Block | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """Mean and biased variance of each step's live rows of x [dirs, R, C] → [2, dirs, T, C] float32.

    centred: [dirs, R, C], takes the live rows less their mean.
    before: x is [dirs, B + R, C], states with the initial ones first, and a step's rows are those before it.
    block: only these steps, whose rows are all that centred has place for. into: takes the result.
    """
    directions, _, columns = x.shape
    found = into
    if found is None:
        found = empty(2, directions, rows.steps, columns, dtype=torch.float32, device=x.device)
    part = block or Block.whole(rows)
    width = 64 if columns > 16 else 16
    grid = (part.last - part.first, triton.cdiv(columns, width), directions)
    _run(
        moments_kernel,
        grid,
        (x, found, x if centred is None else centred, rows.first, rows.count),
        (columns, rows.steps, rows.rows, rows.batch, part.first, part.rows, part.first_row),
        {"CENTRE": centred is not None, "BEFORE": before, "BR": 64, "BC": width},
        {"num_warps": 8 if width > 16 else 4},
    )
    return found


def train(
    h: Tensor,
    c: Tensor,
    weight: Tensor,
    x: Tensor,
    terms: tuple[Tensor, Tensor],
    gamma: Tensor,
    rows: Rows,
    eps: float,
    population: Tensor | None,
    share: Tensor | None,
    cell: CellNorm | None,
    deviation: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence in training. Writes h and c behind their first B rows, which hold the initial states.

    Args:
        h: [dirs, B + R, H] states. c: the same, float32.
        weight: [dirs, 4H, H] W_hh.
        x: [dirs, R, 4H] W_ih x; or, where x is one column, [dirs, R] float32 x less its mean.
        terms: scale and shift of each step's input, [dirs, T, 4H] float32.
        gamma: [dirs, 4H] float32 γ_hh.
        rows: which rows exist.
        eps: ε.
        population, share: [2, dirs, T, 4H] and [dirs, T] n/(n+κ), None where no seat is vacated.
        cell: with cell norm.
        deviation: [dirs, R, 4H], takes W_hh h less its mean over the batch.

    Returns:
        mean and variance over the batch of W_hh h [2, dirs, T, 4H], and with cell norm of c [2, dirs, T, H].

    Raises:
        KernelError: see there.
    """
    directions, _, hidden = h.shape
    device = h.device
    own = empty(2, directions, rows.steps, 4 * hidden, dtype=torch.float32, device=device)
    own_c = None
    if cell is not None:
        own_c = empty(2, directions, rows.steps, hidden, dtype=torch.float32, device=device)
    precision = product_precision(h.dtype, device)

    nothing = gamma  # in the place of a pointer that is not read

    def arguments(config: Config) -> Arguments:
        walk = rows.batch > config.batch_tile
        scratch = nothing
        if walk:
            scratch = empty(directions, rows.batch, 5 * hidden, dtype=torch.float32, device=device)
        tensors = (
            *(h, c, weight, x, *terms, gamma, own),
            *(nothing if s is None else s for s in (population, share)),
            *((nothing, nothing) if cell is None or own_c is None else (cell.affine, own_c)),
            nothing if cell is None or cell.population is None else cell.population,
            *(rows.first, rows.count, scratch, nothing if deviation is None else deviation),
        )
        constants = {"WALK": walk, "SEATS": share is not None}
        return Arguments((triton.cdiv(hidden, config.units), directions), tensors, (eps,), constants)

    shared = {
        "NARROW": x.dim() == 2,
        "KEEP_DEVIATIONS": deviation is not None,
        "CELL_NORM": cell is not None,
        "PRECISION": precision,
    }
    recur(forward_kernel, arguments, shared, Case.of(h), rows, partial(default_config, split_batch=False))
    return own, own_c


def infer(
    h: Tensor,
    c: Tensor,
    weight: Tensor,
    x: Tensor,
    terms: tuple[Tensor, Tensor, Tensor],
    rows: Rows,
    affine_c: Tensor | None,
) -> None:
    """The recurrence with constant statistics. Writes h behind its first B rows, which hold the initial states, and c.

    Args:
        h: [dirs, B + R, H] states.
        c: float32 cell states: [dirs, B, H], of which the initial ones become the last; or [dirs, B + R, H] like h.
        weight: [dirs, 4H, H] W_hh.
        x: [dirs, R, 4H] W_ih x, or [dirs, R] float32 x itself where it is one column.
        terms: scale of x, scale of W_hh h, and shift of each step, [dirs, T, 4H] float32.
        rows: which rows exist.
        affine_c: [2, dirs, T, H] float32 scale and shift of the cell norm.

    Raises:
        KernelError: see there.
    """
    directions, _, hidden = h.shape
    scale, scale_hh, shift = terms

    def arguments(config: Config) -> Arguments:
        tensors = (h, c, weight, x, scale, scale_hh, shift, scale if affine_c is None else affine_c, *rows[:2])
        tiles = triton.cdiv(rows.batch, config.batch_tile)
        return Arguments((triton.cdiv(hidden, config.units), tiles, directions), tensors, (), {})

    shared = {
        "NARROW": x.dim() == 2,
        "KEEP_CELLS": c.shape == h.shape,
        "CELL_NORM": affine_c is not None,
        "PRECISION": product_precision(h.dtype, h.device),
    }
    recur(inference_kernel, arguments, shared, Case.of(h), rows, partial(default_config, split_batch=True))


class Case(NamedTuple):
    """What a recurrence is about: device, dtype of its products, directions, hidden size."""

    device: torch.device
    dtype: torch.dtype
    directions: int
    hidden: int

    @classmethod
    def of(cls, h: Tensor) -> Case:
        """Of states h [dirs, ·, H]."""
        return cls(h.device, h.dtype, h.shape[0], h.shape[2])


class Arguments(NamedTuple):
    """Of a recurrent kernel in one layout: grid, tensors but the counter, scalars after `batch`, constants.

    phases: in step mode a step is a launch for each of these, with its changes of the constants.
    meetings: how often programs meet in a step.
    """

    grid: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    scalars: tuple[float, ...]
    constants: dict[str, Any]
    phases: tuple[dict[str, Any], ...] = ({},)
    meetings: int = 1


def recur(
    kernel: Any,
    arguments: Callable[[Config], Arguments],
    shared: dict[str, Any],
    case: Case,
    rows: Rows,
    layout: Callable[..., Config],
    *,
    explicit: Config | None = None,
    backwards: bool = False,
    block: Block | None = None,
) -> None:
    """All steps of a recurrent kernel, by the layout that was asked for or the device's default one.

    Args:
        kernel: the kernel.
        arguments: of the kernel in a layout.
        shared: constants that do not depend on the layout.
        case: what it is about.
        rows: which rows exist.
        layout: chooses a layout, as `default_config`.
        explicit: the layout that was asked for; None: what `use_config` says.
        backwards: the last step comes first.
        block: only these steps.
    """
    device = device_of(case.device)
    steps = (0, rows.steps) if block is None else (block.first, block.last)
    choose = partial(layout, device, case.hidden, rows.batch, case.directions, case.dtype, str(shared["PRECISION"]))
    if explicit is None and not backwards:
        explicit = explicit_config()
    config = explicit or choose(steps=rows.steps)
    if config.sequence:
        if device.backend == "hip":
            raise KernelError("sequence mode: its barrier is written for CUDA devices; use step mode")
        launch = _prepare(kernel, arguments(config), shared, case, config)
        try:
            room = resident_programs(kernel, launch, rows, device)
        except KernelError as error:
            if explicit is not None:
                raise
            room = 0  # another layout may compile
            tell_once(f"{kernel.__name__} runs in step mode, since sequence mode does not compile here ({error})")
        if launch.programs <= room and rows.steps * launch.programs * launch.arguments.meetings < MOST_ARRIVALS:
            _run(kernel, *launch.call(*steps, rows))
            if launch.constants["SYNC"] == "drain":
                meetings = (launch.counter.shape[0],)
                name = {"KERNEL": f"{kernel.__name__} {NOT_MET}"}
                _run(check_kernel, meetings, (launch.counter,), (), name, {"num_warps": 1, **_ASSERTING})
            return
        if explicit is not None:
            raise KernelError(
                f"sequence mode: {launch.programs} programs of {kernel.__name__} have to run at the same time, and "
                f"{room} can on this device; give a program more units, or use step mode"
            )
        config = choose(steps=1)
    launch = _prepare(kernel, arguments(config), shared, case, config)
    for t in reversed(range(*steps)) if backwards else range(*steps):
        for changes in launch.arguments.phases:
            _run(kernel, *launch.call(t, t + 1, rows, changes))


class _Launch(NamedTuple):
    """A recurrent kernel with everything but the steps."""

    arguments: Arguments
    counter: Tensor
    constants: dict[str, Any]
    options: dict[str, Any]

    @property
    def programs(self) -> int:
        """Of the whole grid."""
        return math.prod(self.arguments.grid)

    def call(self, first: int, last: int, rows: Rows, changes: dict[str, Any] | None = None) -> tuple[Any, ...]:
        """What `_run` takes for steps first..last."""
        scalars = (first, last, rows.steps, rows.rows, rows.batch, *self.arguments.scalars)
        tensors = (*self.arguments.tensors, self.counter)
        return self.arguments.grid, tensors, scalars, {**self.constants, **(changes or {})}, self.options


def _prepare(kernel: Any, arguments: Arguments, shared: dict[str, Any], case: Case, config: Config) -> _Launch:
    programs, device = arguments.grid[0], device_of(case.device)
    sync = "none"
    if config.sequence and programs > 1:
        sync = "interpreted" if interpreted() else _sync_of(config, device)
    meetings = math.prod(arguments.grid[1:])
    # zeros: a launch counts up from there
    counter = arguments.tensors[0]
    if sync != "none":
        counter = torch.zeros(meetings, 32, dtype=torch.int32, device=case.device)
    constants = {
        "H": case.hidden,
        "U": config.units,
        "BB": config.batch_tile,
        "BK": config.inner,
        "RESIDENT": config.resident,
        "SYNC": sync,
        "PROGRAMS": programs,
        "INTERPRETED": interpreted(),
        **shared,
        **arguments.constants,
    }
    return _Launch(arguments, counter, constants, launch_options(config, sync, device))


def _sync_of(config: Config, device: Device) -> str:
    """How a wait that lasts too long ends; see `barrier`. Products of 64 rows and more run on Hopper's warpgroups."""
    return "drain" if device.capability == 90 and config.product_rows >= 64 else "assert"


def launch_options(config: Config, sync: str, device: Device) -> dict[str, Any]:
    """Triton's options of a recurrent kernel."""
    options: dict[str, Any] = {"num_warps": config.warps, "num_stages": config.stages}
    if device.backend == "cuda" and (config.sequence or isinstance(config, BackwardConfig)):
        # A multiprocessor has one program. ptxas does not know, and saves registers for others: loads of the state
        # would wait for each other, and a few values be spilled.
        options["maxnreg"] = min(255, 65536 // (32 * config.warps))
    if sync in ("assert", "drain"):
        options["launch_cooperative_grid"] = True  # all programs at once, or an error
    if sync == "assert":
        options |= _ASSERTING
    return options


# Assertions are compiled in for the barrier's time limit, without those that Triton would add to integers.
_ASSERTING = {"debug": True, "sanitize_overflow": False}
_resident: dict[Any, int] = {}


def resident_programs(kernel: Any, launch: _Launch, rows: Rows, device: Device) -> int:
    """Programs of this compiled kernel that the device can hold at the same time; compiles it if need be."""
    if launch.constants["SYNC"] == "none":
        return launch.programs
    if interpreted():
        return 1
    h = launch.arguments.tensors[0]
    key = (kernel.__name__, h.device, h.dtype, *sorted(launch.constants.items()), *sorted(launch.options.items()))
    if key not in _resident:
        grid, tensors, scalars, constants, options = launch.call(0, rows.steps, rows)
        with _as_kernel_error(kernel), torch.cuda.device(h.device):
            compiled = kernel.warmup(*tensors, *scalars, **constants, **options, enable_fp_fusion=True, grid=grid)
            compiled._init_handles()
        _resident[key] = device.resident_programs(
            compiled.metadata.shared, compiled.n_regs, compiled.metadata.num_warps
        )
    return _resident[key]


@contextmanager
def _as_kernel_error(kernel: Any) -> Iterator[None]:
    """What Triton raises when it compiles or loads a kernel → KernelError."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        # A launch also reports what an earlier kernel did wrong; that is not for another backend to try again.
        if any(word in str(error) for word in _FATAL):
            raise
        text = str(error).strip().splitlines()
        raise KernelError(f"{kernel.__name__}: {type(error).__name__}: {text[0] if text else ''}") from error


# What makes a device useless until the process ends, and a lack of memory, which another path would only share.
_FATAL = (
    *("illegal memory access", "illegal instruction", "illegal address", "invalid program counter"),
    *("device-side assert", "unspecified launch failure", "misaligned address", "hardware stack error"),
    *("launch timed out", "out of memory", "uncorrectable"),
)


def _quiet() -> AbstractContextManager[Any]:
    """Rows and columns that do not exist are computed too, then thrown away: NumPy would warn of what comes of them."""
    if not interpreted():
        return nullcontext()
    import numpy

    return numpy.errstate(all="ignore")


def _run(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[Tensor, ...],
    scalars: tuple[float, ...],
    constants: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """One launch, on the tensors' device and its current stream."""
    on_device = torch.cuda.device(tensors[0].device) if tensors[0].device.type == "cuda" else nullcontext()
    with _as_kernel_error(kernel), on_device, _quiet():
        # fusion said explicitly: Triton's default is about to change
        kernel[grid](*tensors, *scalars, **constants, **options, enable_fp_fusion=True)
