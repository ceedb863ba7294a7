"""The kernels against the float64 oracle, in Triton's interpreter or on a GPU: outputs, states, statistics, gradients.

What a kernel writes is allocated full of NaN between guard bands, so that nothing left unwritten, read too early or
written beside its place goes unseen.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support import assert_same_buffers, buffers, make_layer, oracle_of
from triton_bnlstm import BNLSTM
from triton_bnlstm.packing import Packing

pytest.importorskip("triton")

from triton_bnlstm.kernels import launch
from triton_bnlstm.kernels.config import Config, use_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POISON = 12345.0
BAND = 64  # elements on each side

# Sums of at most some hundred float32 numbers, a few steps deep: roundings of 2⁻²⁴ = 6e-8, ε = 3e-3 under the root.
FLOAT32 = 1e-5
# float16 keeps 11 bits: h is rounded by 2⁻¹² relative at each step and W_ih x likewise, γ/σ of order one carries each
# on, and a handful of steps add up.
FLOAT16 = 8e-3


@pytest.fixture(autouse=True)
def bands(monkeypatch):
    """Guard bands around every tensor that a kernel writes, looked at when the test is over."""
    held: list[tuple[Tensor, int]] = []

    def empty(*shape, dtype, device):
        size = math.prod(shape)
        whole = torch.full((size + 2 * BAND,), POISON, dtype=dtype, device=device)
        whole[BAND : BAND + size] = math.nan
        held.append((whole, size))
        return whole[BAND : BAND + size].view(shape)

    monkeypatch.setattr(launch, "empty", empty)
    yield held
    for whole, size in held:
        assert (whole[:BAND] == POISON).all()
        assert (whole[BAND + size :] == POISON).all()


def step_mode(units=4, tile=16, inner=16):
    return Config(sequence=False, units=units, batch_tile=tile, inner=inner, resident=False, warps=4, stages=1)


def one_program(units=16, tile=16, inner=16, resident=True):
    """Sequence mode without a barrier, as the interpreter can run it."""
    return Config(sequence=True, units=units, batch_tile=tile, inner=inner, resident=resident, warps=4, stages=1)


def device_lengths(monkeypatch):
    """Lengths given to the host take the way of lengths on a device."""
    monkeypatch.setattr(Packing, "of_host_lengths", lambda steps, lengths, _: Packing.of_device_lengths(steps, lengths))


def close(name: str, actual: Tensor, expected: Tensor, bound: float) -> None:
    assert actual.shape == expected.shape, name
    error = (actual.detach().cpu().double() - expected).norm() / expected.norm().clamp_min(1e-6)
    assert error <= bound, f"{name}: relative RMS error {error:.2e}"


def kernel_layer(*sizes, dtype=torch.float32, **options) -> BNLSTM:
    """On the kernels, with a population, and of no memory: statistics after a step are that step's moments."""
    return make_layer(*sizes, dtype=dtype, backend="triton", momentum=1.0, **options).to(DEVICE)


def check(layer: BNLSTM, x: Tensor, lengths=None, *, states: bool = True, bound=FLOAT32, start=0) -> None:
    """One layer and direction: all that a call gives and leaves, in training and in evaluation."""
    exact = copy.deepcopy(layer).cpu().double()
    shape = (1, x.shape[1], layer.hidden_size)
    hx = [torch.randn(shape).to(x.dtype) * 0.5 for _ in range(2)] if states else [torch.zeros(shape).to(x.dtype)] * 2
    for training in (False, True):
        layer.train(training)
        oracle = oracle_of(exact)
        before = buffers(layer)
        inputs = [s.to(DEVICE).requires_grad_() for s in (x, *hx)]
        output, (h_n, c_n) = layer(inputs[0], tuple(inputs[1:]) if states else None, lengths=lengths, start=start)
        wides = [s.detach().double().requires_grad_() for s in (x, *hx)]
        held = lengths or [len(x)] * x.shape[1]
        *expected, seen = oracle.run(wides[0], held, wides[1][0], wides[2][0], training, start)
        for name, a, e in zip(("output", "h_n", "c_n"), (output, h_n[0], c_n[0]), expected, strict=True):
            close(f"{name}, training={training}", a, e, bound)

        weights = [torch.randn(e.shape).to(x.dtype) for e in expected]
        among = inputs if states else inputs[:1]
        outputs = (output, h_n[0], c_n[0])
        found = torch.autograd.grad(outputs, [*among, *layer.parameters()], [w.to(DEVICE) for w in weights])
        doubled = [w.double() for w in weights]
        wanted = torch.autograd.grad(expected, [*wides[: len(among)], *exact.parameters()], doubled)
        for k, (a, e) in enumerate(zip(found, wanted, strict=True)):
            close(f"gradient {k}, training={training}", a, e, 5 * bound)

        after = buffers(layer)
        if not training:
            assert_same_buffers(before, after)
            continue
        for norm, slots in seen.items():
            for slot, moments in slots.items() if norm != "c" or layer.cell_norm else ():
                name = f"{norm} of slot {slot}"
                # a mean may be next to nothing beside the deviations
                scale = moments.mean.square() + moments.var
                error = (after[f"mean_{norm}_l0"][slot].cpu() - moments.mean).square() / scale.clamp_min(1e-12)
                assert error.mean().sqrt() <= 2 * bound, name
                close(f"variance, {name}", after[f"var_{norm}_l0"][slot], moments.var, 2 * bound)


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


def test_padding_may_be_anything():
    layer = kernel_layer(3, 5, cell_norm=True, bidirectional=True)
    x = torch.randn(6, 5, 3, device=DEVICE)
    lengths = [6, 2, 5, 1, 6]
    bad = x.clone()
    for b, length in enumerate(lengths):
        bad[length:, b] = math.nan
    twin = copy.deepcopy(layer)
    given = bad.requires_grad_()
    with use_config(step_mode()):
        expected, output = twin(x, lengths=lengths)[0], layer(given, lengths=lengths)[0]
    assert torch.equal(output, expected)
    assert_same_buffers(buffers(layer), buffers(twin))
    output.sum().backward()
    assert given.grad.isfinite().all()
    for b, length in enumerate(lengths):
        assert (given.grad[length:, b] == 0).all()


def test_the_same_bits_every_time():
    with use_config(step_mode()):
        first, second = (kernel_layer(3, 9, cell_norm=True) for _ in range(2))
        x = torch.randn(6, 20, 3, device=DEVICE)
        assert torch.equal(first(x, lengths=[6] * 9 + [2] * 11)[0], second(x, lengths=[6] * 9 + [2] * 11)[0])
    assert_same_buffers(buffers(first), buffers(second))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, in the interpreter
def test_infinite_input_leaves_the_statistics():
    layer = kernel_layer(3, 5)
    before = buffers(layer)
    x = torch.randn(4, 3, 3, device=DEVICE)
    x[1, 1, 1] = math.inf
    with pytest.warns(RuntimeWarning, match="not finite"):
        layer(x), layer.eval()
    after = buffers(layer)
    assert all(torch.equal(before[name], after[name]) for name in before if name != "_skipped_steps")


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


def test_second_derivatives_are_the_references():
    """The kernels' backward steps aside for a gradient with a graph."""
    layer = kernel_layer(2, 3)
    twin = copy.deepcopy(layer)
    twin.backend = "reference"
    x = torch.randn(3, 4, 2, device=DEVICE)
    found = []
    for model in (layer, twin):
        given = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(model(given)[0].square().sum(), given, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [given, *model.parameters()]))
    for a, e in zip(*found, strict=True):
        close("", a, e.cpu().double(), 1e-4)


def test_the_output_may_be_written_over():
    """nn.LSTM's output can be; where a backward needs it, autograd notices."""
    layer = kernel_layer(2, 3)
    x = torch.randn(3, 4, 2, device=DEVICE)
    output = layer(x)[0]
    output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    with torch.no_grad():
        layer(x)[0].mul_(2)


def test_one_column_needs_no_preactivations(bands):
    """Without a gradient nothing as large as W_ih x of all rows is made for an input of one column."""
    layer = kernel_layer(1, 3)
    x = torch.randn(20, 8, 1, device=DEVICE)
    largest = 20 * 8 * 4 * 3
    with torch.no_grad():
        layer(x), layer.eval()(x)
        assert bands
        assert max(size for _, size in bands) < largest
        kernel_layer(2, 3)(x.expand(-1, -1, 2))
    assert max(size for _, size in bands) == largest


@pytest.mark.skipif(DEVICE != "cpu", reason="memory is not really taken on a CPU alone; tests/test_gpu.py has its own")
@pytest.mark.parametrize("narrow", [False, True], ids=["W_ih x", "states"])
@pytest.mark.parametrize("directions", [1, 2])
def test_offsets_beyond_32_bits(directions, narrow):
    """The last rows of tensors with more than 2³¹ elements, of which no others are ever touched."""
    hidden, batch = 64, 2
    columns = hidden if narrow else 4 * hidden
    rows = 2**31 // (columns * directions) + 16 * directions
    found = []
    weight = torch.randn(directions, 4 * hidden, hidden).half() * 0.2
    h_0, x_last = (
        torch.randn(directions, batch, hidden).half(),
        torch.randn(directions, batch, 1 if narrow else columns),
    )
    for held in (rows, batch):
        h = torch.empty(directions, batch + held, hidden, dtype=torch.float16)
        c = torch.empty(directions, batch + held, hidden)
        x = torch.empty(directions, held) if narrow else torch.empty(directions, held, columns, dtype=torch.float16)
        h[:, :batch], c[:, :batch] = h_0, h_0.float()
        x[:, -batch:] = x_last[:, :, 0] if narrow else x_last.half()
        table = launch.Rows(torch.tensor([0, held]), torch.tensor([batch], dtype=torch.int32), 1, held, batch)
        terms = torch.ones(directions, 1, 4 * hidden), torch.zeros(directions, 1, 4 * hidden)
        with use_config(step_mode(units=64, inner=64)):
            launch.train(h, c, weight, x, terms, torch.ones(directions, 4 * hidden), table, 0.1, None, None, None)
            found.append([h[:, -batch:].clone(), c[:, -batch:].clone()])
            h[:, -batch:] = 0
            scales = terms[0], terms[0], terms[1]
            launch.infer(h, c, weight, x, scales, table, None)
            found[-1] += [h[:, -batch:].clone(), c[:, -batch:].clone()]
    for far, near in zip(*found, strict=True):
        assert torch.equal(far, near)
        assert near.abs().min() > 0
