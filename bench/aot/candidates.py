"""The layouts that tuning tries beside a case's default, and why some of them cannot run on a device.

Only what is certain before a kernel is compiled keeps it from being compiled: shared memory and registers that the
compiler makes more of than is there are told of the compiled kernel, and so are spills.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from bench.layouts import neighbours
from triton_bnlstm.kernels.backward_config import default_backward_config
from triton_bnlstm.kernels.config import BackwardConfig, Config, Device, default_config

from .cases import STEPS, Case
from .targets import Numbers


def precision(device: Device, numbers: Numbers) -> str:
    """Of products, as the launching code has it."""
    return "tf32" if numbers.tf32 and device.backend == "cuda" and device.capability >= 80 else "ieee"


def default_layout(device: Device, numbers: Numbers, case: Case) -> Config | None:
    """The layout that a case gets if all its programs fit at the same time; None for kernels without a layout."""
    kernel = case.variant.partition("/")[0]
    what = (device, case.hidden, case.batch, case.directions, numbers.dtype, precision(device, numbers))
    if kernel == "backward":
        return default_backward_config(*what, steps=STEPS)
    if kernel in ("forward", "inference"):
        return default_config(*what, split_batch=kernel == "inference", steps=STEPS)
    return None


def candidates(device: Device, numbers: Numbers, case: Case) -> Iterator[tuple[Config, str | None]]:
    """Layouts beside the default one, and for each why it cannot run; None where that is not known yet."""
    default = default_layout(device, numbers, case)
    for layout in neighbours(default) if default is not None else ():
        yield layout, why_not(device, numbers, case, layout)


def programs(case: Case, layout: Config) -> int:
    """Of a launch."""
    if isinstance(layout, BackwardConfig):
        return case.directions * layout.programs(case.hidden)
    tiles = -(-case.batch // layout.batch_tile) if case.variant.startswith("inference/") else 1
    return case.directions * tiles * -(-case.hidden // layout.units)


def why_not(device: Device, numbers: Numbers, case: Case, layout: Config) -> str | None:
    """Why a layout cannot run, as far as that is known before it is compiled."""
    if not device.multiplies(numbers.dtype, precision(device, numbers)):
        # such products are unrolled to single multiply-adds, whose operands all come from registers
        if layout.resident:
            return "nothing stays on chip without a matrix unit"
        if layout.inner > 16 or layout.product_rows > 64:
            return "a product of that size needs a matrix unit"
    if layout.sequence:
        there = programs(case, layout)
        together = device.resident_programs(0, 1, layout.warps)
        if there > together and there > case.directions:
            return f"{there} programs have to run at the same time, and {together} can at most"
    held = resident_bytes(numbers, case, layout)
    chip = device.shared_per_program + 4 * device.registers_per_multiprocessor
    if held > chip:
        return f"{held} bytes of W_hh stay on chip, where shared memory and registers have {chip}"
    return None


def resident_bytes(numbers: Numbers, case: Case, layout: Config) -> int:
    """Of W_hh, that a program keeps through all steps."""
    if not layout.resident:
        return 0
    extent = case.hidden
    if isinstance(layout, BackwardConfig):
        extent = math.ceil(4 * case.hidden / layout.splits)
    return layout.product_rows * extent * numbers.dtype.itemsize
