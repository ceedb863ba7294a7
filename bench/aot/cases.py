"""What is launched where: the launching code itself is run on tensors without memory, and its launches are noted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from triton_bnlstm.kernels import launch, launch_backward
from triton_bnlstm.kernels.config import Device, explicit_backward_config, explicit_config
from triton_bnlstm.kernels.rows import CellNorm, Rows
from triton_bnlstm.tuning import analytic_only

from .targets import Numbers

STEPS = 2  # more than one, so that sequence mode is chosen

# Of each kernel: the options that are compiled in, as arguments of the functions below.
FORWARD: dict[str, dict[str, bool]] = {
    "plain": {},
    "cell": {"cell_norm": True},
    "seats": {"seats": True},
    "cell+seats": {"cell_norm": True, "seats": True},
    "keep": {"keep": True},
    "narrow": {"narrow": True},
}
INFERENCE: dict[str, dict[str, bool]] = {
    "plain": {},
    "keep": {"keep_cells": True},
    "cell+keep": {"cell_norm": True, "keep_cells": True},
    "narrow": {"narrow": True},
}
BACKWARD: dict[str, dict[str, bool]] = {
    "plain": {},
    "cell": {"cell_norm": True},
    "narrow": {"narrow": True},
    "cell+fill": {"cell_norm": True, "fill": True},
    "later": {"later": True},
}
VARIANTS = (
    *(f"forward/{name}" for name in FORWARD),
    *(f"backward/{name}" for name in BACKWARD),
    *(f"inference/{name}" for name in INFERENCE),
    *("moments/centre", "moments/narrow", "moments/product", "moments/states", "moments/finish"),
)


class Case(NamedTuple):
    """A layer's call, as far as kernels differ by it."""

    variant: str
    batch: int
    hidden: int
    directions: int


class Launch(NamedTuple):
    """One kernel as it is launched; tensors have a dtype and a size but no memory."""

    case: Case
    kernel: Any
    grid: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    scalars: tuple[float, ...]
    constants: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The variant, or the kernel's own name where it serves them all."""
        return self.case.variant if "U" in self.constants or "BC" in self.constants else str(self.kernel.__name__)

    @property
    def mode(self) -> str:
        """Either "sequence" or "step", and "" for a kernel that has no steps."""
        if "SYNC" not in self.constants:
            return ""
        cooperates = self.constants["SYNC"] != "none" or self.constants["PROGRAMS"] == 1
        return "sequence" if cooperates else "step"


def cases(
    variants: Iterable[str], batches: Iterable[int], hiddens: Iterable[int], directions: Iterable[int]
) -> Iterator[Case]:
    """All combinations, the big ones last."""
    for hidden, batch, ways, variant in product(hiddens, batches, directions, variants):
        yield Case(variant, batch, hidden, ways)


def launches(device: Device, numbers: Numbers, case: Case) -> Iterator[Launch]:
    """What this case launches on a device: in sequence mode if that is chosen, and in the fall-back without it.

    A layout that `use_config` asks for has no fall-back. Step mode launches the same kernel for each step.
    """
    asked = explicit_backward_config() if case.variant.startswith("backward/") else explicit_config()
    for room in (True, False) if asked is None else (True,):
        noted: list[Launch] = []
        with _noting(device, numbers, case, noted, room=room):
            kernel, _, name = case.variant.partition("/")
            if kernel == "forward":
                _forward(numbers.dtype, case, **FORWARD[name])
            elif kernel == "backward":
                _backward(numbers.dtype, case, **BACKWARD[name])
            elif kernel == "inference":
                _inference(numbers.dtype, case, **INFERENCE[name])
            else:
                _moments(numbers.dtype, case, name)
        yield from noted


@contextmanager
def _noting(device: Device, numbers: Numbers, case: Case, noted: list[Launch], *, room: bool) -> Iterator[None]:
    """Within it `launch` notes what it would run on this device, where (room) the grid of sequence mode fits."""

    def run(kernel: Any, grid: Any, tensors: Any, scalars: Any, constants: Any, options: Any) -> None:
        noted.append(Launch(case, kernel, grid, tensors, scalars, constants, options))

    def programs(kernel: Any, prepared: Any, rows: Any, device: Any) -> int:
        return int(prepared.programs) if room else 0

    def device_of(_: torch.device) -> Device:
        return device

    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = numbers.tf32
    try:
        with (
            analytic_only(),  # whatever somebody has tuned on this machine
            FakeTensorMode(),
            mock.patch.multiple(launch, _run=run, resident_programs=programs, device_of=device_of),
            mock.patch.object(launch_backward, "_run", run),
        ):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def _maker(dtype: torch.dtype) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Empty tensors of a dtype, and float32 ones."""
    device = torch.device("cuda", 0)

    def states(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    return states, floats


def _rows(case: Case) -> Rows:
    first = torch.empty(STEPS + 1, dtype=torch.int64, device="cuda:0")
    count = torch.empty(STEPS, dtype=torch.int32, device="cuda:0")
    return Rows(first, count, STEPS, STEPS * case.batch, case.batch)


def _forward(
    dtype: torch.dtype,
    case: Case,
    *,
    cell_norm: bool = False,
    seats: bool = False,
    narrow: bool = False,
    keep: bool = False,
) -> None:
    states, floats = _maker(dtype)
    rows, hidden, ways = _rows(case), case.hidden, case.directions
    everything = rows.batch + rows.rows
    cell = None
    if cell_norm:
        cell = CellNorm(floats(2, ways, hidden), floats(2, ways, STEPS, hidden) if seats else None)
    launch.train(
        states(ways, everything, hidden),
        floats(ways, everything, hidden),
        states(ways, 4 * hidden, hidden),
        floats(ways, rows.rows) if narrow else states(ways, rows.rows, 4 * hidden),
        (floats(ways, STEPS, 4 * hidden), floats(ways, STEPS, 4 * hidden)),
        floats(ways, 4 * hidden),
        rows,
        1e-5,
        floats(2, ways, STEPS, 4 * hidden) if seats else None,
        floats(ways, STEPS) if seats else None,
        cell,
        states(ways, rows.rows, 4 * hidden) if keep else None,
    )


def _backward(
    dtype: torch.dtype,
    case: Case,
    *,
    cell_norm: bool = False,
    narrow: bool = False,
    fill: bool = False,
    later: bool = False,
) -> None:
    states, floats = _maker(dtype)
    rows, hidden, ways = _rows(case), case.hidden, case.directions
    x = floats(ways, rows.rows) if narrow else states(ways, rows.rows, 4 * hidden)
    table = floats(2, ways, STEPS, 4 * hidden)
    kept = launch_backward.Kept(
        states(ways, rows.rows, 4 * hidden),
        x,
        floats(ways, rows.batch + rows.rows, hidden),
        table,
        table,
        floats(2, ways, STEPS, hidden) if cell_norm else None,
    )
    given = launch_backward.Given(
        states(ways, rows.rows, hidden), states(ways, rows.batch, hidden), floats(ways, rows.batch, hidden)
    )
    d_input = None if narrow else states(ways, rows.rows, 4 * hidden)
    sums = launch_backward.Sums.empty(rows, ways, hidden, kept.c.device, column=narrow, cell=cell_norm)
    wanted = launch_backward.Wanted(states(ways, rows.rows, 4 * hidden), d_input, narrow, later, fill)
    launch_backward.backward(
        kept,
        given,
        wanted,
        states(ways, hidden, 4 * hidden),
        floats(4, ways, 4 * hidden),
        floats(2, ways, hidden) if cell_norm else None,
        floats(ways, STEPS),
        rows,
        sums,
        explicit=explicit_backward_config(),
    )


def _inference(
    dtype: torch.dtype, case: Case, *, cell_norm: bool = False, keep_cells: bool = False, narrow: bool = False
) -> None:
    states, floats = _maker(dtype)
    rows, hidden, ways = _rows(case), case.hidden, case.directions
    everything = rows.batch + rows.rows
    term = floats(ways, STEPS, 4 * hidden)
    launch.infer(
        states(ways, everything, hidden),
        floats(ways, everything if keep_cells else rows.batch, hidden),
        states(ways, 4 * hidden, hidden),
        floats(ways, rows.rows) if narrow else states(ways, rows.rows, 4 * hidden),
        (term, term, term),
        rows,
        floats(2, ways, STEPS, hidden) if cell_norm else None,
    )


def _moments(dtype: torch.dtype, case: Case, name: str) -> None:
    states, floats = _maker(dtype)
    rows, ways = _rows(case), case.directions
    if name == "product":  # of W_ih x
        launch.moments(states(ways, rows.rows, 4 * case.hidden), rows)
    elif name == "states":  # those before each step
        states_of = states(ways, rows.batch + rows.rows, case.hidden)
        launch.moments(states_of, rows, states(ways, rows.rows, case.hidden), before=True)
    elif name == "finish":
        d = states(ways, rows.rows, 4 * case.hidden)
        table = floats(ways, STEPS, 4 * case.hidden)
        launch_backward.finish(d, d, floats(ways, 4 * case.hidden), table, floats(4, ways, 4 * case.hidden), rows)
    elif name == "narrow":
        launch.moments(states(ways, rows.rows, 1), rows, floats(ways, rows.rows, 1))
    else:  # of x, here with an odd number of features
        launch.moments(states(ways, rows.rows, 13), rows, states(ways, rows.rows, 13))
