"""Slots: merging, learning, inheriting, and how the module keeps them."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.oracle import Slot, resolved
from tests.support import CLOSE, assert_same_buffers, buffers, make_layer
from triton_bnlstm import BNLSTM, Moments, Statistics, bn_lstm, update_statistics
from triton_bnlstm.statistics import merge, pool, resolve, slots_of_steps


def moments_of(rows):
    return Moments(rows.mean(0)[None], rows.var(0, correction=0)[None], torch.tensor([float(len(rows))]).double())


def test_merge_is_the_moments_of_all_rows():
    a, b = torch.randn(7, 3).double(), torch.randn(2, 3).double() + 100
    for mine, truth in zip(merge(moments_of(a), moments_of(b)), moments_of(torch.cat([a, b])), strict=True):
        torch.testing.assert_close(mine, truth, **CLOSE)


def test_merge_with_nothing_is_exact():
    a = moments_of(torch.randn(5, 3).double() * 1e-6)
    unseen = Moments(torch.zeros(1, 3).double(), torch.ones(1, 3).double(), torch.zeros(1).double())
    for merged in (merge(a, unseen), merge(unseen, a)):
        for mine, truth in zip(merged, a, strict=True):
            assert torch.equal(mine, truth)


def test_pool_is_the_moments_of_all_rows():
    parts = [torch.randn(n, 3).double() + 10 * n for n in (4, 1, 6)]
    stacked = Moments(*(torch.cat(s) for s in zip(*map(moments_of, parts), strict=True)))
    for mine, truth in zip(pool(stacked), moments_of(torch.cat(parts)), strict=True):
        torch.testing.assert_close(mine, truth, **CLOSE)


@pytest.mark.parametrize(
    ("start", "steps", "first", "length"), [(0, 3, 0, 3), (0, 6, 0, 4), (2, 6, 2, 2), (9, 2, 3, 1)]
)
def test_steps_past_the_last_slot_are_its_rows(start, steps, first, length):
    moments = Moments(torch.randn(steps, 2), torch.rand(steps, 2), torch.ones(steps).double())
    found, by_slot = slots_of_steps(moments, start, 4)
    assert (found, by_slot.mean.shape[0]) == (first, length)
    assert by_slot.count.sum() == steps
    torch.testing.assert_close(by_slot.mean[-1], moments.mean[length - 1 :].mean(0))


@pytest.mark.parametrize(
    "counts", [[9, 9, 9, 9, 9], [9, 7.5, 3, 0, 1], [9, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 3, 0, 9, 1]]
)
@pytest.mark.parametrize("rows", [0.0, 2.0, 100.0])
def test_resolve_is_the_recursion(counts, rows):
    """The scan in log2(S) passes against one slot after the other, with means far apart."""
    mean, var = torch.randn(5, 3).double() * 1e3, torch.rand(5, 3).double()
    count = torch.tensor(counts, dtype=torch.float64)
    mine = resolve(Moments(mean, var, count), torch.tensor(rows, dtype=torch.float64))
    slots = resolved([Slot(m, v, float(n)) for m, v, n in zip(mean, var, count, strict=True)], rows)
    torch.testing.assert_close(mine.mean, torch.stack([s.mean for s in slots]), **CLOSE)
    torch.testing.assert_close(mine.var, torch.stack([s.var for s in slots]), **CLOSE)
    torch.testing.assert_close(mine.count, torch.tensor([s.count for s in slots]).double(), **CLOSE)


def test_resolve_in_float32_keeps_small_variances_between_distant_means():
    """784 slots, means 1e3 apart by the end and variances of order one: relative errors stay near float32's."""
    mean = torch.linspace(0, 1e3, 784)[:, None].double()
    var = torch.rand(784, 1).double() + 0.5
    count = torch.linspace(1000, 1, 784).double()
    rows = torch.tensor(32.0).double()
    exact = resolve(Moments(mean, var, count), rows)
    mine = resolve(Moments(mean.float(), var.float(), count), rows)
    # neighbouring means differ by about 1.3 and are rounded to 6e-5 each: 1e-4 of a variance of order one
    torch.testing.assert_close(mine.var.double(), exact.var, rtol=1e-3, atol=0)


def test_a_slot_never_seen_is_its_predecessor():
    layer = make_layer(seen=False, cell_norm=True)
    layer(torch.randn(3, 4, 3).double())
    for moments in layer.statistics(resolved=True).values():
        for slot in (3, 4, 5):
            assert torch.equal(moments.mean[slot], moments.mean[2])
            assert torch.equal(moments.var[slot], moments.var[2])
    assert layer.statistics()["hh"].count.tolist() == [4, 4, 4, 0, 0, 0]


def test_update_statistics_is_what_the_module_does():
    layer = make_layer(cell_norm=True, prior_count=1.5)
    before = layer._statistics_of("_l0")
    copy = Statistics(*(m.clone() for m in before))
    x, lengths = torch.randn(8, 5, 3).double(), [8, 2, 3, 8, 1]
    result = bn_lstm(
        x,
        layer._parameters_of("_l0"),
        copy,
        lengths=lengths,
        training=True,
        eps=layer.eps,
        input_stats="time",
        prior_count=1.5,
    )
    after = update_statistics(copy, result.moments, momentum=0.1)
    output, _ = layer(x, lengths=lengths)
    assert torch.equal(output, result.output)
    now = layer._statistics_of("_l0")
    for mine, truth in zip(after[:3], now[:3], strict=True):
        for a, b in zip(mine, truth, strict=True):
            assert torch.equal(a, b)
    assert torch.equal(after.rows, now.rows)


def test_bn_lstm_is_pure():
    layer = make_layer(input_stats="sequence")
    before = buffers(layer)
    arguments = layer._parameters_of("_l0"), layer._statistics_of("_l0")
    first = bn_lstm(x := torch.randn(6, 4, 3).double(), *arguments, lengths=[6, 1, 2, 3], training=True)
    second = bn_lstm(x, *arguments, lengths=[6, 1, 2, 3], training=True)
    assert torch.equal(first.output, second.output)
    assert_same_buffers(before, buffers(layer))
    assert bn_lstm(x, *arguments, training=False).moments is None


@pytest.mark.parametrize("where", ["first step", "last layer only", "overflow"])
def test_a_step_that_is_not_finite_leaves_all_statistics(where):
    layer = make_layer(num_layers=2, bidirectional=True, cell_norm=True)
    x = torch.randn(4, 3, 3).double()
    if where == "first step":
        x[0, 1, 2] = float("nan")
    elif where == "overflow":
        x *= 1e200  # variance of W x is infinite
    else:
        with torch.no_grad():
            layer.weight_ih_l1_reverse[0, 0] = float("inf")
    before = buffers(layer)
    with pytest.warns(RuntimeWarning, match="not finite"):
        output, _ = layer(x)
    layer(x)  # one warning, not one per step: another would be an error here
    with pytest.warns(RuntimeWarning, match="2 training step"):
        layer.eval()
    layer.state_dict()
    after = buffers(layer)
    assert after.pop("_skipped_steps") == 2
    before.pop("_skipped_steps")
    assert_same_buffers(before, after)
    if where == "first step":  # the NaN itself flows on, as through nn.LSTM
        assert output.isnan().any()


def test_steps_that_are_not_finite_are_told_again_when_they_are_many():
    layer, x = make_layer(), torch.full((2, 2, 3), float("nan")).double()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(120):
            layer(x)
    assert [str(one.message).split()[0] for one in told] == ["1", "10", "100"]


def test_reset_statistics_forgets_everything():
    layer = make_layer(num_layers=2, cell_norm=True)
    fresh = make_layer(num_layers=2, cell_norm=True, seen=False)
    with pytest.warns(RuntimeWarning, match="not finite"):
        layer(torch.full((2, 2, 3), float("nan")).double())
    layer.reset_statistics()
    assert_same_buffers(buffers(layer), buffers(fresh))
    with pytest.warns(RuntimeWarning, match="1 training step"):  # told anew
        layer(torch.full((2, 2, 3), float("nan")).double())


def test_a_merge_that_overflows_is_a_step_that_is_not_finite():
    """Moments within float32, whose distance from what is known is not."""
    layer = make_layer(dtype=torch.float32, seen=False)
    x = torch.randn(2, 8, 3)
    layer(x)
    before = buffers(layer)
    with pytest.warns(RuntimeWarning, match="not finite"):
        layer(x + 1e20)
    before["_skipped_steps"] += 1
    assert_same_buffers(before, buffers(layer))


def test_skipped_steps_are_told_at_eval_where_they_were_not_before():
    """As on an accelerator, where a look at each step would wait for it; and not after another state is loaded."""
    layer = make_layer()
    layer._skipped_steps += 2
    with pytest.warns(RuntimeWarning, match="2 training step"):
        layer.eval()
    layer._skips_told = 0
    layer.load_state_dict(make_layer().state_dict())
    layer.train().eval()


def test_writes_through_data_are_seen_after_a_change_of_mode():
    layer = make_layer().eval()
    x = torch.randn(4, 2, 3).double()
    before = layer(x)[0]
    layer.mean_hh_l0.data.add_(5)
    assert not torch.equal(layer.train().eval()(x)[0], before)


def test_update_statistics_checks_its_numbers():
    layer = make_layer()
    known = layer._statistics_of("_l0")
    for name, value in (("momentum", 1.5), ("momentum", 0), ("start", -2)):
        with pytest.raises(ValueError, match=name):
            update_statistics(known, known, **{name: value})


def test_finite_steps_after_one_that_was_not_are_learnt():
    layer = make_layer()
    with pytest.warns(RuntimeWarning, match="not finite"):
        layer(torch.full((2, 2, 3), float("nan")).double())
    before = layer.mean_hh_l0.clone()
    layer(torch.randn(2, 2, 3).double())
    assert not torch.equal(before, layer.mean_hh_l0)


def test_evaluation_and_errors_write_nothing():
    layer = make_layer(num_layers=2)
    before = buffers(layer)
    with pytest.raises(ValueError, match="lengths"):
        layer(torch.randn(4, 3, 3).double(), lengths=[4, 4, 5])
    layer.eval()(torch.randn(9, 3, 3).double())
    assert_same_buffers(before, buffers(layer))


def test_resolved_statistics_are_kept_in_eval_until_a_buffer_changes(monkeypatch):
    from triton_bnlstm import resolved

    calls = []
    real = resolved.resolve_statistics
    monkeypatch.setattr(resolved, "resolve_statistics", lambda s: calls.append(1) or real(s))
    layer = make_layer().eval()
    x = torch.randn(4, 2, 3).double()
    with torch.inference_mode():
        first = layer(x)[0]
    layer(x)[0].sum().backward()  # what inference mode kept serves a graph
    assert len(calls) == 1
    with torch.no_grad():
        layer.mean_hh_l0 += 1
    assert not torch.equal(layer(x)[0], first)
    assert len(calls) == 2
    layer.load_state_dict(make_layer(seed=1).state_dict())
    expected = layer(x)[0]
    torch.testing.assert_close(expected, make_layer(seed=1).eval()(x)[0])
    layer.rows += 3  # how much a slot inherits depends on it
    assert not torch.equal(layer(x)[0], expected)
    layer.rows -= 3
    assert torch.equal(layer(x)[0], expected)
    version = layer.mean_hh_l0._version
    layer.mean_hh_l0 = torch.randn_like(layer.mean_hh_l0)  # another tensor, by chance of the same version
    while layer.mean_hh_l0._version < version:
        layer.mean_hh_l0.add_(0)
    assert not torch.equal(layer(x)[0], expected)
    layer.set_max_length(2)
    assert layer(x)[0].shape == (4, 2, 4)


@pytest.mark.parametrize("convert", ["half", "bfloat16", "float", "double"])
def test_conversions_leave_statistics_wide(convert):
    layer = make_layer(dtype=torch.float32, cell_norm=True)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    getattr(layer, convert)()
    wide = torch.float64 if convert == "double" else torch.float32
    for name, buffer in layer.named_buffers():
        if buffer.is_floating_point():
            expected = torch.float64 if name.startswith("count") or name == "rows" else wide
            assert buffer.dtype == expected, name
            assert torch.equal(buffer, before[name].to(expected)), name
    assert layer.weight_hh_l0.dtype == getattr(
        torch, {"double": "float64", "float": "float32", "half": "float16"}.get(convert, convert)
    )
    layer.to(torch.float32)
    assert layer.mean_hh_l0.dtype == torch.float32
    x = torch.randn(4, 3, 3)
    assert layer(x)[0].dtype == torch.float32


def test_set_max_length_grows_and_shrinks():
    layer = make_layer(max_length=4, cell_norm=True).eval()
    x = torch.randn(9, 2, 3).double()
    before = layer(x)[0]
    counts = layer.count_hh_l0.clone()
    layer.set_max_length(7)
    assert layer.mean_c_l0.shape == (7, 4)
    # new slots have no rows: each inherits from the last seen one... all that the last slot stood on
    assert torch.equal(layer(x[:4])[0], before[:4])
    assert torch.equal(layer.count_hh_l0, torch.cat([counts, torch.zeros(3).double()]))
    layer.set_max_length(4)
    torch.testing.assert_close(layer(x)[0], before, **CLOSE)
    layer.set_max_length(2)
    assert layer.count_hh_l0[1] == counts[1:].sum()
    assert "max_length=2" in repr(layer)
    unseen = make_layer(max_length=5, seen=False)
    unseen.set_max_length(1)
    assert (unseen.var_hh_l0 == 1).all()


def test_statistics_are_copies_by_layer_and_direction():
    layer = BNLSTM(3, 4, num_layers=2, bidirectional=True, max_length=5, input_stats="sequence")
    layer(torch.randn(5, 4, 3))
    found = layer.statistics(1, reverse=True)
    assert set(found) == {"ih", "hh"}
    assert [s.shape for s in found["ih"]] == [(1, 16), (1, 16), (1,)]
    assert [s.shape for s in found["hh"]] == [(5, 16), (5, 16), (5,)]
    assert torch.equal(found["hh"].mean, layer.mean_hh_l1_reverse)
    assert found["ih"].count == 20
    found["hh"].mean.zero_()
    assert layer.mean_hh_l1_reverse.abs().sum() > 0
    with pytest.raises(IndexError, match="layer"):
        layer.statistics(2)
    with pytest.raises(ValueError, match="reverse"):
        BNLSTM(3, 4, max_length=5).statistics(reverse=True)


def test_a_handful_of_buffers_whatever_the_length():
    layer = BNLSTM(1, 100, max_length=784, cell_norm=True)
    assert len(list(layer.buffers())) <= 12


def test_running_statistics_approach_the_population():
    """Rows of N(3, 4) at every step: after many steps the slots say so, short of sampling error."""
    layer = make_layer(1, 2, dtype=torch.float32, max_length=3, seen=False, momentum=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(300):
            layer(torch.randn(3, 16, 1) * 2 + 3)
    weight = layer.weight_ih_l0.detach().squeeze(1)
    # memory of 16/0.05 = 320 rows: standard errors of 2/√320 = 0.11 per unit weight, and 8 % of the variance
    torch.testing.assert_close(layer.mean_ih_l0, (3 * weight).expand(3, -1), rtol=0.2, atol=1e-3)
    torch.testing.assert_close(layer.var_ih_l0, (4 * weight**2).expand(3, -1), rtol=0.4, atol=1e-3)
