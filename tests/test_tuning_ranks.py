"""Under torch.distributed: what all ranks agree on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.tuning import CPU, H100, WORK, FakeBench, FakeStore, as_a_new_process, entry
from triton_bnlstm.kernels.config import Config
from triton_bnlstm.tuning import Work, choice, online, ranks, space
from triton_bnlstm.tuning.device import Identity
from triton_bnlstm.tuning.tuner import TuningError

ROOT = Path(__file__).parents[1]


cache = pytest.fixture(autouse=True)(as_a_new_process)


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
        works += [replace(WORK, hidden=h) for h in (2048, 1536, 768)]  # which rank 0 never needs
    if what == "failing" and rank == 0:
        os.environ["TRITON_BNLSTM_AUTOTUNE_SECONDS"] = "soon"
    if what == "batches":  # each rank has its own last batch
        works += [replace(WORK, batch=40 + k + 8 * rank) for k in range(8)]
    if what == "known":  # the others have tuned before, and know better
        from tests.support.tuning import entry
        if rank > 0:
            choice.store_of(numbers).put(entry())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        began = time.monotonic()
        for work in works:
            online.ensure_works([work], CPU, numbers, "on_miss", make)
    found = [repr(choice.choose(numbers, work).layout) for work in works]
    waited = time.monotonic() - began
    told = [str(w.message) for w in told]
    print(json.dumps({"rank": rank, "found": found, "made": len(made), "told": told, "waited": waited}))
    dist.barrier()
    dist.destroy_process_group()
    """
)


@pytest.mark.parametrize(
    ("size", "what"),
    [(4, "same"), (2, "known"), (2, "alone"), (2, "mixed"), (2, "failing"), (3, "batches")],
)
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
    assert zero["made"] == (0 if what == "failing" else 2)
    assert [text for text in zero["told"] if "AUTOTUNE_SECONDS must be a number" not in text] == []
    for other in others:
        assert other["made"] == 0  # nobody else measures
        assert other["waited"] < ranks.BEGIN_SECONDS / 2
        if what == "mixed":
            assert other["found"] != zero["found"]
            assert "rank 0 has another kind of device" in other["told"][0]
        else:
            assert other["found"][:2] == zero["found"][:2]
        if what == "alone":
            (text,) = other["told"]
            assert "rank 0 has not decided about forward bfloat16 H2048" in text
        elif what != "mixed":
            assert other["told"] == []
        if what == "batches":  # one layout for each bucket
            assert len({*other["found"][2:], other["found"][0]}) == 1


@pytest.fixture
def group(monkeypatch):
    """Several ranks in one process: `group(1)` is rank 1 from then on, with a process's memory of its own."""
    store, groups = FakeStore(), {}
    monkeypatch.setattr(ranks, "LOOK_SECONDS", 0)
    monkeypatch.setitem(ranks.Answers.wait.__kwdefaults__, "sleep", lambda _: pytest.fail("it waits"))
    monkeypatch.setattr(ranks.Answers, "of", lambda group: ranks.Answers(store, group))

    def become(rank):
        groups.setdefault(rank, ranks.Group(store))
        monkeypatch.setattr(ranks, "group", lambda: groups[rank])
        monkeypatch.setattr(ranks, "rank", lambda: rank)
        monkeypatch.setattr(online, "_done", set())
        monkeypatch.setattr(choice, "_decided", {})
        monkeypatch.setattr(choice, "_memo", {})
        monkeypatch.setattr(choice, "_stores", {})
        monkeypatch.setenv("TRITON_BNLSTM_CACHE_DIR", f"{os.environ['TRITON_BNLSTM_CACHE_DIR']}/{rank}")
        return store

    become.groups = groups
    return become


def ensure(*works, mode="on_miss", make=None):
    online.ensure_works(list(works) or [WORK], CPU, H100, mode, make or (lambda work, device: FakeBench(work)))


def nobody(work, device):
    pytest.fail("measured by another rank than 0")


def test_rank_0_answers_whatever_becomes_of_its_tuning(group, monkeypatch):
    """With the layout that it takes itself, so that the ranks agree; and nobody waits for more."""

    def failing(work, device):
        raise TuningError("there is too little memory")

    store = group(0)
    with pytest.warns(RuntimeWarning, match="could not be tuned"):
        ensure(make=failing)
    theirs = choice.choose(H100, WORK)
    assert theirs.layout == space.analytic(H100, WORK)
    group(1)
    choice.store_of(H100).put(entry())  # this rank would know a better one
    ensure(make=nobody)
    assert choice.choose(H100, WORK) == choice.Choice(theirs.layout, choice.RANK_0)
    assert not choice.choose(H100, WORK).measured  # not by what this rank knows of another layout
    monkeypatch.setenv("TRITON_BNLSTM_AUTOTUNE_SECONDS", "soon")
    group(0)
    other = replace(WORK, hidden=1024)
    with pytest.warns(RuntimeWarning, match="AUTOTUNE_SECONDS must be a number"):
        ensure(other)
    monkeypatch.delenv("TRITON_BNLSTM_AUTOTUNE_SECONDS")
    group(1)
    ensure(other, make=nobody)
    assert len(store.said()) == 2

    def interrupted(work, device):
        raise KeyboardInterrupt

    group(0)
    third = replace(WORK, hidden=768)
    ranks.Answers(store, group.groups[0]).later(f"{choice.times_forgotten()}/on_miss/{third.key}")  # at an earlier call
    with pytest.raises(KeyboardInterrupt):
        ensure(third, make=interrupted)
    assert not [text for text in store.said() if text == b"begun"]


@pytest.mark.parametrize("others_ask", ["meanwhile", "later"])
def test_an_interrupted_tuning_is_made_up_for(group, monkeypatch, others_ask):
    """By the next call of a program that goes on, be it a notebook: and all ranks take what that finds."""

    def interrupted(work, device):
        raise KeyboardInterrupt

    group(0)
    with pytest.raises(KeyboardInterrupt):
        ensure(make=interrupted)
    memory = online._done, choice._decided, choice._memo
    assert not online._done
    group(1)
    if others_ask == "meanwhile":
        ensure(make=nobody)
        assert choice.choose(H100, WORK).origin == choice.ANALYTIC
    mine = online._done, choice._decided, choice._memo
    group(0)
    for name, held in zip(("_done", "_decided", "_memo"), memory, strict=True):
        monkeypatch.setattr(online if name == "_done" else choice, name, held)
    ensure()
    theirs = choice.choose(H100, WORK)
    assert theirs.measured
    group(1)
    for name, held in zip(("_done", "_decided", "_memo"), mine, strict=True):
        monkeypatch.setattr(online if name == "_done" else choice, name, held)
    ensure(make=nobody)
    assert choice.choose(H100, WORK).layout == theirs.layout


def test_what_rank_0_puts_off_it_decides_later(group):
    """Meanwhile nobody waits, and nobody takes the question for answered."""
    store = group(0)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            ensure()
    finally:
        torch.use_deterministic_algorithms(False)
    assert (store.said(), store.told) == ([b"not now"], 2)  # and the group's name
    group(1)
    ensure(make=nobody)
    ensure(make=nobody)
    assert choice.choose(H100, WORK).origin == choice.ANALYTIC
    assert store.asked == 4  # for the group's name, and for the answer
    group(0)
    ensure()
    theirs = choice.choose(H100, WORK)
    assert theirs.measured
    group(1)
    ensure(make=nobody)
    assert choice.choose(H100, WORK).layout == theirs.layout


def test_another_rank_asks_nothing_where_nothing_can_be_tuned(group, monkeypatch):
    """While it captures a graph, above all: and the next call asks."""
    store = group(0)
    ensure()
    theirs = choice.choose(H100, WORK)
    group(1)
    monkeypatch.setattr(online, "why_not_now", lambda device: "a CUDA graph is being captured")
    ensure(make=nobody)
    assert store.asked == 0
    assert choice.choose(H100, WORK).origin == choice.ANALYTIC
    monkeypatch.setattr(online, "why_not_now", lambda device: None)
    ensure(make=nobody)
    assert choice.choose(H100, WORK).layout == theirs.layout


SIZES = [Work("forward", hidden, 64, 1, torch.bfloat16) for hidden in (1280, 1056, 1040)]


@pytest.mark.parametrize("asked", range(3), ids=lambda k: f"H={SIZES[k].hidden}")
def test_ranks_agree_in_all_sizes_of_a_key_after_a_failure(group, asked):
    """Whichever size it was whose tuning failed: the model has another layout for the largest."""
    assert len({work.key for work in SIZES}) == 1
    assert len({space.analytic(H100, work) for work in SIZES}) > 1

    def failing(work, device):
        raise TuningError("there is too little memory")

    group(0)
    with pytest.warns(RuntimeWarning, match="could not be tuned"):
        ensure(SIZES[asked], make=failing)
    theirs = [choice.tuned(H100, work) for work in SIZES]
    group(1)
    ensure(*SIZES, make=nobody)
    assert [choice.tuned(H100, work) for work in SIZES] == theirs


def test_ranks_agree_where_what_is_known_does_not_fit(group):
    """Rank 0's cache has a layout that is none for the size that asks, but is one for others of the key."""
    large, small = SIZES[:2]
    narrow = Config(True, 4, 64, 64, resident=False, warps=32, stages=2)  # 264 of its programs run at the same time
    assert [space.why_not(H100, work, narrow) is None for work in (large, small)] == [False, True]
    group(0)
    choice.store_of(H100).put(entry(large, layout=narrow))
    ensure(large)
    theirs = [choice.choose(H100, work).layout for work in (large, small)]
    assert theirs == [space.analytic(H100, large), narrow]
    group(1)
    choice.store_of(H100).put(entry(large, layout=replace(narrow, units=16, warps=8)))  # which would fit both
    ensure(large, make=nobody)
    assert [choice.choose(H100, work).layout for work in (large, small)] == theirs


NOTHING = ranks.Answer(None)


def test_other_ranks_wait_as_long_as_rank_0_may_take(group, monkeypatch):
    """Who may first wait for another process that measures the same."""
    asked, locks = [], []
    monkeypatch.setattr(
        ranks.Answers, "wait", lambda self, name, work, identity, seconds: asked.append(seconds) or NOTHING
    )
    monkeypatch.setattr(online, "locked", lambda path, seconds: locks.append(seconds) or nullcontext())
    monkeypatch.setenv("TRITON_BNLSTM_AUTOTUNE_SECONDS", "300")
    group(1)
    ensure(make=nobody)
    group(0)
    ensure()
    assert asked == [locks[0] + 300]


def test_threads_of_rank_0_answer_once(group):
    """With "force", too, where the second would find something else, and tell it."""
    store, made, begun, go_on = group(0), [], threading.Event(), threading.Event()

    def make(work, device):
        made.append(FakeBench(work))
        begun.set()
        assert go_on.wait(30)
        return made[-1]

    threads = [threading.Thread(target=lambda: ensure(mode="force", make=make)) for _ in range(2)]
    threads[0].start()
    assert begun.wait(30)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert len(made) == 1
    assert store.told == 3  # the group's name, "begun", and the answer


def test_a_group_that_cannot_be_asked_does_not_keep_the_call_from_running(group, monkeypatch):
    def gone():
        raise RuntimeError("the group has been destroyed")

    group(0)
    monkeypatch.setattr(ranks, "group", gone)
    with pytest.warns(RuntimeWarning, match="process group cannot be asked .*has been destroyed"):
        ensure(make=nobody)
    ensure(make=nobody)  # a second warning would be an error


def test_a_key_is_asked_once_for_all_its_batches(group):
    store = group(0)
    ensure()
    theirs = choice.choose(H100, WORK).layout
    group(1)
    works = [replace(WORK, batch=batch) for batch in range(33, 65)]
    assert {choice.choose(H100, work).layout for work in works} != {theirs}
    for work in works:
        ensure(work, make=nobody)
    assert store.asked == 2  # for the group's name, and for the answer
    assert {choice.choose(H100, work) for work in works} == {choice.Choice(theirs, choice.RANK_0)}


def test_who_has_tuned_alone_answers_in_a_group(group, monkeypatch):
    """And after `forget`, of all ranks, the question is a new one."""
    store = group(0)
    monkeypatch.setattr(ranks, "rank", lambda: None)
    monkeypatch.setattr(ranks, "group", lambda: None)
    ensure()
    assert not store
    monkeypatch.setattr(ranks, "rank", lambda: 0)
    monkeypatch.setattr(ranks, "group", lambda: group.groups[0])
    ensure(make=nobody)  # it knows
    assert len(store.said()) == 1
    ensure(mode="force")
    choice.forget()
    ensure(make=nobody)
    assert len(store.said()) == 3


def test_who_comes_first_of_ranks_that_have_once_waited_in_vain_does_not_matter(group, monkeypatch):
    """The other rank's calls, after rank 0 has decided, are in rank 0's layout."""
    group(1)
    group.groups[1].silent = True
    memory = online._done, choice._decided, choice._memo
    ensure(make=nobody)  # a moment before rank 0 begins
    assert choice.choose(H100, WORK).origin == choice.ANALYTIC
    group(0)
    ensure()
    theirs = choice.choose(H100, WORK)
    group(1)
    for name, held in zip(("_done", "_decided", "_memo"), memory, strict=True):
        monkeypatch.setattr(online if name == "_done" else choice, name, held)
    ensure(make=nobody)
    assert choice.choose(H100, WORK).layout == theirs.layout


def test_what_is_remembered_of_questions_is_bounded(group, monkeypatch):
    """Also in a process that calls `forget` again and again."""
    monkeypatch.setattr(ranks, "_MOST", 10)
    store = group(0)
    for _ in range(5):
        for hidden in (256, 512):
            ensure(replace(WORK, hidden=hidden))
        choice.forget()
    assert len(online._done) == 2
    answers = ranks.Answers(store, group.groups[0])
    for k in range(30):
        answers.later(f"put off {k}")
        answers.wait(f"put off {k}", WORK, Identity.of(H100), 60)
    assert len(answers.group.put_off) <= 10
    answers.group.silent = True
    for k in range(30):
        answers.wait(f"never {k}", WORK, Identity.of(H100), 60, sleep=lambda _: None)
    assert len(answers.group.waits) <= 10
