"""finished="frozen": arguments, what does not go together with it, and what says so."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from tests.support import assert_same_buffers, buffers
from tests.test_frozen_rows import LENGTHS, ROWS, STEPS, frozen, rectangle
from triton_bnlstm import BNLSTM, bn_lstm, dispatch, traced
from triton_bnlstm.distributed import NO_KERNELS

# Arguments, and what does not go together


def test_argument():
    assert "finished" not in repr(BNLSTM(3, 4, max_length=5))
    layer = BNLSTM(3, 4, max_length=5, input_stats="time", finished="frozen", eps=1e-3)
    assert repr(layer) == "BNLSTM(3, 4, max_length=5, input_stats='time', finished='frozen', eps=0.001)"
    assert copy.deepcopy(layer).finished == "frozen"
    assert BNLSTM.from_lstm(nn.LSTM(3, 4), max_length=5, finished="frozen").finished == "frozen"
    assert BNLSTM.from_lstm(nn.LSTM(3, 4), max_length=5).finished == "phantom"
    with pytest.raises(ValueError, match="finished"):
        BNLSTM(3, 4, max_length=5, finished="held")


@pytest.mark.parametrize("prior_count", [0, 3.5])
def test_prior_count_has_no_use(prior_count):
    match = r'prior_count.*finished="frozen"'
    with pytest.raises(ValueError, match=match):
        BNLSTM(3, 4, max_length=5, prior_count=prior_count, finished="frozen")
    layer = frozen()
    known = layer._statistics_of("_l0")
    options = {"training": True, "prior_count": prior_count, "finished": "frozen"}
    with pytest.raises(ValueError, match=match):
        bn_lstm(rectangle(), layer._parameters_of("_l0"), known, None, LENGTHS, **options)
    layer.prior_count = prior_count  # later on, too
    with pytest.raises(ValueError, match=match):
        layer(rectangle(), lengths=LENGTHS)
    layer.prior_count, layer.finished = None, "held"
    with pytest.raises(ValueError, match="finished"):
        layer(rectangle(), lengths=LENGTHS)


def test_process_group(tmp_path):
    layer = frozen(process_group="world")
    before = buffers(layer)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r'process_group.*finished="frozen"'):
            layer(rectangle(), lengths=LENGTHS)
        assert_same_buffers(before, buffers(layer))
        layer.eval()(rectangle(), lengths=LENGTHS)
    finally:
        torch.distributed.destroy_process_group()


def test_kernels_say_that_they_do_not_have_it(monkeypatch):
    """As for process_group: "auto" warns once on a device that has kernels, "triton" raises; not for equal lengths."""
    monkeypatch.setattr(dispatch, "KERNEL_DEVICES", ("cpu",))
    monkeypatch.setattr(dispatch, "why_no_kernels", lambda device, dtype: None)
    monkeypatch.setattr(dispatch, "_told", set())
    ran = []
    monkeypatch.setattr(dispatch.importlib, "import_module", lambda name: ran.append(name) or pytest.skip)
    layer, x = frozen(), rectangle()
    with pytest.raises(RuntimeError, match=r'backend="triton": finished="frozen"'):
        frozen(backend="triton")(x, lengths=LENGTHS)
    with pytest.warns(RuntimeWarning, match=r'reference path: finished="frozen"'):
        layer(x, lengths=LENGTHS)
    layer(x, lengths=LENGTHS)  # said once: a second warning would be an error here
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frozen(backend="reference")(x, lengths=LENGTHS)
    assert not ran
    assert NO_KERNELS not in dispatch._told


# Compilers, exporters, transforms


def test_compiled_code_leaves_it():
    """A training call with lengths runs uncompiled, and is not the phantom rows' operator."""
    torch._dynamo.reset()
    x, layer = rectangle(), frozen(cell_norm=True)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="eager")
    assert torch.equal(compiled(x, lengths=LENGTHS)[0], twin(x, lengths=LENGTHS)[0])
    assert_same_buffers(buffers(layer), buffers(twin))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="frozen"):
        torch.compile(layer, backend="eager", fullgraph=True)(x, lengths=LENGTHS)
    assert 'finished="frozen"' in traced.UNCOMPILED


def test_tracing_and_export_are_refused():
    layer = frozen(dtype=torch.float32)
    x, lengths = torch.randn(STEPS, ROWS, 3), torch.tensor(LENGTHS)
    with pytest.raises(RuntimeError, match=r'finished="frozen"'):
        torch.export.export(layer, (x, None, lengths), strict=False)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
        with pytest.raises(RuntimeError, match=r'finished="frozen"'):
            layer(fake, lengths=LENGTHS)
        layer(fake)  # equal lengths know no such rows
        known = layer._statistics_of("_l0")
        parameters = layer._parameters_of("_l0")
        options = {"input_stats": "time", "finished": "frozen"}
        with pytest.raises(RuntimeError, match=r'finished="frozen"'):
            bn_lstm(fake, parameters, known, None, LENGTHS, training=True, **options)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch.func's own
def test_transforms_and_forward_mode():
    """Models of an ensemble each by its own rows, and derivatives of torch.func those of the hand-written backward."""
    layers = [frozen(seed=seed, cell_norm=True, bidirectional=True) for seed in (1, 2)]
    x = rectangle(0.0).detach()
    expected = []
    stacked, shared = torch.func.stack_module_state(layers)
    for layer in layers:
        given = x.clone().requires_grad_()
        loss = layer(given, lengths=LENGTHS)[0].square().sum()
        expected.append(torch.autograd.grad(loss, given)[0])

    def loss_of(x, parameters, statistics):
        state = {name: value.clone() for name, value in statistics.items()}
        return torch.func.functional_call(layers[0], (parameters, state), (x, None, LENGTHS))[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss_of), (None, 0, 0))(x, stacked, shared)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-8, atol=1e-9)
    tangent = torch.randn_like(x)
    one = {name: value[0] for name, value in stacked.items()}, {name: value[0] for name, value in shared.items()}
    _, moved = torch.func.jvp(lambda x: loss_of(x, *one), (x,), (tangent,))
    torch.testing.assert_close(moved, (expected[0] * tangent).sum(), rtol=1e-8, atol=1e-9)
    with pytest.raises(RuntimeError, match="vmap in training"):
        torch.func.vmap(lambda x: layers[0](x, lengths=LENGTHS)[0])(torch.stack([x, x]))
