"""Tuning before a call: when it happens, when it does not, and what all ranks agree on."""

from __future__ import annotations

import logging
import threading
import time
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.support.tuning import CPU, H100, WORK, FakeBench, FakeStore, as_a_new_process, entry
from triton_bnlstm import BNLSTM
from triton_bnlstm.tuning import choice, online, ranks, shipped, space
from triton_bnlstm.tuning import store as stores
from triton_bnlstm.tuning.choice import ANALYTIC, CACHE
from triton_bnlstm.tuning.device import Identity
from triton_bnlstm.tuning.mode import why_not_now
from triton_bnlstm.tuning.store import Store, read_file
from triton_bnlstm.tuning.tuner import TuningError

ROOT = Path(__file__).parents[1]


cache = pytest.fixture(autouse=True)(as_a_new_process)


@pytest.fixture
def made():
    """Benches that were asked for."""
    return []


@pytest.fixture
def ensure(made):
    def make(work, device):
        made.append(FakeBench(work))
        return made[-1]

    def ensured(mode, *works):
        online.ensure_works(list(works) or [WORK], CPU, H100, mode, make)

    return ensured


def test_what_nobody_has_measured_is_measured_once(ensure, made, cache):
    ensure("on_miss")
    found = choice.choose(H100, WORK)
    assert (found.origin, found.measured) == (CACHE, True)
    assert found.layout != made[0].default
    ensure("on_miss")
    ensure("on_miss", replace(WORK, batch=60))  # the same bucket
    assert len(made) == 1
    choice.forget()  # as another process
    ensure("on_miss")
    assert len(made) == 1
    assert len(read_file(Store(Identity.of(H100), cache).path("forward"))) == 1


def test_force_measures_what_is_known_once_more(ensure, made):
    ensure("on_miss")
    ensure("force")
    ensure("force")
    ensure("force", *[replace(WORK, batch=batch) for batch in range(33, 64)])  # the same bucket
    assert len(made) == 2
    assert len(made[1].prepared) > 3
    assert choice.choose(H100, WORK).measured


def test_a_modelled_layout_is_a_miss(ensure, made, monkeypatch):
    modelled = replace(entry(), how="modelled")
    other = replace(WORK, hidden=1024)
    choice.store_of(H100).put(replace(entry(other), how="modelled", at=0.0, candidates=()))
    ensure("on_miss", other)
    assert (len(made), choice.choose(H100, other).measured) == (1, True)
    made.clear()
    monkeypatch.setattr(shipped, "get", lambda identity, key: modelled if key == modelled.key else None)
    ensure("on_miss")
    assert len(made) == 1
    choice.forget()
    monkeypatch.setattr(shipped, "get", lambda identity, key: entry() if key == entry().key else None)
    ensure("on_miss")
    assert len(made) == 1


def test_off_is_off(monkeypatch):
    """And on a CPU there is nothing to measure in any mode."""
    monkeypatch.setattr(online, "ensure_works", lambda *_: pytest.fail("measured"))
    for mode in ("off", "on_miss", "force"):
        layer = BNLSTM(2, 5, max_length=4, autotune=mode)
        layer(torch.randn(3, 4, 2))[0].sum().backward()


@pytest.mark.parametrize("why", ["graph", "deterministic", "backward"])
def test_when_nothing_is_measured(ensure, made, monkeypatch, caplog, why):
    """One line, the layout that is there, and the next call may measure."""
    caplog.set_level(logging.INFO, "triton_bnlstm.tuning")
    if why == "graph":
        monkeypatch.setattr(online, "why_not_now", lambda device: "a CUDA graph is being captured")
        ensure("on_miss")
        ensure("on_miss")
        monkeypatch.undo()
    elif why == "deterministic":
        torch.use_deterministic_algorithms(True)
        try:
            ensure("force")
            ensure("force")
        finally:
            torch.use_deterministic_algorithms(False)
    else:

        class InBackward(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, d):
                ensure("on_miss")
                ensure("on_miss")
                return d

        InBackward.apply(torch.ones(1, requires_grad=True)).sum().backward()
    assert made == []
    (record,) = [r for r in caplog.records if "is not tuned now" in r.message]
    assert record.levelno == logging.INFO
    assert choice.choose(H100, WORK).origin == ANALYTIC


def test_a_capture_is_noticed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert why_not_now(torch.device("cuda", 0)) == "a CUDA graph is being captured"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert why_not_now(torch.device("cuda", 0)) is None


def test_what_goes_wrong_does_not_keep_the_call_from_running(ensure, made, monkeypatch, cache):
    tries = []

    def failing(work, device):
        tries.append(work)
        raise TuningError("there is too little memory")

    with pytest.warns(RuntimeWarning, match="could not be tuned .TuningError: there is too little memory."):
        online.ensure_works([WORK], CPU, H100, "on_miss", failing)
    for batch in range(33, 65):  # not again in this process, whatever the last batch has
        online.ensure_works([replace(WORK, batch=batch)], CPU, H100, "on_miss", failing)
    assert tries == [WORK]
    assert choice.choose(H100, WORK).origin == ANALYTIC
    monkeypatch.setenv("TRITON_BNLSTM_AUTOTUNE_SECONDS", "long")
    with pytest.warns(RuntimeWarning, match="TRITON_BNLSTM_AUTOTUNE_SECONDS must be a number"):
        ensure("on_miss", replace(WORK, hidden=256))
    assert made == []


def test_the_time_cap_is_the_users(monkeypatch):
    assert online.seconds_allowed() == online.SECONDS
    monkeypatch.setenv("TRITON_BNLSTM_AUTOTUNE_SECONDS", "7.5")
    assert online.seconds_allowed() == 7.5
    for bad in ("0", "-1", "inf", "nan"):
        monkeypatch.setenv("TRITON_BNLSTM_AUTOTUNE_SECONDS", bad)
        with pytest.raises(ValueError, match="AUTOTUNE_SECONDS must be a positive"):
            online.seconds_allowed()


def test_a_cache_that_cannot_be_written_still_serves_this_process(ensure, made, cache, monkeypatch):
    (cache / "file").write_text("")
    monkeypatch.setenv("TRITON_BNLSTM_CACHE_DIR", str(cache / "file"))
    with pytest.warns(RuntimeWarning, match="they last for this process only"):
        ensure("on_miss")
    assert choice.choose(H100, WORK).measured


@pytest.mark.parametrize("error", [PermissionError(13, "no"), OSError(30, "read-only"), OSError(28, "full")])
def test_one_warning_where_nothing_can_be_written(ensure, made, cache, monkeypatch, error):
    """Not one for each key, although the folder of those who measure is there."""
    (Store(Identity.of(H100), cache).folder / "measuring").mkdir(parents=True)

    @contextmanager
    def failing(path, *_):
        # as real ones: with the file's name, which is another one for each kernel and each attempt
        failed.append(path)
        raise OSError(*error.args, f"{path}.{len(failed)}.part")
        yield

    failed = []

    monkeypatch.setattr(online, "locked", failing)
    monkeypatch.setattr(stores, "locked", failing)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ensure("on_miss", WORK, replace(WORK, hidden=1024), replace(WORK, kernel="inference"))
    assert len(made) == 3
    assert len({str(path) for path in failed}) > 1
    assert ["they last for this process only" in str(each.message) for each in told] == [True]


def test_who_has_waited_too_long_measures_beside_the_other(ensure, made, cache, monkeypatch):
    store = choice.store_of(H100)
    alone = online._alone
    monkeypatch.setattr(online, "_alone", lambda store, work, seconds: alone(store, work, -14.99))  # 20 ms
    with alone(store, WORK, 60), pytest.warns(RuntimeWarning, match=r"is held by another .* is measured anyway"):
        ensure("on_miss")
    assert len(made) == 1
    assert choice.choose(H100, WORK).measured


def test_no_error_of_choosing_reaches_the_call(ensure, made, monkeypatch):
    def failing(*_):
        raise ConnectionError("nobody is there")

    monkeypatch.setattr(choice, "choose", failing)
    with pytest.warns(RuntimeWarning, match=r"could not be tuned .ConnectionError: nobody is there"):
        ensure("on_miss")
    assert made == []


@pytest.mark.parametrize("rank", [0, 1])
def test_no_error_of_asking_reaches_the_call(ensure, made, monkeypatch, rank):
    """A group's store that is gone for a moment. What another rank has not heard, it asks for again."""

    class Gone(FakeStore):
        def set(self, name, value):
            raise ConnectionError("nobody is there")

        def check(self, names):
            raise ConnectionError("nobody is there")

    store = Gone()
    group = ranks.Group(store)
    monkeypatch.setattr(ranks, "rank", lambda: rank)
    monkeypatch.setattr(ranks, "group", lambda: group)
    monkeypatch.setattr(ranks.Answers, "of", lambda group: ranks.Answers(store, group))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            ensure("on_miss")
    assert ["ConnectionError" in str(each.message) for each in told] == [True]
    assert made == []
    assert len(online._done) == (1 if rank == 0 else 0)
    if rank == 1:
        there = FakeStore()
        ranks.Answers(there, ranks.Group(there)).give(
            f"{choice.times_forgotten()}/on_miss/{WORK.key}", Identity.of(H100), entry().layout
        )
        monkeypatch.setattr(ranks.Answers, "of", lambda group: ranks.Answers(there, group))
        for wait in group.waits.values():
            wait.look_at = 0.0  # a minute later
        ensure("on_miss")
        assert choice.choose(H100, WORK) == choice.Choice(entry().layout, choice.RANK_0)


def test_a_fresh_measurement_is_kept_whatever_the_clocks_say(ensure, cache):
    """Here the cache has an entry from a host whose clock is ahead."""
    slow = next(each for each in space.structures(H100, WORK) if not each.resident)
    known = entry(layout=slow, at=time.time() + 3600)
    Store(Identity.of(H100), cache).put(known)
    choice.forget()
    ensure("force")
    mine = choice.choose(H100, WORK)
    assert mine.layout != known.layout
    assert Store(Identity.of(H100), cache).get(WORK.key).layout == mine.layout


def test_two_threads_or_processes_measure_one_thing_once(cache):
    """The second one waits, and finds what the first one has found."""
    begun, go_on, made = threading.Event(), threading.Event(), []

    def make(work, device):
        made.append(FakeBench(work))
        begun.set()
        assert go_on.wait(30)
        return made[-1]

    found = []

    def run():
        found.append(online.tune_work(WORK, CPU, H100, make=make, store=Store(Identity.of(H100), cache)))

    threads = [threading.Thread(target=run) for _ in range(2)]
    threads[0].start()
    assert begun.wait(30)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert len(made) == 1
    assert found[0] == found[1]


def test_what_another_process_has_found_meanwhile_is_read_again(cache):
    """Before anything is measured, under the lock, whatever this process read earlier."""
    mine, other = (Store(Identity.of(H100), cache) for _ in range(2))
    assert mine.get(WORK.key) is None
    assert other.put(entry())

    def make(work, device):
        pytest.fail("measured")

    assert online.tune_work(WORK, CPU, H100, make=make, store=mine) == entry()
    measuring, late = threading.Event(), Store(Identity.of(H100), cache / "late")
    alone = online._alone

    @contextmanager
    def waiting(store, work, seconds):
        measuring.set()  # it is about to wait
        with alone(store, work, seconds):
            yield

    found = []
    with alone(late, WORK, 5), mock.patch.object(online, "_alone", waiting):
        thread = threading.Thread(target=lambda: found.append(online.tune_work(WORK, CPU, H100, make=make, store=late)))
        thread.start()
        assert measuring.wait(30)
        Store(Identity.of(H100), cache / "late").put(entry())
    thread.join(30)
    assert found == [entry()]


# What a layer's call asks for


@pytest.mark.parametrize(
    ("options", "lengths", "expected"),
    [
        ({}, None, {"forward": (), "backward": ()}),
        ({"cell_norm": True}, None, {"forward": ("cell_norm",), "backward": ("cell_norm",)}),
        ({"bidirectional": True}, [3, 2, 2, 1], {"forward": ("seats",), "backward": ()}),
        ({"save": "auto"}, None, {"forward": (), "backward": (), "save": ()}),
    ],
)
def test_works_of_a_layers_call(monkeypatch, options, lengths, expected):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("as on a device, on a CPU")
    asked = []

    def noted(calls, precision, mode, **which):
        asked.append((mode, online.works_of(calls, precision, **which)))

    monkeypatch.setattr(online, "ensure", noted)
    layer = BNLSTM(2, 5, max_length=4, backend="triton", autotune="on_miss", **options)
    layer(torch.randn(3, 4, 2), lengths=lengths)
    ((mode, works),) = asked
    assert mode == "on_miss"
    assert {work.kernel: work.flags for work in works if work.kernel != "moments"} == expected
    assert {work.directions for work in works} == {1 + layer.bidirectional}
    moments = {(work.columns, work.flags) for work in works if work.kernel == "moments"}
    assert moments == {(2, ("centre",)), (20, ()), (5, ("before", "centre"))}
    # what is looked up when it runs is what was asked for
    looked_up = set()
    monkeypatch.setattr(choice, "tuned", lambda device, work: looked_up.add(work))
    layer(torch.randn(3, 4, 2), lengths=lengths)[0].sum().backward()
    assert {work for work in works if work.kernel != "save"} <= looked_up
    asked.clear()
    with torch.no_grad():
        layer.eval()(torch.randn(3, 4, 2))
    assert [work.kernel for work in asked[0][1]] == ["inference"]
    asked.clear()
    layer(torch.randn(1, 4, 2))
    assert asked == []  # one step


def test_what_has_an_explicit_layout_is_not_measured(monkeypatch):
    from types import SimpleNamespace

    from triton_bnlstm.kernels.config import use_config

    measured = []
    monkeypatch.setattr(online, "ensure_works", lambda works, *_: measured.append([work.kernel for work in works]))
    monkeypatch.setattr(online, "works_of", lambda *_, **__: [replace(WORK, kernel=k) for k in ("forward", "backward")])
    monkeypatch.setattr(online, "device_of", lambda device: H100)
    weight = SimpleNamespace(device=torch.device("cuda", 0))
    calls = [SimpleNamespace(parameters=SimpleNamespace(weight_hh=weight))]
    online.ensure(calls, "ieee", "on_miss", gradients=True)
    with use_config(entry().layout):
        online.ensure(calls, "ieee", "on_miss", gradients=True)
    with use_config(backward=space.analytic(H100, replace(WORK, kernel="backward"))):
        online.ensure(calls, "ieee", "on_miss", gradients=True)
    online.ensure(calls, "ieee", "off", gradients=True)
    assert measured == [["forward", "backward"], ["backward"], ["forward"]]


def test_what_is_saved_is_what_was_found_faster(monkeypatch):
    """save="auto": "preactivations" where nobody has measured."""
    pytest.importorskip("triton")
    from triton_bnlstm import fused
    from triton_bnlstm.kernels.config import SaveConfig

    saved = []
    train = fused.train
    monkeypatch.setattr(fused, "train", lambda calls, save, **kw: saved.append(save) or train(calls, save, **kw))
    layer = BNLSTM(2, 5, max_length=4, backend="triton", save="auto")
    x = torch.randn(3, 4, 2)
    layer(x)
    found = choice.Choice(SaveConfig(recompute=True), CACHE)
    monkeypatch.setattr(choice, "choose", lambda device, work: found)
    monkeypatch.setattr(choice, "tuned", lambda device, work: None)
    layer(x)
    layer(x[:1])  # of one step
    with torch.no_grad():
        layer(x)
    assert saved == ["preactivations", "recompute", "preactivations", None]
