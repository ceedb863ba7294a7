"""The cell, one step at a time."""

from __future__ import annotations

import pytest
import torch

from tests.support import CLOSE, buffers, make_layer
from triton_bnlstm import BNLSTMCell


@pytest.mark.parametrize("cell_norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_loop_equals_the_layer(cell_norm, bias, training):
    """Outputs, gradients and (training) statistics."""
    layer = make_layer(cell_norm=cell_norm, bias=bias, max_length=8).train(training)
    cell = BNLSTMCell.from_layer(layer)
    assert cell.training == training
    x = torch.randn(8, 5, 3).double()
    output, (h_n, c_n) = layer(x)
    state, outputs = None, []
    for t, step in enumerate(x):
        state = cell(step, state, time=t)
        outputs.append(state[0])
    torch.testing.assert_close(torch.stack(outputs), output, **CLOSE)
    torch.testing.assert_close(state[0], h_n[0], **CLOSE)
    torch.testing.assert_close(state[1], c_n[0], **CLOSE)
    (output.sum() + c_n.sum()).backward()
    (sum(outputs).sum() + state[1].sum()).backward()
    for name, parameter in cell.named_parameters():
        torch.testing.assert_close(parameter.grad, getattr(layer, f"{name}_l0").grad, rtol=1e-8, atol=1e-9)
    for name, buffer in buffers(cell).items():
        twin = name if name in ("rows", "_skipped_steps") else f"{name}_l0"
        torch.testing.assert_close(buffer, getattr(layer, twin), **CLOSE)


@pytest.mark.parametrize("input_stats", ["time", "sequence"])
def test_streaming_past_the_last_slot_and_unbatched(input_stats):
    layer = make_layer(num_layers=2, input_stats=input_stats, max_length=3).eval()
    cells = [BNLSTMCell.from_layer(layer, k) for k in range(2)]
    x = torch.randn(7, 3).double()
    expected = layer(x)[0]
    states = [None, None]
    for t, step in enumerate(x):
        for k, cell in enumerate(cells):
            states[k] = cell(step if k == 0 else states[0][0], states[k], time=t)
        assert states[1][0].shape == (4,)
        torch.testing.assert_close(states[1][0], expected[t], **CLOSE)


def test_from_layer_copies():
    layer = make_layer()
    cell = BNLSTMCell.from_layer(layer)
    with torch.no_grad():
        cell.weight_hh.zero_()
        cell.mean_hh.zero_()
    assert layer.weight_hh_l0.abs().sum() > 0
    assert layer.mean_hh_l0.abs().sum() > 0
    assert "BNLSTMCell(3, 4, max_length=6)" in repr(cell)
    other = make_layer(eps=0.1, momentum=0.7, bias=False, cell_norm=True, gamma_init=0.5, recurrent_init="identity")
    twin = BNLSTMCell.from_layer(other)
    for option in (
        "eps",
        "momentum",
        "cell_norm",
        "input_stats",
        "gamma_init",
        "recurrent_init",
        "forget_bias",
        "backend",
    ):
        assert getattr(twin, option) == getattr(other, option), option
    torch.nn.utils.parametrizations.weight_norm(other, "weight_hh_l0")
    torch.testing.assert_close(BNLSTMCell.from_layer(other).weight_hh, other.weight_hh_l0)
    with pytest.raises(IndexError, match="index"):
        BNLSTMCell.from_layer(layer, 1)
    with pytest.raises(TypeError, match="layer"):
        BNLSTMCell.from_layer(cell)


def test_bad_input():
    cell = BNLSTMCell(3, 4, max_length=5)
    x = torch.randn(2, 3)
    for bad, error, name in (
        (lambda: cell(torch.randn(2, 2, 3)), ValueError, "input"),
        (lambda: cell(torch.randn(2, 4)), ValueError, "input"),
        (lambda: cell(torch.randn(0, 3)), ValueError, "empty batch"),
        (lambda: cell([1.0]), TypeError, "input"),
        (lambda: cell(x.double()), TypeError, "input"),
        (lambda: cell(x, time=-1), ValueError, "time"),
        (lambda: cell(x, (torch.zeros(2, 4), torch.zeros(2, 4))), ValueError, "time: give the index"),
        (lambda: cell(x, time=1.5), TypeError, "time"),
        (lambda: cell(x, (torch.zeros(2, 4), torch.zeros(2, 5)), 0), ValueError, "hx"),
        (lambda: cell(x[0]), ValueError, "at least 2"),
    ):
        with pytest.raises(error, match=name):
            bad()
    with pytest.raises(ValueError, match="input_stats"):
        BNLSTMCell(3, 4, max_length=5, input_stats="sequence")(x)
    assert (cell.count_hh == 0).all()
