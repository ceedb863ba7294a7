"""Launching: from tensors to kernels, in the mode that the layout says, with every failure turned into one error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..tuning import choice
from ..tuning.work import Work
from .barrier import MOST_ARRIVALS, NOT_MET, check_kernel
from .config import (
    BackwardConfig,
    Config,
    Device,
    MomentsConfig,
    default_moments_config,
    device_of,
    explicit_config,
    explicit_moments_config,
)
from .errors import KernelError, tell_once
from .forward import forward_kernel
from .forward_config import default_config
from .inference import inference_kernel
from .input_side import moments_kernel
from .needs import compiled, resident_programs
from .rows import Block, Case, CellNorm, Rows
from .run import interpreted as interpreted  # asked of this module, too
from .run import run

_run = run  # each launch of this file goes through this name, so that all of them can be watched


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

    def run_in(config: MomentsConfig) -> None:
        grid = (part.last - part.first, triton.cdiv(columns, config.columns), directions)
        _run(
            moments_kernel,
            grid,
            (x, found, x if centred is None else centred, rows.first, rows.count),
            (columns, rows.steps, rows.rows, rows.batch, part.first, part.rows, part.first_row),
            {"CENTRE": centred is not None, "BEFORE": before, "BR": config.rows, "BC": config.columns},
            {"num_warps": config.warps},
        )

    explicit = explicit_moments_config()
    if explicit is not None:
        run_in(explicit)
        return found
    device = device_of(x.device)
    work = Work.of_moments(columns, rows.batch, directions, x.dtype, centre=centred is not None, before=before)
    tuned = choice.tuned(device, work)
    if isinstance(tuned, MomentsConfig):
        try:
            run_in(tuned)
        except KernelError as error:
            choice.reject(device, work, tuned, str(error))
        else:
            return found
    run_in(default_moments_config(columns))
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
    flags = {"cell_norm": cell is not None, "narrow": x.dim() == 2, "seats": share is not None}
    work = _work("forward", Case.of(h), rows, precision, flags)
    recur(forward_kernel, arguments, shared, Case.of(h), rows, partial(default_config, split_batch=False), work)
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
    flags = {"cell_norm": affine_c is not None, "narrow": x.dim() == 2}
    work = _work("inference", Case.of(h), rows, str(shared["PRECISION"]), flags)
    recur(inference_kernel, arguments, shared, Case.of(h), rows, partial(default_config, split_batch=True), work)


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


def _work(name: str, case: Case, rows: Rows, precision: str, flags: dict[str, bool]) -> Work:
    given = tuple(sorted(flag for flag, is_set in flags.items() if is_set))
    return Work(name, case.hidden, rows.batch, case.directions, case.dtype, precision, given)


class Recurrence(NamedTuple):
    """A recurrent kernel on its tensors, to be run in any layout; see `recur`."""

    kernel: Any
    arguments: Callable[[Config], Arguments]
    shared: dict[str, Any]
    case: Case
    rows: Rows
    steps: tuple[int, int]
    backwards: bool

    def prepare(self, config: Config) -> _Launch:
        """Everything but the steps."""
        return _prepare(self.kernel, self.arguments(config), self.shared, self.case, config)

    def why_not_at_once(self, launch: _Launch) -> str | None:
        """Why its programs cannot run at the same time.

        Raises:
            KernelError: it does not compile, or the device has no sequence mode.
        """
        device = device_of(self.case.device)
        if device.backend == "hip":
            raise KernelError("sequence mode: its barrier is written for CUDA devices; use step mode")
        room = resident_programs(self.kernel, launch, self.rows, device)
        if launch.programs > room:
            return (
                f"{launch.programs} programs of {self.kernel.__name__} have to run at the same time, and {room} can "
                "on this device; give a program more units, or use step mode"
            )
        if self.rows.steps * launch.programs * launch.arguments.meetings >= MOST_ARRIVALS:
            return f"{self.rows.steps} steps of {launch.programs} programs are more than the barrier's counter holds"
        return None

    def why_not(self, config: Config, launch: _Launch | None = None) -> str | None:
        """Why this layout cannot run here, having compiled it."""
        try:
            launch = launch or self.prepare(config)
            if config.sequence:
                return self.why_not_at_once(launch)
            for changes in launch.arguments.phases if not interpreted() else ():
                compiled(self.kernel, launch, self.rows, changes)
        except KernelError as error:
            return str(error)
        return None

    def run(self, config: Config, launch: _Launch | None = None) -> None:
        """All steps in this layout, without asking whether it fits."""
        launch = launch or self.prepare(config)
        if config.sequence:
            _run(self.kernel, *launch.call(*self.steps, self.rows))
            if launch.constants["SYNC"] == "drain":
                meetings = (launch.counter.shape[0],)
                name = {"KERNEL": f"{self.kernel.__name__} {NOT_MET}"}
                _run(check_kernel, meetings, (launch.counter,), (), name, {"num_warps": 1, **_ASSERTING})
            return
        for t in reversed(range(*self.steps)) if self.backwards else range(*self.steps):
            for changes in launch.arguments.phases:
                _run(self.kernel, *launch.call(t, t + 1, self.rows, changes))


_observer: ContextVar[list[Recurrence] | None] = ContextVar("triton_bnlstm_observer", default=None)


@contextmanager
def observed() -> Iterator[list[Recurrence]]:
    """Within it, and in its thread, what recurs is also put into this list, to be run again."""
    found: list[Recurrence] = []
    token = _observer.set(found)
    try:
        yield found
    finally:
        _observer.reset(token)


def recur(
    kernel: Any,
    arguments: Callable[[Config], Arguments],
    shared: dict[str, Any],
    case: Case,
    rows: Rows,
    layout: Callable[..., Config],
    work: Work,
    *,
    explicit: Config | None = None,
    backwards: bool = False,
    block: Block | None = None,
) -> None:
    """All steps of a recurrent kernel, by the layout that was asked for, or a tuned one, or the device's default one.

    Args:
        kernel: the kernel.
        arguments: of the kernel in a layout.
        shared: constants that do not depend on the layout.
        case: what it is about.
        rows: which rows exist.
        layout: chooses a layout, as `default_config`.
        work: what a tuned layout is looked up by.
        explicit: the layout that was asked for; None: what `use_config` says.
        backwards: the last step comes first.
        block: only these steps.
    """
    device = device_of(case.device)
    steps = (0, rows.steps) if block is None else (block.first, block.last)
    this = Recurrence(kernel, arguments, shared, case, rows, steps, backwards)
    noted = _observer.get()
    if noted is not None:
        noted.append(this)
    if explicit is None and not backwards:
        explicit = explicit_config()
    if explicit is not None:
        launch = this.prepare(explicit)
        reason = this.why_not_at_once(launch) if explicit.sequence else None
        if reason is not None:
            raise KernelError(f"sequence mode: {reason}")
        this.run(explicit, launch)
        return
    choose = partial(layout, device, case.hidden, rows.batch, case.directions, case.dtype, str(shared["PRECISION"]))
    tuned = choice.tuned(device, work) if rows.steps > 1 else None  # of many steps; one is launched as such
    if isinstance(tuned, Config):
        launch = this.prepare(tuned)
        reason = this.why_not(tuned, launch)
        if reason is None:
            this.run(tuned, launch)
            return
        choice.reject(device, work, tuned, reason)
    config = choose(steps=rows.steps)
    if config.sequence:
        launch = this.prepare(config)
        try:
            reason = this.why_not_at_once(launch)
        except KernelError as error:
            reason = str(error)  # another layout may compile
            tell_once(f"{kernel.__name__} runs in step mode, since sequence mode does not compile here ({error})")
        if reason is None:
            this.run(config, launch)
            return
        config = choose(steps=1)
    this.run(config)


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
