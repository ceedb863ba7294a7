"""The recurrence of many formulations against the library, nn.LSTM, and what is written down plainly."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.paper.formulations import (
    FORMULATIONS,
    Batch,
    Formulation,
    Running,
    Weights,
    batch_share,
    counted_rows,
    forward,
    normalise,
)
from triton_bnlstm import BNLSTM

LENGTHS = torch.tensor([[7, 6, 6, 3, 1], [5, 5, 4, 4, 2]])
MEMBERS, ROWS, STEPS, FEATURES, HIDDEN = 2, 5, 7, 3, 4
CLOSE = {"rtol": 1e-9, "atol": 1e-10}  # float64, sums in another order


def layers(cell_norm: bool = True, input_stats: str = "time", prior_count: int | None = None) -> list[BNLSTM]:
    torch.manual_seed(1)
    made = []
    for _ in range(MEMBERS):
        layer = BNLSTM(
            FEATURES,
            HIDDEN,
            max_length=STEPS,
            cell_norm=cell_norm,
            input_stats=input_stats,
            prior_count=prior_count,
            dtype=torch.float64,
        )
        for name in ("gamma_ih_l0", "gamma_hh_l0"):
            nn.init.uniform_(layer.get_parameter(name), 0.3, 1.5)  # so that a forgotten γ would show
        made.append(layer)
    return made


def stacked(made: list[BNLSTM]) -> Weights:
    names = [name for name in Weights._fields if hasattr(made[0], f"{name}_l0")]
    together = {name: torch.stack([getattr(m, f"{name}_l0").detach() for m in made]).requires_grad_() for name in names}
    return Weights(**together)


def batch(seed: int) -> Batch:
    torch.manual_seed(seed)
    return Batch(torch.randn(STEPS, MEMBERS, ROWS, FEATURES, dtype=torch.float64), LENGTHS)


def running(kind: str = "merged", slots: int = STEPS, columns: int = 4 * HIDDEN) -> Running:
    made = Running(kind, slots, MEMBERS, columns, torch.device("cpu"))
    made.mean, made.var = made.mean.double(), made.var.double()
    return made


@pytest.mark.parametrize("cell_norm", [True, False])
@pytest.mark.parametrize("input_stats", ["time", "sequence"])
@pytest.mark.parametrize("name", ["both rules", "plain masking", "padding counted"])
def test_is_the_library(name, input_stats, cell_norm):
    """Two training steps, the second with phantom rows of what the first has taught; then gradients and statistics."""
    formulation = FORMULATIONS[name]
    made = layers(cell_norm, input_stats, None if name == "both rules" else 0)
    weights = stacked(made)
    norms = {"ih": running(slots=STEPS if input_stats == "time" else 1), "hh": running()}
    if cell_norm:
        norms["c"] = running(columns=HIDDEN)
    for seed in (0, 1):
        given = batch(seed)
        priors = None
        if name == "both rules":
            count = counted_rows(formulation, LENGTHS, STEPS).sum(2)[..., None].double()
            share = batch_share(formulation, count, ROWS, norms["hh"].count[0])
            priors = {k: (*norm.resolved(STEPS, ROWS), share) for k, norm in norms.items() if len(norm.mean) > 1}
        h, own = forward(formulation, weights, given, priors, over_time=input_stats == "time")
        for k, norm in norms.items():
            norm.update(own[k].mean, own[k].var, own[k].count, ROWS, 0.1)
        weight = torch.randn(STEPS, ROWS, HIDDEN, dtype=torch.float64)
        valid = (torch.arange(STEPS)[:, None, None] < LENGTHS)[..., None]
        loss = (h * valid * weight[:, None]).sum()
        expected = torch.zeros(())
        for k, layer in enumerate(made):
            steps = int(LENGTHS[k].max())
            lengths = torch.full_like(LENGTHS[k], steps) if name == "padding counted" else LENGTHS[k]
            rows, _ = layer(given.x[:steps, k], lengths=lengths)
            torch.testing.assert_close(h[:steps, k][valid[:steps, k, :, 0]], rows[valid[:steps, k, :, 0]], **CLOSE)
            expected = expected + (rows * valid[:steps, k] * weight[:steps]).sum()
    loss.backward()
    expected.backward()
    for name_, value in weights._asdict().items():
        for k, layer in enumerate(made):
            if value is not None:
                torch.testing.assert_close(value.grad[k], getattr(layer, f"{name_}_l0").grad, **CLOSE)
    for norm, statistics in norms.items():
        for k, layer in enumerate(made):
            found = statistics.of_member(k)
            for kind, value in layer.statistics()[norm]._asdict().items():
                torch.testing.assert_close(getattr(found, kind), value, **CLOSE)
            if len(statistics.mean) > 1:
                mean, var = statistics.resolved(STEPS, ROWS)
                used = layer.statistics(resolved=True)[norm]
                torch.testing.assert_close(mean[:, k], used.mean, **CLOSE)
                torch.testing.assert_close(var[:, k], used.var, **CLOSE)


def test_without_batch_norm_is_nn_lstm():
    given = batch(0)
    made = [nn.LSTM(FEATURES, HIDDEN, dtype=torch.float64) for _ in range(MEMBERS)]
    fields = {"weight_ih": "weight_ih_l0", "weight_hh": "weight_hh_l0"}
    weights = {field: torch.stack([getattr(m, name).detach() for m in made]) for field, name in fields.items()}
    bias = torch.stack([(m.bias_ih_l0 + m.bias_hh_l0).detach() for m in made])
    h, own = forward(
        FORMULATIONS["LSTM"],
        Weights(**weights, bias=bias, gamma_ih=bias, gamma_hh=bias),
        given,
        None,
        over_time=True,
    )
    assert own == {}
    for k, layer in enumerate(made):
        rows, _ = layer(given.x[:, k])
        valid = torch.arange(STEPS)[:, None] < LENGTHS[k]
        torch.testing.assert_close(h[:, k][valid], rows[valid], **CLOSE)


def test_frozen_rows_written_plainly():
    """An ended sequence keeps its state and its last input, and all B rows count in each step."""
    (layer, _), given, lengths = layers(), batch(0), LENGTHS[0]
    h, own = forward(FORMULATIONS["frozen rows"], stacked(layers()), given, None, over_time=True)
    x, state, c = given.x[:, 0], torch.zeros(ROWS, HIDDEN).double(), torch.zeros(ROWS, HIDDEN).double()
    for t in range(STEPS):
        held = torch.stack([x[min(t, int(n) - 1), b] for b, n in enumerate(lengths)])
        parts = []
        for z, gamma in (
            (held @ layer.weight_ih_l0.t(), layer.gamma_ih_l0),
            (state @ layer.weight_hh_l0.t(), layer.gamma_hh_l0),
        ):
            parts.append(F.batch_norm(z, None, None, gamma, None, training=True, eps=1e-5))
        i, f, g, o = (parts[0] + parts[1] + layer.bias_l0).chunk(4, 1)
        left = (t < lengths)[:, None]
        c = torch.where(left, f.sigmoid() * c + i.sigmoid() * g.tanh(), c)
        squashed = F.batch_norm(c, None, None, layer.gamma_c_l0, layer.beta_c_l0, training=True, eps=1e-5).tanh()
        state = torch.where(left, o.sigmoid() * squashed, state)
        torch.testing.assert_close(h[t, 0][left[:, 0]], state[left[:, 0]], **CLOSE)
    assert own["hh"].count[:, 0, 0].tolist() == [ROWS] * STEPS


@pytest.mark.parametrize("prior", [True, False])
def test_gradient_of_the_norm(prior):
    torch.manual_seed(0)
    z, term = (torch.randn(2, ROWS, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    gamma = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1.0, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).double()[..., None]
    phantom = (torch.randn(2, 3).double(), torch.rand(2, 3).double(), torch.tensor([[0.6], [0.2]]).double())

    def run(z, term, gamma):
        return normalise(z, term, gamma, mask, mask.sum(1), phantom if prior else None)[0]

    rows = mask.sum(1)
    if not prior:  # a single row is its own mean: 1/√ε is too steep for finite differences
        mask[1] = torch.tensor([[1.0], [1], [0], [0], [0]])
        rows = mask.sum(1)
    assert rows.min() >= 1
    assert torch.autograd.gradcheck(run, (z, term, gamma))


def test_counted_rows_and_shares():
    padded = counted_rows(FORMULATIONS["padding counted"], LENGTHS, STEPS)
    assert padded.sum(2).t().tolist() == [[5] * 7, [5] * 5 + [0, 0]]  # a member's padding ends with its longest
    valid = counted_rows(FORMULATIONS["plain masking"], LENGTHS, STEPS)
    assert valid.sum(2).t().tolist() == [[5, 4, 4, 3, 3, 3, 1], [5, 5, 4, 4, 2, 0, 0]]
    count, seen = valid.sum(2)[..., None].double(), torch.full((2, 1), 100.0).double()
    vacated = batch_share(FORMULATIONS["both rules"], count, ROWS, seen)
    assert vacated[:, 0, 0].tolist() == pytest.approx([1, 0.8, 0.8, 0.6, 0.6, 0.6, 0.2])
    fixed = batch_share(Formulation("valid", 4), count, ROWS, seen)
    assert fixed[:, 0, 0].tolist() == pytest.approx([5 / 9, 0.5, 0.5, 3 / 7, 3 / 7, 3 / 7, 0.2])
    assert batch_share(FORMULATIONS["both rules"], count, ROWS, 0 * seen)[:, 0].eq(1).all()  # nothing seen, no phantoms


def test_pooled_variance_is_within_batches():
    """Two batches far apart: merged takes the distance for variance, pooled does not; one row tells nothing of it."""
    pooled, merged = running("pooled", 1, 1), running("merged", 1, 1)
    for mean in (0.0, 10.0):
        for norm in (pooled, merged):
            moments = torch.full((1, MEMBERS, 1), mean).double(), torch.full((1, MEMBERS, 1), 3.0).double()
            norm.update(*moments, torch.full((1, MEMBERS, 1), 4.0).double(), 4, 0.5)
    # 4 rows each, the first discounted by half: (1.5 · 4 + 3 · 4) / (1.5 + 3) within, and between 2 · 4 / 6² · 10²
    assert pooled.var.unique().tolist() == pytest.approx([4.0])
    assert merged.var.unique().tolist() == pytest.approx([3 + 2 * 4 / 36 * 100])
    before = pooled.var.clone()
    pooled.update(0 * before + 50, 0 * before, torch.ones_like(pooled.count), 4, 0.5)
    torch.testing.assert_close(pooled.var, before)
    assert pooled.mean.unique().item() > 10


def test_formulations_differ():
    """Each gives outputs or gradients of its own, so that no name stands for another's figures."""
    weights, given = stacked(layers()), batch(0)
    found = {}
    for name, formulation in FORMULATIONS.items():
        priors = None
        if formulation.phantoms != "none":
            norms = {"ih": running(formulation.running), "hh": running(formulation.running)}
            norms["c"] = running(formulation.running, columns=HIDDEN)
            for seed in (5, 6):
                _, own = forward(Formulation("valid"), weights, batch(seed), None, over_time=True)
                for k, norm in norms.items():
                    norm.update(own[k].mean, own[k].var, own[k].count, ROWS, 0.1)
            count = counted_rows(formulation, LENGTHS, STEPS).sum(2)[..., None].double()
            share = batch_share(formulation, count, ROWS, norms["hh"].count[0])
            resolved = formulation.prior == "resolved"
            priors = {
                k: (*(norm.resolved(STEPS, ROWS) if resolved else (norm.mean, norm.var)), share)
                for k, norm in norms.items()
            }
        h = forward(formulation, weights, given, priors, over_time=True)[0][4, :, :2]
        (gradient,) = torch.autograd.grad(h.sum(), weights.weight_hh)
        found[name] = torch.cat([h.detach().flatten(), gradient.flatten()])
    names = list(found)
    for k, first in enumerate(names):
        for second in names[k + 1 :]:
            assert (found[first] - found[second]).abs().max() > 1e-6, (first, second)
