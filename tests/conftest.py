"""Every test from the same seed, on the threads that it was given; kernels in the interpreter where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported

# CI machines are slow and shared: a deadline would test the machine. Derandomised: a red run is red again.
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci")

# Tensors here are tiny: more threads would only wait for each other, for minutes where cores are shared.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, and counted, where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
