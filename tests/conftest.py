"""Every test from the same seed, and on the threads that it was given."""

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


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
