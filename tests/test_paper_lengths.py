"""Members that are trained together are what each would be alone, and tables say what the numbers say."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.paper import lengths, lengths_tables
from bench.paper.data import Sequences
from bench.paper.ensemble import Ensemble, Plan, scores

pytestmark = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="the package that holds the spoken digits has no release for Python 3.10"
)
CPU = torch.device("cpu")


def some(*, every_step: bool = False) -> Sequences:
    torch.manual_seed(0)
    count = torch.randint(2, 9, (40,))
    x = torch.randn(40, 8, 3) if not every_step else torch.randint(5, (40, 8))
    y = torch.randint(5, (40,) if not every_step else (40, 8))
    parts = torch.arange(20), torch.arange(20, 25), torch.arange(25, 40)
    return Sequences(x, count, y, *parts, classes=5, source="made up")


@pytest.mark.parametrize("every_step", [True, False])
@pytest.mark.parametrize("name", ["both rules", "plain masking", "LSTM"])
def test_a_member_is_what_it_is_alone(name, every_step):
    """Trained through the library itself, on the same batches: weights and statistics after some steps."""
    found = some(every_step=every_step)
    plan = Plan(name, "time", True, 6, 8, 4, 1e-2, [3, 4])
    together = Ensemble(found, plan, CPU)
    alone = Ensemble(found, plan._replace(seeds=[4]), CPU)
    member = alone.member(0).train()
    if name == "LSTM":  # there one bias is trained, not two
        member.layer.bias_hh_l0.requires_grad_(False)
    parameters = [p for p in member.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=plan.rate)
    losses = []
    for done in range(plan.steps):
        optimiser.param_groups[0]["lr"] = plan.rate * (1 - done / plan.steps)
        batch, targets = alone.next_batch()
        logits, length = member(batch.x[:, 0], batch.lengths[0]), batch.lengths[0]
        if every_step:
            valid = torch.arange(len(logits))[:, None] < length
            loss = F.cross_entropy(logits[valid], targets[:, 0][valid])
        else:
            loss = F.cross_entropy(logits, targets[0])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        losses.append(loss.item())
    assert [each[1].item() for each in together.train()] == pytest.approx(losses, rel=1e-4)
    trained = dict(together.member(1).state_dict())
    for key, value in member.state_dict().items():
        # float32 in another order, and Adam divides by gradients that may be small
        torch.testing.assert_close(trained[key], value, rtol=2e-3, atol=2e-4)


def test_scores():
    """Of all sequences and of the longest tenth, by a model that is asked one by one."""
    found = some(every_step=True)
    member = Ensemble(found, Plan("both rules", "time", False, 6, 8, 1, 1e-2, [0]), CPU).member(0)
    given = scores(member, found, found.test, CPU)
    losses, long = [], []
    longest = found.lengths[found.test].argsort(descending=True, stable=True)[:2]  # of fifteen
    for k, position in enumerate(found.test.tolist()):
        n = int(found.lengths[position])
        x = F.one_hot(found.x[position, :n], 5).float()[:, None]
        with torch.no_grad():
            loss = F.cross_entropy(member(x, torch.tensor([n]))[:, 0], found.y[position, :n], reduction="none").tolist()
        losses += loss
        long += loss if k in longest else []
    assert given["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert given["long_loss"] == pytest.approx(sum(long) / len(long), rel=1e-5)


def made_up(worse: float) -> tuple[dict, dict]:
    """Plain masking worse than both rules by so much, in each of four seeds."""
    settings = {"formulations": ["both rules", "plain masking"], "sets": {"vowels": {}}}
    results = {}
    for name, stats, cell in lengths.variants(settings):
        losses = [0.5 + 0.01 * seed + (worse if name == "plain masking" else 0) for seed in range(4)]
        wobble = [0.001, -0.001, 0.002, -0.002]
        of = [
            {
                kind: {"test": {"loss": loss + w, "accuracy": 0.9, "long_loss": loss, "long_accuracy": 0.9}}
                for kind in (("none",) if name == "LSTM" else lengths_tables.KINDS)
            }
            for loss, w in zip(losses, wobble if name != "both rules" else [0] * 4, strict=True)
        ]
        results[lengths.key_of("vowels", (name, stats, cell))] = {"scores": of}
    return settings, results


@pytest.mark.parametrize(
    ("worse", "words"), [(0.2, "worse in 2"), (-0.2, "better in 2"), (0.0, "no clear difference in 2")]
)
def test_the_summary_says_what_the_numbers_say(worse, words):
    settings, results = made_up(worse)
    lines = [line for line in lengths_tables.tables(settings, results) if line.startswith("- plain masking, loss")]
    assert len(lines) == 1
    assert words in lines[0]
    row = next(
        line for line in lengths_tables.tables(settings, results) if line.startswith("| plain masking | time | yes")
    )
    assert f"{0.515 + worse:.3f} ± " in row
    assert lengths.figure(settings | {"seeds": [0, 1, 2, 3]}, results, "note").axes


def test_the_rate_is_the_panel_s_choice():
    settings = {
        "rates": [0.1, 0.2],
        "formulations": ["both rules", "plain masking"],
        "tuning_seeds": [7, 8],
        "seeds": [0],
        "sets": {"vowels": {"steps": 1}},
    }
    results = {}
    for job in lengths.jobs(settings, {}):
        assert not job.arguments["final"]
        rate, name = job.arguments["rate"], job.arguments["formulation"]
        # both rules alone would take 0.1, plain masking 0.2 by far
        loss = {("both rules", 0.1): 1.0, ("both rules", 0.2): 1.1, ("plain masking", 0.1): 3.0}.get((name, rate), 1.2)
        results[job.key] = {"validation": [loss, math.inf if name == "LSTM" and rate == 0.2 else loss]}
    assert lengths.best_rate(settings, results, "vowels", "plain masking") == 0.2
    assert lengths.best_rate(settings, results, "vowels", "LSTM") == 0.1
    finals = [job for job in lengths.jobs(settings, results) if job.arguments["final"]]
    assert len(finals) == len(lengths.variants(settings))
    assert {job.arguments["rate"] for job in finals if job.arguments["formulation"] != "LSTM"} == {0.2}
