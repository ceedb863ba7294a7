"""The kernels against the float64 oracle, in Triton's interpreter or on a GPU: outputs, states, statistics, gradients.

What a kernel writes is allocated full of NaN between guard bands (the fixture `bands`), so that nothing left unwritten,
read too early or written beside its place goes unseen.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.kernel_cases import (
    DEVICE,
    FLOAT16,
    FLOAT32,
    check,
    close,
    device_lengths,
    kernel_layer,
    one_program,
    step_mode,
)
from tests.support import buffers, need_kernels, oracle_of
from triton_bnlstm.kernels.config import Config, use_config

need_kernels()
pytestmark = pytest.mark.usefixtures("bands")


LENGTHS = {"equal": None, "ragged": [6, 2, 5, 1, 6], "one row left": [6, 3, 3, 1, 1]}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("cell_norm", [False, True], ids=["", "cell norm"])
@pytest.mark.parametrize("input_stats", ["time", "sequence"])
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("config", [step_mode(), one_program()], ids=["step", "sequence"])
def test_float32(config, columns, input_stats, cell_norm, lengths):
    layer = kernel_layer(columns, 5, cell_norm=cell_norm, input_stats=input_stats)
    with use_config(config):
        check(layer, torch.randn(6, 5, columns), LENGTHS[lengths])


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("columns", [1, 3])
def test_lengths_on_a_device(columns, lengths, monkeypatch):
    """Steps are rectangles of B rows, sorted so that the live ones are a prefix; nobody looks at the lengths."""
    device_lengths(monkeypatch)
    layer = kernel_layer(columns, 5, cell_norm=True)
    with use_config(step_mode()):
        check(layer, torch.randn(6, 5, columns), LENGTHS[lengths] or [6] * 5)


@pytest.mark.parametrize("cell_norm", [False, True], ids=["", "cell norm"])
@pytest.mark.parametrize("config", [step_mode(), one_program(inner=16)], ids=["step", "sequence"])
def test_walked_batch(config, cell_norm):
    """More rows than a tile has; in the end less than one tile of them is left."""
    layer = kernel_layer(2, 7, cell_norm=cell_norm)
    lengths = [4] * 18 + [3] * 13 + [2] * 9 + [1] * 2
    with use_config(config):
        check(layer, torch.randn(4, 42, 2), lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("inner", [16, 32, 64])
def test_inner_extent_in_parts(inner, resident, dtype):
    """H = 33 in parts of 16, 32 and 64, streamed and kept on chip, 3 units of the last program's 4 missing."""
    config = Config(False, 4, 16, inner, resident, 4, 1)
    with use_config(config):
        layer = kernel_layer(3, 33, dtype=dtype)
        check(layer, torch.randn(3, 4, 3).to(dtype), bound=FLOAT32 if dtype == torch.float32 else FLOAT16)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("columns", [1, 3])
def test_float16(columns, lengths):
    """Statistics, gates and cells are float32, so the bound is that of rounding h and W_ih x."""
    layer = kernel_layer(columns, 5, dtype=torch.float16, cell_norm=True)
    with use_config(step_mode()):
        check(layer, torch.randn(6, 5, columns).half(), LENGTHS[lengths], bound=FLOAT16)


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({"bias": False}, {}),
        ({}, {"states": False}),
        ({"prior_count": 0}, {"lengths": [6, 6, 5, 3, 2]}),
        ({"prior_count": 1.5}, {"lengths": [6, 6, 5, 3, 2]}),
        ({"max_length": 2}, {"lengths": [6, 6, 5, 3, 2]}),
        ({"max_length": 9}, {"lengths": [6, 6, 5, 3, 2], "start": 4}),
        ({"max_length": 3}, {"start": 2}),
    ],
    ids=[
        "no bias",
        "no states",
        "no prior",
        "capped prior",
        "past the last slot",
        "start",
        "start, past the last slot",
    ],
)
def test_options(options, call):
    with use_config(step_mode()):
        check(kernel_layer(3, 5, cell_norm=True, **options), torch.randn(6, 5, 3), **call)


@pytest.mark.parametrize(
    ("steps", "batch", "hidden", "columns"), [(1, 2, 1, 1), (1, 2, 1, 4), (3, 2, 1, 2), (2, 3, 9, 1)]
)
def test_smallest(steps, batch, hidden, columns):
    with use_config(step_mode()):
        check(kernel_layer(columns, hidden), torch.randn(steps, batch, columns))


def test_default_layout():
    """Without a layout asked for."""
    check(kernel_layer(3, 20, cell_norm=True), torch.randn(6, 5, 3), [6, 6, 5, 3, 2])


def test_one_row_in_evaluation():
    layer = kernel_layer(3, 5, cell_norm=True).eval()
    exact = oracle_of(copy.deepcopy(layer).cpu().double())
    x = torch.randn(4, 1, 3)
    zeros = torch.zeros(1, 5, dtype=torch.float64)
    expected = exact.run(x.double(), [4], zeros, zeros, False)
    for grad in (True, False):  # with and without cells kept for a backward
        with torch.set_grad_enabled(grad):
            output, (h_n, c_n) = layer(x.to(DEVICE))
        for name, a, e in zip(("output", "h_n", "c_n"), (output, h_n[0], c_n[0]), expected[:3], strict=True):
            close(name, a, e, FLOAT32)


@pytest.mark.parametrize("lengths", [None, [5, 2, 4, 1]], ids=["equal", "ragged"])
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("config", [step_mode(), one_program()], ids=["step", "sequence"])
def test_layers_and_directions(config, columns, lengths):
    """Both directions in one launch, two layers with dropout and noise, against the reference path on the same numbers.

    That is float32 as well, and normalisation leaves a single input column no gradient but what ε and rounding make.
    """
    layer = kernel_layer(
        columns, 5, num_layers=2, bidirectional=True, dropout=0.3, initial_noise=0.5, cell_norm=True, max_length=4
    )
    twin = copy.deepcopy(layer)
    twin.backend = "reference"
    x = torch.randn(5, 4, columns, device=DEVICE)
    found = []
    for model in (layer, twin):
        results = []
        for training in (True, False):
            model.train(training)
            torch.manual_seed(5)
            given = x.clone().requires_grad_()
            with use_config(config):
                output, (h_n, c_n) = model(given, lengths=lengths)
            weight = torch.linspace(-1, 1, output.numel(), device=DEVICE).view(output.shape)
            loss = (output * weight).sum() + h_n.square().sum() + c_n.sum()
            results += [output, h_n, c_n, *torch.autograd.grad(loss, [given, *model.parameters()])]
            with torch.no_grad():
                results += [*buffers(model).values(), model(x, lengths=lengths)[0]] if not training else []
        found.append(results)
    assert len(found[0]) == len(found[1])
    for a, e in zip(*found, strict=True):
        close("", a, e.cpu().double(), 5 * FLOAT32 if columns > 1 else 50 * FLOAT32)


@pytest.mark.parametrize("lengths", [[4, 2, 3, 1, 4], [3, 1, 2, 1, 3]], ids=["to the end", "shorter than T"])
@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_states_without_a_gradient(training, where, lengths, monkeypatch):
    """The last states of finished rows, where cells are kept for no backward; and steps in which nobody is left."""
    if where == "device":
        device_lengths(monkeypatch)
    layer = kernel_layer(3, 5, cell_norm=True).train(training)
    oracle = oracle_of(copy.deepcopy(layer).cpu().double())
    x = torch.randn(4, 5, 3)
    h_0, c_0 = torch.randn(2, 5, 5).unbind()
    with torch.no_grad(), use_config(step_mode()):
        output, (h_n, c_n) = layer(x.to(DEVICE), (h_0[None].to(DEVICE), c_0[None].to(DEVICE)), lengths=lengths)
    expected = oracle.run(x.double(), lengths, h_0.double(), c_0.double(), training)
    for name, a, e in zip(("output", "h_n", "c_n"), (output, h_n[0], c_n[0]), expected[:3], strict=True):
        close(name, a, e, FLOAT32)
    assert all(buffer.isfinite().all() for buffer in buffers(layer).values())


@hypothesis_settings(max_examples=15)
@given(
    data=st.data(),
    steps=st.integers(1, 4),
    batch=st.integers(2, 20),
    hidden=st.integers(1, 18),
    columns=st.integers(1, 4),
    cell_norm=st.booleans(),
    units=st.sampled_from([4, 8]),
    sequence=st.booleans(),
)
def test_any_shape(data, steps, batch, hidden, columns, cell_norm, units, sequence):
    lengths = data.draw(st.lists(st.integers(1, steps), min_size=batch, max_size=batch))
    lengths[0] = steps
    config = one_program(32) if sequence else step_mode(units)
    # a step with one row of a large batch has no deviations to be relative to: ε stands in for them
    layer = kernel_layer(columns, hidden, cell_norm=cell_norm, max_length=3, eps=0.1)
    with use_config(config):
        check(layer, torch.randn(steps, batch, columns), lengths)
