"""Which device a layout was found for, and with what software: the one decides, the other is told."""

from __future__ import annotations

import importlib
import subprocess
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ..kernels.config import Device


class Identity(NamedTuple):
    """What makes two devices the same one for a layout: a cooperative grid that fits one may hang or fail on another.

    backend: "cuda", "hip", "cpu". architecture: "sm90", "gfx942". multiprocessors: how many. shared: bytes of shared
    memory that a program can have.
    """

    backend: str
    architecture: str
    multiprocessors: int
    shared: int

    @classmethod
    def of(cls, device: Device) -> Identity:
        """Of a device's numbers."""
        return cls(device.backend, device.architecture, device.multiprocessors, device.shared_per_program)

    @classmethod
    def of_json(cls, fields: Any) -> Identity:
        """From its JSON.

        Raises:
            ValueError: it is not one.
        """
        if not isinstance(fields, dict):
            raise ValueError("a device is an object")
        backend, architecture = fields.get("backend"), fields.get("architecture")
        multiprocessors, shared = fields.get("multiprocessors"), fields.get("shared")
        if not isinstance(backend, str) or not isinstance(architecture, str):
            raise ValueError("a device has a backend and an architecture")
        if type(multiprocessors) is not int or type(shared) is not int:
            raise ValueError("a device has a number of multiprocessors and of bytes of shared memory")
        return cls(backend, architecture, multiprocessors, shared)

    @property
    def slug(self) -> str:
        """A folder's name: "cuda-sm90-132x227KB"."""
        return f"{self.backend}-{self.architecture}-{self.multiprocessors}x{self.shared // 1024}KB"

    def __str__(self) -> str:
        return f"{self.architecture}, {self.multiprocessors} multiprocessors, {self.shared // 1024} KB"


class Provenance(NamedTuple):
    """Who measured: recorded, shown, and of no influence but for Triton's minor version, see `is_stale`."""

    name: str
    driver: str
    torch: str
    triton: str

    @classmethod
    def of_json(cls, fields: Any) -> Provenance:
        """From its JSON; what is missing is unknown."""
        known = fields if isinstance(fields, dict) else {}
        return cls(*(str(known.get(name, "unknown")) for name in cls._fields))


def triton_version() -> str:
    """Triton's, or "none"."""
    try:
        return str(importlib.import_module("triton").__version__)
    except Exception:  # a broken install may raise anything
        return "none"


def minor(version: str) -> str:
    """The first two numbers: "3.6" of "3.6.0+git1"."""
    return ".".join(version.split(".")[:2])


def is_stale(provenance: Provenance) -> bool:
    """Whether another minor version of Triton compiled what was measured."""
    here = triton_version()
    return here != "none" and minor(provenance.triton) != minor(here)


@lru_cache
def provenance_of(device: torch.device) -> Provenance:
    """Of this process and a device."""
    name, driver = "CPU", "none"
    if device.type == "cuda":
        name, driver = torch.cuda.get_device_name(device), _driver()
    return Provenance(name, driver, torch.__version__, triton_version())


def _driver() -> str:
    """NVIDIA's driver, "unknown" where its tool is not there."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return told[0] if told else "unknown"
