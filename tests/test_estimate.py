"""Population statistics from a pass over a data set."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader

from tests.oracle import Slot, merged
from tests.support import CLOSE, assert_same_buffers, buffers, make_layer, oracle_of
from triton_bnlstm import BNLSTMCell, estimate_statistics, functional
from triton_bnlstm.packing import Packing

LENGTHS = [6, 1, 4, 2, 5, 3, 6, 2]


def data():
    return torch.randn(6, 8, 3).double()


def items(x, lengths, parts):
    """Batches of the given rows, each as the arguments (input, hx, lengths)."""
    return [(x[:, rows], None, [lengths[k] for k in rows]) for rows in parts]


HALVES = [[0, 1, 2, 3], [4, 5, 6, 7]]
PAIRS = [[6, 1], [3, 7], [0, 2], [4, 5]]
ONE = [list(range(8))]


class Model(nn.Module):
    """Two BN-LSTM modules among layers of other kinds, registered in another order than they are called."""

    def __init__(self, **options):
        super().__init__()
        self.top = make_layer(8, 4, seed=1, seen=False, **options)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2).double())
        self.bottom = make_layer(
            3, 4, num_layers=2, bidirectional=True, dropout=0.5, initial_noise=1.0, seen=False, **options
        )

    def forward(self, x, hx=None, lengths=None):
        assert not self.head[0].training
        below, _ = self.bottom(x, hx, lengths)
        return self.head(self.top(below, lengths=lengths)[0])


@pytest.mark.parametrize("options", [{}, {"cell_norm": True, "input_stats": "sequence"}], ids=["plain", "all options"])
@pytest.mark.parametrize("lengths", [LENGTHS, [6] * 8], ids=["ragged", "equal"])
@pytest.mark.parametrize("max_length", [4, 9])
@pytest.mark.parametrize("offload", [False, True])
def test_whole_does_not_depend_on_the_split_and_evaluation_reproduces_it(options, lengths, max_length, offload):
    x = data()
    found, outputs = [], []
    for parts in (ONE, HALVES, PAIRS):
        torch.manual_seed(1)
        model = Model(max_length=max_length, **options)
        estimate_statistics(model, items(x, lengths, parts), "whole", offload=offload)
        found.append(buffers(model.bottom) | {f"top.{k}": v for k, v in buffers(model.top).items()})
        model.eval()
        outputs.append(model(x, None, lengths))
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, **CLOSE)
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], **CLOSE)

    # the fixed point: statistics of the pre-activations that evaluation computes are the statistics it uses
    layer = model.bottom
    slots = layer.statistics(0)["hh"]
    zeros = torch.zeros(8, 4).double()
    states = oracle_of(layer).run(x, lengths, zeros, zeros, training=False)[0]
    for t in range(min(max_length, max(lengths))):
        active = [b for b in range(8) if lengths[b] > t]
        z = torch.stack([(states[t - 1, b] if t else zeros[b]) @ layer.weight_hh_l0.T for b in active])
        torch.testing.assert_close(slots.mean[t], z.mean(0), **CLOSE)
        torch.testing.assert_close(slots.var[t], z.var(0, correction=0), **CLOSE)
        assert slots.count[t] == len(active)


def test_whole_of_equal_lengths_is_one_giant_training_batch():
    """Without vacated seats the whole data set's pass is what training does with it, moments and outputs."""
    x = data()
    giant = make_layer(seen=False, momentum=1.0, cell_norm=True, bidirectional=True, num_layers=2)
    expected, _ = giant(x)
    layer = make_layer(seen=False, cell_norm=True, bidirectional=True, num_layers=2)
    estimate_statistics(layer, items(x, [6] * 8, PAIRS), "whole")
    for name, value in giant.named_buffers():
        torch.testing.assert_close(dict(layer.named_buffers())[name], value, **CLOSE)
    torch.testing.assert_close(layer.eval()(x)[0], expected, **CLOSE)


class MaskedPacking(Packing):
    @classmethod
    def of_host_lengths(cls, steps, lengths, device):
        return Packing.of_device_lengths(steps, lengths)


@pytest.mark.parametrize("kind", ["padded", "packed", "device lengths"])
def test_whole_from_every_form_of_input(kind, monkeypatch):
    x = data()
    expected, layer = make_layer(bidirectional=True), make_layer(bidirectional=True)
    estimate_statistics(expected, items(x, LENGTHS, ONE), "whole")
    hx_free = items(x, LENGTHS, HALVES)
    if kind == "packed":
        hx_free = [pack_padded_sequence(a, torch.tensor(n), enforce_sorted=False) for a, _, n in hx_free]
    elif kind == "device lengths":
        # only where the layer packs its input: the pass itself goes by the real one
        monkeypatch.setattr(functional, "Packing", MaskedPacking)
    estimate_statistics(layer, hx_free, "whole")
    for name, value in expected.named_buffers():
        torch.testing.assert_close(dict(layer.named_buffers())[name], value, **CLOSE)


@pytest.mark.parametrize("mode", ["batches", "paper"])
@pytest.mark.parametrize("seen", [False, True])
def test_the_order_of_batches_does_not_matter(mode, seen):
    x = data()
    found = []
    for parts in (PAIRS, PAIRS[::-1], [PAIRS[k] for k in (2, 0, 3, 1)]):
        layer = make_layer(seen=seen, num_layers=2, bidirectional=True, cell_norm=True)
        estimate_statistics(layer, items(x, LENGTHS, parts), mode)
        found.append(buffers(layer))
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, **CLOSE)


@pytest.mark.parametrize("mode", ["batches", "paper"])
def test_slots_that_a_batch_leaves_empty_do_not_count(mode, monkeypatch):
    """With lengths on a device a batch has moments of every step, of no rows in the last ones."""
    x, found = data(), []
    for masked in (False, True):
        if masked:
            monkeypatch.setattr(functional, "Packing", MaskedPacking)
        layer = make_layer(seen=False, cell_norm=True)
        estimate_statistics(layer, items(x, LENGTHS, [[1, 3], [0, 7], [2, 4, 5, 6]]), mode)
        found.append(buffers(layer))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, **CLOSE)


@pytest.mark.parametrize("prior_count", [0.0, 1.0, None])
def test_prior_count_is_honoured(prior_count):
    layer = make_layer(prior_count=prior_count)
    oracle, x = oracle_of(layer), data()
    estimate_statistics(layer, items(x, LENGTHS, ONE))
    zeros = torch.zeros(8, 4).double()
    seen = oracle.run(x, LENGTHS, zeros, zeros, True)[3]["hh"]
    for k, slot in seen.items():
        torch.testing.assert_close(layer.mean_hh_l0[k], slot.mean, **CLOSE)


@pytest.mark.parametrize("mode", ["batches", "whole", "paper"])
def test_rows_that_a_slot_may_inherit(mode):
    """Those of the last training step; of a layer that was never trained all that the first slot saw."""
    for seen, expected in ((True, 4), (False, 8)):
        layer = make_layer(seen=seen)
        estimate_statistics(layer, items(data(), LENGTHS, HALVES), mode)
        assert layer.rows == expected


@pytest.mark.parametrize("mode", ["batches", "paper"])
@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("input_stats", ["time", "sequence"])
def test_batches_are_merged_and_papers_are_averaged(mode, seen, input_stats):
    """Against the oracle's moments of each batch, normalised as in training with the statistics at entry."""
    x = data()
    layer = make_layer(seen=seen, cell_norm=True, input_stats=input_stats)
    oracle = oracle_of(layer)
    batches = items(x, LENGTHS, PAIRS)
    zeros = torch.zeros(2, 4).double()
    by_batch = [oracle.run(a, lengths, zeros, zeros, True)[3] for a, _, lengths in batches]
    estimate_statistics(layer, batches, mode)
    for norm in ("ih", "hh", "c"):
        for k in range(getattr(layer, f"mean_{norm}_l0").shape[0]):
            parts = [seen[norm][k] for seen in by_batch if k in seen[norm]]
            total = Slot(torch.zeros(()).double(), torch.zeros(()).double(), 0.0)
            for part in parts:
                total = merged(total, part)
            if mode == "paper":
                total.mean = sum(p.mean for p in parts) / len(parts)
                total.var = sum(p.var for p in parts) / len(parts)
            torch.testing.assert_close(getattr(layer, f"mean_{norm}_l0")[k], total.mean, **CLOSE)
            torch.testing.assert_close(getattr(layer, f"var_{norm}_l0")[k], total.var, **CLOSE)
            assert getattr(layer, f"count_{norm}_l0")[k] == total.count


@pytest.mark.parametrize("mode", ["batches", "whole", "paper"])
def test_the_model_is_left_as_found(mode):
    model = Model(max_length=6)
    model.train()
    model.bottom.eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    batches = items(data(), LENGTHS, HALVES)
    rng = torch.get_rng_state()
    estimate_statistics(model, batches, mode)
    assert torch.equal(rng, torch.get_rng_state())  # no dropout, no noise
    assert {name: m.training for name, m in model.named_modules()} == modes
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None
    assert model.bottom.count_hh_l0[0] == 8
    assert model.top.count_hh_l0[0] == 8


@pytest.mark.parametrize("mode", ["batches", "whole", "paper"])
@pytest.mark.parametrize("fault", ["nan", "raise", "lengths"])
def test_after_an_error_everything_is_as_found(mode, fault):
    model = Model(max_length=6)
    before = buffers(model.bottom), buffers(model.top)
    batches = items(data(), LENGTHS, HALVES)
    if fault == "nan":
        batches[1][0][0, 0, 0] = float("nan")
    elif fault == "lengths":
        batches[1][2][0] = 99

    def forward(model, item):
        if fault == "raise" and item is batches[1]:
            raise ValueError("from the user's code")
        return model(*item)

    with pytest.raises(ValueError):  # noqa: PT011 - three faults, one state
        estimate_statistics(model, batches, mode, forward=forward)
    assert_same_buffers(before[0], buffers(model.bottom))
    assert_same_buffers(before[1], buffers(model.top))
    assert model.training
    assert model.bottom._intercept is None
    assert model.top._intercept is None


def test_items_are_arguments():
    """Tuples, mappings, single tensors, packed sequences, a DataLoader; or whatever `forward` makes of them."""
    x = data()
    packed = pack_padded_sequence(x, torch.tensor(LENGTHS), enforce_sorted=False)
    expected = make_layer()
    estimate_statistics(expected, items(x, LENGTHS, ONE))
    for batches, forward in (
        ([{"input": x, "lengths": LENGTHS}], None),
        ([[x, None, LENGTHS]], None),
        ([packed], None),
        ([(x, "label")], lambda model, item: model(item[0], lengths=LENGTHS)),
    ):
        layer = make_layer()
        estimate_statistics(layer, batches, forward=forward)
        for name, value in expected.named_buffers():
            torch.testing.assert_close(dict(layer.named_buffers())[name], value, **CLOSE)
    rows = list(x.transpose(0, 1))
    for mode in ("batches", "whole"):
        loader = DataLoader(rows, batch_size=4, shuffle=True, collate_fn=lambda r: torch.stack(r, 1))
        layer = make_layer()
        estimate_statistics(layer, loader, mode)
        assert layer.count_hh_l0.tolist() == [8.0] * 6


def test_a_cell_is_estimated_step_by_step():
    layer = make_layer(seen=False)
    cell = BNLSTMCell.from_layer(layer)
    x = data()

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = cell

        def forward(self, x):
            state = None
            for t, step in enumerate(x):
                state = self.cell(step, state, time=t)
            return state

    estimate_statistics(layer, [x])
    loop = Loop()
    estimate_statistics(loop, [x])
    torch.testing.assert_close(cell.mean_hh, layer.mean_hh_l0, **CLOSE)
    assert torch.equal(cell.count_ih, layer.count_ih_l0)
    with pytest.raises(ValueError, match="more than once"):
        estimate_statistics(loop, [x], "whole")


def test_a_layer_that_is_not_called_keeps_its_statistics():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = make_layer(), make_layer(seed=1)

        def forward(self, x):
            return self.used(x)

    for mode in ("batches", "whole", "paper"):
        model = Unused()
        before = buffers(model.spare)
        estimate_statistics(model, [data()], mode)
        assert_same_buffers(before, buffers(model.spare))
        assert model.used.count_hh_l0[0] == 8


def test_progress_is_shown(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # to rich, a terminal
    layer = make_layer()
    with_bar = []
    estimate_statistics(layer, (with_bar.append(1) or x for x in [data(), data()]), progress=True)
    assert len(with_bar) == 2
    assert "population statistics" in capsys.readouterr().err


def test_bad_arguments():
    layer = make_layer()
    with pytest.raises(TypeError, match=r"batches: an item does not fit .*too many.*forward=lambda model, item"):
        estimate_statistics(nn.Sequential(layer), [(data(), torch.zeros(8))])
    estimate_statistics(layer, [(data(), torch.zeros(8))], forward=lambda model, item: model(item[0]))
    unpacking = nn.Sequential(layer)
    unpacking.register_forward_pre_hook(lambda model, args: args[:1])  # it fits once the hook has been there
    estimate_statistics(unpacking, [(data(), torch.zeros(8))])
    with pytest.raises(TypeError, match="model"):
        estimate_statistics(lambda x: x, [data()])
    with pytest.raises(ValueError, match="mode"):
        estimate_statistics(layer, [data()], "all")
    for batches in (3, data()):
        with pytest.raises(TypeError, match="batches must be an iterable of items"):
            estimate_statistics(layer, batches)
    with pytest.raises(TypeError, match="iterator"):
        estimate_statistics(layer, iter([data()]), "whole")
    for mode in ("batches", "whole"):
        with pytest.raises(ValueError, match="batches is empty"):
            estimate_statistics(layer, [], mode)
    with pytest.raises(ValueError, match="BNLSTM"):
        estimate_statistics(nn.Linear(2, 2), [data()])
    with pytest.raises(ValueError, match="batches: an item has a batch of one sequence"):
        estimate_statistics(layer, [data()[:, :1]])
    estimate_statistics(layer, [data()[:, :1], data()[:, 1:]], "whole")  # one row is no batch there
    with pytest.raises(ValueError, match="start"):
        estimate_statistics(layer, [(data(), None, None, 0), (data(), None, None, 1)], "whole")


@pytest.mark.parametrize("mode", ["batches", "whole", "paper"])
def test_start_and_states_are_honoured(mode):
    x, hx = data(), tuple(torch.randn(1, 8, 4).double() for _ in range(2))
    layer = make_layer(seen=False)
    estimate_statistics(layer, [(x, hx, None, 2)], mode, offload=mode == "whole")
    expected = make_layer(seen=False, momentum=1.0)
    expected(x[:4], hx, start=2)
    torch.testing.assert_close(layer.mean_hh_l0[:5], expected.mean_hh_l0[:5], **CLOSE)  # the last slot: other rules
    assert layer.count_hh_l0[:2].sum() == 0
