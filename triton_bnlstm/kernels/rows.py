"""What a launch is about: which rows exist, a block of steps, the cell norm's vectors, sizes and dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Which rows exist, as the kernels read it.

    first: [T + 1] int64 row of the states that step t reads; it writes from first[t + 1]. Its own rows of tensors
        without the B initial states stand from first[t + 1] − B on.
    count: [T] int32 live rows of each step, a prefix of its rows.
    steps, rows, batch: T, R, B.
    """

    first: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    steps: int
    rows: int
    batch: int


class Block(NamedTuple):
    """Some steps: first..last, the first of their rows among all R, and how many rows they have."""

    first: int
    last: int
    first_row: int
    rows: int

    @classmethod
    def whole(cls, rows: Rows) -> Block:
        """All steps."""
        return cls(0, rows.steps, 0, rows.rows)


class CellNorm(NamedTuple):
    """affine: [2, dirs, H] γ_c and β_c. population: [2, dirs, T, H], or None where no seat is vacated."""

    affine: Tensor
    population: Tensor | None


class Case(NamedTuple):
    """What a recurrence is about: device, dtype of its products, directions, hidden size."""

    device: torch.device
    dtype: torch.dtype
    directions: int
    hidden: int

    @classmethod
    def of(cls, h: Tensor) -> Case:
        """Of states h [dirs, ·, H]."""
        return cls(h.device, h.dtype, h.shape[0], h.shape[2])
