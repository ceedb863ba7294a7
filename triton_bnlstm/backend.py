"""Which implementation runs, and why."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch

from ._version import __version__

BACKENDS = ("auto", "reference", "triton")


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
    try:
        triton = str(importlib.import_module("triton").__version__)
    except Exception as error:  # a broken install may raise anything: that is what the report is for
        triton = f"not importable ({type(error).__name__}: {error})"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return BackendReport(
        version=__version__,
        torch=torch.__version__,
        triton=triton,
        devices=tuple(torch.cuda.get_device_name(k) for k in range(count)),
        backend="reference",
        reason="this version has no Triton kernels yet; every device runs the eager PyTorch path",
    )


def choose_backend(requested: str) -> str:
    """The backend that runs a call. Raises RuntimeError where the requested one cannot."""
    if requested == "triton":
        raise RuntimeError(
            'backend="triton": this version has no Triton kernels yet; use backend="auto" or "reference"'
        )
    return "reference"
