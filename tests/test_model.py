"""The model of a step against what an H100 took, and what it makes of layouts that nobody has measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from bench.aot.targets import TARGETS
from bench.fit_model import errors, fitted, measured, orders
from triton_bnlstm.kernels import backward_config, forward_config, model
from triton_bnlstm.kernels.config import BackwardConfig, Config
from triton_bnlstm.kernels.model import preferred
from triton_bnlstm.tuning import Work, space

H100 = TARGETS["sm90"].device
STREAMED = Config(sequence=True, units=8, batch_tile=64, inner=64, resident=False, warps=8, stages=2)


TIMED = [each for each in measured() if each.name.startswith("sm90 ")]


def test_the_model_is_near_what_was_measured():
    """Within 12 % root mean square, as its page says: the residual of its fit, which stays as long as both do."""
    found = errors(TIMED)
    assert len(found) > 90
    assert math.sqrt(sum(each**2 for each in found) / len(found)) < 0.12
    assert math.log(0.6) < min(found) < max(found) < math.log(1.5)


def test_the_model_takes_nearly_the_fastest():
    """Of the layouts that were measured for a size; 4 % behind is the worst there is."""
    found = orders(TIMED)
    assert len(found) >= 15
    assert max(order.behind for order in found.values()) < 1.05, found


def test_a_campaign_in_which_tuning_failed_is_read(tmp_path):
    (tmp_path / "board").mkdir()
    record = {"layouts": [{"case": "c", "way": "forward", "tried": 0, "failed": {"all": "no memory"}}]}
    (tmp_path / "board" / "campaign.json").write_text(json.dumps(record))
    assert {each.name for each in measured(tmp_path)} == {each.name for each in measured()}


def test_the_fit_finds_the_rates_again():
    """From times that are the model's own at other rates; of few layouts, since each look takes its time."""
    other = model.RATES._replace(meeting=2.5, streamed=0.8)
    few = TIMED[::3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "RATES", other)
        own = [
            each._replace(microseconds=1e6 * space.modelled_seconds(each.device, each.work, each.layout))
            for each in few
        ]
    before = model.RATES
    found = fitted(own, tries=1)
    assert before == model.RATES
    assert found.meeting == pytest.approx(2.5, rel=0.1)
    assert found.streamed == pytest.approx(0.8, rel=0.05)


def seconds(layout, kernel="forward", hidden=512, batch=64, device=H100, directions=1):
    return space.modelled_seconds(device, Work(kernel, hidden, batch, directions, torch.bfloat16), layout)


def test_what_costs_more():
    assert seconds(replace(STREAMED, stages=3)) < seconds(STREAMED) < seconds(replace(STREAMED, stages=1))
    assert seconds(replace(STREAMED, resident=True, stages=1)) < seconds(STREAMED)
    assert seconds(replace(STREAMED, warps=4)) < seconds(STREAMED)
    # a batch that is walked streams W_hh once more for each tile
    assert seconds(replace(STREAMED, batch_tile=16)) > 2.5 * seconds(STREAMED)
    # two directions beside each other, until they no longer fit
    few, many = replace(STREAMED, units=16), replace(STREAMED, units=4)
    assert seconds(few, directions=2) == seconds(few)
    assert seconds(many, directions=2) > seconds(many)


def test_a_program_alone_meets_nobody():
    alone = replace(STREAMED, units=32, batch_tile=16)
    assert seconds(alone, hidden=32, batch=16) < seconds(replace(alone, sequence=False), hidden=32, batch=16) - 1e-6
    # nor do several tiles of the batch meet, each with its own recurrence
    many = seconds(alone, "inference", hidden=32, batch=64)
    assert many == seconds(alone, "inference", hidden=32, batch=16)
    back = BackwardConfig(True, 32, 16, 64, False, 4, 1)
    assert seconds(back, "backward", 32, 16) < seconds(replace(back, sequence=False), "backward", 32, 16) - 1e-6


def test_products_without_matrix_units_are_counted_one_by_one():
    t4 = TARGETS["sm75"].device
    layout = replace(STREAMED, inner=16, stages=1)
    assert seconds(layout, device=t4, hidden=1024) > 1.7 * seconds(layout, device=t4)
    assert seconds(layout, device=t4) > 1.5 * seconds(STREAMED)


def test_step_mode_is_chosen_where_a_graph_gains_more_than_its_absence_loses():
    step = replace(STREAMED, sequence=False)
    assert preferred(STREAMED, 30e-6) == 30e-6
    assert preferred(step, 30e-6) > 30e-6  # from the host it takes longer
    assert preferred(step, 30e-6, launches=2) > preferred(step, 30e-6)
    assert preferred(step, 1e-3) == pytest.approx(1e-3)  # the device is what takes long


@pytest.mark.parametrize("kernel", ["forward", "inference", "backward"])
def test_a_layer_that_is_not_tuned_asks_the_model_once(kernel, monkeypatch):
    """Not at each of its calls."""
    work = Work(kernel, 643, 61, 1, torch.bfloat16)
    first = space.analytic(H100, work)
    for module in (forward_config, backward_config):
        monkeypatch.setattr(module, "preferred", lambda *_: pytest.fail("asked again"))
    assert space.analytic(H100, work) is first


def test_the_default_is_the_one_that_the_model_prefers():
    """Of all divisions of the work that it looks at, for each kernel and several devices."""
    for target, kernel, hidden in product(("sm80", "sm90", "sm120"), ("forward", "inference", "backward"), (100, 1024)):
        device, work = TARGETS[target].device, Work(kernel, hidden, 64, 1, torch.bfloat16)
        default, *others = space.structures(device, work)

        def cost(layout, device=device, work=work):
            launches = 1 + getattr(layout, "divided", False)
            return preferred(layout, space.modelled_seconds(device, work, layout), launches)

        allowed = [
            layout
            for layout in others
            if not layout.sequence or space.programs(work, layout) <= device.multiprocessors
            # stages that differ from what a layout has by default, where W_hh could stay
            if layout.resident or replace(layout, resident=True, inner=64, stages=1) not in others
        ]
        assert cost(default) <= min(map(cost, allowed)) * (1 + 1e-9), (target, work, default)
