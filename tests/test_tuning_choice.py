"""Which layout a kernel gets: explicit, remembered, from the user's cache, shipped, analytic, in this order."""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.tuning import A100, BY, H100, WORK, entry
from triton_bnlstm import BNLSTM, use_autotune
from triton_bnlstm.kernels import errors
from triton_bnlstm.kernels.config import INTERPRETER, BackwardConfig, Config, MomentsConfig, use_config
from triton_bnlstm.kernels.errors import KernelError
from triton_bnlstm.tuning import choice, shipped, space
from triton_bnlstm.tuning.choice import ANALYTIC, CACHE, SHIPPED, Choice
from triton_bnlstm.tuning.device import Identity, Provenance
from triton_bnlstm.tuning.mode import requested_autotune
from triton_bnlstm.tuning.store import Store
from triton_bnlstm.tuning.work import Work, in_words

IDENTITY = Identity.of(H100)
GET = shipped.get


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty one; nothing is shipped, nothing has been told."""
    monkeypatch.setenv("TRITON_BNLSTM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(errors, "_told", set())
    monkeypatch.setattr(shipped, "get", lambda identity, key: None)
    choice.forget()
    yield
    choice.forget()


def ship(monkeypatch, *entries, identity=IDENTITY):
    known = {(identity, each.key): each for each in entries}
    monkeypatch.setattr(shipped, "get", lambda identity, key: known.get((identity, key)))


def other(layout):
    return next(each for each in space.neighbours(layout) if space.why_not(H100, WORK, each) is None)


def test_the_order(monkeypatch):
    assert choice.choose(H100, WORK) == Choice(space.analytic(H100, WORK), ANALYTIC)
    assert choice.tuned(H100, WORK) is None
    choice.forget()
    modelled = replace(entry(layout=other(entry().layout)), how="modelled")
    ship(monkeypatch, modelled)
    found = choice.choose(H100, WORK)
    assert (found.layout, found.origin, found.measured) == (modelled.layout, SHIPPED, False)
    choice.store_of(H100).put(entry())
    assert choice.choose(H100, WORK).origin == SHIPPED  # what this process knows comes first
    choice.forget()
    found = choice.choose(H100, WORK)
    assert (found.layout, found.origin, found.measured) == (entry().layout, CACHE, True)
    assert choice.tuned(H100, WORK) == entry().layout


def test_sizes_of_a_bucket_share_a_layout_where_it_fits():
    choice.store_of(H100).put(entry())
    assert choice.choose(H100, replace(WORK, batch=50)).origin == CACHE
    assert choice.choose(H100, replace(WORK, batch=65)).origin == ANALYTIC
    assert choice.choose(H100, replace(WORK, hidden=500)).origin == CACHE
    # one for 1,024 units, of which 4 each would be too many programs: there it is not used, and one for less still is
    layout = replace(entry().layout, units=8, warps=32, sequence=True)
    found = entry(replace(WORK, hidden=2048), layout=layout)
    choice.store_of(H100).put(found)
    fitting = [h for h in range(1793, 2049) if choice.choose(H100, replace(WORK, hidden=h)).origin == CACHE]
    room = H100.resident_programs(0, 1, 32)
    assert fitting == [h for h in range(1793, 2049) if -(-h // 8) <= room]


def test_another_device_has_its_own(caplog):
    choice.store_of(H100).put(entry())
    fewer = replace(H100, multiprocessors=114)
    assert choice.choose(fewer, WORK).origin == ANALYTIC
    assert choice.choose(replace(H100, shared_per_program=100_000), WORK).origin == ANALYTIC
    assert choice.choose(A100, WORK).origin == ANALYTIC
    # with the same numbers it is the same device, whatever it is called
    choice.store_of(H100).put(entry(by=BY._replace(name="another board"), at=1.1e9))
    choice.forget()
    assert choice.choose(H100, WORK).entry.by.name == "another board"


def test_an_entry_that_this_device_cannot_run_is_not_used(caplog):
    """A file may have been edited, or come from a version that knew less."""
    impossible = replace(entry().layout, units=32, batch_tile=64, inner=256, resident=True)
    too_much = entry(replace(WORK, hidden=2048), layout=impossible)
    choice.store_of(H100).put(too_much)
    with caplog.at_level(logging.INFO, "triton_bnlstm.tuning"):
        for _ in range(3):
            assert choice.choose(H100, replace(WORK, hidden=2048)).origin == ANALYTIC
            assert choice.choose(H100, replace(WORK, hidden=2040)).origin == ANALYTIC
    assert len([r for r in caplog.records if "is not used for H=2048" in r.message]) == 1


def test_a_stale_triton_is_used_and_told_once(caplog):
    choice.store_of(H100).put(entry(by=BY._replace(triton="2.1.0")))
    with caplog.at_level(logging.INFO, "triton_bnlstm.tuning"):
        assert choice.choose(H100, WORK).origin == CACHE
        assert choice.choose(H100, replace(WORK, batch=60)).origin == CACHE
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "measured with Triton 2.1.0" in record.message


def test_other_code_of_the_kernel_is_another_question():
    found = entry()
    choice.store_of(H100).put(replace(found, key=found.key._replace(source="0" * 12)))
    assert choice.choose(H100, WORK).origin == ANALYTIC


def test_what_does_not_run_is_not_taken_again():
    choice.store_of(H100).put(entry())
    with pytest.warns(RuntimeWarning, match=r"layout of forward .* from the cache does not run here \(too big\)"):
        choice.reject(H100, WORK, entry().layout, "too big")
    assert choice.tuned(H100, WORK) is None
    assert choice.choose(H100, replace(WORK, batch=60)).origin == CACHE  # another size may be all right


def test_a_layout_that_came_meanwhile_is_not_rejected_for_another():
    choice.store_of(H100).put(entry())
    assert choice.tuned(H100, WORK) == entry().layout
    better = other(entry().layout)
    choice.decide(H100, WORK.key, Choice(better, CACHE))  # by another thread's tuning
    choice.reject(H100, WORK, entry().layout, "too big")  # a warning would be an error
    assert choice.tuned(H100, WORK) == better


def test_what_does_not_run_is_not_taken_again_whoever_decides_for_it():
    """By the key's other batches, or by rank 0; `forget` starts anew."""
    choice.store_of(H100).put(entry())
    with pytest.warns(RuntimeWarning, match="does not run here .too big."):
        choice.reject(H100, WORK, entry().layout, "too big")
    choice.decide(H100, WORK.key, Choice(entry().layout, CACHE))
    assert choice.choose(H100, WORK).origin == choice.ANALYTIC
    assert choice.tuned(H100, replace(WORK, batch=60)) == entry().layout  # of which nobody has said so
    choice.forget()
    assert choice.tuned(H100, WORK) == entry().layout


def test_forget_keeps_what_could_not_be_written(tmp_path, monkeypatch):
    """It is nowhere else; what is in files is read again."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_BNLSTM_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="they last for this process only"):
        choice.store_of(H100).put(entry())
    choice.forget()
    assert choice.tuned(H100, WORK) == entry().layout
    monkeypatch.setenv("TRITON_BNLSTM_CACHE_DIR", str(tmp_path))
    choice.forget()
    assert choice.tuned(H100, WORK) is None
    Store(IDENTITY, tmp_path).put(entry())  # another process
    assert choice.tuned(H100, WORK) is None
    choice.forget()
    assert choice.tuned(H100, WORK) == entry().layout


def test_the_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(choice, "_MOST_KNOWN", 10)
    for batch in range(1, 100):
        choice.choose(H100, replace(WORK, batch=batch))
    assert len(choice._memo) <= 10


def test_rejected_layouts_are_bounded(monkeypatch):
    """They are remembered by size, of which a process may have many."""
    monkeypatch.setattr(choice, "_MOST_KNOWN", 10)
    for batch in range(1, 100):
        work = replace(WORK, batch=batch)
        choice.reject(H100, work, space.analytic(H100, work), "too big")
    assert len(choice._rejected) <= 10


def test_what_is_shipped_is_read_again_after_forget(monkeypatch):
    """An installation may have been brought up to date."""
    held: dict[str, Any] = {}
    monkeypatch.setattr(shipped, "get", GET)
    monkeypatch.setattr(shipped, "parse", lambda text: {IDENTITY: dict(held)})
    shipped.of_device.cache_clear()
    assert choice.choose(H100, WORK).origin == ANALYTIC
    held[str(WORK.key)] = entry().as_json()
    choice.forget()
    assert choice.choose(H100, WORK).origin == SHIPPED


def test_a_shipped_entry_under_another_ones_key_is_not_used(monkeypatch):
    key = replace(WORK, hidden=1024).key
    monkeypatch.setattr(shipped, "parse", lambda text: {IDENTITY: {str(key): entry().as_json()}})
    shipped.of_device.cache_clear()
    assert shipped.of_device(IDENTITY)
    assert GET(IDENTITY, key) is None


def test_what_was_decided_is_not_followed_by_a_cache(monkeypatch):
    """Where it does not fit, ranks have to agree, and each may have a cache of its own."""
    choice.store_of(H100).put(entry())
    choice.decide(H100, WORK.key, Choice(replace(entry().layout, warps=64), choice.RANK_0))
    assert choice.choose(H100, WORK).origin == ANALYTIC
    ship(monkeypatch, replace(entry(), how="modelled"))
    choice.forget()
    choice.decide(H100, WORK.key, Choice(replace(entry().layout, warps=64), choice.RANK_0))
    assert choice.choose(H100, WORK).origin == SHIPPED


def test_nothing_is_read_twice(monkeypatch):
    """A call of a layer asks at each step of training."""
    choice.store_of(H100).put(entry())
    choice.choose(H100, WORK)
    monkeypatch.setattr(choice, "store_of", lambda device: pytest.fail("the disk is asked again"))
    assert choice.choose(H100, WORK).origin == CACHE


def test_analytic_only():
    choice.store_of(H100).put(entry())
    with choice.analytic_only():
        assert choice.tuned(H100, WORK) is None
    assert choice.tuned(H100, WORK) == entry().layout


def test_the_interpreter_has_no_cache():
    assert choice.choose(INTERPRETER, replace(WORK, dtype=torch.float32)).origin == ANALYTIC


# In a layer's call


@pytest.fixture
def layer(monkeypatch):
    """One whose kernels look up their layouts as on a device, and run in the interpreter."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter only")
    asked = []

    def tuned(device, work):
        asked.append(work)
        return layouts.get(work.kernel)

    layouts = {}
    monkeypatch.setattr(choice, "tuned", tuned)
    layer = BNLSTM(2, 5, max_length=4, backend="triton")
    layer.asked, layer.layouts = asked, layouts
    return layer


SMALL = Config(sequence=True, units=8, batch_tile=16, inner=32, resident=False, warps=8, stages=1)


def test_a_layer_asks_for_its_kernels_work(layer, monkeypatch):
    x = torch.randn(3, 4, 2)
    layer(x)[0].sum().backward()
    works = [Work("forward", 5, 4, 1, torch.float32, "ieee", ()), Work("backward", 5, 4, 1, torch.float32, "ieee", ())]
    assert [work for work in layer.asked if work.kernel != "moments"] == works
    assert Work.of_moments(2, 4, 1, torch.float32, centre=True) in layer.asked
    assert Work.of_moments(20, 4, 1, torch.float32, centre=False) in layer.asked
    layer.asked.clear()
    layer(x, lengths=[3, 2, 2, 1])
    assert layer.asked[-1].flags == ("seats",)
    layer.asked.clear()
    layer.eval()(x)
    assert [work.kernel for work in layer.asked] == ["inference"]
    layer.asked.clear()
    layer(x[:1])  # of one step nothing is tuned
    assert layer.asked == []


def test_a_tuned_layout_is_what_runs(layer, monkeypatch):
    from triton_bnlstm.kernels import launch

    warps, run = {}, launch._run

    def noting(kernel, grid, tensors, scalars, constants, options):
        warps[kernel.__name__] = options["num_warps"]
        run(kernel, grid, tensors, scalars, constants, options)

    monkeypatch.setattr(launch, "_run", noting)
    layer.layouts |= {"forward": SMALL, "moments": MomentsConfig(16, 16, 2)}
    layer.layouts["backward"] = BackwardConfig(*dataclasses.astuple(SMALL)[:5], warps=2, stages=1)
    layer(torch.randn(3, 4, 2))[0].sum().backward()
    assert warps == {"forward_kernel": 8, "moments_kernel": 2, "backward_kernel": 2}


def test_an_explicit_layout_comes_before_all(layer):
    layer.layouts["forward"] = replace(SMALL, units=4)  # which could not run: two programs
    with use_config(SMALL):
        layer(torch.randn(3, 4, 2))
    assert "forward" not in [work.kernel for work in layer.asked]
    with use_config(replace(SMALL, units=4)), pytest.raises(KernelError, match="2 programs"):
        layer(torch.randn(3, 4, 2))


def test_a_tuned_layout_that_cannot_run_here_is_replaced_by_the_default(layer, monkeypatch):
    rejected = []
    monkeypatch.setattr(
        choice, "reject", lambda device, work, layout, reason: rejected.append((work.kernel, layout, reason))
    )
    x = torch.randn(3, 4, 2)
    expected = layer(x)[0]
    layer.reset_statistics()
    layer.layouts["forward"] = replace(SMALL, units=4)
    assert torch.equal(layer(x)[0], expected)
    assert rejected[0][0] == "forward"
    assert rejected[0][1] == layer.layouts["forward"]
    assert "2 programs of forward_kernel have to run at the same time" in rejected[0][2]


def test_moments_in_a_layout_that_cannot_run(layer, monkeypatch):
    """The input side falls back as the others do, and not to the reference path."""
    from triton_bnlstm.kernels import launch

    rejected, run = [], launch._run

    def failing(kernel, grid, tensors, scalars, constants, options):
        if options["num_warps"] == 2:
            raise KernelError("moments_kernel: out of resources")
        run(kernel, grid, tensors, scalars, constants, options)

    monkeypatch.setattr(
        choice, "reject", lambda device, work, layout, reason: rejected.append((work.kernel, layout, reason))
    )
    x = torch.randn(3, 4, 2)
    expected = layer(x)[0]
    layer.reset_statistics()
    monkeypatch.setattr(launch, "_run", failing)
    layer.layouts["moments"] = MomentsConfig(16, 16, 2)
    assert torch.equal(layer(x)[0], expected)
    assert set(rejected) == {("moments", MomentsConfig(16, 16, 2), "moments_kernel: out of resources")}
    with use_config(moments=MomentsConfig(16, 16, 2)), pytest.raises(KernelError, match="out of resources"):
        layer(x)


# Who says whether to measure


def test_who_is_asked_first(monkeypatch):
    assert requested_autotune(None) == "off"
    monkeypatch.setenv("TRITON_BNLSTM_AUTOTUNE", "force")
    assert requested_autotune(None) == "force"
    with use_autotune("on_miss"):
        assert requested_autotune(None) == "on_miss"
        with use_autotune("off"):
            assert requested_autotune(None) == "off"
        assert requested_autotune("force") == "force"
    assert requested_autotune(None) == "force"
    monkeypatch.setenv("TRITON_BNLSTM_AUTOTUNE", "")
    assert requested_autotune(None) == "off"


def test_bad_modes(monkeypatch):
    with pytest.raises(ValueError, match="autotune must be one of 'off', 'on_miss', 'force', got 'yes'"):
        BNLSTM(2, 5, max_length=4, autotune="yes")
    with pytest.raises(ValueError, match="autotune"), use_autotune("yes"):
        pass
    monkeypatch.setenv("TRITON_BNLSTM_AUTOTUNE", "1")
    with pytest.raises(ValueError, match="TRITON_BNLSTM_AUTOTUNE must be one of"):
        BNLSTM(2, 5, max_length=4)(torch.randn(3, 4, 2))
    assert "autotune='on_miss'" in repr(BNLSTM(2, 5, max_length=4, autotune="on_miss"))


# What is shipped


def test_shipped_files(tmp_path, monkeypatch):
    monkeypatch.undo()
    text = shipped.text_of({IDENTITY: {str(WORK.key): entry().as_json()}})
    assert shipped.parse(text) == {IDENTITY: {str(WORK.key): json.loads(json.dumps(entry().as_json()))}}
    for broken in ("{", "[]", json.dumps({"format": "other"}), text.replace('"devices"', '"gadgets"')):
        with pytest.raises(ValueError, match=r"\w"):
            shipped.parse(broken)
    assert shipped.of_device(IDENTITY._replace(architecture="sm1")) == {}


def test_in_words():
    assert in_words(SMALL) == "sequence, 8 units x 16 rows, inner 32, 1 stage, 8 warps"
    work = Work("backward", 1024, 64, 1, torch.bfloat16)
    assert in_words(space.analytic(H100, work)) == (
        "sequence, 8 units x 64 rows, product 8 x 2, inner 64, W_hh stays, 8 warps"
    )
    assert in_words(space.analytic(H100, replace(work, kernel="save"))) == "preactivations"
    assert Provenance.of_json({"name": 1}) == ("1", "unknown", "unknown", "unknown")


# What is decided for a key


def test_a_decision_is_for_all_works_of_a_key(monkeypatch):
    """Those that were looked up before, too, for as long as the process lasts or until it is to forget."""
    works = [replace(WORK, batch=batch) for batch in range(33, 65)]
    assert {choice.choose(H100, work).origin for work in works} == {ANALYTIC}
    decided = Choice(entry().layout, CACHE, entry())
    choice.decide(H100, WORK.key, decided)
    assert all(choice.choose(H100, work) == decided for work in works)
    assert choice.choose(H100, replace(WORK, batch=65)).origin == ANALYTIC
    assert choice.choose(A100, WORK).origin == ANALYTIC
    monkeypatch.setattr(choice, "_MOST_KNOWN", 4)
    for batch in range(1, 33):
        choice.choose(H100, replace(WORK, batch=batch))
    assert all(choice.choose(H100, work) == decided for work in works)
    choice.forget()
    assert choice.choose(H100, WORK).origin == ANALYTIC


def test_a_decision_is_not_for_a_size_that_it_does_not_fit():
    """Two programs of a multiprocessor, each of 8 units: beyond so many units others could not be resident."""
    layout = replace(entry().layout, units=8, warps=32, sequence=True)
    room = 8 * A100.resident_programs(0, 1, 32)
    small, large = replace(WORK, hidden=room), replace(WORK, hidden=room + 1)
    assert large.key == small.key
    choice.decide(A100, large.key, Choice(layout, CACHE))
    assert choice.choose(A100, small).layout == layout
    assert choice.choose(A100, large).origin == ANALYTIC


def test_lines_that_were_told_are_bounded(monkeypatch):
    monkeypatch.setattr(choice, "_MOST_KNOWN", 10)
    for k in range(100):
        choice.inform_once(f"line {k}")
    assert len(choice._told) <= 10


def test_without_triton_nothing_is_stale(monkeypatch):
    """Nobody can tell which one will compile."""
    from triton_bnlstm.tuning import device

    monkeypatch.setattr(device, "triton_version", lambda: "none")
    assert not device.is_stale(BY._replace(triton="2.1.0"))
    monkeypatch.setattr(device, "triton_version", lambda: "3.9.1")
    assert not device.is_stale(BY._replace(triton="3.9.0"))
    assert device.is_stale(BY._replace(triton="3.8.0"))
