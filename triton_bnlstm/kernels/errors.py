"""Importable without Triton, unlike the rest of this package."""


class KernelError(RuntimeError):
    """A kernel could not be compiled, or asks for more than the device has. Nothing was computed."""
