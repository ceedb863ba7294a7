"""How the forward kernels are laid out on a device, chosen from the device's own numbers."""

from __future__ import annotations

from functools import lru_cache

import torch

from .config import (
    MOST_REGISTERS_OF_STATE,
    MOST_TILE,
    RESIDENT_INNER,
    SPARE_SHARED,
    Config,
    Device,
    power_of_two,
)
from .model import forward_seconds, preferred


@lru_cache(maxsize=4096)  # each call of an untuned layer asks
def default_config(
    device: Device,
    hidden: int,
    batch: int,
    directions: int,
    dtype: torch.dtype,
    precision: str,
    *,
    split_batch: bool,
    steps: int,
) -> Config:
    """The layout for a case that nobody has tuned, from the device's numbers alone.

    Of those in which every program has a multiprocessor to itself, or that launch step by step, the one whose step is
    modelled to be shortest.

    Args:
        device: its numbers.
        hidden, batch, directions, steps: H, B, 1 or 2, T.
        dtype, precision: of the products; "ieee" or "tf32" for float32.
        split_batch: tiles of the batch are programs of their own (inference) instead of being walked.
    """
    whole = max(power_of_two(hidden), 16)  # all of the inner extent, as one product has it
    seats = max(power_of_two(batch), 16)
    if device.backend == "cpu":  # programs of the interpreter run one after another, so they cannot meet
        units = min(max(power_of_two(hidden), 4), 64)
        return Config(units >= hidden, units, min(seats, 64), whole, False, 4, 1)

    matrix = device.multiplies(dtype, precision)

    fitting = []
    # code without matrix units is long enough at 16
    for units in (4, 8, 16, 32) if matrix else (4, 8, 16):
        if units > 8 and units >= 2 * hidden:
            continue
        for tile in tiles(units, device, batch, dtype, matrix, split_batch):
            for sequence in (True, False):
                what = (device, hidden, batch, dtype, matrix, units, tile)
                layout = laid_out(*what, split_batch=split_batch, sequence=sequence)
                programs = directions * -(-hidden // units) * (-(-batch // tile) if split_batch else 1)
                if sequence and not device.may_meet(programs, alone=units >= hidden, steps=steps):
                    continue
                seconds = forward_seconds(
                    *(device, layout, hidden, batch, directions, dtype.itemsize), matrix=matrix, split_batch=split_batch
                )
                fitting.append((preferred(layout, seconds), -units, -tile, layout))
    return min(fitting, key=lambda found: found[:-1])[-1]


def tiles(
    units: int, device: Device, batch: int, dtype: torch.dtype, matrix: bool, split_batch: bool
) -> tuple[int, ...]:
    """Rows that a tile may have beside so many units: as many as registers allow; in inference also half of them."""
    most = _tile_beside(units, device, batch, dtype, matrix, split_batch)
    return (most, most // 2) if split_batch and most > 16 else (most,)


def _tile_beside(units: int, device: Device, batch: int, dtype: torch.dtype, matrix: bool, split_batch: bool) -> int:
    """Rows of a tile with so many units."""
    seats = max(power_of_two(batch), 16)
    most = MOST_TILE if matrix and dtype.itemsize == 2 else MOST_TILE // 2
    if device.backend == "hip":
        most = MOST_TILE // 4
    tile = min(seats, most // (4 * units), 64 if split_batch else 128)
    if tile < batch and not split_batch:  # walked: what is carried from tile to tile needs registers too
        tile = min(tile, MOST_TILE // 2 // (4 * units))
    return max(tile, 16)


def laid_out(
    device: Device,
    hidden: int,
    batch: int,
    dtype: torch.dtype,
    matrix: bool,
    units: int,
    tile: int,
    *,
    split_batch: bool,
    sequence: bool,
) -> Config:
    """Pipeline and warps for so many units of a program and rows of a tile, in this mode.

    W_hh stays on chip where a program's slice of it and one whole tile of the state fit beside each other.
    """
    whole = max(power_of_two(hidden), 16)
    size = dtype.itemsize
    walked = tile < batch and not split_batch
    elements = 4 * units * tile
    # four warps wait for each other less: of those that hold a tile without spilling, they were faster on an H100
    few = size == 2 and matrix and tile < 128 and not walked
    warps = 8 if elements >= (MOST_TILE if few else MOST_TILE // 2) or units > 8 else 4

    room = device.shared_per_program - SPARE_SHARED
    stays = (4 * units + tile) * whole * size <= room and (split_batch or tile >= batch)
    if sequence and matrix and stays and not device.multiplies_in_groups(4 * units):
        # all loads of a step's state are on their way at once, through registers
        state = tile * whole * size // (4 * device.warp)  # of all warps' threads together
        if state <= (8 if elements < MOST_TILE else 4) * MOST_REGISTERS_OF_STATE:
            return Config(True, units, tile, min(whole, RESIDENT_INNER), True, warps, 1)
    inner = min(whole, 128 // size) if matrix else 16
    # beside the largest tile, or where the batch is walked, a deeper pipeline is unrolled until its addresses spill
    crowded = elements >= MOST_TILE or walked
    deepest = (2 if crowded else 4) if matrix else 1
    stages = max(1, min(deepest, room // ((4 * units + tile) * inner * size)))
    return Config(sequence, units, tile, inner, False, warps, stages)
