"""First and second derivatives, of the hand-written backward and of autograd's."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from tests.support import CLOSE, make_layer
from triton_bnlstm import Parameters, bn_lstm, bptt, reference
from triton_bnlstm.packing import Packing
from triton_bnlstm.reference import Call, Problem
from triton_bnlstm.statistics import (
    population_at_steps,
    resolve_statistics,
    training_population,
)

EQUAL, RAGGED = [3, 3, 3], [3, 1, 2]


def differentiable_call(layer, lengths, training, reverse=False):
    """`bn_lstm` as a function of all that has a gradient, and values for these."""
    parameters, statistics = layer._parameters_of("_l0"), layer._statistics_of("_l0")
    present = [name for name in Parameters._fields if getattr(parameters, name) is not None]

    def call(x, h, c, *values):
        given = Parameters(**{**dict.fromkeys(Parameters._fields), **dict(zip(present, values, strict=True))})
        result = bn_lstm(
            x, given, statistics, (h, c), lengths, training=training, input_stats=layer.input_stats, reverse=reverse
        )
        return result.output, result.h_n, result.c_n

    x = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    h, c = (torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return call, (x, h, c, *(getattr(parameters, name) for name in present))


@pytest.mark.parametrize("cell_norm", [False, True])
@pytest.mark.parametrize("input_stats", ["time", "sequence"])
@pytest.mark.parametrize("lengths", [EQUAL, RAGGED], ids=["equal", "ragged"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradcheck_and_gradgradcheck(cell_norm, input_stats, lengths, bias, training):
    layer = make_layer(2, 2, cell_norm=cell_norm, input_stats=input_stats, bias=bias, max_length=3)
    call, inputs = differentiable_call(layer, lengths, training)
    assert gradcheck(call, inputs)
    # fast mode: one random projection of the Hessian instead of each of its some thousand entries
    assert gradgradcheck(call, inputs, fast_mode=True)


def test_gradcheck_reverse():
    layer = make_layer(2, 2, cell_norm=True, max_length=3)
    call, inputs = differentiable_call(layer, RAGGED, True, reverse=True)
    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs, fast_mode=True)


def problems(layer, kind, training):
    """The same batch as rows of a prefix, or with a mask, and its population."""
    over_time = layer.input_stats == "time"
    lengths = torch.tensor([4, 1, 3, 4, 2])
    packing = (
        Packing.of_device_lengths(4, lengths)
        if kind == "mask"
        else Packing.of_host_lengths(4, lengths if kind == "prefix" else torch.full((5,), 4), torch.device("cpu"))
    )
    statistics = layer._statistics_of("_l0")
    if training:
        population = training_population(statistics, packing, 0, None, over_time)
    else:
        resolved = resolve_statistics(statistics)
        population = population_at_steps(resolved, 0, len(packing.sizes), None, over_time)
    return packing, Problem(packing, population, over_time, 1e-5)


@pytest.mark.parametrize("cell_norm", [False, True])
@pytest.mark.parametrize("input_stats", ["time", "sequence"])
@pytest.mark.parametrize("kind", ["equal", "prefix", "mask"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("block_rows", [1, 7, 1000])
def test_handwritten_backward_is_autograds(cell_norm, input_stats, kind, training, block_rows, monkeypatch):
    monkeypatch.setattr(bptt, "_BLOCK_ROWS", block_rows)
    layer = make_layer(cell_norm=cell_norm, input_stats=input_stats)
    packing, problem = problems(layer, kind, training)
    rectangle = torch.randn(4, 5, 3, dtype=torch.float64)
    x = packing.pack(rectangle).requires_grad_()
    h, c = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    parameters = layer._parameters_of("_l0")
    inputs = [x, h, c, *(p for p in parameters if p is not None)]

    by_hand = bptt.layer(Call(x, h, c, parameters, problem))[:3]
    assert type(by_hand[0].grad_fn).__name__ == "_LayerBackward"
    by_autograd = reference.forward(x, h, c, parameters, problem)[:3]
    weights = [torch.randn_like(y) for y in by_hand]
    for a, e in zip(
        torch.autograd.grad(by_hand, inputs, weights), torch.autograd.grad(by_autograd, inputs, weights), strict=True
    ):
        torch.testing.assert_close(a, e, **CLOSE)


def test_input_moments_of_all_steps_at_once_are_those_of_each(monkeypatch):
    """How an accelerator takes them, tried on the CPU."""
    x, results = torch.randn(4, 5, 3).double(), []
    for apart in (True, False):
        monkeypatch.setattr(reference, "_one_step_at_a_time", lambda z, packing, apart=apart: apart)
        layer = make_layer()
        results.append([layer(x)[0], layer.mean_ih_l0, layer.var_ih_l0])
    for one, all_at_once in zip(*results, strict=True):
        torch.testing.assert_close(all_at_once, one, **CLOSE)


@pytest.mark.parametrize("wanted", ["x", "h", "gamma", "nothing"])
def test_only_what_is_needed_gets_a_gradient(wanted):
    layer = make_layer().requires_grad_(False)
    x, h = torch.randn(4, 2, 3, dtype=torch.float64), torch.randn(1, 2, 4, dtype=torch.float64)
    target = {"x": x, "h": h, "gamma": layer.gamma_hh_l0, "nothing": None}[wanted]
    if target is None:
        assert not layer(x, (h, h))[0].requires_grad
        return
    target.requires_grad_()
    output, _ = layer(x, (h, h.detach()))
    (gradient,) = torch.autograd.grad(output.sum(), target)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradient_from_any_one_of_the_outputs(which):
    layer = make_layer(cell_norm=True)
    x = torch.randn(4, 3, 3, dtype=torch.float64, requires_grad=True)

    def call(x):
        output, (h_n, c_n) = layer(x, lengths=[4, 2, 1])
        return (output, h_n, c_n)[which]

    layer.eval()
    assert gradcheck(call, x)


def test_the_same_tensor_in_two_places_gets_both_gradients():
    layer = make_layer(2, 2, max_length=3)
    call, (x, h, c, w_ih, w_hh, bias, gamma, _) = differentiable_call(layer, RAGGED, True)

    def tied(gamma):
        return call(x, h, c, w_ih, w_hh, bias, gamma, gamma)

    assert gradcheck(tied, gamma)
    assert gradgradcheck(tied, gamma)
    (plain,) = torch.autograd.grad(tied(gamma)[0].square().sum(), gamma)
    (with_graph,) = torch.autograd.grad(tied(gamma)[0].square().sum(), gamma, create_graph=True)
    torch.testing.assert_close(with_graph, plain, **CLOSE)  # which gradgradcheck takes for granted


def test_statistics_are_constants():
    """No gradient to running statistics, and phantom rows stand still as the weights move."""
    layer = make_layer()
    output, _ = layer(torch.randn(4, 3, 3, dtype=torch.float64), lengths=[4, 2, 1])
    output.sum().backward()
    for name, buffer in layer.named_buffers():
        assert not buffer.requires_grad, name


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float32, 1e-5)])
def test_other_dtypes_follow_float64(dtype, bound):
    """Relative RMS over four steps and a backward; bounds: some ten roundings of 2⁻⁹, 2⁻¹² and 2⁻²⁵, amplified by the
    division by standard deviations of order 0.3."""
    exact = make_layer(8, 16, cell_norm=True)
    rounded = make_layer(8, 16, cell_norm=True, dtype=dtype)
    x = torch.randn(4, 32, 8).to(dtype)
    with torch.no_grad():
        for name, parameter in exact.named_parameters():
            parameter.copy_(dict(rounded.named_parameters())[name])
    results = []
    for layer, value in ((exact, x.double()), (rounded, x.clone())):
        value.requires_grad_()
        output, (_, c_n) = layer(value, lengths=[4] * 20 + [3] * 6 + [2] * 6)
        assert output.dtype == c_n.dtype == value.dtype
        (output.double() ** 2).sum().backward()
        results.append([output, c_n, value.grad, *(p.grad for p in layer.parameters()), layer.var_hh_l0])
    assert rounded.var_hh_l0.dtype == torch.float32
    for e, a in zip(*results, strict=True):
        assert (a.double() - e).norm() <= bound * e.norm()


def test_autocast_on_the_cpu_runs():
    """Matrix products in bfloat16, states and statistics in the parameters' precision."""
    layer = make_layer(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = layer(torch.randn(4, 8, 3, dtype=torch.bfloat16))
    output.float().sum().backward()
    assert torch.isfinite(layer.weight_hh_l0.grad).all()
    assert layer.mean_hh_l0.dtype == torch.float32
