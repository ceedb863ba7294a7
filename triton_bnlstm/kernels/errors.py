"""Importable without Triton, unlike the rest of this package."""

from __future__ import annotations

import warnings

_told: set[str] = set()


class KernelError(RuntimeError):
    """A kernel could not be compiled, or asks for more than the device has. Nothing was computed."""


def tell_once(message: str) -> None:
    """A warning, the first time."""
    if message not in _told:
        _told.add(message)
        warnings.warn(f"triton_bnlstm: {message}", RuntimeWarning, stacklevel=3)
