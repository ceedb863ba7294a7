"""Which implementation runs, and why."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock

import torch

from . import checks
from ._version import __version__

BACKENDS = ("auto", "reference", "triton")
# What kernels keep of W_hh h for their backward; see `BNLSTM`.
SAVES = ("preactivations", "recompute")
SAVE_CHOICES = (*SAVES, "auto")
_VARIABLE = "TRITON_BNLSTM_BACKEND"
_chosen: ContextVar[str | None] = ContextVar("triton_bnlstm_backend", default=None)


class _Shown:
    """What the `use_backend` entered last, of those of all threads, says, for torch.compile.

    It cannot watch a ContextVar, and takes what is in a threading.local for constant.
    """

    backend: str | None = None


_shown = _Shown()
_entered: list[tuple[object, str]] = []
_entering = Lock()


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within it, layers and functions that name no backend use this one: "auto", "reference" or "triton".

    It is for the thread that it is in. Compiled code does not know threads: where several are in a `use_backend` at a
    time, it goes by the one entered last. Layers that run compiled in several threads get their `backend=` instead.

    Raises:
        TypeError, ValueError: no such backend.
    """
    token = _chosen.set(checks.choice("backend", backend, BACKENDS))
    own = object()
    with _entering:
        _entered.append((own, backend))
        _shown.backend = backend
    try:
        yield
    finally:
        with _entering:
            _entered[:] = [one for one in _entered if one[0] is not own]
            _shown.backend = _entered[-1][1] if _entered else None
        _chosen.reset(token)


def requested_backend(argument: str | None) -> str:
    """What is asked for: by the argument, else the innermost `use_backend`, else the environment, else "auto".

    Raises:
        ValueError: the environment variable names no backend.
    """
    if argument is not None:
        return checks.choice("backend", argument, BACKENDS)
    return _chosen.get() or checks.choice(_VARIABLE, os.environ.get(_VARIABLE) or "auto", BACKENDS)


def traced_backend(argument: str | None) -> str:
    """`requested_backend` in code that torch.compile traces, which it does again when the answer is another one."""
    chosen = _shown.backend if argument is None else argument
    if chosen is None:
        chosen = os.environ.get(_VARIABLE) or "auto"
    return checks.choice("backend", chosen, BACKENDS)


@lru_cache(maxsize=1)
def _triton() -> tuple[str | None, str]:
    """Triton's version, or None and why it cannot be imported."""
    try:
        return str(importlib.import_module("triton").__version__), ""
    except Exception as error:  # a broken install may raise anything: that is what the report is for
        return None, f"{type(error).__name__}: {error}"


def why_no_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot compute on this device in this dtype; None if they can."""
    if device.type not in ("cuda", "cpu"):
        return f"the kernels run on CUDA and ROCm devices, not on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels compute in float32, bfloat16 and float16, not in {dtype}".replace("torch.", "")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            "tensors are on the CPU, where the kernels run in Triton's interpreter only: "
            "set TRITON_INTERPRET=1 before Python starts"
        )
    version, reason = _triton()
    if version is None:
        return f"Triton cannot be imported ({reason})"
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < (7, 5):
            return f"the kernels need compute capability 7.5, this device has {major}.{minor}"
        if dtype == torch.bfloat16 and major < 8:
            return f"bfloat16 needs compute capability 8.0, this device has {major}.{minor}"
    try:
        interpreted = _interpreted()
    except Exception as error:  # a Triton that is too old, or broken: the reference path is there
        return f"the kernels cannot be imported ({type(error).__name__}: {error})"
    if interpreted and device.type == "cuda":
        return "TRITON_INTERPRET=1 was set when the kernels were imported"
    if interpreted and not _triton_interpreted():
        return "TRITON_INTERPRET=1 was set after Triton had been imported; set it before Python starts"
    if not interpreted and device.type == "cpu":
        return "TRITON_INTERPRET=1 was set after the kernels had been imported"
    return None


def _triton_interpreted() -> bool:
    """Whether Triton's own library is that of the interpreter: optimisers of torch's import it too, maybe earlier."""
    triton = importlib.import_module("triton")
    return not isinstance(triton.language.cdiv, triton.runtime.JITFunction)


def _interpreted() -> bool:
    return bool(importlib.import_module("triton_bnlstm.kernels.launch").interpreted())


@dataclass(frozen=True)
class BackendReport:
    """What this installation can run. `str()` gives it as text for a bug report.

    Attributes:
        version, torch: versions of this package and of torch.
        triton: Triton's version, or why it cannot be imported.
        devices: names of the accelerators that torch sees.
        backend: what backend="auto" runs.
        reason: why.
    """

    version: str
    torch: str
    triton: str
    devices: tuple[str, ...]
    backend: str
    reason: str

    def __str__(self) -> str:
        devices = ", ".join(self.devices) or "none (CPU only)"
        return (
            f"triton_bnlstm {self.version}\n"
            f"torch         {self.torch}\n"
            f"triton        {self.triton}\n"
            f"accelerators  {devices}\n"
            f"backend       {self.backend}: {self.reason}"
        )


def backend_report() -> BackendReport:
    """Versions, devices, and the backend that will be used and why. Needs neither Triton nor a GPU."""
    version, reason = _triton()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        backend, why = "reference", "torch sees no accelerator, and on a CPU the kernels run in an interpreter only"
    else:
        why_not = why_no_kernels(torch.device("cuda", torch.cuda.current_device()), torch.float32)
        backend = "triton" if why_not is None else "reference"
        why = why_not or "on accelerators; tensors on a CPU, and float64, take the reference path"
    try:
        requested = requested_backend(None)
    except ValueError as error:
        requested, why = "auto", f"{why}; but every call that names no backend will raise: {error}"
    if requested != "auto":
        backend, why = requested, f"asked for by use_backend or {_VARIABLE}"
    if requested == "triton" and count == 0:
        why_not = why_no_kernels(torch.device("cpu"), torch.float32)
        why += ", in Triton's interpreter" if why_not is None else f", and raises: {why_not}"
    return BackendReport(
        version=__version__,
        torch=torch.__version__,
        triton=version or f"not importable ({reason})",
        devices=tuple(torch.cuda.get_device_name(k) for k in range(count)),
        backend=backend,
        reason=why,
    )
