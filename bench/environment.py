"""What figures depend on: the device and the versions of everything on the way to it."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from .timing import l2_bytes


def current_device() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def version_of(module: str) -> str | None:
    """A module's version; None if it cannot be imported."""
    try:
        return str(importlib.import_module(module).__version__)
    except Exception:  # a broken install may raise anything
        return None


def versions() -> dict[str, Any]:
    """Of Python, PyTorch, CUDA, cuDNN and the packages that matter."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {"cuda": torch.version.cuda, "hip": torch.version.hip}
    found["cudnn"] = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return found | {module: version_of(module) for module in ("triton", "numpy", "triton_bnlstm")}


def asked(*command: str) -> str | None:
    """First line that a program prints, None where it cannot be run."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, cwd=Path(__file__).parent)
        return ran.stdout.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def state() -> str | None:
    """Clock, temperature and power of the first GPU just now."""
    return asked("nvidia-smi", "--query-gpu=clocks.sm,temperature.gpu,power.draw", "--format=csv,noheader")


def cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def device_info() -> dict[str, Any]:
    """Name and numbers of the current device; a CPU's are there for dry runs only."""
    on = current_device()
    host = {"cpu": f"{cpu_name()}, {os.cpu_count()} cores", "machine": platform.machine()}
    if on.type == "cpu":
        return {"name": "CPU", "slug": "cpu", "type": on.type, "multiprocessors": 1, **host}
    p = torch.cuda.get_device_properties(on)
    slug = "-".join("".join(c if c.isalnum() else " " for c in p.name.lower()).split())
    return {
        "name": p.name,
        "slug": slug,
        "type": on.type,
        "capability": 10 * p.major + p.minor,
        "multiprocessors": p.multi_processor_count,
        "memory_bytes": p.total_memory,
        "l2_bytes": l2_bytes(on),
        **host,
        "driver": asked("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "limits": asked(
            "nvidia-smi", "--query-gpu=clocks.max.sm,clocks.max.memory,power.limit", "--format=csv,noheader"
        ),
    }
