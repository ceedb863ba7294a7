"""From a layer's call to the implementation that runs it."""

from __future__ import annotations

import importlib
import warnings

from torch.autograd import forward_ad

from . import bptt
from .backend import requested_backend, why_no_kernels
from .distributed import NO_KERNELS
from .kernels.config import explicit_config
from .kernels.errors import KernelError
from .reference import Call, Ran
from .tuning.mode import requested_autotune

# What auto takes the kernels for: the interpreter is for those who ask for it.
KERNEL_DEVICES = ("cuda",)

_told: set[str] = set()
_failed: set[tuple[object, ...]] = set()


def _tell_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def _tell(message: str) -> None:
    _tell_once(f"triton_bnlstm: {message}")


def _why_not_these(calls: list[Call]) -> str | None:
    """What these calls ask for that no kernel gives."""
    if getattr(forward_ad, "_current_level", -1) < 0:
        return None
    inputs = [s for c in calls for s in (c.x, c.h, c.c, *c.parameters) if s is not None]
    if any(forward_ad.unpack_dual(s).tangent is not None for s in inputs):
        return "the kernels have no forward-mode derivatives"
    return None


def _case(calls: list[Call]) -> tuple[object, ...]:
    """What a failure of a kernel is a failure for."""
    p, problem = calls[0].parameters, calls[0].problem
    shapes = (p.weight_ih.shape, p.weight_hh.shape, problem.packing.batch, len(calls))
    return p.weight_hh.device, p.weight_hh.dtype, *shapes, p.gamma_c is None, problem.frozen, problem.population is None


def run(calls: list[Call], backend: str | None, save: str = "preactivations", autotune: str | None = None) -> list[Ran]:
    """All directions of one layer on the backend that is asked for; they share device, dtype and packing.

    save: what kernels keep for their backward; autotune: whether their layouts may be measured; see `BNLSTM`.

    Raises:
        RuntimeError: backend="triton", and the kernels cannot run this.
    """
    requested, tuning = requested_backend(backend), requested_autotune(autotune)
    weight = calls[0].parameters.weight_hh
    if requested != "reference":
        wanted = requested == "triton" or weight.device.type in KERNEL_DEVICES
        reason = None
        if wanted and calls[0].problem.ranks is not None:
            reason = NO_KERNELS
        elif wanted:
            reason = why_no_kernels(weight.device, weight.dtype) or _why_not_these(calls)
        if reason is not None and requested == "triton":
            raise RuntimeError(f'backend="triton": {reason}')
        if reason is not None:
            _tell_once(f"triton_bnlstm runs on the reference path: {reason}")
        elif wanted:
            case = _case(calls)
            if requested == "triton" or case not in _failed:
                only_kernels = requested == "triton"
                fused = importlib.import_module("triton_bnlstm.fused")

                def failed(error: KernelError) -> None:
                    _failed.add(case)
                    _tell_once(f"triton_bnlstm runs on the reference path: a kernel could not run here ({error})")

                try:
                    options = fused.Options(save, only_kernels, _tell, failed, tuning)
                    return list(fused.layer(calls, options))
                except KernelError as error:
                    if only_kernels or explicit_config() is not None:
                        raise
                    failed(error)
    return [bptt.layer(call) for call in calls]
