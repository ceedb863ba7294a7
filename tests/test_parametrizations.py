"""Weights that are computed from others, masked or clipped, and the optimisers that move them: on both backends."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.kernel_cases import DEVICE
from tests.support import CLOSE, buffers, make_layer, need_kernels
from triton_bnlstm import BNLSTM, BNLSTMCell, estimate_statistics

KINDS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}
BACKENDS = {"reference": torch.float64, "triton": torch.float32}
RAGGED = [3, 1, 2]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "triton":
        need_kernels()
    return request.param


def layer_on(backend: str, **options) -> BNLSTM:
    return make_layer(dtype=BACKENDS[backend], backend=backend, **options).to(DEVICE)


def inputs(layer: BNLSTM, steps: int = 3, batch: int = 3) -> torch.Tensor:
    return torch.randn(steps, batch, 3).to(layer.rows.device, next(layer.parameters()).dtype)


def frozen(layer: BNLSTM) -> BNLSTM:
    """Without the step of power iteration that spectral_norm takes in training each time its weight is computed."""
    for module in layer.modules():
        if isinstance(module, parametrize.ParametrizationList):
            module.eval()
    return layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_gradients_are_the_plain_layers_through_the_parametrization(kind, backend, training):
    """A plain layer with the weights as computed gives their gradients; autograd takes these to what is learnt."""
    layer = layer_on(backend, num_layers=2).train(training)
    for name in ("weight_hh_l0", "weight_ih_l0", "weight_hh_l1"):
        KINDS[kind](layer, name)
    frozen(layer)
    plain = layer_on(backend, num_layers=2).train(training)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(getattr(layer, name))
    x = inputs(layer)
    output, expected = (model(x, lengths=RAGGED)[0] for model in (layer, plain))
    # the same numbers go into the same operations
    assert torch.equal(output, expected)
    weight = torch.randn_like(output)
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, parameter in plain.named_parameters():
        if parametrize.is_parametrized(layer, name):
            learnt = list(layer.parametrizations[name].parameters())
            wanted = torch.autograd.grad(getattr(layer, name), learnt, parameter.grad)
            for p, gradient in zip(learnt, wanted, strict=True):
                assert torch.equal(p.grad, gradient), name
                assert gradient.abs().sum() > 0
        else:
            assert torch.equal(layer.get_parameter(name).grad, parameter.grad), name
    for name, buffer in buffers(plain).items():
        assert torch.equal(layer.get_buffer(name), buffer), name


@pytest.mark.parametrize("kind", KINDS)
def test_training_keeps_the_weight_what_it_is(kind, backend):
    layer = layer_on(backend)
    KINDS[kind](layer, "weight_hh_l0")
    target, x = torch.randn(3, 3, 4).to(layer.gamma_hh_l0), inputs(layer)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.03)
    before, losses = layer.weight_hh_l0.detach().clone(), []
    for _ in range(9):
        loss = (layer(x, lengths=RAGGED)[0] - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    weight = layer.weight_hh_l0.detach()
    assert not torch.allclose(weight, before, rtol=0.01)
    if kind == "orthogonal":
        torch.testing.assert_close(weight.T @ weight, torch.eye(4).to(weight), rtol=0, atol=1e-5)  # of float32
    elif kind == "spectral_norm":
        # power iteration goes along: one step for each of ours, while the weight moves by 0.03 a step
        assert 0.9 < torch.linalg.matrix_norm(weight, 2) < 1.1
    else:
        magnitude = layer.parametrizations.weight_hh_l0.original0.detach()
        torch.testing.assert_close(weight.norm(dim=1, keepdim=True), magnitude.abs())


@pytest.mark.parametrize("kind", KINDS)
def test_states_copies_and_conversions(kind):
    layer, twin = (make_layer(num_layers=2, seed=seed) for seed in (0, 1))
    for model in (layer, twin):
        KINDS[kind](model, "weight_hh_l1")
    x = torch.randn(6, 3, 3).double()
    for _ in range(2):
        layer(x, lengths=[6, 4, 1])[0].sum().backward()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    expected = layer.eval()(x)[0]
    assert torch.equal(twin.eval()(x)[0], expected)
    assert torch.equal(copy.deepcopy(layer)(x)[0], expected)
    with parametrize.cached():
        assert torch.equal(layer(x)[0], expected)
        assert torch.equal(layer(x)[0], expected)
    torch.testing.assert_close(layer.to_lstm()(x)[0], layer(x, start=5)[0], **CLOSE)
    cells, states = [BNLSTMCell.from_layer(layer, k) for k in range(2)], [None, None]
    for t, step in enumerate(x):
        for k, cell in enumerate(cells):
            states[k] = cell(step if k == 0 else states[0][0], states[k], time=t)
        torch.testing.assert_close(states[1][0], expected[t], **CLOSE)
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*weight_hh_l1.*Unexpected key"):
        make_layer(num_layers=2).load_state_dict(layer.state_dict())
    parametrize.remove_parametrizations(twin, "weight_hh_l1")
    assert type(twin) is BNLSTM
    assert torch.equal(twin(x)[0], expected)
    make_layer(num_layers=2).load_state_dict(twin.state_dict())
    twin.train()(x)[0].sum().backward()
    assert twin.weight_hh_l1.grad.abs().sum() > 0
    narrow = copy.deepcopy(layer).float()
    assert narrow.weight_hh_l1.dtype == torch.float32
    assert narrow.count_hh_l1.dtype == torch.float64
    torch.testing.assert_close(narrow(x.float())[0].double(), expected, rtol=1e-4, atol=1e-5)  # float32, six steps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["batches", "whole"])
def test_statistics_of_a_computed_weight(kind, mode, backend):
    """They are a plain layer's with the weight as it is in evaluation."""
    layer, plain = layer_on(backend), layer_on(backend)
    KINDS[kind](layer, "weight_hh_l0")
    x = inputs(layer)
    layer(x)  # spectral_norm takes a step
    weight = layer.eval().weight_hh_l0.detach()
    layer.train()
    with torch.no_grad():
        plain.weight_hh_l0.copy_(weight)
    plain(x)
    plain.load_state_dict({n: b for n, b in layer.named_buffers(recurse=False) if n in plain.state_dict()}, False)
    for model in (layer, plain):
        estimate_statistics(model, [{"input": x, "lengths": RAGGED}], mode=mode)
    for name, buffer in buffers(plain).items():
        assert torch.equal(layer.get_buffer(name), buffer), name
    assert layer.training
    assert torch.equal(layer.eval()(x)[0], plain.eval()(x)[0])


class Counting(nn.Module):
    """The weight itself; counts how often it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return weight * 1


def test_a_call_computes_a_weight_once(backend):
    """An orthogonal weight takes longer than a step, and spectral_norm's power iteration goes on with each time."""
    layer = layer_on(backend, num_layers=2)
    counters = {name: Counting() for name in ("weight_hh_l0", "weight_ih_l0", "weight_hh_l1")}
    for name, counter in counters.items():
        parametrize.register_parametrization(layer, name, counter)

    def counts(run):
        for counter in counters.values():
            counter.count = 0
        run()
        return {counter.count for counter in counters.values()}

    x = inputs(layer)
    assert counts(lambda: layer(x, lengths=RAGGED)[0].sum().backward()) == {1}
    assert counts(lambda: layer(x)) == {1}
    assert counts(lambda: layer.eval()(x)) == {1}
    assert counts(lambda: layer.to(DEVICE).train().state_dict()) == {0}
    with parametrize.cached():
        assert counts(lambda: (layer(x), layer(x))) == {1}
    cell = BNLSTMCell.from_layer(layer)
    counter = Counting()
    parametrize.register_parametrization(cell, "weight_hh", counter)
    counter.count = 0
    cell(x[0])
    assert counter.count == 1


def test_a_pruned_weight_stays_pruned(backend):
    layer = layer_on(backend)
    prune.random_unstructured(layer, "weight_hh_l0", 0.5)
    mask, x = layer.weight_hh_l0_mask.bool(), inputs(layer)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = layer.weight_hh_l0_orig.detach().clone()
    for _ in range(2):
        optimiser.zero_grad()
        layer(x, lengths=RAGGED)[0].square().sum().backward()
        optimiser.step()
    layer.eval()
    expected = layer(x)[0]
    assert (layer.weight_hh_l0[~mask] == 0).all()
    assert torch.equal(layer.weight_hh_l0_orig[~mask], before[~mask])
    assert not torch.allclose(layer.weight_hh_l0[mask], before[mask])
    prune.remove(layer, "weight_hh_l0")
    assert torch.equal(layer(x)[0], expected)
    assert layer.state_dict().keys() == layer_on(backend).state_dict().keys()


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2, "cell_norm": True, "bias": False}])
def test_gradients_are_what_fused_optimisers_and_clipping_take(backend, options):
    """Dense, in the parameters' dtype and strides, and no two of them in one memory."""
    layer = layer_on(backend, **options)
    layer(inputs(layer), lengths=RAGGED)[0].square().sum().backward()
    places = set()
    for name, p in layer.named_parameters():
        assert p.grad.layout == torch.strided, name
        assert (p.grad.dtype, p.grad.device, p.grad.stride()) == (p.dtype, p.device, p.stride()), name
        places.add(p.grad.untyped_storage().data_ptr())
    assert len(places) == len(list(layer.parameters()))
    gradients = [p.grad.clone() for p in layer.parameters()]
    norm = torch.stack([g.norm() for g in gradients]).norm()
    for foreach in (False, True):
        for p, gradient in zip(layer.parameters(), gradients, strict=True):
            p.grad = gradient.clone()
        found = nn.utils.clip_grad_norm_(layer.parameters(), float(norm) / 2, foreach=foreach)
        torch.testing.assert_close(found, norm)
        for p, gradient in zip(layer.parameters(), gradients, strict=True):
            torch.testing.assert_close(p.grad, gradient / 2, rtol=1e-5, atol=1e-7)  # 1e-6 is added to the norm
    largest = max(float(p.grad.abs().max()) for p in layer.parameters())
    nn.utils.clip_grad_value_(layer.parameters(), largest / 4)
    assert max(float(p.grad.abs().max()) for p in layer.parameters()) == pytest.approx(largest / 4)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD], ids=["AdamW", "SGD"])
def test_fused_and_foreach_optimisers_go_the_same_way(make, backend):
    results = []
    for how in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        layer = layer_on(backend)
        torch.manual_seed(3)
        optimiser = make(layer.parameters(), lr=1e-3, weight_decay=0.01, **how)
        for _ in range(3):
            optimiser.zero_grad()
            layer(inputs(layer), lengths=RAGGED)[0].square().sum().backward()
            nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
            optimiser.step()
        results.append({name: value.clone() for name, value in layer.state_dict().items()})
    for name, value in results[0].items():
        for other in results[1:]:
            # roundings of one step go through two more; where a gradient is next to nothing Adam's step is not, but
            # it is at most lr
            bound = {"rtol": 1e-4, "atol": 1e-5} if value.dtype == torch.float32 else {"rtol": 1e-8, "atol": 1e-9}
            torch.testing.assert_close(other[name], value, **bound, msg=lambda text, name=name: f"{name}: {text}")
