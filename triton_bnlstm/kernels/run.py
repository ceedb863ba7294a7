"""One launch, and what may go wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import triton
from torch import Tensor

from .errors import KernelError
from .forward import forward_kernel


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: TRITON_INTERPRET=1 when they were imported."""
    return not isinstance(forward_kernel, triton.runtime.JITFunction)


@contextmanager
def as_kernel_error(kernel: Any) -> Iterator[None]:
    """What Triton raises when it compiles or loads a kernel → KernelError."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        # A launch also reports what an earlier kernel did wrong; that is not for another backend to try again.
        if any(word in str(error) for word in FATAL):
            raise
        text = str(error).strip().splitlines()
        raise KernelError(f"{kernel.__name__}: {type(error).__name__}: {text[0] if text else ''}") from error


# What makes a device useless until the process ends, and a lack of memory, which another path would only share.
FATAL = (
    *("illegal memory access", "illegal instruction", "illegal address", "invalid program counter"),
    *("device-side assert", "unspecified launch failure", "misaligned address", "hardware stack error"),
    *("launch timed out", "out of memory", "uncorrectable"),
)


def quiet() -> AbstractContextManager[Any]:
    """Rows and columns that do not exist are computed too, then thrown away: NumPy would warn of what comes of them."""
    if not interpreted():
        return nullcontext()
    import numpy

    return numpy.errstate(all="ignore")


_only_loaded: ContextVar[bool] = ContextVar("triton_bnlstm_only_loaded", default=False)


@contextmanager
def only_loaded() -> Iterator[None]:
    """Within it, and in its thread, what would be launched is compiled and loaded, and not launched."""
    token = _only_loaded.set(True)
    try:
        yield
    finally:
        _only_loaded.reset(token)


def loaded(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[Tensor, ...],
    scalars: tuple[float, ...],
    constants: dict[str, Any],
    options: dict[str, Any],
) -> Any:
    """The compiled kernel of a launch, which is not launched.

    Raises:
        KernelError: it does not compile, or needs more than the device has.
    """
    with as_kernel_error(kernel), torch.cuda.device(tensors[0].device):
        made = kernel.warmup(*tensors, *scalars, **constants, **options, enable_fp_fusion=True, grid=grid)
        made._init_handles()
    return made


def run(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[Tensor, ...],
    scalars: tuple[float, ...],
    constants: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """One launch, on the tensors' device and its current stream."""
    if _only_loaded.get():
        if not interpreted():
            loaded(kernel, grid, tensors, scalars, constants, options)
        return
    on_device = torch.cuda.device(tensors[0].device) if tensors[0].device.type == "cuda" else nullcontext()
    with as_kernel_error(kernel), on_device, quiet():
        # fusion said explicitly: Triton's default is about to change
        kernel[grid](*tensors, *scalars, **constants, **options, enable_fp_fusion=True)
