"""state_dicts across versions of the format, other max_length, assign, meta devices and tools that save only a part."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from tests.support import CLOSE, assert_same_buffers, buffers, make_layer
from triton_bnlstm import BNLSTM, BNLSTMCell, estimate_statistics, state

EVERYTHING = {"num_layers": 2, "bidirectional": True, "cell_norm": True, "input_stats": "sequence"}


def plain(module: nn.Module) -> dict[str, torch.Tensor]:
    """As safetensors gives it: copies, and no metadata."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """All that is saved is the same, to the bit and in dtype."""
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype, name
        assert torch.equal(first[name], second[name]), name


# The format


@pytest.mark.parametrize("input_stats", ["time", "sequence"])
def test_what_format_1_is(input_stats):
    """Files of this format are out there: who changes what is saved counts `VERSION` up, and writes a migration."""
    layer = BNLSTM(3, 4, 2, bidirectional=True, max_length=5, cell_norm=True, input_stats=input_stats)
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"rows": ((), torch.float64)}
    slots = 5 if input_stats == "time" else 1
    for suffix, columns in (("_l0", 3), ("_l0_reverse", 3), ("_l1", 8), ("_l1_reverse", 8)):
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (16, columns), "weight_hh": (16, 4), "bias": (16,)}
        shapes |= {"gamma_ih": (16,), "gamma_hh": (16,), "gamma_c": (4,), "beta_c": (4,)}
        shapes |= {"mean_ih": (slots, 16), "var_ih": (slots, 16), "mean_hh": (5, 16), "var_hh": (5, 16)}
        shapes |= {"mean_c": (5, 4), "var_c": (5, 4)}
        expected |= {name + suffix: (shape, torch.float32) for name, shape in shapes.items()}
        counts = {"count_ih": (slots,), "count_hh": (5,), "count_c": (5,)}
        expected |= {name + suffix: (shape, torch.float64) for name, shape in counts.items()}
    saved = layer.state_dict()
    assert {name: (tuple(value.shape), value.dtype) for name, value in saved.items()} == expected
    assert saved._metadata[""] == {"version": 1}
    assert BNLSTMCell(3, 4, max_length=5).state_dict()._metadata[""] == {"version": 1}


@pytest.mark.parametrize("nested", [False, True])
def test_a_newer_format_is_refused(nested):
    source, target = make_layer(), make_layer(seed=1)
    module = nn.ModuleDict({"rnn": target}) if nested else target
    saved = (nn.ModuleDict({"rnn": source}) if nested else source).state_dict()
    saved._metadata["rnn" if nested else ""]["version"] = 2
    before = plain(target)
    with pytest.raises(RuntimeError, match=rf"that of {'rnn' if nested else 'BNLSTM'} has format 2.*Upgrade"):
        module.load_state_dict(saved)
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name])
    module.load_state_dict(dict(saved))  # who knows better can say so: without metadata it is of this format
    assert_same(source, target)


def test_an_older_format_goes_through_every_migration(monkeypatch):
    """Formats that never were, to see that what will be written some day is called, in order, for the layer only."""
    saved = nn.ModuleDict({"rnn": make_layer(), "head": nn.Linear(2, 2)}).state_dict()
    renamed = type(saved)((name.replace("weight_hh", "old"), value) for name, value in saved.items())
    renamed._metadata = saved._metadata
    model = nn.ModuleDict({"rnn": make_layer(seed=1), "head": nn.Linear(2, 2)})

    def first(entries, prefix, layer):
        assert layer is model["rnn"]
        entries[f"{prefix}middle_l0"] = entries.pop(f"{prefix}old_l0")

    def second(entries, prefix, layer):
        entries[f"{prefix}weight_hh_l0"] = entries.pop(f"{prefix}middle_l0")

    monkeypatch.setattr(state, "VERSION", 3)
    monkeypatch.setattr(state, "MIGRATIONS", {1: first, 2: second})
    model.load_state_dict(renamed)
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[name]), name
    assert "rnn.old_l0" in renamed  # the caller's dict is as it was
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_hh_l0"):
        model.load_state_dict(dict(renamed))


def test_keys_are_torchs_to_tell():
    layer = make_layer()
    saved = plain(layer)
    del saved["bias_l0"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "bias_l0"'):
        layer.load_state_dict(saved)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "more"'):
        layer.load_state_dict(plain(layer) | {"more": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"size mismatch for weight_hh_l0"):
        make_layer(3, 5).load_state_dict(plain(layer))


@pytest.mark.parametrize("strict", [False, True])
def test_an_lstms_state_is_told_from_its_own(strict):
    layer = make_layer(dtype=torch.float32)
    before = plain(layer)
    with pytest.raises(RuntimeError, match=r"state_dict: that of rnn is an nn.LSTM's.*from_lstm"):
        nn.ModuleDict({"rnn": layer}).load_state_dict(nn.ModuleDict({"rnn": nn.LSTM(3, 4)}).state_dict(), strict=strict)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


# Only a part


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "lost",
    [("rows",), ("count_",), ("var_c",), ("mean_ih",), ("mean_hh", "var_hh", "count_hh"), ("mean_", "var_", "count_")],
    ids=["rows", "counts", "a part of a norm", "means of a norm", "a norm", "all but rows"],
)
def test_a_part_of_the_statistics_is_refused(lost, strict):
    """Without strict torch would say nothing, and a fresh layer would take slots whose count it lacks for unseen."""
    everything = plain(make_layer(**EVERYTHING))
    saved = {name: value for name, value in everything.items() if not name.startswith(lost)}
    layer = make_layer(seen=False, **EVERYTHING)
    before = plain(layer)
    named = ".*".join(["rows"] if lost == ("rows",) else [f"{lost[0]}\\w*{s}" for s in ("_l0", "_l0_reverse", "_l1")])
    with pytest.raises(RuntimeError, match=rf"statistics of BNLSTM.*only in part.*Missing key.*{named}.*estimate_stat"):
        layer.load_state_dict(saved, strict=strict)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
    statistics = {name: value for name, value in saved.items() if name in buffers(layer)}
    with pytest.raises(RuntimeError, match="only in part"):
        layer.load_state_dict(statistics, strict=False)


def test_statistics_alone():
    source, layer = make_layer(**EVERYTHING), make_layer(seed=1, **EVERYTHING)
    layer.load_state_dict(
        {name: value for name, value in plain(source).items() if name in buffers(source)}, strict=False
    )
    assert_same_buffers(buffers(source), buffers(layer))
    assert not torch.equal(layer.weight_hh_l0, source.weight_hh_l0)


@pytest.mark.parametrize("version", [0, -1, "1", 1.5])
def test_no_such_format(version):
    layer = make_layer()
    saved = layer.state_dict()
    saved._metadata[""]["version"] = version
    with pytest.raises(RuntimeError, match=rf"has format {version!r}; formats are numbers from 1"):
        layer.load_state_dict(saved)


def test_weights_alone_keep_the_layers_statistics():
    """What a tool that averages parameters saves; then `estimate_statistics`, as the message says."""
    source, layer = make_layer(cell_norm=True), make_layer(cell_norm=True, seed=1)
    before = buffers(layer)
    weights = {name: value.detach().clone() for name, value in source.named_parameters()}
    found = layer.load_state_dict(weights, strict=False)
    assert set(found.missing_keys) == set(before) - {"_skipped_steps"}
    assert_same_buffers(before, buffers(layer))
    x = torch.randn(6, 5, 3).double()
    for model in (source, layer):
        estimate_statistics(model, [x], mode="whole")
    assert torch.equal(source.eval()(x)[0], layer.eval()(x)[0])


def test_a_layer_gets_a_norm_or_a_layer_more():
    """Fine-tuning: what the file has is whole, what it lacks stays initial."""
    source = make_layer()
    layer = make_layer(num_layers=2, cell_norm=True, seen=False)
    found = layer.load_state_dict(source.state_dict(), strict=False)
    assert {name.rsplit("_", 1)[0] for name in found.missing_keys if name.endswith("_l0")} == {
        *("gamma_c", "beta_c", "mean_c", "var_c", "count_c")
    }
    assert torch.equal(layer.mean_hh_l0, source.mean_hh_l0)
    assert layer.rows == 4
    assert (layer.count_hh_l1 == 0).all()


# Another max_length


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("saved", "own"), [(9, 6), (4, 6)], ids=["shorter", "longer"])
@pytest.mark.parametrize("options", [{"cell_norm": True}, EVERYTHING], ids=["one layer", "everything"])
def test_three_calls_load_another_max_length(options, saved, own, nested):
    source = make_layer(max_length=saved, **options)
    target = make_layer(max_length=own, seed=1, **options)
    target.eval()(torch.randn(6, 2, 3).double())  # fills the cache of what is used
    given = nn.ModuleDict({"a": nn.ModuleDict({"rnn": source})}).state_dict() if nested else source.state_dict()
    module = nn.ModuleDict({"a": nn.ModuleDict({"rnn": target})}) if nested else target
    called = r"a\.rnn" if nested else "BNLSTM"
    message = (
        rf"saved with max_length={saved}, the layer {called} has max_length={own}\. "
        rf"Call set_max_length\({saved}\) on it, load the state_dict, then call set_max_length\({own}\)"
    )
    with pytest.raises(ValueError, match=message):
        module.load_state_dict(given)
    target.set_max_length(saved)
    module.load_state_dict(given)
    assert_same(source, target)
    target.set_max_length(own)
    assert {b.shape[0] for name, b in target.named_buffers() if name.startswith("mean_hh")} == {own}
    x = torch.randn(12, 3, 3).double()
    output, expected = target(x)[0], source.eval()(x)[0]
    if "bidirectional" in options and own < saved:
        # the second direction begins at each sequence's end, so every step of it has gone through the slots that differ
        lengths = [own - 1] * 3
        output, expected = target(x, lengths=lengths)[0], source(x, lengths=lengths)[0]
    # what is left of the memory is used as it was: slots before the new last one are the same, and new ones, unseen,
    # are their predecessor
    steps = own - 1 if own < saved else 12
    torch.testing.assert_close(output[:steps], expected[:steps], **CLOSE)
    if own < saved:
        last = source.count_hh_l0[own - 1 :].sum()
        torch.testing.assert_close(target.count_hh_l0[-1], last)  # rows of slots that went are the last one's


# assign, meta, dtypes


@pytest.mark.parametrize("own", [6, 9])
def test_onto_meta_with_assign(own):
    source = make_layer(**EVERYTHING)
    layer = BNLSTM(3, 4, 2, bidirectional=True, cell_norm=True, input_stats="sequence", max_length=own, device="meta")
    layer.eps = source.eps
    model = nn.Sequential(layer)
    if own != 6:
        with pytest.raises(ValueError, match="max_length"):
            model.load_state_dict(nn.Sequential(source).state_dict(), assign=True)
        layer.set_max_length(6)
    saved = {f"0.{name}": value for name, value in plain(source).items()}
    model.load_state_dict(saved, assign=True)
    assert not [name for name, b in layer.named_buffers() if b.is_meta]
    assert_same(source, layer)
    assert layer.weight_hh_l0.data_ptr() == saved["0.weight_hh_l0"].data_ptr()
    assert layer.mean_hh_l0.data_ptr() == saved["0.mean_hh_l0"].data_ptr()
    layer.set_max_length(own)
    x = torch.randn(6, 3, 3).double()
    assert torch.equal(layer.eval()(x)[0], source.eval()(x)[0])
    layer.train()(x, lengths=[6, 2, 1])[0].sum().backward()
    assert layer.weight_hh_l1.grad.abs().sum() > 0
    assert layer.rows == 3


def test_assign_replaces_what_evaluation_had_resolved():
    source, layer = make_layer(), make_layer(seed=1).eval()
    x = torch.randn(6, 3, 3).double()
    layer(x)
    layer.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(layer(x)[0], source.eval()(x)[0])


@pytest.mark.parametrize("assign", [False, True])
def test_statistics_stay_wide_when_somebody_halves_every_float(assign):
    source = make_layer(dtype=torch.float32, cell_norm=True, input_stats="sequence")
    halved = {name: value.half() for name, value in plain(source).items()}
    layer = BNLSTM(3, 4, max_length=6, cell_norm=True)
    layer.load_state_dict(halved, assign=assign)
    assert layer.weight_hh_l0.dtype == (torch.float16 if assign else torch.float32)
    for name, buffer in layer.named_buffers():
        if name != "_skipped_steps":
            assert buffer.dtype == (torch.float64 if name == "rows" or "count" in name else torch.float32), name
    # a rounding of 2⁻¹¹ to float16, of numbers of order one
    torch.testing.assert_close(layer.mean_hh_l0, source.mean_hh_l0, rtol=5e-4, atol=1e-6)
    x = torch.randn(6, 3, 3).to(layer.weight_hh_l0.dtype)
    assert layer(x)[0].isfinite().all()


def test_assign_of_a_wider_layer_brings_its_dtypes():
    source, layer = make_layer(input_stats="sequence"), BNLSTM(3, 4, max_length=6, eps=3e-3)
    layer.load_state_dict(plain(source), assign=True)
    assert_same(source, layer)
    x = torch.randn(6, 3, 3).double()
    assert torch.equal(layer(x)[0], source(x)[0])
    assert_same(source, layer)


@pytest.mark.parametrize("parametrized", [False, True])
def test_a_cells_state(parametrized):
    """Through a file that holds nothing but tensors."""
    cells = [BNLSTMCell.from_layer(make_layer(cell_norm=True, seed=seed)) for seed in (0, 1)]
    if parametrized:
        for cell in cells:
            nn.utils.parametrizations.weight_norm(cell, "weight_hh")
    file = io.BytesIO()
    torch.save(cells[0].state_dict(), file)
    file.seek(0)
    cells[1].load_state_dict(torch.load(file, weights_only=True))
    assert_same(*cells)
    x = torch.randn(5, 3).double()
    for a, b in zip(*(cell(x, time=2) for cell in cells), strict=True):
        assert torch.equal(a, b)
    later = copy.deepcopy(cells[0]).state_dict()
    later._metadata[""]["version"] = 7
    with pytest.raises(RuntimeError, match="BNLSTMCell has format 7"):
        cells[1].load_state_dict(later)


@pytest.mark.parametrize("strict", [True, False])
def test_other_input_stats_are_named(strict):
    source, layer = make_layer(input_stats="time"), make_layer(input_stats="sequence")
    before = plain(layer)
    with pytest.raises(ValueError, match=r'input_stats: .* saved with input_stats="time", .* has "sequence"'):
        layer.load_state_dict(plain(source), strict=strict)
    assert all(torch.equal(before[name], value) for name, value in plain(layer).items())
