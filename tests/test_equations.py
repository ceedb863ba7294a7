"""The layer against the straight-line transcription of the paper and of the variable-length rules."""

from __future__ import annotations

import pytest
import torch

from tests.oracle import learnt
from tests.support import CLOSE, make_layer, oracle_of

LENGTHS = {"equal": [7, 7, 7, 7, 7], "ragged": [3, 7, 1, 4, 6]}


@pytest.mark.parametrize("cell_norm", [False, True])
@pytest.mark.parametrize("input_stats", ["time", "sequence"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_outputs_gradients_and_statistics_are_the_papers(
    cell_norm, input_stats, lengths, bias, training, bidirectional
):
    """T = 7 steps over 6 slots: the last steps share a slot."""
    layer = make_layer(cell_norm=cell_norm, input_stats=input_stats, bias=bias, bidirectional=bidirectional)
    layer.train(training)
    directions = ["_l0", "_l0_reverse"] if bidirectional else ["_l0"]
    oracles = [oracle_of(layer, suffix) for suffix in directions]
    x = torch.randn(7, 5, 3, dtype=torch.float64, requires_grad=True)
    h0, c0 = (torch.randn(len(directions), 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inputs = [x, h0, c0, *layer.parameters()]

    output, (h_n, c_n) = layer(x, (h0, c0), lengths=lengths)
    runs = [oracle.run(x, lengths, h0[k], c0[k], training, reverse=k == 1) for k, oracle in enumerate(oracles)]
    expected = [
        torch.cat([run[0] for run in runs], 2),
        torch.stack([run[1] for run in runs]),
        torch.stack([run[2] for run in runs]),
    ]
    actual = [output, h_n, c_n]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **CLOSE)

    weights = [torch.randn_like(e) for e in expected]
    grads = torch.autograd.grad(actual, inputs, weights)
    for a, e in zip(grads, torch.autograd.grad(expected, inputs, weights), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-9)  # sums of many terms, each as CLOSE

    for suffix, oracle, run in zip(directions, oracles, runs, strict=True):
        for norm, seen in run[3].items():
            if norm == "c" and not cell_norm:
                continue
            slots = learnt(oracle.slots[norm], seen, 5, 0.1) if training else oracle.slots[norm]
            for k, slot in enumerate(slots):
                torch.testing.assert_close(getattr(layer, f"mean_{norm}{suffix}")[k], slot.mean, **CLOSE)
                torch.testing.assert_close(getattr(layer, f"var_{norm}{suffix}")[k], slot.var, **CLOSE)
                assert float(getattr(layer, f"count_{norm}{suffix}")[k]) == pytest.approx(slot.count, rel=1e-12)
    assert float(layer.rows) == (5 if training else 4)


@pytest.mark.parametrize("prior_count", [0, 0.5, 1, None])
@pytest.mark.parametrize("momentum", [0.05, 1.0, None])
def test_prior_count_and_momentum_over_several_training_steps(prior_count, momentum):
    """From a layer that has seen nothing: the first step has no population, later ones do."""
    layer = make_layer(seen=False, prior_count=prior_count, momentum=momentum, cell_norm=True)
    oracle = oracle_of(layer)
    zeros = torch.zeros(4, 4, dtype=torch.float64)
    for lengths in ([5, 1, 3, 2], [8, 8, 1, 2], [2, 2, 2, 1]):
        x = torch.randn(max(lengths), 4, 3, dtype=torch.float64)
        output, _ = layer(x, lengths=lengths)
        expected, _, _, seen = oracle.run(x, lengths, zeros, zeros, True)
        torch.testing.assert_close(output, expected, **CLOSE)
        oracle.slots = {norm: learnt(oracle.slots[norm], seen[norm], 4, momentum) for norm in seen}
        oracle.rows = 4
    for norm, slots in oracle.slots.items():
        for k, slot in enumerate(slots):
            torch.testing.assert_close(getattr(layer, f"mean_{norm}_l0")[k], slot.mean, **CLOSE)
            torch.testing.assert_close(getattr(layer, f"var_{norm}_l0")[k], slot.var, **CLOSE)


@pytest.mark.parametrize("start", [0, 2, 5, 9])
@pytest.mark.parametrize("training", [False, True])
def test_start_is_the_slot_of_the_first_step(start, training):
    layer = make_layer(cell_norm=True)
    layer.train(training)
    oracle = oracle_of(layer)
    x = torch.randn(3, 4, 3, dtype=torch.float64)
    h0, c0 = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    output, _ = layer(x, (h0, c0), lengths=[3, 1, 2, 3], start=start)
    expected, _, _, seen = oracle.run(x, [3, 1, 2, 3], h0[0], c0[0], training, start=start)
    torch.testing.assert_close(output, expected, **CLOSE)
    if training:
        assert set(seen["hh"]) == {min(start + t, 5) for t in range(3)}
        for k, slot in enumerate(learnt(oracle.slots["hh"], seen["hh"], 4, 0.1)):
            torch.testing.assert_close(layer.mean_hh_l0[k], slot.mean, **CLOSE)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_stacked_layers_are_one_layer_after_the_other(lengths):
    layer = make_layer(num_layers=2, bidirectional=True, batch_first=True)
    names = ["_l0", "_l0_reverse", "_l1", "_l1_reverse"]
    oracles = [oracle_of(layer, suffix) for suffix in names]
    x = torch.randn(7, 5, 3, dtype=torch.float64)
    zeros = torch.zeros(5, 4, dtype=torch.float64)
    output, (h_n, c_n) = layer(x.transpose(0, 1), lengths=lengths)
    below = x
    states = []
    for k in range(2):
        runs = [oracles[2 * k + d].run(below, lengths, zeros, zeros, True, reverse=d == 1) for d in range(2)]
        below = torch.cat([run[0] for run in runs], 2)
        states += [run[1:3] for run in runs]
    torch.testing.assert_close(output, below.transpose(0, 1), **CLOSE)
    torch.testing.assert_close(h_n, torch.stack([h for h, _ in states]), **CLOSE)
    torch.testing.assert_close(c_n, torch.stack([c for _, c in states]), **CLOSE)


def test_phantom_rows_are_rows():
    """Two rows in vacated seats, at the population's mean ± deviation: batch norm over all of them is the layer's."""
    layer = make_layer(max_length=1, seen=False)
    with torch.no_grad():
        layer.mean_hh_l0.normal_()
        layer.var_hh_l0.uniform_(0.5, 2)
        layer.mean_ih_l0.normal_()
        layer.var_ih_l0.uniform_(0.5, 2)
        for count in (layer.count_hh_l0, layer.count_ih_l0):
            count.fill_(100)
    # four sequences, two of which end after the first step, so that step 1 has two rows and two phantoms
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    populations = {
        n: (getattr(layer, f"mean_{n}_l0")[0].clone(), getattr(layer, f"var_{n}_l0")[0].sqrt()) for n in ("ih", "hh")
    }
    output, (_, c_n) = layer(x, lengths=[2, 2, 1, 1])
    h_1 = output[0, :2]

    def normalised(z, name, gamma):
        mean, deviation = populations[name]
        everyone = torch.cat([z, (mean + deviation)[None], (mean - deviation)[None]])
        y = torch.nn.functional.batch_norm(everyone, None, None, gamma, None, training=True, eps=layer.eps)
        return y[:2]

    a = normalised(x[1, :2] @ layer.weight_ih_l0.T, "ih", layer.gamma_ih_l0) + layer.bias_l0
    a = a + normalised(h_1 @ layer.weight_hh_l0.T, "hh", layer.gamma_hh_l0)
    i, f, g, o = a.chunk(4, 1)
    # c after step 0 from the oracle, which the tests above hold to the layer
    c_1 = oracle_of(layer).run(x[:1], [1] * 4, *torch.zeros(2, 4, 4, dtype=torch.float64), True)[2][:2]
    c_2 = f.sigmoid() * c_1 + i.sigmoid() * g.tanh()
    torch.testing.assert_close(output[1, :2], o.sigmoid() * c_2.tanh(), **CLOSE)
    torch.testing.assert_close(c_n[0, :2], c_2, **CLOSE)


def test_beyond_the_last_slot_its_statistics_serve():
    """In eval, steps past max_length are steps of the last slot."""
    layer = make_layer(max_length=3).eval()
    long = make_layer(max_length=9).eval()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            dict(long.named_parameters())[name].copy_(parameter)
        for name, buffer in long.named_buffers():
            short = dict(layer.named_buffers())[name]
            buffer.copy_(torch.cat([short, short[-1:].expand(6, *short.shape[1:])]) if short.dim() else short)
    x = torch.randn(9, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], long(x)[0], **CLOSE)


def test_large_offsets_do_not_spoil_float32_statistics():
    """A mean 1e3 times the deviation: E[x²] − E[x]² would lose all of a variance of 1e-6 of the mean's square."""
    layer = make_layer(dtype=torch.float32, momentum=1.0, seen=False)
    x = torch.randn(6, 64, 3) + 1e3
    layer(x)
    exact = x.double() @ layer.weight_ih_l0.double().T
    expected = exact.var(1, correction=0)
    # the mean is gone before anything is multiplied: sums of 64 squares, each with a few roundings of 2⁻²⁴
    torch.testing.assert_close(layer.var_ih_l0.double(), expected, rtol=2e-6, atol=0)
