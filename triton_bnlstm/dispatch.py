"""From a layer's call to the implementation that runs it."""

from __future__ import annotations

import importlib
import warnings
from functools import partial
from typing import Any

from . import bptt
from .backend import requested_backend, why_no_kernels
from .distributed import NO_KERNELS
from .held import NO_KERNELS as NO_KERNELS_HELD
from .kernels.config import explicit_config
from .kernels.errors import KernelError
from .reference import Call, Ran
from .transforms import have_tangents, transformed
from .tuning.mode import requested_autotune

# What auto takes the kernels for: the interpreter is for those who ask for it.
KERNEL_DEVICES = ("cuda",)

# Batches may come in any number of sizes, and errors tell of them: what is known of them is forgotten at some point.
_MOST_KNOWN = 4096
_told: set[str] = set()
_failed: set[tuple[object, ...]] = set()


def _tell_once(message: str) -> None:
    if message not in _told:
        _add(_told, message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def _add(known: set[Any], new: object) -> None:
    if len(known) >= _MOST_KNOWN:
        known.clear()
    known.add(new)


def _tell(message: str) -> None:
    _tell_once(f"triton_bnlstm: {message}")


def _why_not_these(calls: list[Call]) -> str | None:
    """What these calls ask for that no kernel gives."""
    if transformed():
        return "the kernels do not go through the transforms of torch.func (grad, jvp, vmap, ...)"
    if have_tangents(s for c in calls for s in (c.x, c.h, c.c, *c.parameters)):
        return "the kernels have no forward-mode derivatives"
    return None


def case_of(calls: list[Call]) -> tuple[object, ...]:
    """What a failure of a kernel is a failure for."""
    p, problem = calls[0].parameters, calls[0].problem
    shapes = (p.weight_ih.shape, p.weight_hh.shape, problem.packing.batch, len(calls))
    return p.weight_hh.device, p.weight_hh.dtype, *shapes, p.gamma_c is None, problem.frozen, problem.population is None


def has_failed(calls: list[Call]) -> bool:
    """Whether a kernel could not run calls like these."""
    return case_of(calls) in _failed


def for_kernels(calls: list[Call], requested: str) -> bool:
    """Whether these calls are the kernels' to run, as far as one knows before they are launched.

    Raises:
        RuntimeError: "triton" is requested, and they cannot run this.
    """
    weight = calls[0].parameters.weight_hh
    if requested == "reference" or (requested == "auto" and weight.device.type not in KERNEL_DEVICES):
        return False
    if calls[0].problem.ranks is not None:
        reason: str | None = NO_KERNELS
    elif calls[0].problem.held:
        reason = NO_KERNELS_HELD
    else:
        reason = why_no_kernels(weight.device, weight.dtype) or _why_not_these(calls)
    if reason is not None and requested == "triton":
        raise RuntimeError(f'backend="triton": {reason}')
    if reason is not None:
        _tell_once(f"triton_bnlstm runs on the reference path: {reason}")
        return False
    return requested == "triton" or not has_failed(calls)


def note_failure(case: tuple[object, ...], error: KernelError) -> None:
    """From now on "auto" takes the reference path for calls like these; said once."""
    _add(_failed, case)
    _tell_once(f"triton_bnlstm runs on the reference path: a kernel could not run here ({error})")


def options_of(calls: list[Call], requested: str, save: str, autotune: str | None) -> Any:
    """How the kernels run these calls: `fused.Options`."""
    fused = importlib.import_module("triton_bnlstm.fused")
    failed = partial(note_failure, case_of(calls))
    return fused.Options(save, requested == "triton", _tell, failed, requested_autotune(autotune))


def may_step_in(requested: str) -> bool:
    """Whether the reference path may do what a kernel could not: nobody asked for the kernel, or for its layout."""
    return requested != "triton" and explicit_config() is None


def run(calls: list[Call], backend: str | None, save: str = "preactivations", autotune: str | None = None) -> list[Ran]:
    """All directions of one layer on the backend that is asked for; they share device, dtype and packing.

    save: what kernels keep for their backward; autotune: whether their layouts may be measured; see `BNLSTM`.

    Raises:
        RuntimeError: backend="triton", and the kernels cannot run this.
    """
    requested = requested_backend(backend)
    requested_autotune(autotune)  # an error of the reference path, too: no typo waits for the kernels
    if for_kernels(calls, requested):
        fused = importlib.import_module("triton_bnlstm.fused")
        try:
            return list(fused.layer(calls, options_of(calls, requested, save, autotune)))
        except KernelError as error:
            if not may_step_in(requested):
                raise
            note_failure(case_of(calls), error)
    return [bptt.layer(call) for call in calls]
