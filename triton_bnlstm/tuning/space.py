"""Layouts that tuning may choose: the analytic one, those worth trying beside it, and why some cannot run on a device.

Only what is certain before a kernel is compiled rules a layout out here. What the compiler makes of it (shared memory,
registers, and so how many programs are resident) is asked of the compiled kernel, before it is ever launched.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from ..kernels import backward_config, forward_config
from ..kernels.backward_config import default_backward_config
from ..kernels.config import (
    BackwardConfig,
    Config,
    Device,
    MomentsConfig,
    SaveConfig,
    default_moments_config,
    power_of_two,
)
from ..kernels.forward_config import default_config
from ..kernels.model import forward_seconds
from .work import LAYOUTS, Layout, Work

# Divisions of the backward's product, (splits, groups), worth trying beside the one that the model prefers.
DIVISIONS = ((1, 1), (4, 1), (8, 1), (16, 1), (4, 2), (8, 2), (4, 4))
# Elements of a tile, and of a product's operands, beyond which a compiler takes minutes or gives up.
_MOST_ELEMENTS = 16384
# A deeper pipeline hides nothing more, and is unrolled so often that it compiles for minutes.
_MOST_STAGES = 8
_MANY_STEPS = 64
# The backward has some eighty; those that the model puts far behind are not worth compiling.
_MOST_STRUCTURES = 24


def analytic(device: Device, work: Work, steps: int = _MANY_STEPS) -> Layout:
    """The layout for work that nobody has tuned, from the device's numbers and the model of a step."""
    if work.kernel == "moments":
        return default_moments_config(work.columns)
    if work.kernel == "save":
        return SaveConfig(recompute=False)  # faster wherever memory suffices, until somebody measures otherwise
    what = (device, work.hidden, work.batch, work.directions, work.dtype, work.precision)
    if work.kernel == "backward":
        return default_backward_config(*what, steps=steps)
    return default_config(*what, split_batch=work.kernel == "inference", steps=steps)


def programs(work: Work, layout: Config) -> int:
    """Of a launch."""
    if isinstance(layout, BackwardConfig):
        return work.directions * layout.programs(work.hidden)
    tiles = -(-work.batch // layout.batch_tile) if work.kernel == "inference" else 1
    return work.directions * tiles * -(-work.hidden // layout.units)


def _product_tile(work: Work, layout: Config) -> int:
    """Rows of the batch in a tile of the product."""
    if isinstance(layout, BackwardConfig) and layout.divided:
        return layout.product_tile(work.batch)
    return layout.batch_tile


def resident_bytes(work: Work, layout: Config) -> int:
    """Of W_hh, that a program keeps through all steps."""
    if not layout.resident:
        return 0
    extent = work.hidden
    if isinstance(layout, BackwardConfig):
        extent = math.ceil(4 * work.hidden / layout.splits)
    return layout.product_rows * extent * work.dtype.itemsize


def why_not(device: Device, work: Work, layout: Layout) -> str | None:
    """Why a layout cannot run, as far as that is known before it is compiled."""
    if type(layout) is not LAYOUTS[work.kernel]:
        return f"a {type(layout).__name__} is no layout of {work.kernel}"
    if isinstance(layout, SaveConfig):
        return None
    if layout.warps * device.warp > 1024:
        return f"{layout.warps} warps are more than a program can have"
    if isinstance(layout, MomentsConfig):
        return None if layout.rows * layout.columns <= _MOST_ELEMENTS else "a tile of that size does not fit"
    assert isinstance(layout, Config)
    if layout.stages > _MOST_STAGES:
        return f"a pipeline of {layout.stages} stages is deeper than any that pays"
    if 4 * layout.units * layout.batch_tile > _MOST_ELEMENTS or layout.product_rows * layout.inner > 2 * _MOST_ELEMENTS:
        return "a tile of that size does not fit into registers"
    if device.backend != "cpu" and not device.multiplies(work.dtype, work.precision):
        # such products are unrolled to single multiply-adds, whose operands all come from registers
        if layout.resident:
            return "nothing stays on chip without a matrix unit"
        if layout.inner > 16 or layout.product_rows > 64:
            return "a product of that size needs a matrix unit"
    if layout.resident and not layout.sequence and device.backend != "cpu":
        return "nothing stays on chip from one launch to the next"
    if isinstance(layout, BackwardConfig) and layout.divided:
        if layout.product_rows < 16:
            return "a product has 16 rows or more"
        if layout.groups > 1 and 16 * layout.groups > max(power_of_two(work.batch), 16):
            return f"{layout.groups} parts of the rows, where {work.batch} rows are less than 16 for each"
    if layout.sequence:
        if device.backend == "hip":
            return "sequence mode is written for CUDA devices"
        if device.backend == "cuda" and device.capability < 70:
            return "sequence mode needs compute capability 7.0"
        there = programs(work, layout)
        together = device.resident_programs(0, 1, layout.warps)
        alone = layout.units >= work.hidden and not (isinstance(layout, BackwardConfig) and layout.divided)
        if there > together and not alone:
            return f"{there} programs have to run at the same time, and {together} can at most"
    if not layout.resident and device.backend != "cpu":
        # one stage at least is on its way through registers
        rows = layout.product_rows + _product_tile(work, layout)
        waiting = (layout.stages - 1) * rows * layout.inner * work.dtype.itemsize
        if waiting > device.shared_per_program:
            return f"{waiting} bytes of the pipeline, where shared memory has {device.shared_per_program}"
    held = resident_bytes(work, layout)
    chip = device.shared_per_program + 4 * device.registers_per_multiprocessor
    if held > chip:
        return f"{held} bytes of W_hh stay on chip, where shared memory and registers have {chip}"
    return None


def modelled_seconds(device: Device, work: Work, layout: Config) -> float:
    """Modelled time of a step of the recurrence (`kernels.model`); good for an order, not for a promise."""
    matrix = device.multiplies(work.dtype, work.precision)
    what = (work.hidden, work.batch, work.directions, work.dtype.itemsize)
    if isinstance(layout, BackwardConfig):
        return backward_config.backward_seconds(device, layout, *what, matrix=matrix)
    return forward_seconds(device, layout, *what, matrix=matrix, split_batch=work.kernel == "inference")


def neighbours(layout: Layout) -> Iterator[Layout]:
    """Layouts that differ from this one in one decision, the most promising first."""
    changes: list[dict[str, Any]]
    if isinstance(layout, SaveConfig):
        return
    if isinstance(layout, MomentsConfig):
        changes = [{name: f(getattr(layout, name))} for name in ("columns", "rows") for f in (_half, _twice)]
        changes += [{"warps": 8 if layout.warps == 4 else 4}]
    else:
        assert isinstance(layout, Config)
        changes = [{"units": 2 * layout.units}, {"units": layout.units // 2}]
        if isinstance(layout, BackwardConfig):
            changes += [{"splits": s, "groups": g} for s, g in DIVISIONS]
            changes += [{"units": 2 * layout.units, "splits": s, "groups": g} for s, g in DIVISIONS]
        changes += [{"warps": 8 if layout.warps == 4 else 4}, {"inner": 2 * layout.inner}]
        changes += [{"inner": layout.inner // 2}]
        changes += [{"resident": not layout.resident, "stages": 1 if not layout.resident else 3}]
        changes += [{"stages": layout.stages + 1}, {"stages": layout.stages - 1}] if not layout.resident else []
        changes += [{"batch_tile": layout.batch_tile // 2}]
    yield from _changed(layout, changes)


def _half(value: int) -> int:
    return value // 2


def _twice(value: int) -> int:
    return 2 * value


def _changed(layout: Layout, changes: Iterable[dict[str, Any]]) -> Iterator[Layout]:
    seen = {layout}
    for change in changes:
        try:
            changed = replace(layout, **change)
        except ValueError:
            continue  # below the least
        if changed not in seen:
            seen.add(changed)
            yield changed


def structures(device: Device, work: Work) -> list[Layout]:
    """Layouts that divide the work differently, the analytic one first, then by their modelled time.

    Mode, units of a program, residence of W_hh and the backward's division are free; tiles, pipeline and warps are
    what the analytic choice takes for these. `neighbours` vary them afterwards.
    """
    default = analytic(device, work)
    if isinstance(default, SaveConfig):
        return [default, SaveConfig(recompute=True)]
    if isinstance(default, MomentsConfig):
        tiles = (MomentsConfig(rows, columns, warps) for columns in (16, 32, 64, 128) for rows, warps in _ROWS)
        wide = max(16, power_of_two(work.columns))
        return [default, *(t for t in tiles if t != default and t.columns <= wide and why_not(device, work, t) is None)]
    assert isinstance(default, Config)
    matrix = device.multiplies(work.dtype, work.precision)
    found: dict[Config, float] = {}
    for sequence, units in product((True, False), (4, 8, 16, 32)):
        if units > 8 and units >= 2 * work.hidden:
            continue
        for layout in _of_units(device, work, matrix, units, sequence=sequence):
            if layout != default and why_not(device, work, layout) is None:
                found[layout] = modelled_seconds(device, work, layout)
    return [default, *sorted(found, key=lambda layout: found[layout])[:_MOST_STRUCTURES]]


_ROWS = ((32, 4), (64, 4), (64, 8), (128, 8))


def _of_units(device: Device, work: Work, matrix: bool, units: int, *, sequence: bool) -> Iterator[Config]:
    what = (device, work.hidden, work.batch, work.dtype, matrix, units)
    if work.kernel != "backward":
        split = work.kernel == "inference"
        for tile in forward_config.tiles(units, device, work.batch, work.dtype, matrix, split):
            layout = forward_config.laid_out(*what, tile, split_batch=split, sequence=sequence)
            yield layout
            if layout.resident:  # the same, streamed
                yield replace(layout, resident=False, stages=2)
        return
    seats = max(power_of_two(work.batch), 16)
    for splits, groups in product((1, 2, 4, 8, 16), (1, 2, 4)):
        rows_of_product = units * splits * groups
        if rows_of_product > (128 if matrix else 64) or (splits * groups > 1 and rows_of_product < 16):
            continue
        if groups > 1 and 16 * groups > seats:
            continue
        yield backward_config.laid_out(*what, splits, groups, sequence=sequence)
