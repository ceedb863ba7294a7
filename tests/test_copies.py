"""Copies of a layer at any time of its life: the same outputs, and a training of their own from there on."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from tests.support import assert_same_buffers, buffers, make_layer
from triton_bnlstm import BNLSTM, BNLSTMCell, resolved

RAGGED = [4, 2, 1]


def by_file(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_state_dict(module):
    """What it would take in another process: the class again, and a file of tensors only."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.zero_()
    twin.load_state_dict(torch.load(file, weights_only=True))
    return twin


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": by_file,
    "state_dict": by_state_dict,
}


def layer_and_call(kind: str, parametrized: bool):
    """A layer or a cell, and a call of it that takes one sequence of inputs."""
    module: nn.Module
    if kind == "layer":
        module = make_layer(num_layers=2, bidirectional=True, cell_norm=True)

        def call(model, x):
            return model(x, lengths=RAGGED)[0]

        weight = "weight_hh_l0"
    else:
        module = BNLSTMCell.from_layer(make_layer(cell_norm=True))

        def call(model, x):
            state = None
            for t, step in enumerate(x):
                state = model(step, state, time=t)
            return state[0]

        weight = "weight_hh"
    if parametrized:
        parametrizations.weight_norm(module, weight)
    return module, call


def train(model, call, data):
    """A step of SGD on each batch; gives the losses."""
    optimiser, losses = torch.optim.SGD(model.parameters(), lr=0.01), []
    for x in data:
        loss = call(model.train(), x).square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def kept_for(layer):
    """Resolved statistics that evaluation finds for this layer."""
    return [suffix for suffix in layer._all_suffixes() if layer._statistics_of(suffix).hh.mean in resolved._kept]


@pytest.mark.parametrize("kind", ["layer", "cell"])
@pytest.mark.parametrize("parametrized", [False, True], ids=["plain", "weight_norm"])
@pytest.mark.parametrize("when", ["new", "trained", "evaluated", "with a live graph"])
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_lives_on_by_itself(way, when, parametrized, kind):
    layer, call = layer_and_call(kind, parametrized)
    data = [torch.randn(4, 3, 3).double() for _ in range(2)]
    alive = None
    if when != "new":
        train(layer, call, data)
    if when == "evaluated":
        call(layer.eval(), data[0])
        assert kept_for(layer)
    if when == "with a live graph":
        alive = checkpoint(partial(call, layer), data[0], use_reentrant=False)
    if parametrized and way in ("pickle", "torch.save"):
        with pytest.raises(RuntimeError, match="only supported through state_dict"):  # torch's word
            WAYS[way](layer)
        return
    twin = WAYS[way](layer)
    assert repr(twin) == repr(layer)
    assert twin.training == layer.training
    assert not kept_for(twin)
    assert not list(twin._calls._all())
    assert_same_buffers(buffers(layer), buffers(twin))
    mode = layer.training
    assert torch.equal(call(twin.eval(), data[1]), call(layer.eval(), data[1]))
    layer.train(mode), twin.train(mode)

    parameters = {name: p.detach().clone() for name, p in layer.named_parameters()}
    before = buffers(layer)
    losses = train(twin, call, data)
    for name, p in layer.named_parameters():  # the copy's training has touched nothing of the original
        assert torch.equal(p, parameters[name]), name
    assert_same_buffers(before, buffers(layer))
    if alive is not None:
        alive.sum().backward()  # the graph is the original's, and whole
        assert layer.get_parameter("gamma_hh_l0" if kind == "layer" else "gamma_hh").grad.abs().sum() > 0
    assert train(layer, call, data) == losses  # and the original's is the same
    assert_same_buffers(buffers(layer), buffers(twin))


@pytest.mark.parametrize("parametrized", [False, True], ids=["plain", "weight_norm"])
def test_a_copy_sees_its_own_statistics_change(parametrized):
    """The original's cache counts writes to buffers; a copy's count anew, and would come to its number some day."""
    layer = make_layer()
    if parametrized:
        parametrizations.weight_norm(layer, "weight_hh_l0")
    x = torch.randn(4, 3, 3).double()
    for _ in range(3):
        layer(x)
    layer.eval()(x)
    for writes in range(1, 9):
        twin = copy.deepcopy(layer)
        with torch.no_grad():
            for _ in range(writes):
                for buffer in twin.buffers():
                    buffer.mul_(2)
        fresh = copy.deepcopy(twin)
        fresh.train().eval()  # looks again
        found = twin(x)[0]
        assert torch.equal(found, fresh(x)[0])
        assert not torch.allclose(found, layer(x)[0])


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_what_was_told_stays_told(way):
    layer = make_layer()
    with pytest.warns(RuntimeWarning, match="not finite"):
        layer(torch.full((6, 3, 3), float("nan")).double())
    twin = WAYS[way](layer)
    twin.eval()  # no second warning, which would be an error here
    assert twin._skipped_steps == 1


def test_shared_layers_stay_shared():
    layer = make_layer()
    pair = copy.deepcopy(nn.ModuleList([layer, layer]))
    assert pair[0] is pair[1]
    assert pair[0] is not layer


def test_a_cached_weight_is_not_the_copys():
    """Within `parametrize.cached()` copies compute their own."""
    layer = make_layer(num_layers=1)
    parametrizations.weight_norm(layer, "weight_hh_l0")
    x = torch.randn(4, 3, 3).double()
    with parametrize.cached():
        expected = layer.eval()(x)[0]
        twin = copy.deepcopy(layer)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(1.5)
        assert not torch.allclose(twin(x)[0], expected)
        assert torch.equal(layer(x)[0], expected)


def test_a_pickle_without_what_is_of_the_moment():
    """Nothing of a call is in the file: its size does not depend on what the layer has done."""
    fresh = BNLSTM(3, 4, max_length=6)
    size = len(pickle.dumps(fresh))
    for _ in range(3):
        fresh(torch.randn(4, 3, 3), lengths=RAGGED)
    with torch.no_grad():
        fresh(torch.randn(4, 3, 3), lengths=RAGGED)
    fresh.eval()(torch.randn(4, 3, 3))
    assert abs(len(pickle.dumps(fresh)) - size) < 50  # numbers written in more digits or fewer
