"""Rows instead of a padded rectangle: what is computed at each step, and where it came from.

Everything below the module works on *rows*: a 2-D tensor [R, ·] in which step 0's rows stand first, then step 1's, and
so on, as in a `PackedSequence`. Sequences are sorted by length, so the rows of step t are those of the first n_t
sequences, and finished sequences cost no work. Padding is never read, so it may hold anything.

When the lengths live on an accelerator, n_t is not known to the host without a synchronisation. Then every step holds
all B rows, in the caller's order, and `mask` tells the valid ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


@dataclass(frozen=True)
class Packing:
    """Which rows exist, for T steps of B sequences.

    Attributes:
        sizes: rows held at each step, never increasing; `sum(sizes)` is R.
        batch: B, the seats of the batch, finished sequences included.
        steps: T of the caller's tensor; steps past the longest sequence hold no rows.
        count: [len(sizes)] float64, valid rows n_t of each step.
        lengths: [B] int64, lengths in the order of the rows.
        index: [R] position of each row in the caller's flattened [T·B] rectangle; None where it is the identity.
        order: [B] the caller's sequence in each seat; None where it is the identity.
        inverse: [B] the seat of each of the caller's sequences; None where it is the identity.
        mask: [R, 1] bool, the valid rows; None where all are.
    """

    sizes: tuple[int, ...]
    batch: int
    steps: int
    count: Tensor
    lengths: Tensor
    index: Tensor | None = None
    order: Tensor | None = None
    inverse: Tensor | None = None
    mask: Tensor | None = None

    @property
    def equal(self) -> bool:
        """True when every step is known to hold every sequence: no seat is ever vacated."""
        return self.mask is None and self.sizes[-1] == self.batch

    @classmethod
    def of_equal_lengths(cls, steps: int, batch: int, device: torch.device) -> Packing:
        """Every sequence has all T steps."""
        return cls(
            sizes=(batch,) * steps,
            batch=batch,
            steps=steps,
            count=torch.full((steps,), float(batch), dtype=torch.float64, device=device),
            lengths=torch.full((batch,), steps, dtype=torch.int64, device=device),
        )

    @classmethod
    def of_host_lengths(cls, steps: int, lengths: Tensor, device: torch.device) -> Packing:
        """Lengths [B] known to the host, each in 1..T."""
        batch = lengths.numel()
        if int(lengths.min()) == steps:
            return cls.of_equal_lengths(steps, batch, device)
        ordered, order = torch.sort(lengths, descending=True, stable=True)
        time = torch.arange(int(ordered[0]), device="cpu")[:, None]
        valid = ordered > time  # [T', B]
        return cls(
            sizes=tuple(valid.sum(1).tolist()),
            batch=batch,
            steps=steps,
            count=valid.sum(1, dtype=torch.float64).to(device),
            lengths=ordered.to(device),
            index=(time * batch + order)[valid].to(device),
            order=order.to(device),
            inverse=torch.argsort(order).to(device),
        )

    @classmethod
    def of_device_lengths(cls, steps: int, lengths: Tensor) -> Packing:
        """Lengths [B] that the host must not look at: clamped to 1..T, and a mask instead of a prefix."""
        batch = lengths.numel()
        lengths = lengths.to(torch.int64).clamp(1, steps)
        valid = lengths > torch.arange(steps, device=lengths.device)[:, None]  # [T, B]
        return cls(
            sizes=(batch,) * steps,
            batch=batch,
            steps=steps,
            count=valid.sum(1, dtype=torch.float64),
            lengths=lengths,
            mask=valid.reshape(-1, 1),
        )

    @classmethod
    def of_packed_sequence(cls, packed: PackedSequence) -> Packing:
        """The rows of a `PackedSequence` are already these rows."""
        sizes = tuple(packed.batch_sizes.tolist())
        device = packed.data.device
        held = packed.batch_sizes
        lengths = (held[:, None] > torch.arange(sizes[0], device="cpu")).sum(0)
        return cls(
            sizes=sizes,
            batch=sizes[0],
            steps=len(sizes),
            count=held.to(device, torch.float64),
            lengths=lengths.to(device),
            order=packed.sorted_indices,
            inverse=packed.unsorted_indices,
        )

    @cached_property
    def mirror(self) -> Tensor:
        """[R] the row that stands at the same distance from its own sequence's end; its own inverse."""
        device = self.lengths.device
        if self.mask is not None:
            time = torch.arange(self.steps, device=device)[:, None]
            mirrored = torch.where(time < self.lengths, self.lengths - 1 - time, time)
            return (mirrored * self.batch + torch.arange(self.batch, device=device)).reshape(-1)
        held = torch.tensor(self.sizes, device=device)
        first = held.cumsum(0) - held  # [T] first row of each step
        time = torch.repeat_interleave(torch.arange(len(self.sizes), device=device), held, output_size=sum(self.sizes))
        seat = torch.arange(sum(self.sizes), device=device) - first[time]
        return first[self.lengths[seat] - 1 - time] + seat

    def pack(self, rectangle: Tensor) -> Tensor:
        """[T, B, ·] → rows [R, ·]; gradients of padding are zero."""
        flat = rectangle.reshape(-1, rectangle.shape[-1])
        if self.mask is not None:
            return torch.where(self.mask, flat, 0)
        return flat if self.index is None else flat.index_select(0, self.index)

    def unpack(self, rows: Tensor) -> Tensor:
        """Rows [R, ·] → [T, B, ·], zero where there is no row."""
        if self.index is not None:
            flat = rows.new_zeros(self.steps * self.batch, rows.shape[1])
            rows = flat.index_copy(0, self.index, rows)
        return rows.reshape(self.steps, self.batch, -1)

    def seat(self, state: Tensor) -> Tensor:
        """[.., B, H] in the caller's order → in the order of the rows."""
        return state if self.order is None else state.index_select(-2, self.order)

    def unseat(self, state: Tensor) -> Tensor:
        """[.., B, H] in the order of the rows → in the caller's order."""
        return state if self.inverse is None else state.index_select(-2, self.inverse)
