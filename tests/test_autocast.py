"""torch.autocast: products in its dtype, statistics and cell state in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernel_cases import DEVICE, FLOAT16, close
from tests.support import assert_same_buffers, buffers, make_layer, need_kernels
from triton_bnlstm import BNLSTMCell, bn_lstm, estimate_statistics

LENGTHS = [6, 2, 4, 4, 6, 5, 3, 6]
BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.filterwarnings("ignore::UserWarning"))]


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    if request.param == "triton":
        need_kernels()
    return request.param


def layer_of(backend, **options):
    return make_layer(3, 4, dtype=torch.float32, backend=backend, momentum=1.0, **options).to(DEVICE)


def autocast(dtype=torch.float16, **options):
    # float16: Triton's interpreter rounds to bfloat16 in its own way
    return torch.autocast(DEVICE, dtype=dtype, **options)


class Products(TorchDispatchMode):
    """Dtypes of all matrix products over rows."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.linear):
            self.found.append(args[-1].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["equal", "ragged"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "cell_norm": True}], ids=["", "deep"])
def test_it_is_the_layer_with_rounded_products(backend, options, training, lengths):
    layer = layer_of(backend, **options).train(training)
    exact = copy.deepcopy(layer).double()
    exact.backend = "reference"
    x = torch.randn(6, 8, 3, device=DEVICE)
    given, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    with autocast():
        output, (h_n, c_n) = layer(given, lengths=lengths)
    assert (output.dtype, h_n.dtype, c_n.dtype) == (torch.float16, torch.float16, torch.float32)
    expected, (h, c) = exact(wide, lengths=lengths)
    weights = [torch.randn_like(s) for s in (expected, h, c)]
    found = [(s * w).sum() for s, w in zip((output, h_n, c_n), weights, strict=True)]
    gradients = torch.autograd.grad(sum(found), [given, *layer.parameters()])
    wanted = torch.autograd.grad(
        (expected * weights[0] + 0).sum() + (h * weights[1]).sum() + (c * weights[2]).sum(), [wide, *exact.parameters()]
    )
    depth = layer.num_layers
    for name, a, e in (("output", output, expected), ("h_n", h_n, h), ("c_n", c_n, c)):
        close(name, a, e.cpu(), depth * FLOAT16)
    for k, (a, e) in enumerate(zip(gradients, wanted, strict=True)):
        assert a.dtype == torch.float32
        close(f"gradient {k}", a, e.cpu(), 2 * depth * FLOAT16)
    for name, buffer in buffers(layer).items():
        if name.startswith(("mean", "var")):
            assert buffer.dtype == torch.float32
            close(name, buffer, buffers(exact)[name].cpu(), 2 * depth * FLOAT16)


def test_products_are_in_its_dtype_and_only_there():
    layer = layer_of("reference")
    x = torch.randn(6, 8, 3, device=DEVICE)
    for dtype in (torch.float16, torch.bfloat16):
        with Products() as products, autocast(dtype):
            layer(x)[0].sum().backward()
        narrow = [kind for kind in products.found if kind != torch.float64]  # W_ih x̄, which nothing may round
        assert len(narrow) > 12
        assert set(narrow) == {dtype}
    with Products() as products:
        layer(x)[0].sum().backward()
    assert set(products.found) == {torch.float32, torch.float64}


def test_a_mean_of_the_input_is_not_rounded(backend):
    """It is taken off in float32; in float16 nothing would be left of deviations beside 1e4."""
    layer, twin = layer_of(backend), layer_of(backend)
    x = torch.randn(6, 8, 3, device=DEVICE)
    with autocast():
        expected, found = layer(x)[0], twin(x + 1e4)[0]
    # x + 1e4 keeps deviations to 2⁻¹¹ in float32, which is float16's rounding, too
    close("output", found, expected.double().cpu(), 2 * FLOAT16)


def test_regions_that_are_off_or_nested(backend):
    layer = layer_of(backend)
    layer.momentum = 0.1
    x = torch.randn(6, 8, 3, device=DEVICE)
    twins = [copy.deepcopy(layer) for _ in range(3)]
    expected, _ = layer(x)
    with autocast(enabled=False):
        assert torch.equal(twins[0](x)[0], expected)
    with autocast():
        with autocast(enabled=False):
            assert torch.equal(twins[1](x)[0], expected)
        inside, _ = twins[2](x)
    assert inside.dtype == torch.float16
    for twin in twins[:2]:
        assert_same_buffers(buffers(twin), buffers(layer))
    with autocast(torch.bfloat16), autocast(torch.float16):
        assert layer.eval()(x)[0].dtype == torch.float16


def test_a_backward_in_the_region_is_the_backward_behind_it(backend):
    layer = layer_of(backend)
    x = torch.randn(6, 8, 3, device=DEVICE, requires_grad=True)
    with autocast():
        output, _ = copy.deepcopy(layer)(x)
        (inside,) = torch.autograd.grad(output.float().square().sum(), x)
        output, _ = copy.deepcopy(layer)(x)
    assert torch.equal(inside, torch.autograd.grad(output.float().square().sum(), x)[0])


def test_parameters_in_other_dtypes(backend):
    x = torch.randn(6, 8, 3, device=DEVICE)
    half = layer_of(backend).to(torch.float16)
    expected, _ = copy.deepcopy(half)(x.half())
    with autocast():  # nothing to do, but for an input that is not rounded before its mean is taken off
        output, _ = half(x)
    close("output", output, expected.double().cpu(), FLOAT16)
    exact = layer_of("reference").double()
    with autocast():
        assert exact(x.double())[0].dtype == torch.float64


def test_states_from_call_to_call(backend):
    layer = layer_of(backend).eval()
    x = torch.randn(6, 8, 3, device=DEVICE)
    with autocast():
        expected, _ = layer(x)
        first, hx = layer(x[:4])
        second, _ = layer(x[4:], hx, start=4)
    # h goes over in the dtype in which it is used anyway, c in float32
    assert torch.equal(torch.cat([first, second]), expected)


def test_the_other_entries(backend):
    layer = layer_of(backend).eval()
    x = torch.randn(6, 8, 3, device=DEVICE)
    with autocast():
        expected, _ = layer(x)
        found = bn_lstm(
            x,
            layer._parameters_of("_l0"),
            layer._statistics_of("_l0"),
            training=False,
            eps=layer.eps,
            input_stats="time",
            backend=backend,
        )
        assert torch.equal(found.output, expected)
        cell, hx = BNLSTMCell.from_layer(layer), None
        for t in range(6):
            hx = cell(x[t], hx, t)
            close(f"step {t}", hx[0], expected[t].double().cpu(), FLOAT16)


def test_estimated_statistics_are_of_rounded_products(backend):
    layer = layer_of(backend, num_layers=2, bidirectional=True)
    trained = copy.deepcopy(layer)
    x = torch.randn(6, 8, 3, device=DEVICE)
    with autocast():
        estimate_statistics(layer, [x], "batches")
        trained(x)
    for name, buffer in buffers(layer).items():
        if name.startswith(("mean", "var")):
            # of the very same moments, merged in float64 and in float32: roundings of 2⁻²⁴ of numbers of order one
            torch.testing.assert_close(buffer, buffers(trained)[name], rtol=1e-5, atol=1e-6, msg=name)


def test_whole_reproduces_itself():
    layer = layer_of("reference", num_layers=2)
    x = torch.randn(6, 8, 3, device=DEVICE)
    with autocast():
        estimate_statistics(layer, [{"input": x, "lengths": LENGTHS}], "whole")
        split = copy.deepcopy(layer)
        estimate_statistics(split, [{"input": x[:, k : k + 4], "lengths": LENGTHS[k : k + 4]} for k in (0, 4)], "whole")
    for name, buffer in buffers(split).items():
        torch.testing.assert_close(buffer, buffers(layer)[name], rtol=1e-5, atol=1e-6, msg=name)  # as above
    assert layer.weight_hh_l0.dtype == torch.float32


def test_the_gradient_scaler(backend):
    layer, plain = layer_of(backend), layer_of(backend)
    x = torch.randn(6, 8, 3, device=DEVICE)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)
    sgd = torch.optim.SGD(layer.parameters(), 0.1)
    with autocast():
        loss = layer(x)[0].float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(sgd)
    scaler.update()
    assert scaler.get_scale() == 2.0**10
    with autocast():
        plain(x)[0].float().square().mean().backward()
    for mine, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
        # a power of two scales exactly, but for what float16 lost below its smallest number without it
        torch.testing.assert_close(mine.detach(), theirs.detach() - 0.1 * theirs.grad, rtol=1e-2, atol=1e-4)
    before = [p.detach().clone() for p in layer.parameters()]
    sgd.zero_grad()
    with autocast():
        loss = layer(x)[0].float().square().mean() * float("inf")
    scaler.scale(loss).backward()
    scaler.step(sgd)  # which skips
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(p, b) for p, b in zip(layer.parameters(), before, strict=True))
