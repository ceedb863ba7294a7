"""The devices that kernels are compiled for: one of each architecture, with its published numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch

from triton_bnlstm.kernels.config import Device

_KB = 1024


class Target(NamedTuple):
    """An architecture, and a device that has it."""

    name: str
    arch: int | str  # as Triton's GPUTarget has it
    board: str
    device: Device


def _cuda(arch: int, board: str, multiprocessors: int, shared: int, threads: int, reserved: int = 1) -> Target:
    """shared: KB of a multiprocessor, of which `reserved` are not a program's."""
    numbers = Device("cuda", arch, multiprocessors, (shared - reserved) * _KB, shared * _KB, 65536, threads)
    return Target(f"sm{arch}", arch, board, numbers)


def _hip(arch: str, board: str, units: int) -> Target:
    return Target(
        arch, arch, board, Device("hip", 0, units, 64 * _KB, 64 * _KB, 4 * 512 * 64, 2048, warp=64, name=arch)
    )


TARGETS = {
    target.name: target
    for target in (
        _cuda(75, "T4", 40, 64, 1024, reserved=0),
        _cuda(80, "A100", 108, 164, 2048),
        _cuda(86, "RTX 3090", 82, 100, 1536),
        _cuda(89, "RTX 4090", 128, 100, 1536),
        _cuda(90, "H100", 132, 228, 2048),
        _cuda(100, "B200", 148, 228, 2048),
        _cuda(120, "RTX 5090", 170, 100, 1536),
        _hip("gfx90a", "MI210", 104),
        _hip("gfx942", "MI300X", 304),
    )
}


class Numbers(NamedTuple):
    """A dtype of weights and states, and what float32 products may be rounded to."""

    dtype: torch.dtype
    tf32: bool


NUMBERS = {
    "bf16": Numbers(torch.bfloat16, False),
    "fp16": Numbers(torch.float16, False),
    "tf32": Numbers(torch.float32, True),
    "fp32": Numbers(torch.float32, False),
}


def why_skipped(target: Target, numbers: str) -> str | None:
    """Why a target has no kernels of its own in these numbers; None where it has."""
    device = target.device
    if numbers == "bf16" and device.backend == "cuda" and device.capability < 80:
        return "bfloat16 needs compute capability 8.0"
    if numbers == "tf32" and (device.backend == "hip" or device.capability < 80):
        return "no TF32: products are those of fp32"
    return None
