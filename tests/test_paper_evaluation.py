"""The experiment on evaluating worse than training: the recipe is BNLSTM but for its statistics; words follow data."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.paper import evaluation
from bench.paper.data import Images
from bench.paper.learning import Model
from bench.paper.recipe import NORMS, Recipe
from triton_bnlstm import BNLSTM, estimate_statistics

CPU = torch.device("cpu")
SETTINGS = {**evaluation.SIZES["quick"], "hidden_size": 5, "batch_size": 10, "steps": 4, "every": 3, "seeds": 2}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def recipe() -> Recipe:
    """Float64, with shifts and scales that are not their initial ones; 4 slots."""
    torch.manual_seed(0)
    made = Recipe(2, 3, 4).double()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.startswith(("beta", "gamma", "bias")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def sequences(steps: int, batch: int = 7) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(steps)
    states = 0.1 * torch.randn(2, 1, batch, 3, generator=generator).double()
    return torch.randn(steps, batch, 2, generator=generator).double(), (states[0], states[1])


@pytest.mark.parametrize("steps", [4, 6])
def test_recipe_trains_as_bnlstm_with_its_shifts_in_the_bias(recipe, steps):
    layer = recipe.to_bnlstm()
    x, hx = sequences(steps)
    outputs = []
    for model in (recipe, layer):
        output, (h, c) = model(x, hx)
        (output.square().sum() + (h * c).sum()).backward()
        outputs.append((output, h, c))
    torch.testing.assert_close(outputs[0], outputs[1])
    for name in ("weight_ih", "weight_hh", "gamma_ih", "gamma_hh", "gamma_c", "beta_c", "bias"):
        theirs = layer.get_parameter(f"{name}_l0").grad
        assert theirs.abs().max() > 1e-4
        torch.testing.assert_close(recipe.get_parameter(name).grad, theirs)
    for name in ("beta_ih", "beta_hh"):
        torch.testing.assert_close(recipe.get_parameter(name).grad, layer.bias_l0.grad)


def test_recipe_evaluates_as_bnlstm_that_took_its_statistics(recipe):
    for _ in range(3):
        recipe(torch.randn(6, 7, 2).double())
    x, hx = sequences(9)
    layer = recipe.eval().to_bnlstm()
    assert not layer.training
    torch.testing.assert_close(recipe(x, hx), layer(x, hx))


def test_recipe_keeps_moving_averages_of_unbiased_variances(recipe):
    x, hx = sequences(6)
    recipe(x, hx)
    values = x @ recipe.weight_ih.t()
    torch.testing.assert_close(recipe.mean_ih[:3], 0.1 * values[:3].mean(1))
    torch.testing.assert_close(recipe.var_ih[:3], 0.9 + 0.1 * values[:3].var(1, unbiased=True))
    last = torch.zeros_like(recipe.mean_ih[3])
    for step in (3, 4, 5):  # of which the latter two are beyond the last slot, and overwrite it
        last = 0.9 * last + 0.1 * values[step].mean(0)
    torch.testing.assert_close(recipe.mean_ih[3], last)


def test_recipe_starts_as_it_says():
    torch.manual_seed(1)
    recipe = Recipe(1, 5, 3)
    assert recipe.weight_ih.square().sum().item() == pytest.approx(1)
    torch.testing.assert_close(recipe.weight_hh[5:10], torch.eye(5))
    for norm in NORMS:
        assert recipe.get_parameter(f"gamma_{norm}").unique().tolist() == [pytest.approx(0.1)]
    x = torch.zeros(1, 400, 1)
    h = recipe.eval()(x)[1][0]
    assert (h - recipe(x)[1][0]).abs().max() > 1e-4  # noise, in evaluation too
    assert torch.equal(Recipe(1, 5, 3, initial_noise=0).eval()(x)[0].std(1), torch.zeros(1, 5))


def test_a_layer_that_differs_is_told(recipe):
    model = Model(recipe.float(), 3, 4, every_step=False)
    x, hx = sequences(4)
    item = evaluation.Item(x.float(), (hx[0].float(), hx[1].float()), torch.zeros(7, dtype=torch.int64))
    layer = recipe.to_bnlstm()
    before = copy.deepcopy(model.state_dict())
    evaluation.check_agreement(model, layer, item)
    torch.testing.assert_close(model.state_dict(), before)
    with torch.no_grad():
        layer.bias_l0[0] += 1
    with pytest.raises(RuntimeError, match="differ by"):
        evaluation.check_agreement(model, layer, item)


@pytest.fixture
def images(monkeypatch) -> Images:
    """Two labels that only the sum of six pixels tells, in place of the digits."""
    x = torch.rand(90, 6, generator=torch.Generator().manual_seed(0))
    order = torch.arange(90)
    made = Images(x, (x.sum(1) > 3).long(), order[:49], order[49:59], order[59:], classes=2)
    monkeypatch.setattr(evaluation, "_images", lambda name: made)
    return made


def test_items_are_all_images_once(images):
    made = evaluation.items(images, images.test, 10, 5, noisy_cells=True, device=CPU)
    assert [len(item.y) for item in made] == [10, 10, 10]  # a last batch of one image has no variance
    seen = torch.cat([item.x[..., 0].t() for item in made])
    assert len(seen.unique(dim=0)) == 30
    again = evaluation.items(images, images.test, 10, 5, noisy_cells=False, device=CPU)
    assert torch.equal(again[0].hx[0], made[0].hx[0])
    assert not again[0].hx[1].any()
    assert made[0].hx[1].any()


def test_run_tables_and_plot(images, tmp_path):
    results = {}
    for job in evaluation.jobs(SETTINGS, {}):
        reported: list[float] = []
        results[job.key] = evaluation.run(job.arguments, SETTINGS, "cpu", reported.append)
        assert sum(reported) == pytest.approx(job.work)
    assert len(results) == 4
    for key, one in results.items():
        assert [point["step"] for point in one["curve"]] == [3, 4]
        assert ("noise" in one["end"]) == key.startswith("BNLSTM")
        assert one["curve"][-1]["running"] == one["end"]["running"]
        assert one["end"]["rest"] != one["end"]["running"]
        # after four steps the moving averages have hardly left mean 0 and variance 1
        assert one["end"]["batches"] != one["end"]["running"]
    told = "\n".join(evaluation.tables(SETTINGS, results))
    assert told.count("| running |") == 2
    evaluation.figure(SETTINGS, results, "a note").savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 20_000
    first = {next(iter(results)): next(iter(results.values()))}
    evaluation.tables(SETTINGS, first)
    evaluation.figure(SETTINGS, first, "a note").savefig(tmp_path / "part.png")


def test_scores_leave_the_model_as_it_was(images):
    torch.manual_seed(0)
    layer = BNLSTM(1, 5, max_length=6, cell_norm=True, input_stats="time")
    model = Model(layer, 5, 2, every_step=False)
    test = evaluation.items(images, images.test, 10, 5, False, CPU)
    known = evaluation.items(images, images.train, 10, 5, False, CPU)
    before = copy.deepcopy(model.state_dict())
    found = evaluation.scores(model, test, known, ("batches", "whole"))
    torch.testing.assert_close(model.state_dict(), before)
    assert model.training
    assert layer.training
    estimate_statistics(model, [item.x for item in known], "whole")
    assert evaluation.score(model, layer, test) == found["whole"] != found["running"]


def made_up(running: float, batches: float) -> dict[str, Any]:
    """Results of two seeds whose losses are so much above the batch's own."""
    results = {}
    for seed in range(2):
        step = 0.01 * seed
        point = {"batch": [1.0, 0.9], "running": [1 + running + step, 0.5], "batches": [1 + batches, 0.8]}
        early = {"batch": [1.0, 0.9], "running": [9.0, 0.1], "batches": [9.0, 0.1]}
        value = {"curve": [{"step": 3, **early}, {"step": 4, **point}], "end": point}
        results[f"recipe/{evaluation.HIGH['name']}/{seed}"] = value
    return results


def test_words_follow_the_data():
    def told(running: float, batches: float) -> str:
        return "\n".join(evaluation.tables({**SETTINGS, "rates": [evaluation.HIGH]}, made_up(running, batches)))

    good, bad = told(0.3, 0.0), told(-0.3, 0.2)
    assert "running statistics: worse than the batch's own (+0.3050" in good
    assert "estimate_statistics: better than running statistics (-0.3050" in good
    assert "estimate_statistics: no clear difference from the batch's own" in good
    assert "running statistics: better than the batch's own (-0.2950" in bad
    assert "estimate_statistics: worse than running statistics (+0.4950" in bad
    assert "a greater loss than the running statistics at 0," in good
    assert "a greater loss than the running statistics at 2, by up to 0.500 nats" in bad
    assert "cost up to 80 percentage points" in good
