"""torch.func and forward mode: right on the reference path, refused by the kernels; no vmap shares a population."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vjp, vmap

from tests.kernel_cases import DEVICE, kernel_layer
from tests.support import CLOSE, assert_same_buffers, buffers, make_layer, need_kernels
from triton_bnlstm import BNLSTMCell, bn_lstm, dispatch

# torch's own, where it derives forwards
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

RAGGED = [6, 2, 4]
OPTIONS = [{}, {"num_layers": 2, "bidirectional": True, "cell_norm": True}]


def state_of(layer):
    return dict(layer.named_parameters()), dict(layer.named_buffers())


def loss_of(layer, state, x, lengths=None):
    output, (h_n, c_n) = functional_call(layer, state, (x,), {"lengths": lengths})
    return output.square().sum() + h_n.sum() + c_n.sin().sum()


def close(found, expected):
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("options", OPTIONS, ids=["", "deep"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("lengths", [None, RAGGED], ids=["equal", "ragged"])
def test_grad_is_backward(options, training, lengths):
    """In values, and in what the running statistics learn of it: one step."""
    layer = make_layer(**options).train(training)
    twin = copy.deepcopy(layer)
    x = torch.randn(6, 3, 3).double()
    parameters, others = state_of(layer)
    found, of_x = grad(lambda p, y: loss_of(layer, (p, others), y, lengths), argnums=(0, 1))(parameters, x)
    y = x.clone().requires_grad_()
    loss_of(twin, {}, y, lengths).backward()
    close(of_x, y.grad)
    for name, parameter in twin.named_parameters():
        close(found[name], parameter.grad)
    for name, buffer in buffers(layer).items():
        close(buffer, buffers(twin)[name])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_derivatives_of_any_order(training):
    """Forwards, backwards and both, against autograd's gradients of gradients."""
    layer = make_layer(max_length=3, cell_norm=True).train(training)
    x, direction = torch.randn(2, 3, 3).double(), torch.randn(2, 3, 3).double()
    state = [state_of(layer)]

    def loss(y):
        return loss_of(layer, state[0], y)

    y = x.clone().requires_grad_()
    value = loss(y)
    (first,) = torch.autograd.grad(value, y, create_graph=True)
    (second,) = torch.autograd.grad((first * direction).sum(), y)
    found, derivative = jvp(loss, (x,), (direction,))
    close(found, value.detach())
    close(derivative, (first * direction).sum().detach())
    close(vjp(loss, x)[1](torch.ones_like(value))[0], first.detach())
    close(grad(lambda z: (grad(loss)(z) * direction).sum())(x), second)
    close(jacrev(loss)(x), first.detach())
    whole = hessian(loss)(x)
    close((whole.view(18, 18) @ direction.view(18)).view_as(x), second)
    with forward_ad.dual_level():
        dual = loss(forward_ad.make_dual(x, direction))
        close(forward_ad.unpack_dual(dual).tangent, derivative)


def test_a_batch_of_gradients():
    layer = make_layer(num_layers=2)
    x = torch.randn(6, 3, 3).double().requires_grad_()
    output, _ = layer(x, lengths=RAGGED)
    wanted = torch.randn(2, *output.shape).double()
    (found,) = torch.autograd.grad(output, x, wanted, is_grads_batched=True, retain_graph=True)
    for k in range(2):
        close(found[k], torch.autograd.grad(output, x, wanted[k], retain_graph=True)[0])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("of", ["each its own data", "the same data"])
def test_an_ensemble(training, of):
    """A vmap over parameters and buffers: each model as if it were alone, in gradients and statistics too."""
    models = [make_layer(seed=k, num_layers=2).train(training) for k in range(3)]
    x = torch.randn(3, 6, 4, 3).double()
    lengths = [6, 2, 4, 4]
    parameters, others = stack_module_state(models)
    before = {name: buffer.clone() for name, buffer in others.items()}
    own = of == "each its own data"

    def loss(p, b, y):
        return loss_of(models[0], (p, b), y, lengths)

    found = vmap(grad(loss), in_dims=(0, 0, 0 if own else None))(parameters, others, x if own else x[0])
    for k, model in enumerate(models):
        loss_of(model, {}, x[k if own else 0], lengths).backward()
        for name, parameter in model.named_parameters():
            close(found[name][k], parameter.grad)
        for name, buffer in model.named_buffers():
            close(others[name][k], buffer)
    assert training is not all(torch.equal(before[name], others[name]) for name in before)


def test_vmap_over_data_in_evaluation():
    layer = make_layer(bidirectional=True).eval()
    x = torch.randn(2, 6, 4, 3).double()
    output = vmap(lambda y: layer(y)[0])(x)
    for k in range(2):
        close(output[k], layer(x[k])[0])
    close(vmap(lambda y: layer(y)[0], in_dims=1, out_dims=1)(x[0]), layer(x[0])[0])
    weights = torch.randn(2, 16, 4).double()  # of which only some are batched
    found = vmap(lambda w: functional_call(layer, {"weight_hh_l0": w}, (x[0],))[0])(weights)
    close(found[1], functional_call(layer, {"weight_hh_l0": weights[1]}, (x[0],))[0])
    with torch.no_grad():
        close(vmap(lambda y: layer(y)[0])(x)[0], output[0])


def test_vmap_over_lengths_is_refused():
    layer = make_layer().eval()
    x, lengths = torch.randn(2, 6, 3, 3).double(), torch.tensor([RAGGED, [1, 2, 3]])
    with pytest.raises(RuntimeError, match="lengths: vmap cannot go over them"):
        vmap(lambda y, n: layer(y, lengths=n)[0])(x, lengths)


@pytest.mark.parametrize(
    "call",
    [
        lambda layer, x: vmap(lambda y: layer(y)[0])(torch.stack([x, x])),
        lambda layer, x: vmap(lambda y: layer(y)[0], in_dims=1)(x),
        lambda layer, x: vmap(lambda h: layer(x, (h, h))[0])(torch.zeros(2, 1, 3, 4).double()),
        lambda layer, x: vmap(lambda w: functional_call(layer, {"weight_hh_l0": w}, (x,))[0])(layer.weight_hh_l0[None]),
        lambda layer, x: vmap(BNLSTMCell.from_layer(layer))(x[None, 0]),
    ],
    ids=["calls", "sequences", "states", "weights", "cell"],
)
def test_vmap_with_one_population_is_refused_in_training(call):
    layer = make_layer()
    before = buffers(layer)
    with pytest.raises(RuntimeError, match=r"vmap in training: .* same running statistics"):
        call(layer, torch.randn(6, 3, 3).double())
    assert_same_buffers(buffers(layer), before)


def test_the_pure_function_goes_through_vmap():
    """It has no statistics to write: each call is normalised by its own batch."""
    layer = make_layer()
    x = torch.randn(2, 6, 3, 3).double()
    given = layer._parameters_of("_l0"), layer._statistics_of("_l0")

    def run(y):
        result = bn_lstm(y, *given, lengths=RAGGED, training=True, input_stats="time")
        return result.output, result.moments.hh.mean

    output, mean = vmap(run)(x)
    for k in range(2):
        close((output[k], mean[k]), run(x[k]))


def test_a_step_that_is_not_finite_is_not_learnt():
    layer = make_layer(momentum=0.5)
    before = buffers(layer)
    x = torch.randn(6, 3, 3).double()
    x[2, 1] = float("nan")
    grad(lambda y: loss_of(layer, state_of(layer), y))(x)
    after = buffers(layer)
    assert after.pop("_skipped_steps") == 1
    before.pop("_skipped_steps")
    assert_same_buffers(after, before)
    with pytest.warns(RuntimeWarning, match="1 training step"):
        layer.eval()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_kernels_refuse(training, monkeypatch):
    need_kernels()
    layer = kernel_layer(2, 3).train(training)
    x = torch.randn(3, 4, 2, device=DEVICE)
    before = buffers(layer)

    def loss(y):
        return layer(y)[0].square().sum()

    for transform in (grad(loss), jacrev(loss), hessian(loss), lambda y: jvp(loss, (y,), (y,))):
        with pytest.raises(RuntimeError, match=r'backend="triton": the kernels do not go through the transforms'):
            transform(x)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivatives"):
        loss(forward_ad.make_dual(x, x))
    assert_same_buffers(buffers(layer), before)

    monkeypatch.setattr(dispatch, "KERNEL_DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(dispatch, "_told", set())
    layer.backend = "auto"
    twin = copy.deepcopy(layer)
    twin.backend = "reference"
    with pytest.warns(RuntimeWarning, match="runs on the reference path: .* transforms of torch.func"):
        found = grad(loss)(x)
    y = x.clone().requires_grad_()
    twin(y)[0].square().sum().backward()
    torch.testing.assert_close(found, y.grad)
