"""How layers on the kernels behave: padding, repeats, offsets, memory, contexts; and two pieces by themselves."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from tests.kernel_cases import DEVICE, FLOAT32, close, kernel_layer, step_mode
from tests.support import assert_same_buffers, buffers, need_kernels
from triton_bnlstm import use_backend

pytest.importorskip("triton")

import triton
import triton.language as tl

from triton_bnlstm.kernels import launch
from triton_bnlstm.kernels.common import tanh
from triton_bnlstm.kernels.config import use_config
from triton_bnlstm.kernels.run import quiet

need_kernels()
pytestmark = pytest.mark.usefixtures("bands")


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


def test_infinite_input_leaves_the_statistics():
    layer = kernel_layer(3, 5)
    before = buffers(layer)
    x = torch.randn(4, 3, 3, device=DEVICE)
    x[1, 1, 1] = math.inf
    with pytest.warns(RuntimeWarning, match="not finite"):
        layer(x), layer.eval()
    after = buffers(layer)
    assert all(torch.equal(before[name], after[name]) for name in before if name != "_skipped_steps")


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


@pytest.mark.parametrize("columns", [1, 20, 70])
def test_moments_of_many_rows(columns):
    """More rows than a tile of the moments kernel has, with a mean that E[x²] − E[x]² would not survive."""
    sizes = [150, 130, 64, 1]
    x = (torch.randn(2, sum(sizes), columns) + 1000).to(DEVICE)
    first = torch.tensor([0, 150, 300, 430, 494], device=DEVICE)
    rows = launch.Rows(first, torch.tensor(sizes, dtype=torch.int32, device=DEVICE), 4, sum(sizes), 150)
    centred = launch.empty(*x.shape, dtype=torch.float32, device=x.device)
    mean, var = launch.moments(x, rows, centred)
    for direction in range(2):
        for t, part in enumerate(x[direction].double().cpu().split(sizes)):
            assert (mean[direction, t].cpu() - part.mean(0)).abs().max() < 3e-4  # float32 at 1000 has units of 6e-5
            close("variance", var[direction, t], part.var(0, unbiased=False), FLOAT32 if t < 3 else math.inf)
            assert t < 3 or (var[direction, t] == 0).all()
            part_centred = centred[direction].cpu().split(sizes)[t]
            assert (part_centred.double() - (part - part.mean(0))).abs().max() < 4e-4


@triton.jit
def tanh_kernel(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, tanh(tl.load(x_ptr + at)))


def test_tanh_is_precise_near_zero_and_right_far_away():
    """Relative error: gates of a layer with γ = 0.1 live near 0, where 1 − 2/(e²ˣ + 1) alone would cancel."""
    x = torch.cat([torch.logspace(-6, 2, 1020), torch.tensor([0.0, math.inf, -math.inf, math.nan])])
    x[1::2] *= -1
    y = torch.empty_like(x, device=DEVICE)
    with quiet():
        tanh_kernel[(1,)](x.to(DEVICE), y, N=1024)
    y, expected = y.cpu().double(), x.double().tanh()
    finite = x.isfinite() & (x != 0)
    assert ((y - expected) / expected)[finite].abs().max() < 2e-6  # a rounding of 1 is 1e-6 of tanh(1/4) / 2
    # the polynomial, whose own error is 3e-9: what is left are float32's roundings of 6e-8, some of them
    near = finite & (x.abs() < 0.25)
    assert ((y - expected) / expected)[near].abs().max() < 2e-7
    assert torch.equal(y[-4:-1], expected[-4:-1])
    assert y[-1].isnan()


def test_states_may_be_written_over():
    layer = kernel_layer(2, 3, bidirectional=True)
    for lengths in (None, [3, 2, 1, 3]):
        _, (h_n, c_n) = layer(torch.randn(3, 4, 2, device=DEVICE), lengths=lengths)
        h_n.mul_(2)
        c_n.mul_(2)


@pytest.mark.parametrize("lengths", [None, [3, 2, 1, 3]], ids=["equal", "ragged"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_runs_again_on_the_same_backend(reentrant, lengths):
    """Also where the context that chose it has been left."""
    layer = kernel_layer(2, 3)
    layer.backend = None
    twin = copy.deepcopy(layer)
    x = torch.randn(3, 4, 2, device=DEVICE, requires_grad=True)
    with use_backend("triton"):
        (expected,) = torch.autograd.grad(twin(x, lengths=lengths)[0].square().sum(), x)
        output = checkpoint(lambda y: layer(y, lengths=lengths)[0], x, use_reentrant=reentrant)
    output.square().sum().backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, when it loads its tables
def test_forward_mode_derivatives_are_refused():
    layer = kernel_layer(2, 3).eval().requires_grad_(False)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.randn(3, 4, 2, device=DEVICE), torch.ones(3, 4, 2, device=DEVICE))
        with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
            layer(x)


@pytest.mark.parametrize("lengths", [None, [5, 5, 3, 2]], ids=["equal", "ragged"])
@pytest.mark.parametrize("columns", [1, 3])
def test_a_step_that_is_not_finite_reaches_no_earlier_one(columns, lengths):
    layer = kernel_layer(columns, 4, cell_norm=True)
    twin = copy.deepcopy(layer)
    twin.backend = "reference"
    x = torch.randn(5, 4, columns, device=DEVICE)
    x[4, 0] = math.inf
    with pytest.warns(RuntimeWarning, match="not finite"):
        found, expected = ((model(x, lengths=lengths)[0], model.eval())[0] for model in (layer, twin))
    close("first steps", found[:4], expected[:4].cpu().double(), FLOAT32)
    assert not found[4].isfinite().any(1)[0]
