"""From a layer's call to the implementation that runs it."""

from __future__ import annotations

import importlib
import warnings

from . import bptt
from .backend import requested_backend, why_no_kernels
from .kernels.config import explicit_config
from .kernels.errors import KernelError
from .reference import Call, Ran

# What auto takes the kernels for: the interpreter is for those who ask for it.
KERNEL_DEVICES = ("cuda",)

_told: set[str] = set()
_failed: set[tuple[object, ...]] = set()


def _tell_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def run(calls: list[Call], backend: str | None) -> list[Ran]:
    """All directions of one layer on the backend that is asked for; they share device, dtype and packing.

    Raises:
        RuntimeError: backend="triton", and the kernels cannot run this.
    """
    requested = requested_backend(backend)
    weight = calls[0].parameters.weight_hh
    if requested != "reference":
        wanted = requested == "triton" or weight.device.type in KERNEL_DEVICES
        reason = why_no_kernels(weight.device, weight.dtype) if wanted else None
        if reason is not None and requested == "triton":
            raise RuntimeError(f'backend="triton": {reason}')
        if reason is not None:
            _tell_once(f"triton_bnlstm runs on the reference path: {reason}")
        elif wanted:
            case = (weight.device, weight.dtype, weight.shape, calls[0].problem.packing.batch, calls[0].problem.frozen)
            if requested == "triton" or case not in _failed:
                try:
                    return list(importlib.import_module("triton_bnlstm.fused").layer(calls))
                except KernelError as error:
                    if requested == "triton" or explicit_config() is not None:
                        raise
                    _failed.add(case)
                    _tell_once(f"triton_bnlstm runs on the reference path: a kernel could not run here ({error})")
    return [bptt.layer(call) for call in calls]
