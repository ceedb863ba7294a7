"""Rows instead of a padded rectangle: what is computed at each step, and where it came from.

Everything below the module works on *rows*: a 2-D tensor [R, ·] in which step 0's rows stand first, then step 1's, and
so on, as in a `PackedSequence`. Sequences are sorted by length, so the rows of step t are those of the first n_t
sequences, and finished sequences cost no work. Padding is never read, so it may hold anything.

When the lengths live on an accelerator, n_t is not known to the host without a synchronisation. Then every step holds
all B rows, of which the first n_t are valid: `mask` tells which, and kernels read n_t where it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
        if batch == 0 or int(lengths.min()) == steps:
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
        lengths, order = torch.sort(lengths.to(torch.int64).clamp(1, steps), descending=True, stable=True)
        valid = lengths > torch.arange(steps, device=lengths.device)[:, None]  # [T, B]
        return cls(
            sizes=(batch,) * steps,
            batch=batch,
            steps=steps,
            count=valid.sum(1, dtype=torch.float64),
            lengths=lengths,
            order=order,
            inverse=torch.argsort(order),
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

    def with_steps(self, steps: int) -> Packing:
        """The same rows over another number of steps, of which the last ones may hold none; without a mask."""
        sizes = (*self.sizes, *(0,) * steps)[:steps]
        count = torch.cat([self.count, self.count.new_zeros(steps)])[:steps]
        return replace(self, sizes=sizes, count=count)

    @cached_property
    def mirror(self) -> Tensor:
        """[R] the row that stands at the same distance from its own sequence's end; its own inverse."""
        device = self.lengths.device
        if self.mask is not None:
            time = torch.arange(self.steps, device=device)[:, None]
            mirrored = torch.where(time < self.lengths, self.lengths - 1 - time, time)
            return (mirrored * self.batch + torch.arange(self.batch, device=device)).reshape(-1)
        held = self.count.to(torch.int64)  # where it is: sizes would have to be sent there
        first = held.cumsum(0) - held  # [T] first row of each step
        time = torch.repeat_interleave(torch.arange(len(self.sizes), device=device), held, output_size=sum(self.sizes))
        seat = torch.arange(sum(self.sizes), device=device) - first[time]
        return first[self.lengths[seat] - 1 - time] + seat

    @cached_property
    def places(self) -> Tensor:
        """[R] position of each row in a rectangle [T·B] of steps and seats; without a mask."""
        device = self.lengths.device
        held = self.count.to(torch.int64)
        time = torch.repeat_interleave(torch.arange(len(self.sizes), device=device), held, output_size=sum(self.sizes))
        vacated = (self.batch - held).cumsum(0) - (self.batch - held)  # [T] seats left empty in the steps before
        return torch.arange(sum(self.sizes), device=device) + vacated[time]

    @cached_property
    def first_rows(self) -> Tensor:
        """[len(sizes) + 1] int64: with B initial states put before the rows, the row where the state before step t
        begins, at t; and where the state after the last step does.
        """
        if self.mask is not None:
            return torch.arange(len(self.sizes) + 1, device=self.count.device) * self.batch
        held = self.count.to(torch.int64)
        return torch.cat([held.new_zeros(1), self.batch + held.cumsum(0) - held])

    @cached_property
    def valid_rows(self) -> Tensor:
        """[len(sizes)] int32, `count` as kernels read it."""
        return self.count.to(torch.int32)

    def pack(self, rectangle: Tensor) -> Tensor:
        """[T, B, ·] → rows [R, ·]; gradients of padding are zero."""
        if self.mask is not None and self.order is not None:
            seated = rectangle.index_select(1, self.order)
            return torch.where(self.mask, seated.reshape(-1, rectangle.shape[-1]), 0)
        flat = rectangle.reshape(-1, rectangle.shape[-1])
        return flat if self.index is None else flat.index_select(0, self.index)

    def unpack(self, rows: Tensor) -> Tensor:
        """Rows [R, ·] → [T, B, ·], zero where there is no row."""
        if self.index is not None:
            flat = rows.new_zeros(self.steps * self.batch, rows.shape[1])
            rows = flat.index_copy(0, self.index, rows)
        rectangle = rows.reshape(self.steps, self.batch, rows.shape[1])
        if self.mask is not None and self.inverse is not None:
            return rectangle.index_select(1, self.inverse)
        return rectangle

    def seat(self, state: Tensor) -> Tensor:
        """[.., B, H] in the caller's order → in the order of the rows."""
        return state if self.order is None else state.index_select(-2, self.order)

    def unseat(self, state: Tensor) -> Tensor:
        """[.., B, H] in the order of the rows → in the caller's order."""
        return state if self.inverse is None else state.index_select(-2, self.inverse)
