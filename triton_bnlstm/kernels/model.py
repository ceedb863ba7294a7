"""What a time step of the recurrence takes on a GPU, modelled from what one program does in it.

    seconds = meetings · (a meeting or a launch) + max(bytes through L2, chain of products) + gates and norms
              + what the kernel does besides, having more than four warps, and each further tile of the batch

`RATES` are a least-squares fit, of logarithms, to the medians of 100 layouts that tuning measured on an H100 (80GB
HBM3, torch 2.11, Triton 3.6, bfloat16; H = 100, 128, 512, 1024, 2000 with B = 64, 100, 128, all three kernels), by
`python -m bench.fit_model`. They meet these within 12 % root mean square (tests/test_model.py holds them to it), and
without one of these H in the fit that one's within 14, 23, 18, 13 and 21 % (`--held-out`). So an order among layouts of
one device is what the model is for; for other devices it takes the rates of a multiprocessor to be the same, which
nobody has measured. A meeting of 1.6 us is not the barrier alone, 0.9 us on that device: what was written
before it has to arrive, and what is read behind it starts cold.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .config import Config, Device

# Without matrix units products are single multiply-adds: 64 a clock of one multiprocessor of a T4 or an A100, at most.
_PRODUCTS_PER_SECOND_WITHOUT = 1e11
# Of the host, for one launch that no graph replays: text8's training step took 48.3 ms for 540 of them, on the machine
# above.
_HOST = 89e-6


class Rates(NamedTuple):
    """Of one multiprocessor, in microseconds where nothing else is said.

    Attributes:
        meeting, launch: of all programs, between two steps; in the backward, between the halves of one, too.
        l2: bytes through L2 in a microsecond.
        resident, streamed: one product of `Config.inner` elements behind another, where W_hh stays on chip, and where
            it is streamed two stages deep.
        many_warps: what more than four warps cost.
        tile: what another tile of the batch costs besides its products.
        forward, inference, backward: what is left of a step.
        forward_unit, inference_unit, backward_unit: gates and norms of one unit and row, in nanoseconds.
    """

    meeting: float
    launch: float
    l2: float
    resident: float
    streamed: float
    many_warps: float
    tile: float
    forward: float
    inference: float
    backward: float
    forward_unit: float
    inference_unit: float
    backward_unit: float


RATES = Rates(
    meeting=1.59,
    launch=1.93,
    l2=43_200.0,
    resident=0.151,
    streamed=0.427,
    many_warps=0.359,
    tile=2.18,
    forward=0.814,
    inference=0.0,
    backward=1.09,
    forward_unit=0.991,
    inference_unit=0.354,
    backward_unit=6.01,
)


class Step(NamedTuple):
    """What one program does in a step.

    Attributes:
        kernel: "forward", "inference" or "backward".
        programs: of the launch, all directions together.
        meetings: with all others, or launches, where a step is one.
        moved: bytes through L2.
        products: of `Config.inner` elements each, one behind the other.
        multiplied: multiply-adds.
        units: units times rows whose gates and norms it makes.
        tiles: of the batch, one behind the other.
    """

    kernel: str
    programs: int
    meetings: int
    moved: float
    products: int
    multiplied: float
    units: int
    tiles: int


def step_seconds(device: Device, layout: Config, step: Step, *, matrix: bool) -> float:
    """Modelled time of a step. matrix: products run on matrix units."""
    r = RATES
    crowd = math.ceil(step.programs / device.multiprocessors)  # programs that share a multiprocessor
    if matrix:
        chain = step.products * (r.resident if layout.resident else r.streamed / max(layout.stages - 1, 2 / 3))
    else:
        chain = 1e6 * step.multiplied * crowd / _PRODUCTS_PER_SECOND_WITHOUT
    microseconds = (
        step.meetings * (r.meeting if layout.sequence else r.launch)
        + max(step.moved * crowd / r.l2, chain)
        + getattr(r, step.kernel)
        + 1e-3 * step.units * crowd * getattr(r, f"{step.kernel}_unit")
        + (r.many_warps if layout.warps > 4 else 0.0)
        + (step.tiles - 1) * r.tile
    )
    return 1e-6 * microseconds


def forward_seconds(
    device: Device,
    layout: Config,
    hidden: int,
    batch: int,
    directions: int,
    size: int,
    *,
    matrix: bool,
    split_batch: bool,
) -> float:
    """Modelled time of a step of the forward kernel, or (split_batch) of inference.

    Each program reads all of its rows' state, and its part of W_hh for each tile of them where that does not stay.

    Args:
        device, layout: where and how.
        hidden, batch, directions: H, B, 1 or 2.
        size: bytes of an element.
        matrix: products run on matrix units.
        split_batch: tiles of the batch are programs of their own.
    """
    rows = min(batch, layout.batch_tile) if split_batch else batch
    tiles = math.ceil(rows / layout.batch_tile)
    ways = math.ceil(hidden / layout.units)  # programs that meet
    moved = rows * hidden * size + (0 if layout.resident else tiles * layout.product_rows * hidden * size)
    step = Step(
        "inference" if split_batch else "forward",
        directions * math.ceil(batch / rows) * ways,
        int(ways > 1 or not layout.sequence),
        moved,
        tiles * math.ceil(hidden / layout.inner),
        layout.product_rows * rows * hidden,
        layout.units * rows,
        tiles,
    )
    return step_seconds(device, layout, step, matrix=matrix)


def preferred(layout: Config, seconds: float, launches: int = 1) -> float:
    """What a choice without measuring goes by: the modelled time of a step, in sequence mode.

    Step mode takes that from a graph, and the host's time without one. Nobody knows which it will be, so it counts with
    the geometric mean: it is chosen where a graph gains more than its absence loses.

    Args:
        layout: which.
        seconds: of a step.
        launches: in a step of step mode.
    """
    return seconds if layout.sequence else math.sqrt(seconds * max(seconds, launches * _HOST))
