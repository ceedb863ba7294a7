"""bench.paper.gradient_flow: the gradients that it measures, and what it says of them."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import quad

from bench.paper import gradient_flow as flow
from bench.paper import gradient_flow_told as told
from bench.paper import gradients
from bench.paper.data import Images
from triton_bnlstm import BNLSTM

T, B, H, CLASSES = 6, 5, 4, 3
GAMMAS = [0.1, 1.0]
SETTINGS = {**flow.SIZES["quick"], "hidden": H, "batch": B, "seeds": 2, "gammas": GAMMAS, "about": "made up"}


def double(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def images(monkeypatch):
    """Noise in place of digits, whose reading takes seconds."""
    made = Images(torch.rand(9, T), torch.arange(9) % CLASSES, *(torch.arange(9) for _ in range(3)), CLASSES)
    monkeypatch.setattr(gradients, "_images", lambda side: made)


def norm(a, gamma):
    """Batch norm by torch, with one γ for all columns; none if gamma is None."""
    if gamma is None:
        return a
    return F.batch_norm(a, None, None, training=True, eps=1e-5) * gamma


def by_perturbations(step, x, y, h_0, readout):
    """∂L/∂h_t as the derivative by something that is added to h_t: no tensor of the recurrence is asked."""
    added = torch.zeros(len(x), *h_0.shape, dtype=torch.float64, requires_grad=True)
    h, c = h_0, torch.zeros_like(h_0)
    for t in range(len(x)):
        h, c = step(x[t], h, c)
        h = h + added[t]
    logits = h @ readout.t()
    loss = (torch.logsumexp(logits, 1) - logits[torch.arange(len(y)), y]).mean()
    return torch.autograd.grad(loss, added)[0]


def problem():
    return double(T, B, 1, seed=1), torch.arange(B) % CLASSES, 0.1 * double(B, H, seed=2), double(CLASSES, H, seed=3)


# --- gradients ---


@pytest.mark.parametrize("start", told.STARTS["BN-LSTM"])
@pytest.mark.parametrize("model", ["BN-LSTM", "BN-LSTM, cell norm", "LSTM"])
def test_lstm_gradients_are_those_of_the_equations(model, start):
    gamma = None if model == "LSTM" else 0.3
    torch.manual_seed(5)
    step = gradients.lstm_of(gradients.Case(model, start, gamma), H, T, "cpu")
    torch.manual_seed(5)
    recurrent_init = "identity" if start == "identity" else "orthogonal"
    twin = BNLSTM(1, H, max_length=T, recurrent_init=recurrent_init, dtype=torch.float64)
    w_ih, w_hh = twin.weight_ih_l0.detach(), twin.weight_hh_l0.detach().clone()
    if start == "identity for g":
        w_hh[2 * H : 3 * H] = torch.eye(H)

    def equations(x, h, c):
        a = norm(h @ w_hh.t(), gamma) + norm(x @ w_ih.t(), gamma)
        i, f, g, o = a[:, :H], a[:, H : 2 * H] + 1, a[:, 2 * H : 3 * H], a[:, 3 * H :]
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * norm(c, gamma if model.endswith("cell norm") else None).tanh(), c

    x, y, h_0, readout = problem()
    _, found = gradients.hidden_gradients(step, x, y, (h_0, torch.zeros_like(h_0)), readout)
    expected = by_perturbations(equations, x, y, h_0, readout)
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.3, None])
@pytest.mark.parametrize("start", told.STARTS["BN-RNN"])
def test_rnn_gradients_are_those_of_the_equations(start, gamma):
    torch.manual_seed(5)
    rnn = gradients.TanhRNN(1, H, gamma, start).double().requires_grad_(False)
    if start == "identity":
        assert torch.equal(rnn.weight_hh, torch.eye(H, dtype=torch.float64))
    torch.testing.assert_close(rnn.weight_hh @ rnn.weight_hh.t(), torch.eye(H, dtype=torch.float64), atol=1e-6, rtol=0)

    def equations(x, h, c):
        return (norm(h @ rnn.weight_hh.t(), gamma) + norm(x @ rnn.weight_ih.t(), gamma)).tanh(), c

    x, y, h_0, readout = problem()
    states, found = gradients.hidden_gradients(lambda t, x, states: (rnn(x, states[0]),), x, y, (h_0,), readout)
    torch.testing.assert_close(
        torch.stack(found), by_perturbations(equations, x, y, h_0, readout), rtol=1e-8, atol=1e-14
    )
    if gamma is not None:
        sigma = (states[0] @ rnn.weight_hh.t()).std(0, correction=0)
        assert rnn.gain(states[0]) == pytest.approx(torch.log10(gamma / sigma).mean().item(), abs=1e-2)


@pytest.mark.usefixtures("images")
def test_norms_are_of_sequences_and_their_mean_is_taken(monkeypatch):
    rows = torch.tensor([[3.0, 4.0], [0.0, 3.0]], dtype=torch.float64)  # norms 5 and 3
    zero = torch.zeros(2, H, dtype=torch.float64)
    monkeypatch.setattr(gradients, "hidden_gradients", lambda *arguments: ([zero, zero], [rows, 0 * rows]))
    found = gradients.measure(gradients.Case("RNN", "identity", None), SETTINGS, 0, "cpu")
    assert found["norm"][0] == pytest.approx(math.log10(4))
    assert math.isfinite(found["norm"][1])  # what has died is at the end of float64, not at −∞
    assert found["slope"] == 1


@pytest.mark.usefixtures("images")
def test_jobs_report_their_work_and_depend_on_gamma_and_start():
    every = flow.jobs(SETTINGS, {})
    keys = [job.key for job in every]
    assert len(set(keys)) == len(keys)
    values = {}
    for job in every:
        reports: list[float] = []
        values[job.key] = json.loads(json.dumps(flow.run(job.arguments, SETTINGS, "cpu", reports.append)))
        assert sum(reports) == pytest.approx(job.work)
    curves = {key: tuple(value["norm"]) for key, value in values.items() if key != "tanh"}
    assert len(set(curves.values())) == len(curves)
    assert all(len(curve) == T for curve in curves.values())
    first = {key: value["first"] for key, value in values.items() if key != "tanh"}
    assert all(len(set(ratios)) == 2 for ratios in first.values())  # seeds differ
    assert all(curve[0] - curve[-1] == pytest.approx(sum(first[key]) / 2, abs=2e-3) for key, curve in curves.items())


# --- figure 1(b) ---


def test_slope_of_tanh_is_that_of_numerical_integration():
    found = gradients.slope(0.7)
    mean, _ = quad(
        lambda x: (1 - math.tanh(x) ** 2) * math.exp(-((x / 0.7) ** 2) / 2) / (0.7 * math.sqrt(2 * math.pi)), -9, 9
    )
    assert found["mean"] == pytest.approx(mean, abs=1e-9)
    share = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    slopes = 1 - torch.tanh(0.7 * torch.special.ndtri(share)) ** 2
    assert found["lower"] == pytest.approx(slopes.quantile(0.25).item(), abs=1e-4)
    assert found["upper"] == pytest.approx(slopes.quantile(0.75).item(), abs=1e-4)
    assert gradients.slope(0.0) == {"mean": pytest.approx(1), "lower": 1, "upper": 1}


# --- what is said ---


def test_positions_have_both_ends():
    assert gradients.positions_of(784)[[0, -1]].tolist() == [1, 784]
    assert len(gradients.positions_of(784).unique()) == gradients.POSITIONS
    assert gradients.positions_of(6).tolist() == [1, 2, 3, 4, 5, 6]


def test_summary_counts_steps_back_from_the_end():
    norm = torch.tensor([-9.0, -2.0, -5.1, -4.9, -1.0, -2.0])
    assert flow.of_seed(norm) == {"first": -7, "low": -7, "high": 1, "lost": 3}
    assert flow.of_seed(norm[3:])["lost"] is None


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-6.9, 6.9, "lives"), (-7.1, 0, "vanishes"), (0, 7.1, "explodes"), (-7.1, 9, "explodes"), (-9, 7.1, "vanishes")],
)
def test_outcome(low, high, expected):
    assert told.outcome(low, high) == expected


def case(*ratios):
    """A result whose norms go straight from 10^ratio of the last to the last, for each seed."""
    curve = torch.tensor([[ratio * (1 - k / (T - 1)) for k in range(T)] for ratio in ratios], dtype=torch.float64)
    each = [flow.of_seed(norm) for norm in curve]
    return {
        **{name: [entry[name] for entry in each] for name in each[0]},
        "norm": curve.mean(0).tolist(),
        "steps": T,
        "slope": [0.9] * len(ratios),
        "gain": [0.01] * len(ratios),
    }


@pytest.mark.parametrize(
    ("small", "large", "expected"),
    [
        ((0.5, -1.5), (-20.0, -30.0), "| holds | lives | vanishes |"),
        ((-20.0, -30.0), (0.5, -1.5), "| neither | vanishes | lives |"),
        ((0.5, -1.5), (20.0, 30.0), "| (1) only | lives | explodes |"),
        ((8.0, 9.0), (-20.0, -30.0), "| (2) only | explodes | vanishes |"),
        ((-1.0, -8.0), (-20.0, 30.0), "| neither | lives (1 of 2), vanishes (1 of 2) | "),
    ],
)
def test_tables_tell_what_the_results_are(small, large, expected):
    results = {"BN-LSTM; orthogonal; 0.1": case(*small), "BN-LSTM; orthogonal; 1": case(*large)}
    lines = told.tables(SETTINGS, results)
    rows = [line for line in lines if line.startswith("| BN-LSTM, orthogonal |")]
    verdict, ratios, low, high = rows
    assert expected in verdict
    means = [sum(pair) / 2 for pair in (small, large)]
    assert ratios == f"| BN-LSTM, orthogonal | {means[0]:.1f} | {means[1]:.1f} |  |"
    for row, pair, mean in ((low, small, means[0]), (high, large, means[1])):
        assert f"| {mean:.1f} ({min(pair):.1f} … {max(pair):.1f}) |" in row
        assert f" {10 ** (mean / (T - 1)):.3f} |" in row


def test_tables_tell_after_how_many_steps_it_is_lost():
    results = {"BN-RNN; identity; 0.1": case(-1.0, -4.0), "BN-RNN; identity; 1": case(-20.0, -30.0)}
    low, high = [line for line in told.tables(SETTINGS, results) if line.startswith("| BN-RNN, identity |")][2:]
    assert low.endswith(" 4 (1 of 2) |")  # 10^−0.8 each step
    assert high.endswith(" 1 |")


def test_tables_and_plot_of_a_part(tmp_path):
    results = {
        "BN-RNN; identity; 0.1": case(-1.0, -4.0),
        "RNN; identity": case(-2.5, -2.5),
        "tanh": {"0.10": gradients.slope(0.1), "1.00": gradients.slope(1.0)},
    }
    lines = told.tables(SETTINGS, results)
    assert "| BN-RNN, identity | -2.5 |  | -2.5 |" in lines
    assert not any("holds" in line for line in lines)
    assert any(line.startswith("| 0.1 | 0.990 (0.987 … 0.999) | 0.900 | 1.023 | ") for line in lines)
    flow.figure(SETTINGS, results, "made up").savefig(tmp_path / "part.png")
    assert (tmp_path / "part.png").read_bytes().startswith(b"\x89PNG")
