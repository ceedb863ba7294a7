"""What the kernels keep for their backward, byte for byte, and what a training step needs at most."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernel_cases import DEVICE, device_lengths
from tests.support import need_kernels
from triton_bnlstm import BNLSTM, fused_backward, reference
from triton_bnlstm.packing import Packing
from triton_bnlstm.reference import Problem

pytest.importorskip("triton")

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from triton_bnlstm.fused import _INPUTS, saved_bytes

need_kernels()

SAVES = ("preactivations", "recompute")


def storages(tensors) -> dict[int, int]:
    """Bytes by address of what lies behind tensors."""
    return {s.untyped_storage().data_ptr(): s.untyped_storage().nbytes() for s in tensors if s is not None}


def kept(output: Tensor) -> int:
    """Bytes that the layer's node in the graph of its output keeps, besides the inputs of its one direction."""
    seen: set[Any] = set()
    nodes: list[Any] = [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "_LayerBackward":
            population = node.problems[0].population
            tables = [] if population is None else [s for pair in population[:3] if pair is not None for s in pair]
            return sum(storages([*node.saved_tensors[_INPUTS:], *tables]).values())
        nodes += [following for following, _ in node.next_functions]
    raise AssertionError("no node of the kernels")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("cell_norm", [False, True], ids=["", "cell norm"])
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("kind", ["equal", "ragged", "device"])
@pytest.mark.parametrize("save", SAVES)
def test_bytes_saved(save, kind, columns, cell_norm, dtype, monkeypatch):
    steps, batch, hidden = 6, 5, 8
    lengths = None if kind == "equal" else [6, 2, 5, 1, 6]
    if kind == "device":
        device_lengths(monkeypatch)
    layer = BNLSTM(
        columns,
        hidden,
        max_length=6,
        cell_norm=cell_norm,
        input_stats="time",
        save=save,
        dtype=dtype,
        device=DEVICE,
        backend="triton",
    )
    x = torch.randn(steps, batch, columns, dtype=dtype, device=DEVICE)
    size = kept(layer(x, lengths=lengths)[0])
    rows = sum(lengths) if lengths and kind == "ragged" else steps * batch
    expected = saved_bytes(
        steps,
        batch,
        rows,
        hidden,
        dtype.itemsize,
        save=save,
        column=columns == 1,
        seats=kind != "equal",
        cell_norm=cell_norm,
    )
    assert size == expected
    if dtype == torch.bfloat16 and save == "recompute":
        per_unit = (size - batch * hidden * 6) / (rows * hidden)  # without the states before the first step
        statistics = (64 + (8 if cell_norm else 0)) / batch
        if kind == "equal":
            assert per_unit <= 14 + statistics
            assert columns > 1 or per_unit <= 6 + 4 / hidden + statistics
        elif kind == "device":  # the population too, in which a ragged step counts as a whole one
            assert per_unit <= 14 + 2 * statistics


class Live(TorchDispatchMode):
    """Bytes of all tensors that are made within it and are still there, and the most there were.

    What only Python's garbage collector would free is not there: Triton's interpreter leaves each launch's tensors in
    circles of references.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __enter__(self):
        gc.collect()
        gc.freeze()  # so that what is there already is not looked through again and again
        return super().__enter__()

    def __exit__(self, *of):
        super().__exit__(*of)
        gc.unfreeze()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self._known:
            return
        self._known.add(place)
        self.now += size
        if self.now > self.peak:
            gc.collect()
            self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, place, size)

    def _forget(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


@pytest.mark.parametrize(
    ("save", "columns", "kept", "ratio"),
    [
        ("preactivations", 32, 2 + 2 + 22 + 2, 0.4),
        ("recompute", 32, 2 + 2 + 14 + 1.5, 0.3),
        ("recompute", 1, 6 + 1.5, 0.2),
    ],
)
def test_peak_of_a_training_step(save, columns, kept, ratio, monkeypatch):
    """Against autograd through the same equations in PyTorch, in bfloat16.

    What is there at the most, in bytes of each unit, row and step: input 2, its gradient 2 and the output's 2 (of as
    many columns as units); what is kept, 22 or 14, and states less their mean, 2; or of an eighth of the rows these
    and what is made again, 10 / 8; and statistics and weights, 5 at this size. One column has no gradient here, as data
    have none, and is kept in 4/H instead of 8.
    """
    monkeypatch.setattr(fused_backward, "_BLOCK_ROWS", 256)
    steps, batch, size = 64, 64, 32
    x = torch.randn(steps, batch, columns, dtype=torch.bfloat16, device=DEVICE)
    layer = BNLSTM(
        columns, size, max_length=steps, input_stats="time", save=save, dtype=x.dtype, device=DEVICE, backend="triton"
    )
    given = x.clone().requires_grad_(columns > 1)
    with Live() as ours:
        layer(given)[0].sum().backward()
    packing = Packing.of_equal_lengths(steps, batch, x.device)
    state = x.new_zeros(batch, size)
    given = x.clone().requires_grad_(columns > 1)
    layer.zero_grad()
    with Live() as eager:
        rows = given.reshape(-1, columns)
        problem = Problem(packing, None, True, 1e-5)
        reference.forward(rows, state, state.float(), layer._parameters_of("_l0"), problem)[0].sum().backward()
    units = steps * batch * size
    assert ours.peak / units <= 2 + kept + 5
    assert ours.peak <= ratio * eager.peak
    assert eager.peak / units > 60  # or there is nothing to be compared with
