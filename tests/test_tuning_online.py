"""Tuning before a call: when it happens, when it does not, and what all ranks agree on."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.tuning import CPU, H100, WORK, Clock, FakeBench, entry
from triton_bnlstm import BNLSTM
from triton_bnlstm.kernels import errors
from triton_bnlstm.tuning import choice, online, ranks, shipped
from triton_bnlstm.tuning.choice import ANALYTIC, CACHE
from triton_bnlstm.tuning.device import Identity
from triton_bnlstm.tuning.mode import why_not_now
from triton_bnlstm.tuning.store import Store, read_file
from triton_bnlstm.tuning.tuner import TuningError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_BNLSTM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(errors, "_told", set())
    monkeypatch.setattr(shipped, "get", lambda identity, key: None)
    monkeypatch.setattr(online, "_done", set())
    monkeypatch.setattr(ranks, "_silent", set())
    monkeypatch.setattr(ranks, "_put_off", set())
    choice.forget()
    yield tmp_path
    choice.forget()


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

    with pytest.warns(RuntimeWarning, match="could not be tuned .there is too little memory."):
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
    from triton_bnlstm.tuning import space

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
    monkeypatch.setattr(fused, "train", lambda calls, save: saved.append(save) or train(calls, save))
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


# Ranks

RANK = textwrap.dedent(
    """
    import os, sys, time, json, warnings
    from dataclasses import replace
    from datetime import timedelta
    import torch, torch.distributed as dist
    from tests.support.tuning import H100, A100, WORK, CPU, FakeBench
    from triton_bnlstm.tuning import online, choice, ranks, shipped
    shipped.get = lambda identity, key: None
    rank, size, port, what = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    os.environ["TRITON_BNLSTM_CACHE_DIR"] += f"/{rank}"  # each host its own
    store = dist.TCPStore("127.0.0.1", port, size, rank == 0, timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    made = []
    def make(work, device):
        # every rank would find another layout to be the fastest
        order = lambda layout: 4 + (hash((layout, rank)) % 1000) / 100
        made.append(FakeBench(work, time=order))
        return made[-1]
    numbers = A100 if what == "mixed" and rank > 0 else H100
    works = [WORK, replace(WORK, hidden=1024)]
    if what == "alone" and rank > 0:
        ranks.BEGIN_SECONDS = 0.5
        works.append(replace(WORK, hidden=2048))  # which rank 0 never needs
    if what == "known":  # the others have tuned before, and know better
        from tests.support.tuning import entry
        if rank > 0:
            choice.store_of(numbers).put(entry())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for work in works:
            online.ensure_works([work], CPU, numbers, "on_miss", make)
    found = [repr(choice.choose(numbers, work).layout) for work in works]
    print(json.dumps({"rank": rank, "found": found, "made": len(made), "told": [str(w.message) for w in told]}))
    dist.barrier()
    dist.destroy_process_group()
    """
)


@pytest.mark.parametrize(("size", "what"), [(4, "same"), (2, "known"), (2, "alone"), (2, "mixed")])
def test_rank_0_decides_for_all(tmp_path, size, what):
    """By answers in the group's store, so that no rank waits for one that never asks."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "TRITON_BNLSTM_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment |= {"PYTHONHASHSEED": "0"}
    command = [sys.executable, "-c", RANK]
    ranked = [[*command, str(rank), str(size), str(port), what] for rank in range(size)]
    processes = [subprocess.Popen(each, stdout=subprocess.PIPE, text=True, env=environment) for each in ranked]
    try:
        answers = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()
    zero, *others = answers
    assert zero["made"] == 2
    assert zero["told"] == []
    for other in others:
        assert other["made"] == 0  # nobody else measures
        if what == "mixed":
            assert other["found"] != zero["found"]
            assert "rank 0 has another kind of device" in other["told"][0]
        else:
            assert other["found"][:2] == zero["found"]
        if what == "alone":
            assert any("rank 0 has not decided about forward bfloat16 H2048" in text for text in other["told"])
        if what in ("same", "known"):
            assert other["told"] == []


class FakeStore(dict):
    def set(self, name, value):
        self[name] = value.encode()

    def check(self, names):
        return all(name in self for name in names)

    def get(self, name):
        return self[name]


def test_a_rank_waits_as_long_as_rank_0_may_take():
    clock, store, identity = Clock(), FakeStore(), Identity.of(H100)
    answers = ranks.Answers(store, 1)

    def wait(seconds, happens):
        def sleep(_):
            clock.now += 1
            if clock.now in happens:
                happens[clock.now]()

        clock.now = 0.0
        return answers.wait("a", WORK, identity, seconds, clock=clock, sleep=sleep)

    layout = entry().layout
    begin, give = lambda: answers.begin("a"), lambda: answers.give("a", identity, layout)
    assert wait(60, {5.0: begin, 100.0: give}) == (layout, True)
    store.clear()
    assert wait(60, {5.0: begin, 10.0: lambda: answers.give("a", identity, None)}) == (None, True)
    store.clear()
    assert wait(60, {3.0: lambda: answers.later("a")}) == (None, False)  # to be asked again
    assert clock.now == 3
    assert wait(60, {2.0: begin, 3.0: give}) == (None, False)
    answers.give("a", identity, layout)
    assert wait(60, {}) == (layout, True)
    assert clock.now == 0
    store.clear()
    with pytest.warns(RuntimeWarning, match="rank 0 has not decided"):
        assert wait(60, {}) == (None, True)
    assert clock.now == pytest.approx(ranks.BEGIN_SECONDS, abs=2)
    # one silence is enough: nothing that follows is waited for, unless rank 0 is at work on it
    assert wait(60, {}) == (None, True)  # a second warning would be an error
    assert clock.now <= 1
    store["a"] = b"begun"
    assert wait(60, {100.0: give}) == (layout, True)
    store.clear()
    ranks._silent.clear()
    errors._told.clear()
    with pytest.warns(RuntimeWarning, match="rank 0 has not decided"):
        assert wait(60, {5.0: begin}) == (None, True)
    assert clock.now == pytest.approx(ranks.BEGIN_SECONDS + 60 + ranks.END_SECONDS, abs=2)
    for told in (b"{", b"[]", b'{"device": {}}', b'{"device": 1, "layout": null}'):
        store["a"] = told
        errors._told.clear()
        with pytest.warns(RuntimeWarning, match="rank 0's layout of forward .* cannot be read"):
            assert wait(60, {}) == (None, True)


def test_one_process_alone_asks_nobody():
    assert ranks.rank() is None
