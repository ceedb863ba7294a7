"""The layer is used as nn.LSTM is: shapes, states, packing, state_dict, copies, conversions."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from tests.support import CLOSE, assert_same_buffers, buffers, make_layer, randomise
from triton_bnlstm import BNLSTM, _base

SHAPES = list(itertools.product([1, 3], [False, True], [False, True], [False, True]))


@pytest.mark.parametrize(("num_layers", "bidirectional", "batch_first", "bias"), SHAPES)
@pytest.mark.parametrize("given", ["padded", "unbatched", "packed", "packed unsorted", "with states"])
def test_values_and_shapes_are_those_of_nn_lstm(num_layers, bidirectional, batch_first, bias, given):
    """from_lstm in eval: for every form of input the same numbers in the same shapes."""
    lstm = nn.LSTM(3, 4, num_layers, bias, batch_first, bidirectional=bidirectional).double().eval()
    layer = BNLSTM.from_lstm(lstm, max_length=5)
    assert not layer.training
    x = torch.randn(6, 5, 3).double()
    x = x.transpose(0, 1) if batch_first else x
    arguments = (x,)
    if given == "unbatched":
        arguments = (torch.randn(6, 3).double(),)
    elif given.startswith("packed"):
        lengths = torch.tensor([6, 5, 3, 3, 1] if given == "packed" else [3, 6, 1, 3, 5])
        arguments = (pack_padded_sequence(x, lengths, batch_first, enforce_sorted=given == "packed"),)
    elif given == "with states":
        places = num_layers * (2 if bidirectional else 1)
        arguments = (x, tuple(torch.randn(places, 5, 4).double() for _ in range(2)))
    output, (h_n, c_n) = layer(*arguments)
    expected, (h, c) = lstm(*arguments)
    if given.startswith("packed"):
        assert type(output) is type(expected)
        assert torch.equal(output.batch_sizes, expected.batch_sizes)
        output, expected = output.data, expected.data
    for mine, theirs in ((output, expected), (h_n, h), (c_n, c)):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, **CLOSE)


def test_unbatched_states():
    lstm = nn.LSTM(3, 4, 2).double().eval()
    layer = BNLSTM.from_lstm(lstm, max_length=5)
    x, hx = torch.randn(6, 3).double(), tuple(torch.randn(2, 4).double() for _ in range(2))
    for mine, theirs in zip(layer(x, hx)[1], lstm(x, hx)[1], strict=True):
        assert mine.shape == theirs.shape == (2, 4)
        torch.testing.assert_close(mine, theirs, **CLOSE)


def test_parameters_have_the_documented_names_and_shapes():
    layer = BNLSTM(3, 4, 2, bidirectional=True, max_length=5, cell_norm=True)
    expected = {}
    for k, d in ((0, 3), (1, 8)):
        for suffix in (f"_l{k}", f"_l{k}_reverse"):
            expected |= {f"weight_ih{suffix}": (16, d), f"weight_hh{suffix}": (16, 4), f"bias{suffix}": (16,)}
            expected |= {f"gamma_ih{suffix}": (16,), f"gamma_hh{suffix}": (16,)}
            expected |= {f"gamma_c{suffix}": (4,), f"beta_c{suffix}": (4,)}
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == expected
    plain = BNLSTM(3, 4, max_length=5, bias=False)
    assert set(dict(plain.named_parameters())) == {"weight_ih_l0", "weight_hh_l0", "gamma_ih_l0", "gamma_hh_l0"}
    assert plain.bias_l0 is None
    lstm = dict(nn.LSTM(3, 4, 2, bidirectional=True).named_parameters())
    for name, shape in expected.items():
        if name.startswith("weight"):
            assert tuple(lstm[name].shape) == shape


def test_initial_values():
    layer = BNLSTM(3, 4, max_length=5, cell_norm=True, gamma_init=0.2, forget_bias=0.5)
    for gamma in (layer.gamma_ih_l0, layer.gamma_hh_l0, layer.gamma_c_l0):
        assert (gamma == 0.2).all()
    assert (layer.beta_c_l0 == 0).all()
    assert layer.bias_l0.tolist() == [0] * 4 + [0.5] * 4 + [0] * 8
    for gate in layer.weight_hh_l0.split(4):
        torch.testing.assert_close(gate @ gate.T, torch.eye(4))
    identity = BNLSTM(3, 4, max_length=5, recurrent_init="identity")
    assert torch.equal(identity.weight_hh_l0, torch.eye(4).repeat(4, 1))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert BNLSTM(3, 4, max_length=5, dtype=dtype).weight_hh_l0.isfinite().all()


def test_factory_arguments():
    layer = BNLSTM(3, 4, max_length=5, device="meta", dtype=torch.float16)
    assert all(p.is_meta and p.dtype == torch.float16 for p in layer.parameters())
    assert all(b.is_meta for b in layer.buffers())
    layer.to_empty(device="cpu").reset_parameters()
    assert torch.equal(layer.var_hh_l0, torch.ones(5, 16))
    assert layer.half()(torch.randn(5, 2, 3).half())[0].isfinite().all()


def test_from_lstm_carries_options_and_trains():
    lstm = nn.LSTM(3, 4, 2, dropout=0.25, batch_first=True)
    layer = BNLSTM.from_lstm(lstm, max_length=7, momentum=None, input_stats="sequence")
    assert (layer.dropout, layer.batch_first, layer.momentum, layer.training) == (0.25, True, None, True)
    assert torch.equal(layer.bias_l1, lstm.bias_ih_l1 + lstm.bias_hh_l1)
    layer(torch.randn(2, 5, 3))[0].sum().backward()
    assert layer.weight_hh_l1.grad.abs().sum() > 0
    options = {"eps": 0.1, "initial_noise": 0.5, "prior_count": 3.0, "cell_norm": True, "backend": "reference"}
    other = BNLSTM.from_lstm(lstm.eval(), max_length=7, **options)
    assert {name: getattr(other, name) for name in options} == options
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(BNLSTM.from_lstm(lstm, max_length=7, eps=0.1)(x)[0], lstm(x)[0])
    with pytest.raises(ValueError, match="proj_size"):
        BNLSTM.from_lstm(nn.LSTM(3, 4, proj_size=2), max_length=7)
    with pytest.raises(TypeError, match="lstm"):
        BNLSTM.from_lstm(nn.GRU(3, 4), max_length=7)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("input_stats", ["time", "sequence"])
def test_to_lstm_is_exact_from_the_last_slot_on(bias, bidirectional, input_stats):
    layer = make_layer(
        num_layers=2, bias=bias, bidirectional=bidirectional, input_stats=input_stats, batch_first=True
    ).eval()
    lstm = layer.to_lstm()
    assert not lstm.training
    assert lstm.weight_hh_l0.dtype == torch.float64
    x = torch.randn(3, 9, 3).double()
    output, (h_n, c_n) = layer(x, start=5)
    expected, (h, c) = lstm(x)
    torch.testing.assert_close(output, expected, **CLOSE)
    torch.testing.assert_close(h_n, h, **CLOSE)
    torch.testing.assert_close(c_n, c, **CLOSE)
    assert not torch.allclose(layer(x)[0], expected)  # earlier slots have statistics of their own


def test_to_lstm_of_from_lstm_is_the_lstm():
    lstm = nn.LSTM(3, 4, 2, bidirectional=True).double()
    again = BNLSTM.from_lstm(lstm, max_length=3).to_lstm()
    x = torch.randn(6, 2, 3).double()
    torch.testing.assert_close(again(x)[0], lstm(x)[0], **CLOSE)


def test_to_lstm_with_cell_norm_is_refused():
    with pytest.raises(ValueError, match="cell_norm"):
        make_layer(cell_norm=True).to_lstm()


@pytest.mark.parametrize("chunks", [(3, 6), (1, 8), (5, 4)])
def test_two_chunks_are_one_call_in_eval(chunks):
    layer = make_layer(num_layers=2, cell_norm=True).eval()
    x = torch.randn(9, 2, 3).double()
    output, (h_n, c_n) = layer(x)
    first, hx = layer(x[: chunks[0]])
    second, (h, c) = layer(x[chunks[0] :], hx, start=chunks[0])
    torch.testing.assert_close(torch.cat([first, second]), output, **CLOSE)
    torch.testing.assert_close(h, h_n, **CLOSE)
    torch.testing.assert_close(c, c_n, **CLOSE)


def test_dropout_stands_between_layers_in_training_only():
    """dropout=1 leaves the second layer nothing: its input statistics are 0, the first's are not."""
    layer = make_layer(num_layers=2, dropout=1.0, seen=False, momentum=1.0)
    x = torch.randn(4, 3, 3).double()
    layer(x)
    assert (layer.mean_ih_l1[:4] == 0).all()
    assert (layer.mean_ih_l0[:4] != 0).all()
    assert layer(x)[0].abs().sum() > 0  # nothing is dropped after the last layer
    reference = make_layer(num_layers=2)
    layer.load_state_dict(reference.state_dict())
    assert torch.equal(layer.eval()(x)[0], reference.eval()(x)[0])
    with pytest.warns(UserWarning, match="num_layers=1"):
        BNLSTM(3, 4, max_length=5, dropout=0.5)


def test_dropout_rate(monkeypatch):
    seen = []
    run = _base.run
    monkeypatch.setattr(_base, "run", lambda calls, *how: seen.append(calls[0].x) or run(calls, *how))
    make_layer(num_layers=2, dropout=0.25, hidden_size=50)(torch.randn(20, 10, 3).double())
    kept = seen[1] != 0
    assert 0.23 < 1 - kept.double().mean() < 0.27  # 10,000 draws at 0.25: standard error 0.004
    whole = []
    monkeypatch.setattr(_base, "run", lambda calls, *how: whole.append(calls[0].x) or run(calls, *how))
    torch.manual_seed(0)
    make_layer(num_layers=2, hidden_size=50)(torch.randn(20, 10, 3).double())
    torch.testing.assert_close(seen[1][kept], whole[1][kept] / 0.75)  # what is kept is scaled up


def test_initial_noise_only_in_training_and_without_states():
    """Equal rows have no variance at the first step; noise on h_0 gives them one, in every layer and direction."""
    options = {"num_layers": 2, "bidirectional": True, "momentum": 1.0, "seen": False}
    x = torch.ones(3, 64, 3).double()
    quiet, noisy = make_layer(**options), make_layer(initial_noise=0.5, **options)
    quiet(x), noisy(x)
    for suffix in ("_l0", "_l0_reverse", "_l1", "_l1_reverse"):
        assert (getattr(quiet, f"var_hh{suffix}")[0] < 1e-20).all()
        weight = getattr(noisy, f"weight_hh{suffix}")
        expected = 0.25 * weight.square().sum(1)
        # the variance of 64 draws has a relative standard error of √(2/63) = 0.18; the mean of 16 columns of it, which
        # share four units, about half
        ratio = (getattr(noisy, f"var_hh{suffix}")[0] / expected).mean()
        assert 0.6 < ratio < 1.5, suffix
    hx = tuple(torch.zeros(4, 64, 4).double() for _ in range(2))
    before = noisy(x, hx)[0]
    assert torch.equal(noisy(x, hx)[0], before)
    noisy.eval()
    assert torch.equal(noisy(x)[0], noisy(x)[0])


def test_state_dict_round_trip():
    source = make_layer(num_layers=2, bidirectional=True, cell_norm=True)
    source(torch.randn(4, 3, 3).double())
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target = make_layer(num_layers=2, bidirectional=True, cell_norm=True, seed=5, seen=False)
    assert str(target.load_state_dict(torch.load(file, weights_only=True))) == "<All keys matched successfully>"
    assert_same_buffers(buffers(source), buffers(target))
    x = torch.randn(4, 3, 3).double()
    assert torch.equal(source.eval()(x)[0], target.eval()(x)[0])
    assert "_skipped_steps" not in source.state_dict()


def test_state_dict_of_another_max_length_says_what_to_do():
    source, target = make_layer(max_length=9), make_layer(max_length=6, seed=1)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    model = nn.ModuleDict({"rnn": target})
    for load in (
        lambda: target.load_state_dict(source.state_dict()),
        lambda: model.load_state_dict({f"rnn.{k}": v for k, v in source.state_dict().items()}, strict=False),
    ):
        with pytest.raises(ValueError, match=r"max_length.*set_max_length\(9\)"):
            load()
        for name, value in target.state_dict().items():
            assert torch.equal(value, before[name])
    target.set_max_length(9)  # as the message says
    target.load_state_dict(source.state_dict())
    target.set_max_length(6)
    x = torch.randn(5, 2, 3).double()
    torch.testing.assert_close(target.eval()(x)[0], source.eval()(x)[0], **CLOSE)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_whole_and_independent(how):
    layer = make_layer(num_layers=2, cell_norm=True)
    layer(torch.randn(6, 3, 3).double(), lengths=[6, 2, 1])  # leaves transient state behind
    layer.eval()(torch.randn(6, 3, 3).double())
    if how == "deepcopy":
        twin = copy.deepcopy(layer)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    x = torch.randn(6, 3, 3).double()
    assert torch.equal(twin(x)[0], layer(x)[0])
    assert repr(twin) == repr(layer)
    before = buffers(layer)
    twin.train()(x, lengths=[6, 3, 1])[0].sum().backward()
    assert_same_buffers(before, buffers(layer))
    assert layer.weight_hh_l0.grad is None


def test_repr_shows_what_is_not_default():
    assert repr(BNLSTM(3, 4, max_length=5)) == "BNLSTM(3, 4, max_length=5)"
    layer = BNLSTM(3, 4, 2, bias=False, max_length=5, cell_norm=True, momentum=None, initial_noise=0.1)
    assert repr(layer) == (
        "BNLSTM(3, 4, num_layers=2, bias=False, max_length=5, cell_norm=True, momentum=None, initial_noise=0.1)"
    )


def test_noncontiguous_and_expanded_inputs():
    a, b = make_layer(), make_layer()
    x = torch.randn(3, 5, 6).double().permute(2, 1, 0)
    assert torch.equal(a(x)[0], b(x.contiguous())[0])
    hx = torch.randn(1, 1, 4).double().expand(1, 5, 4)
    assert torch.equal(a(x, (hx, hx))[0], b(x.contiguous(), (hx.contiguous(), hx.contiguous()))[0])


def test_training_follows_a_loss_down():
    """The whole of it: a layer and a head learn to tell which half of the sequence was larger."""
    layer, head = BNLSTM(1, 8, max_length=6), nn.Linear(8, 1)
    optimiser = torch.optim.Adam([*layer.parameters(), *head.parameters()], 2e-2)
    losses = []
    for _ in range(100):
        x = torch.randn(6, 32, 1)
        target = (x[:3].sum(0) > x[3:].sum(0)).float()
        loss = nn.functional.binary_cross_entropy_with_logits(head(layer(x)[1][0][0]), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_randomise_reaches_everything():
    """What the other tests rely on: nothing is at its initial value."""
    fresh, layer = BNLSTM(3, 4, max_length=6, cell_norm=True), BNLSTM(3, 4, max_length=6, cell_norm=True)
    randomise(layer)
    for name, value in layer.state_dict().items():
        assert not torch.equal(value, fresh.state_dict()[name]), name
