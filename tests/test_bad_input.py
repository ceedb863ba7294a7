"""Every bad argument is named in the error, and nothing has changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from tests.support import assert_same_buffers, buffers, make_layer
from triton_bnlstm import BNLSTM, BNLSTMCell, bn_lstm

X = torch.zeros(6, 5, 3, dtype=torch.float64)
STATE = torch.zeros(1, 5, 4, dtype=torch.float64)

CALLS = {
    "rank 1": ((torch.zeros(3).double(),), {}, ValueError, "input must be 3-D"),
    "rank 4": ((X[None],), {}, ValueError, "input must be 3-D"),
    "width": ((torch.zeros(6, 5, 4).double(),), {}, ValueError, r"input must have 3 features"),
    "dtype": ((X.float(),), {}, TypeError, "input has dtype torch.float32"),
    "integers": ((X.long(),), {}, TypeError, "input has dtype torch.int64"),
    "device": ((X.to("meta"),), {}, ValueError, "input is on meta"),
    "type": (([[1.0]],), {}, TypeError, "input must be a tensor"),
    "nested": (
        (torch.nested.nested_tensor([X[:, 0], X[:3, 1]], layout=torch.jagged),),
        {},
        TypeError,
        "input: a nested tensor is not taken",
    ),
    "T = 0": ((X[:0],), {}, ValueError, r"input has no time steps \(T = 0\)"),
    "B = 0": ((X[:, :0],), {}, ValueError, r"input has an empty batch \(B = 0\)"),
    "B = 1": ((X[:, :1],), {}, ValueError, "at least 2 sequences.*one row has none"),
    "unbatched": ((X[:, 0],), {}, ValueError, "at least 2 sequences.*one row has none"),
    "lengths negative": ((X,), {"lengths": [1, 2, -3, 4, 5]}, ValueError, "lengths must be at least 1, got -3"),
    "lengths zero": ((X,), {"lengths": [1, 2, 0, 4, 5]}, ValueError, "lengths must be at least 1, got 0"),
    "lengths long": ((X,), {"lengths": [1, 2, 7, 4, 5]}, ValueError, "lengths must be at most T = 6, got 7"),
    "lengths few": ((X,), {"lengths": [1, 2]}, ValueError, r"lengths must have shape \(5,\)"),
    "lengths none": ((X,), {"lengths": []}, ValueError, r"lengths must have shape \(5,\).* got \(0,\)"),
    "nothing": ((X[:0, :0],), {"lengths": []}, ValueError, r"input has no time steps \(T = 0\)"),
    "lengths 2-D": ((X,), {"lengths": torch.ones(5, 1).long()}, ValueError, r"lengths must have shape \(5,\)"),
    "lengths float": ((X,), {"lengths": torch.ones(5)}, TypeError, "lengths must be integers"),
    "lengths bool": ((X,), {"lengths": torch.ones(5).bool()}, TypeError, "lengths must be integers"),
    "lengths text": ((X,), {"lengths": "abcde"}, TypeError, "lengths must be"),
    "lengths device": ((X,), {"lengths": torch.ones(5).long().to("meta")}, ValueError, "lengths is on meta"),
    "lengths packed": (
        (pack_padded_sequence(X, [6] * 5),),
        {"lengths": [6] * 5},
        ValueError,
        "lengths: a PackedSequence",
    ),
    "hx one": ((X, STATE), {}, TypeError, "hx must be a pair"),
    "lengths in hx's place": ((X, [6] * 5), {}, TypeError, "hx must be a pair.*lengths and start follow it by name"),
    "hx three": ((X, (STATE,) * 3), {}, TypeError, "hx must be a pair"),
    "hx list": ((X, ([0.0], STATE)), {}, TypeError, r"hx\[0\]"),
    "hx rank": ((X, (STATE[0], STATE)), {}, ValueError, r"hx\[0\] \(h_0\) must have shape \(1, 5, 4\)"),
    "hx batch": ((X, (STATE, STATE[:, :4])), {}, ValueError, r"hx\[1\] \(c_0\) must have shape \(1, 5, 4\)"),
    "hx dtype": ((X, (STATE, STATE.float())), {}, TypeError, r"hx\[1\] \(c_0\) has dtype"),
    "hx device": ((X, (STATE.to("meta"), STATE)), {}, ValueError, r"hx\[0\] \(h_0\) is on meta"),
    "start negative": ((X,), {"start": -1}, ValueError, "start must be at least 0"),
    "start float": ((X,), {"start": 1.0}, TypeError, "start must be an integer"),
}


@pytest.mark.parametrize(("arguments", "options", "error", "match"), CALLS.values(), ids=CALLS)
def test_calls(arguments, options, error, match):
    layer = make_layer()
    before = buffers(layer)
    rng = torch.get_rng_state()
    with pytest.raises(error, match=match):
        layer(*arguments, **options)
    assert_same_buffers(before, buffers(layer))
    assert torch.equal(rng, torch.get_rng_state())


def test_batch_first_names_the_right_dimension():
    layer = make_layer(batch_first=True)
    with pytest.raises(ValueError, match="B = 0"):
        layer(X[:0])
    with pytest.raises(ValueError, match="T = 0"):
        layer(X[:, :0])


CONSTRUCTIONS: dict[str, list[tuple[object, type[Exception]]]] = {
    "input_size": [(0, ValueError), (2.0, TypeError), (True, TypeError)],
    "hidden_size": [(0, ValueError), ("4", TypeError)],
    "num_layers": [(0, ValueError), (1.5, TypeError)],
    "bias": [(1, TypeError)],
    "batch_first": [("no", TypeError)],
    "bidirectional": [(2, TypeError)],
    "dropout": [(-0.1, ValueError), (1.1, ValueError), ("0", TypeError), (True, TypeError)],
    "max_length": [(0, ValueError), (-3, ValueError), (7.0, TypeError), (None, TypeError)],
    "momentum": [(0, ValueError), (0.0, ValueError), (1.01, ValueError), (-0.1, ValueError), ("x", TypeError)],
    "eps": [(0, ValueError), (-1e-5, ValueError), (float("nan"), ValueError)],
    "prior_count": [(-1, ValueError), (float("inf"), ValueError), ("all", TypeError)],
    "gamma_init": [(float("nan"), ValueError), (None, TypeError)],
    "forget_bias": [(float("inf"), ValueError)],
    "initial_noise": [(-1, ValueError)],
    "input_stats": [("batch", ValueError), (None, ValueError)],
    "recurrent_init": [("zeros", ValueError)],
    "backend": [("cuda", ValueError)],
    "cell_norm": [(1, TypeError)],
    "dtype": [(torch.int64, TypeError)],
}


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [(name, value, error) for name, cases in CONSTRUCTIONS.items() for value, error in cases],
)
def test_constructions(name, value, error):
    arguments = {"input_size": 3, "hidden_size": 4, "max_length": 5} | {name: value}
    with pytest.raises(error, match=name):
        BNLSTM(**arguments)
    if name not in ("num_layers", "batch_first", "bidirectional", "dropout", "prior_count", "initial_noise"):
        with pytest.raises(error, match=name):
            BNLSTMCell(**arguments)


def test_max_length_is_required():
    with pytest.raises(TypeError, match="max_length"):
        BNLSTM(3, 4)


def test_good_forms_of_lengths_and_numbers():
    layer = make_layer()
    expected = make_layer()(X, lengths=[1, 2, 3, 4, 5])[0]
    for lengths in (
        torch.tensor([1, 2, 3, 4, 5]),
        torch.tensor([1, 2, 3, 4, 5]).int(),
        np.arange(1, 6),
        (1, 2, 3, 4, 5),
    ):
        assert torch.equal(make_layer()(X, lengths=lengths)[0], expected)
    layer(X, start=np.int64(2))
    BNLSTM(np.int32(3), 4, 2, dropout=np.float32(0.5), max_length=np.int64(5))


untyped_bn_lstm: Any = bn_lstm  # for calls that a type checker would stop

FUNCTIONAL = {
    "training needs rows": (lambda p, s: bn_lstm(X[:, :1], p, s, training=True), ValueError, "at least 2"),
    "input rank": (lambda p, s: bn_lstm(X[:, 0], p, s, training=False), ValueError, "input"),
    "parameters": (lambda p, s: untyped_bn_lstm(X, tuple(p), s, training=True), TypeError, "parameters"),
    "statistics": (lambda p, s: untyped_bn_lstm(X, p, None, training=True), TypeError, "statistics"),
    "training": (lambda p, s: untyped_bn_lstm(X, p, s, training="no"), TypeError, "training"),
    "reverse": (lambda p, s: untyped_bn_lstm(X, p, s, training=True, reverse="no"), TypeError, "reverse"),
    "eps": (lambda p, s: bn_lstm(X, p, s, training=True, eps=0.0), ValueError, "eps"),
    "input_stats": (lambda p, s: bn_lstm(X, p, s, training=True, input_stats="x"), ValueError, "input_stats"),
    "prior_count": (lambda p, s: bn_lstm(X, p, s, training=True, prior_count=-1.0), ValueError, "prior_count"),
    "start": (lambda p, s: bn_lstm(X, p, s, training=True, start=-1), ValueError, "start"),
    "backend": (lambda p, s: bn_lstm(X, p, s, training=True, backend="cpu"), ValueError, "backend"),
    "weight rank": (
        lambda p, s: bn_lstm(X, p._replace(weight_hh=p.bias), s, training=True),
        ValueError,
        "parameters.weight_hh",
    ),
    "weight shape": (
        lambda p, s: bn_lstm(X, p._replace(weight_ih=p.weight_ih[:8]), s, training=True),
        ValueError,
        "parameters.weight_ih",
    ),
    "gamma missing": (
        lambda p, s: bn_lstm(X, p._replace(gamma_ih=None), s, training=True),
        TypeError,
        "parameters.gamma_ih",
    ),
    "gamma_c alone": (
        lambda p, s: bn_lstm(X, p._replace(gamma_c=p.bias[:4]), s, training=True),
        ValueError,
        "gamma_c and beta_c",
    ),
    "cell statistics": (
        lambda p, s: bn_lstm(X, p._replace(gamma_c=p.bias[:4], beta_c=p.bias[:4]), s, training=True),
        ValueError,
        "statistics.c",
    ),
    "statistics shape": (
        lambda p, s: bn_lstm(X, p, s._replace(ih=s.ih._replace(mean=s.ih.mean[:, :3])), training=True),
        ValueError,
        "statistics.ih.mean",
    ),
    "statistics kind": (
        lambda p, s: bn_lstm(X, p, s, training=True, input_stats="time"),
        ValueError,
        "statistics.ih.mean",
    ),
    "count dtype": (
        lambda p, s: bn_lstm(X, p, s._replace(hh=s.hh._replace(count=s.hh.count.float())), training=True),
        TypeError,
        "statistics.hh.count",
    ),
}


@pytest.mark.parametrize(("call", "error", "match"), FUNCTIONAL.values(), ids=FUNCTIONAL)
def test_functional(call, error, match):
    layer = make_layer(input_stats="sequence")
    with pytest.raises(error, match=match):
        call(layer._parameters_of("_l0"), layer._statistics_of("_l0"))
