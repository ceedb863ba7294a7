"""The layouts that tuning tries beside a case's default, and why some of them cannot run on a device.

Only what is certain before a kernel is compiled keeps it from being compiled: shared memory and registers that the
compiler makes more of than is there are told of the compiled kernel, and so are spills.
"""

from __future__ import annotations

from collections.abc import Iterator

from triton_bnlstm.kernels.backward_config import default_backward_config
from triton_bnlstm.kernels.config import Config, Device
from triton_bnlstm.kernels.forward_config import default_config
from triton_bnlstm.tuning import Work, space

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
    for layout in space.neighbours(default) if default is not None else ():
        assert isinstance(layout, Config)
        yield layout, why_not(device, numbers, case, layout)


def work_of(device: Device, numbers: Numbers, case: Case) -> Work:
    """What a case's kernel does, as tuning has it."""
    kernel = case.variant.partition("/")[0]
    rounding = precision(device, numbers)
    return Work(kernel, case.hidden, case.batch, case.directions, numbers.dtype, rounding)


def why_not(device: Device, numbers: Numbers, case: Case, layout: Config) -> str | None:
    """Why a layout cannot run, as far as that is known before it is compiled."""
    return space.why_not(device, work_of(device, numbers, case), layout)
