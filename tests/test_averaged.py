"""Averages of weights (EMA, SWA): evaluated with statistics of their own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from tests.support import CLOSE, assert_same_buffers, buffers, make_layer
from triton_bnlstm import BNLSTM, estimate_statistics

AVERAGES = {
    "EMA": {"multi_avg_fn": get_ema_multi_avg_fn(0.8)},
    "EMA, one by one": {"avg_fn": get_ema_avg_fn(0.8)},
    "SWA": {},
}
LENGTHS = [[6, 2, 5], [3, 6, 1], [4, 4, 4]]


class Model(nn.Module):
    def __init__(self, parametrized: bool = False) -> None:
        super().__init__()
        self.rnn = make_layer(num_layers=2, cell_norm=True)
        if parametrized:
            parametrizations.weight_norm(self.rnn, "weight_hh_l0")
        self.head = nn.Linear(4, 2).double()

    def forward(self, x, lengths):
        return self.head(self.rnn(x, lengths=lengths)[0])


def averaged_over_training(model: Model, use_buffers: bool, average: str, steps: int = 4) -> AveragedModel:
    """The average of the weights (and buffers, or the last ones) after each step."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    averaged = AveragedModel(model, use_buffers=use_buffers, **AVERAGES[average])
    for step in range(steps):
        loss = model(torch.randn(6, 3, 3).double(), LENGTHS[step % 3]).square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        averaged.update_parameters(model)
    return averaged


@pytest.mark.parametrize("parametrized", [False, True], ids=["plain", "weight_norm"])
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_evaluates_with_statistics_of_its_own(use_buffers, average, parametrized):
    model = Model(parametrized)
    averaged = averaged_over_training(model, use_buffers, average)
    rnn = averaged.module.rnn
    for name, buffer in rnn.named_buffers():
        assert buffer.isfinite().all(), name
        assert buffer.dtype == model.rnn.get_buffer(name).dtype, name
    assert torch.equal(rnn.mean_hh_l0, model.rnn.mean_hh_l0) == (not use_buffers)
    assert torch.equal(rnn.count_hh_l0, model.rnn.count_hh_l0) == (not use_buffers)
    assert rnn._skipped_steps == 0
    data = [(torch.randn(6, 3, 3).double(), [6, 6, 6]) for _ in range(3)]
    theirs, before = buffers(model.rnn), averaged.eval()(*data[0])
    estimate_statistics(averaged, data, mode="whole")
    assert_same_buffers(theirs, buffers(model.rnn))  # the model's stay what they are
    after = averaged.eval()(*data[0])
    assert not torch.allclose(before, after)  # what evaluation had resolved before is not used

    # its own pass: all rows in one batch, normalised by themselves, with the average's weights
    batch = copy.deepcopy(averaged.module).train()
    together = batch(torch.cat([x for x, _ in data], 1), [6] * 9)
    for k, item in enumerate(data):
        torch.testing.assert_close(averaged(*item), together[:, 3 * k : 3 * k + 3], **CLOSE)


def test_of_unequal_lengths_too():
    """Where slots with few rows inherit: the same pass again, however the data is split."""
    averaged = averaged_over_training(Model(), True, "EMA")
    data = [(torch.randn(6, 3, 3).double(), lengths) for lengths in LENGTHS]
    whole = [(torch.cat([x for x, _ in data], 1), [n for lengths in LENGTHS for n in lengths])]
    estimate_statistics(averaged, whole, mode="whole")
    first, pass_of_it = buffers(averaged.module.rnn), averaged.eval()(*whole[0])
    estimate_statistics(averaged, data, mode="whole")
    for name, buffer in buffers(averaged.module.rnn).items():
        torch.testing.assert_close(buffer, first[name], **CLOSE)
    for k, item in enumerate(data):
        steps = max(item[1])
        torch.testing.assert_close(averaged(*item)[:steps], pass_of_it[:steps, 3 * k : 3 * k + 3], **CLOSE)


def test_a_mean_of_buffers_is_their_mean():
    """Counts are averaged as floats, and evaluation sees each update."""
    model = Model().eval()
    averaged = AveragedModel(model, use_buffers=True)
    x = torch.randn(6, 3, 3).double()
    counts = []
    for step in range(3):
        with torch.no_grad():
            for name, buffer in model.rnn.named_buffers():
                if name != "_skipped_steps":
                    buffer.mul_(1.25)
        counts.append(model.rnn.count_hh_l0.clone())
        averaged.update_parameters(model)
        torch.testing.assert_close(averaged.module.rnn.count_hh_l0, torch.stack(counts).mean(0), **CLOSE)
        found = averaged(x, LENGTHS[0])
        averaged.train().eval()  # looks again
        assert torch.equal(averaged(x, LENGTHS[0]), found), step


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_goes_through_its_state_dict(use_buffers):
    averaged = averaged_over_training(Model(), use_buffers, "EMA")
    other = AveragedModel(Model(), use_buffers=use_buffers, **AVERAGES["EMA"])
    other.load_state_dict(averaged.state_dict())
    x = torch.randn(6, 3, 3).double()
    assert torch.equal(averaged.eval()(x, LENGTHS[0]), other.eval()(x, LENGTHS[0]))
    names = {name.removeprefix("module.rnn."): value for name, value in other.state_dict().items() if "rnn" in name}
    layer = BNLSTM(3, 4, 2, cell_norm=True, input_stats="time", max_length=6, eps=3e-3).double()
    layer.load_state_dict(names)  # the layer alone, out of the average
    assert torch.equal(layer.eval()(x)[0], averaged.module.rnn(x)[0])
    averaged_over_training(model := Model(), use_buffers, "EMA", steps=1)
    other.update_parameters(model)  # goes on
    assert other.n_averaged == 5
