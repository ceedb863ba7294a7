"""finished="frozen": sequences that have ended are counted in the batch's statistics with what they held last."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from bench.paper.formulations import FORMULATIONS, Batch, Weights
from bench.paper.formulations import forward as formulation_forward
from tests.oracle import Slot, learnt
from tests.support import CLOSE, assert_same_buffers, buffers, make_layer
from triton_bnlstm import BNLSTM, bn_lstm, estimate_statistics, functional, update_statistics
from triton_bnlstm.packing import Packing
from triton_bnlstm.reference import Parameters
from triton_bnlstm.statistics import Moments

LENGTHS = [3, 6, 1, 4, 6]
STEPS, ROWS = 8, 5  # two steps longer than the longest sequence
NORMS = list(product(["time", "sequence"], [False, True]))


def frozen(**options) -> BNLSTM:
    return make_layer(finished="frozen", **options)


def rectangle(fill: float = float("nan")) -> Tensor:
    x = torch.randn(STEPS, ROWS, 3, dtype=torch.float64)
    for b, length in enumerate(LENGTHS):
        x[length:, b] = fill
    return x.requires_grad_()


def masked(monkeypatch) -> None:
    """Lengths go the way of those that the host may not look at."""
    monkeypatch.setattr(
        Packing, "of_host_lengths", lambda steps, lengths, device: Packing.of_device_lengths(steps, lengths)
    )


# The definition, written out


def batch_norm(rows: list[Tensor], eps: float) -> tuple[list[Tensor], Tensor, Tensor]:
    z = torch.stack(rows)
    mean = z.mean(0)
    var = (z - mean).square().mean(0)
    return [(one - mean) / (var + eps).sqrt() for one in rows], mean, var


def direction(
    p: dict[str, Tensor], x: list[list[Tensor]], h: list[Tensor], c: list[Tensor], over_time: bool, eps: float
) -> tuple[list[list[Tensor]], list[Tensor], list[Tensor], dict[str, list[Slot]]]:
    """x: of each sequence its frames in the order in which they are read. Output of each, h_n, c_n, moments by step."""
    seen: dict[str, list[Slot]] = {"ih": [], "hh": [], "c": []}

    def normed(name: str, rows: list[Tensor]) -> list[Tensor]:
        found, mean, var = batch_norm(rows, eps)
        seen[name].append(Slot(mean.detach(), var.detach(), float(len(rows))))
        return found

    outputs: list[list[Tensor]] = [[] for _ in x]
    h, c = list(h), list(c)
    if not over_time:
        frames = normed("ih", [p["weight_ih"] @ frame for frames in x for frame in frames])
    starts = [sum(len(frames) for frames in x[:b]) for b in range(len(x))]
    for t in range(max(len(frames) for frames in x)):
        last = [min(t, len(frames) - 1) for frames in x]
        if over_time:
            inputs = normed("ih", [p["weight_ih"] @ x[b][last[b]] for b in range(len(x))])
        else:
            inputs = [frames[starts[b] + last[b]] for b in range(len(x))]
        recurrent = normed("hh", [p["weight_hh"] @ state for state in h])
        opened: dict[int, Tensor] = {}
        for b in range(len(x)):
            if t < len(x[b]):
                a = p["gamma_ih"] * inputs[b] + p["gamma_hh"] * recurrent[b] + p["bias"]
                i, f, g, o = a.chunk(4)
                c[b] = f.sigmoid() * c[b] + i.sigmoid() * g.tanh()
                opened[b] = o.sigmoid()
        cells = c
        if "gamma_c" in p:
            cells = [p["gamma_c"] * y + p["beta_c"] for y in normed("c", c)]
        for b, o in opened.items():
            h[b] = o * cells[b].tanh()
            outputs[b].append(h[b])
    return outputs, h, c, seen


def transcribed(
    layer: BNLSTM, x: Tensor, hx: tuple[Tensor, Tensor], start: int = 0
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """All layers and directions: output, h_n, c_n, and the statistics after this step."""
    frames = [[x[t, b] for t in range(length)] for b, length in enumerate(LENGTHS)]
    h_n, c_n, place = [], [], 0
    after: dict[str, Tensor] = {}
    for suffixes in layer._suffixes:
        found = []
        for suffix in suffixes:
            p = {k: v for k, v in layer._parameters_of(suffix)._asdict().items() if v is not None}
            reverse = suffix.endswith("_reverse")
            turned = [list(reversed(one)) if reverse else one for one in frames]
            h_0, c_0 = (list(state[place]) for state in hx)
            outputs, h, c, seen = direction(p, turned, h_0, c_0, layer.input_stats == "time", layer.eps)
            found.append([list(reversed(one)) if reverse else one for one in outputs])
            h_n.append(torch.stack(h))
            c_n.append(torch.stack(c))
            place += 1
            for norm in ("ih", "hh", "c"):
                if seen[norm]:
                    names = [f"{kind}_{norm}{suffix}" for kind in ("mean", "var", "count")]
                    old = [Slot(m, v, float(n)) for m, v, n in zip(*(getattr(layer, k) for k in names), strict=True)]
                    at = [min(start + t, len(old) - 1) for t in range(len(seen[norm]))]
                    assert len(set(at)) == len(at)  # what slots pool is another test's
                    new = learnt(old, dict(zip(at, seen[norm], strict=True)), ROWS, layer.momentum)
                    columns = [[s.mean for s in new], [s.var for s in new], [torch.tensor(s.count) for s in new]]
                    after |= {k: torch.stack(column) for k, column in zip(names, columns, strict=True)}
        frames = [[torch.cat(parts) for parts in zip(*each, strict=True)] for each in zip(*found, strict=True)]
    padded = [torch.stack(one + [torch.zeros_like(one[0])] * (STEPS - len(one))) for one in frames]
    return torch.stack(padded, 1), torch.stack(h_n), torch.stack(c_n), after


def states(layer: BNLSTM) -> tuple[Tensor, Tensor]:
    places = len(layer._all_suffixes())
    h, c = (torch.randn(places, ROWS, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return h, c


@pytest.mark.parametrize(
    ("shape", "form"),
    [
        ({}, "list"),
        ({}, "packed"),
        ({}, "device"),
        ({"num_layers": 2, "bidirectional": True}, "list"),
        ({"num_layers": 2, "bidirectional": True}, "device"),
    ],
    ids=["list", "packed", "device", "deep list", "deep device"],
)
@pytest.mark.parametrize(("input_stats", "cell_norm"), NORMS)
def test_is_what_it_says(input_stats, cell_norm, shape, form, monkeypatch):
    """Outputs, states, every gradient and the statistics, of padding that is NaN."""
    layer = frozen(input_stats=input_stats, cell_norm=cell_norm, max_length=9, **shape)
    x, hx, start = rectangle(), states(layer), 2
    before = copy.deepcopy(layer)
    *expected, after = transcribed(layer, x, hx, start)
    if form == "packed":
        packed = pack_padded_sequence(x, torch.tensor(LENGTHS), enforce_sorted=False)
        rows, (h_n, c_n) = layer(packed, hx, start=start)
        output = pad_packed_sequence(rows, total_length=STEPS)[0]
    else:
        if form == "device":
            masked(monkeypatch)
        output, (h_n, c_n) = layer(x, hx, LENGTHS, start)
    results = [output, h_n, c_n]
    weights = [torch.randn_like(y) for y in expected]
    inputs = [x, *hx, *layer.parameters()]
    for found, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)
    gradients = torch.autograd.grad(results, inputs, weights)
    for found, wanted in zip(gradients, torch.autograd.grad(expected, inputs, weights), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)
    for b, length in enumerate(LENGTHS):
        assert (output[length:, b] == 0).all()
        assert (gradients[0][length:, b] == 0).all()
    for name, value in after.items():
        torch.testing.assert_close(getattr(layer, name), value, check_dtype=False, **CLOSE)
        assert not torch.equal(getattr(before, name), value.to(torch.float64))


def test_another_definition_would_show():
    """What the comparison above stands on: phantom rows, and the same without the gradient, are far from it."""
    layer, phantom = frozen(cell_norm=True), make_layer(cell_norm=True)
    x, hx = rectangle(), states(layer)
    output = layer(x, hx, LENGTHS)[0]
    assert (phantom(x, hx, LENGTHS)[0] - output).abs().max() > 1e-2
    # a finished sequence's last frame is told by a step that it has no part in, but for its seat in the statistics
    (gradient,) = torch.autograd.grad(output[5, 1].sum(), x)
    assert (gradient[0, 2].abs() > 1e-6).all()


@pytest.mark.parametrize(("input_stats", "cell_norm"), NORMS)
def test_counts_are_of_all_rows(input_stats, cell_norm):
    layer = frozen(input_stats=input_stats, cell_norm=cell_norm, max_length=9, seen=False)
    layer(rectangle(), lengths=LENGTHS)
    counts = {name: moments.count.tolist() for name, moments in layer.statistics().items()}
    steps = [5.0] * 6 + [0.0] * 3
    assert counts.pop("ih") == (steps if input_stats == "time" else [float(sum(LENGTHS))])
    assert all(count == steps for count in counts.values())
    assert len(counts) == 1 + cell_norm


def test_nothing_is_taken_from_the_population():
    x = rectangle()
    outputs = [frozen(seen=seen, cell_norm=True)(x, lengths=LENGTHS)[0] for seen in (False, True)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("form", ["none", "lengths", "packed"])
@pytest.mark.parametrize(("input_stats", "cell_norm"), NORMS)
def test_equal_lengths_are_the_defaults_bit_for_bit(input_stats, cell_norm, form):
    found = []
    x = torch.randn(6, ROWS, 3, dtype=torch.float64)
    for finished in ("phantom", "frozen"):
        layer = make_layer(finished=finished, input_stats=input_stats, cell_norm=cell_norm, bidirectional=True)
        given = x.clone().requires_grad_()
        if form == "packed":
            output = layer(pack_padded_sequence(given, torch.tensor([6] * ROWS)))[0].data
        else:
            output = layer(given, lengths=[6] * ROWS if form == "lengths" else None)[0]
        output.square().sum().backward()
        found.append([output, given.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
    for phantom, own in zip(*found, strict=True):
        assert torch.equal(phantom, own)


def test_evaluation_is_the_defaults_bit_for_bit():
    x = rectangle()
    outputs = [make_layer(finished=finished).eval()(x, lengths=LENGTHS)[0] for finished in ("phantom", "frozen")]
    assert torch.equal(*outputs)


@pytest.mark.parametrize(("input_stats", "cell_norm"), NORMS)
def test_is_the_papers_frozen_rows(input_stats, cell_norm):
    """bench.paper's formulation of the same, float64."""
    layer = frozen(input_stats=input_stats, cell_norm=cell_norm, eps=1e-5, seen=False)
    order = sorted(range(ROWS), key=lambda b: -LENGTHS[b])
    lengths = torch.tensor(LENGTHS)[order]
    x = rectangle(0.0).detach()[:6, order]
    p = {k: v for k, v in layer._parameters_of("_l0")._asdict().items() if v is not None}
    weights = Weights(**{k: v.detach()[None].requires_grad_() for k, v in p.items()})
    given = Batch(x[:, None], lengths[None])
    h, own = formulation_forward(FORMULATIONS["frozen rows"], weights, given, None, over_time=input_stats == "time")
    output, _ = layer(x, lengths=lengths)
    valid = (torch.arange(6)[:, None] < lengths)[..., None]
    torch.testing.assert_close(output, h[:, 0] * valid, **CLOSE)
    weight = torch.randn_like(output)
    (output * weight).sum().backward()
    (h[:, 0] * valid * weight).sum().backward()
    for name, parameter in p.items():
        torch.testing.assert_close(parameter.grad, getattr(weights, name).grad[0], rtol=1e-8, atol=1e-9)
    for norm, moments in layer.statistics().items():
        for kind in ("mean", "var"):  # of a population that had seen nothing
            torch.testing.assert_close(getattr(moments, kind), getattr(own[norm], kind)[:, 0], **CLOSE)


@pytest.mark.parametrize(("input_stats", "cell_norm"), [("time", True), ("sequence", False)])
def test_gradcheck_and_gradgradcheck(input_stats, cell_norm):
    layer = frozen(input_size=2, hidden_size=2, input_stats=input_stats, cell_norm=cell_norm, max_length=3)
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    h, c = (torch.randn(1, 4, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def call(x, h, c, *parameters):
        given = (x, (h, c), [3, 1, 2, 3])
        output, (h_n, c_n) = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), given)
        return output, h_n, c_n

    assert gradcheck(call, (x, h, c, *parameters), fast_mode=True)
    assert gradgradcheck(call, (x, h, c, *parameters), fast_mode=True)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell_norm", [False, True])
def test_the_function_is_the_layer(reverse, cell_norm):
    """`bn_lstm` and `update_statistics` against the layer's second direction (or first)."""
    layer = frozen(cell_norm=cell_norm, bidirectional=True)
    suffix = "_l0_reverse" if reverse else "_l0"
    known = layer._statistics_of(suffix)
    known = known._replace(
        **{k: m.clone() for k, m in known._asdict().items() if isinstance(m, Moments)}, rows=known.rows.clone()
    )
    x, place = rectangle(), int(reverse)
    hx = states(layer)
    result = bn_lstm(
        x,
        Parameters(*layer._parameters_of(suffix)),
        known,
        (hx[0][place], hx[1][place]),
        LENGTHS,
        training=True,
        reverse=reverse,
        finished="frozen",
        input_stats="time",
        eps=layer.eps,
    )
    output, (h_n, c_n) = layer(x, hx, LENGTHS)
    assert torch.equal(result.output, output[..., 4 * place : 4 * place + 4])
    assert torch.equal(result.h_n, h_n[place])
    assert torch.equal(result.c_n, c_n[place])
    after = update_statistics(known, result.moments)
    for found, wanted in zip(after[:3], layer._statistics_of(suffix)[:3], strict=True):
        assert (found is None) == (wanted is None)
        for a, b in zip(found or (), wanted or (), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    """The same gradients and one update; nothing is noted, since nothing of the population is used."""
    x, found = rectangle().detach(), []
    for mode in (None, use_reentrant):
        layer, given = frozen(cell_norm=True, num_layers=2, bidirectional=True), x.clone().requires_grad_()

        def features(x, layer=layer):
            return layer(x * 2, lengths=LENGTHS)[0]

        y = features(given) if mode is None else checkpoint(features, given, use_reentrant=mode)
        assert not list(layer._calls._all())
        y.square().sum().backward()
        found.append(([given.grad, *(p.grad for p in layer.parameters())], buffers(layer)))
    for plain, again in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-12, atol=1e-12)
    assert_same_buffers(found[0][1], found[1][1])


# A pass over data


class MaskedPacking(Packing):
    @classmethod
    def of_host_lengths(cls, steps, lengths, device):
        return Packing.of_device_lengths(steps, lengths)


@pytest.mark.parametrize("mode", ["batches", "paper"])
def test_estimate_reproduces_a_training_pass(mode):
    """Statistics of one batch are those that a training step of it has taught to a layer that never forgets."""
    x = rectangle().detach()
    trained = frozen(seen=False, momentum=None, cell_norm=True, num_layers=2, bidirectional=True)
    trained(x, lengths=LENGTHS)
    layer = frozen(seen=True, cell_norm=True, num_layers=2, bidirectional=True)
    estimate_statistics(layer, [(x, None, LENGTHS)], mode)
    for name, value in trained.named_buffers():
        if name != "rows":
            torch.testing.assert_close(dict(layer.named_buffers())[name], value, **CLOSE)


@pytest.mark.parametrize("items", [[[4, 2]], [[4, 4], [3, 3]], [[2, 2], [4, 3]]])
@pytest.mark.parametrize("on_device", [False, True])
def test_whole_is_for_equal_lengths(items, on_device, monkeypatch):
    if on_device:  # only where the layer packs its input: the pass itself goes by the real one
        monkeypatch.setattr(functional, "Packing", MaskedPacking)
    layer = frozen()
    before = buffers(layer)
    data = [(torch.randn(4, 2, 3, dtype=torch.float64), None, lengths) for lengths in items]
    with pytest.raises(ValueError, match=r'mode="whole".*finished="frozen"'):
        estimate_statistics(layer, data, "whole")
    assert_same_buffers(before, buffers(layer))


def test_whole_of_equal_lengths_is_as_ever():
    data = [(torch.randn(4, 2, 3, dtype=torch.float64), None, lengths) for lengths in (None, [4, 4])]
    found = []
    for finished in ("phantom", "frozen"):
        layer = make_layer(finished=finished)
        estimate_statistics(layer, data, "whole")
        found.append(buffers(layer))
    assert_same_buffers(*found)
