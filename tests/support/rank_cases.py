"""Calls of a layer that several ranks share, and the same calls on one process that has all rows."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from tests.support import buffers, make_layer
from triton_bnlstm import BNLSTM, BNLSTMCell, functional
from triton_bnlstm.packing import Packing

RAGGED = (5, 1, 3, 7, 2, 2)  # two sequences of one step, and more steps than slots
EQUAL = (7,) * 6


@dataclass
class Case:
    """parts: sequences of each rank; lengths: of all sequences in the order of the ranks. `form`: of the input."""

    parts: tuple[int, ...]
    lengths: tuple[int, ...] = RAGGED
    options: dict[str, Any] = field(default_factory=dict)
    hx: bool = False
    start: int = 0
    form: str = "lengths"  # or "device", "packed", "equal", "cell"
    mean: float = 3.0  # of the input
    seen: bool = True


ALL = {"num_layers": 2, "bidirectional": True, "cell_norm": True}

CASES = {
    2: {
        "equal": Case((3, 3), EQUAL, form="equal"),
        "ragged": Case((3, 3)),
        "nothing seen": Case((2, 4), seen=False),
        "everything": Case((2, 4), options=ALL, hx=True),
        "one row": Case((5, 1), options=ALL),
        "one row each": Case((1, 1), (7, 3), options={"cell_norm": True}),
        "no rows": Case((0, 6), options=ALL, hx=True),
        "no rows, equal": Case((6, 0), EQUAL, {"batch_first": True}, form="equal"),
        "different steps": Case((2, 4), (2, 2, 7, 7, 7, 7)),
        "sequence": Case((4, 2), options={"input_stats": "sequence", **ALL}),
        "sequence, no rows": Case((0, 6), options={"input_stats": "sequence", "cell_norm": True}),
        "device lengths": Case((4, 2), options=ALL, form="device", hx=True),
        "device lengths, no rows": Case((6, 0), options=ALL, form="device"),
        "packed": Case((4, 2), options={"bidirectional": True}, form="packed"),
        "prior_count": Case((3, 3), options={"prior_count": 1.5}),
        "plain masking": Case((3, 3), (7, 7, 5, 7, 5, 4), {"prior_count": 0}),
        "momentum=None": Case((3, 3), options={"momentum": None, "bias": False}),
        "start": Case((3, 3), options={"cell_norm": True}, start=4, hx=True),
        "one slot": Case((3, 3), options={"max_length": 1}),
        "one step": Case((1, 2), (1, 1, 1), {"cell_norm": True}, form="equal"),
        "float32": Case((2, 4), options={"dtype": torch.float32, **ALL}),
        "large mean": Case((2, 4), options={"dtype": torch.float32}, mean=1000.0),
        "cell": Case((2, 4), EQUAL, {"cell_norm": True}, form="cell", hx=True),
        "cell, no rows": Case((0, 6), EQUAL, form="cell", hx=True),
    },
    4: {
        "equal": Case((2, 1, 2, 1), EQUAL, options=ALL, form="equal"),
        "everything": Case((1, 0, 3, 2), options=ALL, hx=True),
        "sequence": Case((2, 1, 0, 3), options={"input_stats": "sequence", **ALL}),
        "different steps": Case((1, 2, 2, 1), (7, 2, 1, 3, 3, 5), {"bidirectional": True}),
        "float32": Case((1, 0, 3, 2), options={"dtype": torch.float32, "cell_norm": True}),
    },
}
STEPS = 2  # training steps: the second one takes its phantom rows from what the first has learnt


def run_case(case: Case, rank: int | None) -> dict[str, Any]:
    """Training steps of the case with one rank's sequences, over the default group; None: with all, without a group.

    Returns:
        outputs and gradients of inputs by step, with the sequences in the second dimension and zeros beyond their
        lengths; gradients of parameters, summed over the steps; buffers.
    """
    cell = case.form == "cell"
    batch_first = bool(case.options.get("batch_first"))
    layer: Any = make_layer(max_length=case.options.get("max_length", 5), seen=case.seen, **_without_length(case))
    if cell:
        layer = BNLSTMCell.from_layer(layer)
    layer.train()
    layer.process_group = None if rank is None else "world"
    first = 0 if rank is None else sum(case.parts[:rank])
    last = len(case.lengths) if rank is None else first + case.parts[rank]
    lengths = case.lengths[first:last]
    longest = max(case.lengths)
    # without rows any number of steps will do, but a cell is called for each step on all ranks
    steps = longest if cell else max(lengths, default=longest + 2)
    dtype = case.options.get("dtype", torch.float64)
    generator = torch.Generator().manual_seed(7)
    found: dict[str, Any] = {"steps": []}

    def numbers(*shape: int) -> Tensor:
        """One rank's part of numbers that are the same for all, along the second dimension."""
        whole = torch.randn(shape[0], len(case.lengths), shape[-1], generator=generator, dtype=torch.float64)
        return whole.to(dtype)[:, first:last].clone()

    directions = 2 if case.options.get("bidirectional") else 1
    places = directions * case.options.get("num_layers", 1)
    for _ in range(STEPS):
        x = case.mean + numbers(longest + 2, 3)[:steps]
        hx = (numbers(places, 4), numbers(places, 4))
        of_output, of_h, of_c = numbers(longest + 2, 4 * directions), numbers(places, 4), numbers(places, 4)
        x.requires_grad_()
        hx[0].requires_grad_(), hx[1].requires_grad_()
        given: Any = hx if case.hx else None
        if cell:
            output, (h_n, c_n) = _loop(layer, x, given)
        else:
            output, (h_n, c_n) = _call(layer, case, x, given, lengths, batch_first)
        loss = (output * of_output[: output.shape[0]]).sum() + (h_n * of_h).sum() + (c_n * of_c).sum()
        loss.backward()
        assert x.grad is not None
        found["steps"].append(
            {"output": output.detach()[:longest], "h_n": h_n.detach(), "c_n": c_n.detach(), "x": x.grad[:longest]}
            | ({"h_0": hx[0].grad, "c_0": hx[1].grad} if case.hx else {})
        )
    found["parameters"] = {name: p.grad for name, p in layer.named_parameters()}
    found["buffers"] = buffers(layer)
    return found


def _without_length(case: Case) -> dict[str, Any]:
    return {name: value for name, value in case.options.items() if name != "max_length"}


def _call(layer: BNLSTM, case: Case, x: Tensor, hx: Any, lengths: tuple[int, ...], batch_first: bool) -> Any:
    """The layer's answer as [T, B, ·]."""
    if case.form == "packed":
        packed = pack_padded_sequence(x, list(lengths), enforce_sorted=False)
        output, states = layer(packed, hx, start=case.start)
        return torch.nn.utils.rnn.pad_packed_sequence(output)[0], states
    rows = None
    if case.form != "equal":
        rows = torch.tensor(lengths, dtype=torch.int64)
        x = torch.where(torch.arange(x.shape[0])[:, None, None] < rows[:, None], x, torch.nan)
    # only the caller's lengths: the other ranks' have to be known to the host
    on_device = mock.patch.object(functional, "Packing", _MaskedPacking)
    with on_device if case.form == "device" else nullcontext():
        output, states = layer(x.transpose(0, 1) if batch_first else x, hx, rows, case.start)
    return output.transpose(0, 1) if batch_first else output, states


class _MaskedPacking(Packing):
    @classmethod
    def of_host_lengths(cls, steps: int, lengths: Tensor, device: torch.device) -> Packing:
        return Packing.of_device_lengths(steps, lengths)


def _loop(cell: BNLSTMCell, x: Tensor, hx: Any) -> Any:
    """A cell over all steps."""
    state = None if hx is None else (hx[0][0], hx[1][0])
    outputs = []
    for t in range(x.shape[0]):
        state = cell(x[t], state, t)
        outputs.append(state[0])
    assert state is not None
    return torch.stack(outputs), (state[0][None], state[1][None])
