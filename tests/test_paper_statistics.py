"""The experiment on statistics over time: its measures, and that its words follow the data."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.paper import seeds, settling, statistics, statistics_told
from bench.paper.data import Text
from bench.paper.learning import CharacterTask, Model, layer_of, scores
from triton_bnlstm import BNLSTM, estimate_statistics
from triton_bnlstm.statistics import Moments

CPU = torch.device("cpu")
SETTINGS = {
    **statistics.SIZES["quick"],
    "hidden_size": 6,
    "length": 10,
    "batch_size": 8,
    "steps": 4,
    "seeds": 2,
    "estimate_batches": 2,
    "test_batches": 2,
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text(monkeypatch) -> Text:
    """A few letters at random, in place of the help texts."""
    parts = torch.randint(7, (3, 400), generator=torch.Generator().manual_seed(0))
    made = Text(parts[0], parts[1], parts[2], "abcdefg", "made up")
    monkeypatch.setattr(statistics, "load_text", lambda: made)
    return made


def population(shift: torch.Tensor, seed: int, noise: float = 0.02, columns: int = 200) -> Moments:
    """Estimates of slots whose true means are `shift` [S] deviations from 0, and variances e to `shift`."""
    generator = torch.Generator().manual_seed(seed)
    chance = noise * torch.randn(2, len(shift), columns, generator=generator)
    return Moments(shift[:, None] + chance[0], (shift[:, None] + chance[1]).exp(), torch.ones(len(shift)))


@pytest.mark.parametrize("rate", [0.5, 0.8])
def test_settled_is_where_a_geometric_approach_comes_within_the_floor(rate):
    slots, floor = 60, 0.01
    distances = [floor + rate**slot for slot in range(1, slots + 1)]
    # the mean of WINDOW powers from slot t on is rate^t · factor, and has to be within (TOLERANCE − 1) · floor
    factor = (1 - rate**settling.WINDOW) / (1 - rate) / settling.WINDOW
    expected = math.ceil(math.log((settling.TOLERANCE - 1) * floor / factor) / math.log(rate))
    assert settling.settled_at(distances, settling.TOLERANCE * floor) == expected
    assert settling.settled_at(distances[: expected + 2], settling.TOLERANCE * floor) is None


@pytest.mark.parametrize(("rate", "least", "most"), [(0.0, 1, 1), (0.6, 6, 10), (0.85, 20, 32)])
def test_noise_hides_an_approach_no_longer_than_it_must(rate, least, most):
    # distances of two estimates with noise of 0.02 are 0.019 at the median; rate^t is that after 8 and 24
    shift = torch.tensor([rate**slot for slot in range(1, 201)], dtype=torch.float64)
    found = settling.settling(population(shift, 0), population(shift, 1), 50)
    for part in ("mean", "var"):
        assert least <= found[part]["settled"] <= most
        assert found[part]["floor"] == pytest.approx(0.02 * math.sqrt(2) * 0.6745, rel=0.1)
        assert found[part]["later"] == pytest.approx(1, abs=0.15)


def test_what_goes_on_after_the_last_slot_is_seen():
    shift = torch.linspace(0, 1, 200, dtype=torch.float64)
    found = settling.settling(population(shift, 0), population(shift, 1), 50)
    assert found["mean"]["later"] > 10
    assert found["var"]["later"] > 10
    assert found["mean"]["settled"] is None or found["mean"]["settled"] > 40


def test_columns_without_variance_are_left_out():
    first, second = population(torch.zeros(12), 0, columns=3), population(torch.zeros(12), 1, columns=3)
    first.var[:, 1] = second.var[:, 1] = 0
    found = settling.settling(first, second, 6)
    others = [Moments(m.mean[:, ::2], m.var[:, ::2], m.count) for m in (first, second)]
    assert found == settling.settling(*others, 6)
    assert all(math.isfinite(value) for row in found["var"]["quartiles"] for value in row)


def test_kept_slots_are_few_and_hold_both_ends():
    for slots in (3, 10, 40, 400):
        kept = settling.kept_slots(slots)
        assert kept[0] == 0
        assert kept[-1] == slots - 1
        assert len(kept) <= 41
        assert kept == sorted(set(kept))


def test_fewer_slots_are_what_a_layer_with_fewer_would_have():
    torch.manual_seed(0)
    many = BNLSTM(2, 4, max_length=9, cell_norm=True, input_stats="time")
    few = BNLSTM(2, 4, max_length=3, cell_norm=True, input_stats="time")
    few.load_state_dict({**few.state_dict(), **dict(many.named_parameters())})
    x = torch.randn(9, 30, 2)
    estimate_statistics(many, [x])
    estimate_statistics(few, [x[:3]])
    before = many.eval()(x)[0]
    statistics.keep_slots(many, 3)
    after = many(x)[0]
    torch.testing.assert_close(after, few.eval()(x)[0])
    torch.testing.assert_close(after[:3], before[:3])
    assert (after[3:] - before[3:]).abs().max() > 1e-4


def test_bits_by_position_are_the_loss_of_each_step(text):
    task = CharacterTask(text, 10)
    torch.manual_seed(0)
    model = Model(layer_of("BN-LSTM", task, 6), 6, task.classes, True)
    batches = task.held_out("test", 20, 8)
    before = copy.deepcopy(model.state_dict())
    for training in (False, True):
        bits = statistics.bits_by_position(model, batches, CPU, training=training)
        assert bits.shape == (20,)
        loss = scores(model, batches, CPU, training=training)["loss"]
        assert bits.mean().item() == pytest.approx(loss / math.log(2), rel=1e-5)
    torch.testing.assert_close(model.state_dict(), before)
    with torch.no_grad():  # only position tells now: a readout that knows nothing is log2(classes) everywhere
        model.readout.weight.zero_()
        model.readout.bias.zero_()
    flat = statistics.bits_by_position(model, batches, CPU)
    torch.testing.assert_close(flat, torch.full_like(flat, math.log2(7)))


@pytest.fixture
def results(text) -> dict[str, Any]:
    """Of all jobs, with the work that each reported."""
    found = {}
    for job in statistics.jobs(SETTINGS, {}):
        reported: list[float] = []
        found[job.key] = statistics.run(job.arguments, SETTINGS, "cpu", reported.append)
        assert sum(reported) == pytest.approx(job.work)
    return found


def test_run_tables_and_plot(results, tmp_path):
    for model in ("BN-LSTM", "BN-LSTM, cell norm"):
        one = results[f"{model}/1"]
        last, own = one["bits"]["last"], one["bits"]["own"]
        ten = statistics_told.BINS // statistics_told.TIMES
        assert last[:ten] == pytest.approx(own[:ten], rel=1e-4)
        assert last[ten:] != pytest.approx(own[ten:], rel=1e-4)
        # as many slots as in training: the last of them serves all later steps, by either way of asking
        assert one["slots"]["10"] == pytest.approx(sum(last[ten:]) / (3 * ten), rel=1e-3)
        assert one["slots"]["1"] != pytest.approx(one["slots"]["10"], rel=1e-3)
    told = "\n".join(statistics.tables(SETTINGS, results))
    assert told.count("| BN-LSTM, cell norm | c |") == 2
    statistics.figure(SETTINGS, results, "a note").savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 20_000
    statistics.tables(SETTINGS, {"LSTM/0": results["LSTM/0"]})
    statistics.figure(SETTINGS, {"LSTM/0": results["LSTM/0"]}, "a note").savefig(tmp_path / "part.png")


def test_tables_say_what_the_last_slot_costs():
    def told(cost: float) -> str:
        made = {}
        for seed in range(2):
            own = [2.0 + 0.001 * seed] * statistics_told.BINS
            last = own[:10] + [value + cost * (1 + 0.01 * seed) for value in own[10:]]
            bits = {"running": own, "batch": own, "last": last, "own": own}
            made[f"BN-LSTM/{seed}"] = {"bits": bits, "settling": {}, "slots": {}}
        lines = statistics.tables({**SETTINGS, "length": 0}, made)
        assert sum("× 4" in line for line in lines) == 2
        (line,) = (line for line in lines if line.startswith("- ") and "a slot for each step" in line)
        return line

    assert "worse than a slot for each step (+0.1005 ± 0.0007 bits, higher in 2 of 2 seeds, p = 0.003)" in told(0.1)
    assert "better than a slot for each step (-0.1005" in told(-0.1)
    assert "no clear difference" in told(0.0)


def test_losses_are_of_the_length_that_is_asked_for():
    bits = [1.0] * 10 + [2.0] * 10 + [5.0] * 20
    assert statistics_told.mean_to(bits, 1) == 1
    assert statistics_told.mean_to(bits, 2) == 1.5
    assert statistics_told.mean_to(bits, 1.5, beyond=True) == 2
    assert statistics_told.mean_to(bits, 4, beyond=True) == 4


WORDS = {"up": [0.1, 0.11, 0.12], "down": [-0.1, -0.11, -0.12], "either": [-0.1, 0.11, 0.12], "one": [5.0]}


def test_words_for_several_seeds():
    said = {name: seeds.compare(values, "a", "b", "bits") for name, values in WORDS.items()}
    assert said["up"] == "a: worse than b (+0.1100 ± 0.0100 bits, higher in 3 of 3 seeds, p = 0.003)"
    assert "better than b (-0.1100" in said["down"]
    assert "higher in 0 of 3 seeds" in said["down"]
    assert "no clear difference from b" in said["either"]
    assert said["one"] == "a: +5.0000 bits against b, with one seed"
    assert seeds.middle([3, 5, 4]) == "4 (3 – 5)"
    assert seeds.middle([3, None, None]) == "never (3 – never)"
    assert seeds.middle([7, 7]) == "7"
    assert seeds.signed([1.0, 3.0], 1) == "+2.0 ± 1.4"
