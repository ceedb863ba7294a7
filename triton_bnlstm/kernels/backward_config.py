"""How the backward kernel is laid out on a device: what a step moves is counted, and the shortest one taken.

dh_{t−1} = W_hhᵀ dz_t needs all of dz_t, 8H bytes of each row in bfloat16, and W_hhᵀ, which stays on chip where it fits.
Megabytes that all programs together exchange through L2 in a step, dz and partial sums, by how the product is divided;
U units for each of 128 programs. "n × m" is n parts of the inner extent 4H, m parts of the rows:

        B      H    U    whole    4 × 1    8 × 1   16 × 1    8 × 2    4 × 4    8 × 4    cluster    taken (H100)
       64    512    4     33.6      9.4      6.3      6.3      4.2      3.1      3.1        2.1    8 × 2
       64   1024    8     67.1     18.9     12.6     12.6      8.4      6.3      6.3        4.2    8 × 2
       64   2048   16    134.2     37.7     25.2     25.2     16.8     12.6     12.6        8.4    4 × 2
      128    512    4     67.1     18.9     12.6     12.6      8.4      6.3      6.3        4.2    8 × 4
      128   1024    8    134.2     37.7     25.2     25.2     16.8     12.6     12.6        8.4    8 × 2
      128   2048   16    268.4     75.5     50.3     50.3     33.6     25.2     25.2       16.8    2 × 4
      256    512    4    134.2     37.7     25.2     25.2     16.8     12.6     12.6        8.4    8 × 4
      256   1024    8    268.4     75.5     50.3     50.3     33.6     25.2     25.2       16.8    8 × 2
      256   2048   16    536.9    151.0    100.7    100.7     67.1     50.3     50.3       33.6    2 × 4

"whole" meets once in a step, all others twice; but each of its programs multiplies all of 4H, one product behind the
other, and was slower on an H100 even at H = 100. m parts of the rows multiply what W_hhᵀ takes on chip by m, 64 KB of a
program at H = 1024: 8 × 4 would fit nowhere there. At H = 2048 the weights are streamed in any case, m times with m
parts of the rows, yet each program has as many tiles of the batch less to walk through, which was faster there (51 us
with 4 × 4, 63 with 8 × 1, at B = 128). "cluster" is "whole" with each row of dz sent once to a cluster of 16 programs,
which Triton cannot say; with parts of the rows it is not far away.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from itertools import product

import torch

from .config import (
    MOST_REGISTERS_OF_STATE,
    MOST_TILE,
    RESIDENT_INNER,
    SPARE_SHARED,
    BackwardConfig,
    Device,
    power_of_two,
)
from .model import Step, preferred, step_seconds


def exchanged_bytes(hidden: int, batch: int, size: int, units: int, splits: int = 1, groups: int = 1) -> int:
    """Bytes that all programs together read and write of dz_t and of partial sums in one step of one direction.

    Args:
        hidden, batch: H, B.
        size: bytes of an element of dz.
        units, splits, groups: as `BackwardConfig` has them.
    """
    columns = 4 * hidden
    if splits * groups == 1:
        return -(-hidden // units) * batch * columns * size
    rows_of_product = units * splits * groups
    programs = splits * groups * -(-hidden // rows_of_product)
    read = programs * batch * columns * size // (splits * groups)
    written = programs * batch // groups * rows_of_product * 4
    return read + written + splits * batch * hidden * 4


def backward_seconds(
    device: Device, layout: BackwardConfig, hidden: int, batch: int, directions: int, size: int, *, matrix: bool
) -> float:
    """Modelled time of a step: what it exchanges and streams, its meetings, its products and its gates.

    Args:
        device, layout: where and how.
        hidden, batch, directions: H, B, 1 or 2.
        size: bytes of an element.
        matrix: products run on matrix units.
    """
    programs = layout.programs(hidden)
    tiles = math.ceil(batch / layout.batch_tile)
    # a tile of the divided product has a part of the rows
    passes = math.ceil(batch / layout.groups / layout.product_tile(batch)) if layout.divided else tiles
    extent = 4 * hidden / layout.splits
    moved = exchanged_bytes(hidden, batch, size, layout.units, layout.splits, layout.groups) / programs
    if not layout.resident:
        moved += passes * layout.product_rows * extent * size
    step = Step(
        "backward",
        directions * programs,
        0 if programs == 1 and layout.sequence else 1 + layout.divided,
        moved,
        passes * math.ceil(extent / layout.inner),
        max(16, layout.product_rows) * extent * batch / layout.groups,
        layout.units * batch,
        tiles,
    )
    return step_seconds(device, layout, step, matrix=matrix)


def bytes_around_the_loop(hidden: int, columns: int, size: int, *, save: str) -> int:
    """Bytes of device memory that the backward of one row moves besides what its step exchanges.

    In the loop deviations, W_ih x, both gradients, two cell states and the output's gradient; behind it the products
    for W_hh, W_ih and x, states and inputs less their mean; and before it, with save="recompute", W_hh h again.

    Args:
        hidden, columns: H, D.
        size: bytes of an element.
        save: as `BNLSTM` has it.
    """
    loop = 16 * hidden * size + 8 * hidden + hidden * size
    centred = 3 * (hidden + columns) * size  # read, written, read by the product
    products = 12 * hidden * size + columns * size
    again = 5 * hidden * size if save == "recompute" else 0
    return loop + centred + products + again


@lru_cache(maxsize=4096)  # each call of an untuned layer asks, and looking at all divisions takes most of a millisecond
def default_backward_config(
    device: Device, hidden: int, batch: int, directions: int, dtype: torch.dtype, precision: str, *, steps: int
) -> BackwardConfig:
    """The layout for a case that nobody has tuned: of those that fit, the one whose step is modelled to be shortest.

    Args:
        device: its numbers.
        hidden, batch, directions, steps: H, B, 1 or 2, T.
        dtype, precision: of the products; "ieee" or "tf32" for float32.
    """
    seats = max(power_of_two(batch), 16)
    if device.backend == "cpu":  # programs of the interpreter run one after another, so they cannot meet
        units = min(max(power_of_two(hidden), 4), 64)
        inner = min(max(power_of_two(4 * hidden), 16), 256)
        return BackwardConfig(units >= hidden, units, min(seats, 64), inner, False, 4, 1)
    matrix = device.multiplies(dtype, precision)
    fitting = []
    for units, splits, groups in product((4, 8, 16, 32), (1, 2, 4, 8, 16), (1, 2, 4)):
        if units > 8 and units >= 2 * hidden:
            continue
        rows_of_product = units * splits * groups
        if rows_of_product > (128 if matrix else 64) or (splits * groups > 1 and rows_of_product < 16):
            continue
        if groups > 1 and 16 * groups > seats:
            continue
        for sequence in (True, False):
            layout = laid_out(device, hidden, batch, dtype, matrix, units, splits, groups, sequence=sequence)
            programs = layout.programs(hidden)
            if sequence and not device.may_meet(directions * programs, alone=programs == 1, steps=steps):
                continue
            seconds = backward_seconds(device, layout, hidden, batch, directions, dtype.itemsize, matrix=matrix)
            fitting.append((preferred(layout, seconds, 1 + layout.divided), -units, splits * groups, layout))
    return min(fitting, key=lambda found: found[:-1])[-1]


def laid_out(
    device: Device,
    hidden: int,
    batch: int,
    dtype: torch.dtype,
    matrix: bool,
    units: int,
    splits: int,
    groups: int,
    *,
    sequence: bool,
) -> BackwardConfig:
    """Tiles, pipeline and warps for this division of the work."""
    size = dtype.itemsize
    seats = max(power_of_two(batch), 16)
    most = MOST_TILE // 2 if matrix and size == 2 else MOST_TILE // 4
    tile = max(16, min(seats, most // (4 * units), 128))
    layout = BackwardConfig(sequence, units, tile, 16, False, 4, 1, splits, groups)
    rows_of_product, columns = layout.product_rows, layout.product_tile(batch)
    elements = max(4 * units * tile, rows_of_product * columns // 2)
    grouped = matrix and device.multiplies_in_groups(rows_of_product)
    blackwell = device.capability >= 100
    # Four warps alone with 128 rows hold as much of them again, a slice on its way to shared memory above all. On B200
    # one thread starts a whole product: there eight warps may hold less of 64 rows too, but spill where gates are few.
    several = 4 * units * tile >= MOST_TILE // 4 if grouped and blackwell else rows_of_product >= 128
    warps = 8 if elements >= MOST_TILE // 2 or (matrix and several and device.backend == "cuda") else 4
    room = device.shared_per_program - SPARE_SHARED
    extent = -(-4 * hidden // (splits * RESIDENT_INNER)) * RESIDENT_INNER
    if sequence and matrix and (rows_of_product + columns) * extent * size <= room:
        state = columns * extent * size // (4 * device.warp * warps)  # registers of a thread
        # two groups of four warps that share 64 rows divide the columns, and take twice the instructions and registers
        shared = grouped and not blackwell and rows_of_product < 16 * warps
        # B200's products, of 32 bytes of the inner extent each, keep addresses in registers, beside a thread's gates
        gates = 4 * units * tile // (device.warp * warps)
        crowded = grouped and blackwell and gates * (extent * size // 32) > 128
        if state <= MOST_REGISTERS_OF_STATE // 2 and not shared and not crowded:
            return replace(layout, inner=RESIDENT_INNER, resident=True, warps=warps)
    inner = 128 // size if matrix else 16
    # what a step was forward waits for the product: beside it a deeper pipeline is unrolled until its addresses spill
    deepest = (4 if layout.divided else 2) if matrix else 1
    stages = max(1, min(deepest, room // ((rows_of_product + columns) * inner * size)))
    return replace(layout, inner=inner, warps=warps, stages=stages)
