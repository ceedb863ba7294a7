"""Under torch.distributed: how long a rank waits for rank 0's answer, and in which group it asks."""

from __future__ import annotations

import gc

import pytest
import torch.distributed as dist

from tests.support.tuning import GROUP, H100, WORK, Clock, FakeStore, as_a_new_process, entry
from triton_bnlstm.kernels import errors
from triton_bnlstm.tuning import ranks
from triton_bnlstm.tuning.device import Identity

cache = pytest.fixture(autouse=True)(as_a_new_process)


@pytest.fixture
def waiting():
    """Rank 1's answers, and `wait(seconds, happens)`, in which a second passes at each look, and things happen."""
    clock, store, identity = Clock(), FakeStore(), Identity.of(H100)
    answers = ranks.Answers(store, GROUP)

    def wait(seconds, happens, name="a"):
        """What it gets, and how long that took."""
        began = clock.now

        def sleep(_):
            clock.now += 1
            happens.get(clock.now - began, lambda: None)()

        return answers.wait(name, WORK, identity, seconds, clock=clock, sleep=sleep), clock.now - began

    wait.answers, wait.clock, wait.store = answers, clock, store
    wait.begin = lambda: answers.begin("a")
    wait.later = lambda: answers.later("a")
    wait.give = lambda: answers.give("a", identity, entry().layout)
    wait.give_nothing = lambda: answers.give("a", identity, None)
    return wait


FOUND, NOTHING, NOT_YET = (entry().layout, True), (None, True), (None, False)


def test_a_rank_waits_as_long_as_rank_0_may_take(waiting):
    assert waiting(60, {5: waiting.begin, 100: waiting.give}) == (FOUND, 100)
    waiting.store.clear()
    assert waiting(60, {5: waiting.begin, 10: waiting.give_nothing}) == (NOTHING, 10)
    waiting.store.clear()
    assert waiting(60, {3: waiting.later}) == (NOT_YET, 3)  # to be asked again
    assert waiting(60, {}) == (NOT_YET, 0)
    waiting.clock.now += 1000  # this is not on the account of the next wait
    waiting.begin()
    assert waiting(60, {100: waiting.give}) == (FOUND, 100)
    assert waiting(60, {}) == (FOUND, 0)
    for told in (b"{", b"[]", b'{"device": {}}', b'{"device": 1, "layout": null}'):
        waiting.store["a"] = told
        errors._told.clear()
        with pytest.warns(RuntimeWarning, match="rank 0's layout of forward .* cannot be read"):
            assert waiting(60, {}) == (NOTHING, 0)


def test_one_silence_is_enough(waiting):
    """Nothing that follows is waited for, unless rank 0 is at work on it; but answers that come late are taken."""
    with pytest.warns(RuntimeWarning, match="rank 0 has not decided"):
        answer, took = waiting(60, {})
    assert answer == NOT_YET
    assert took == pytest.approx(ranks.BEGIN_SECONDS, abs=2)
    asked = waiting.store.asked
    for _ in range(100):  # calls of a layer
        assert waiting(60, {}) == (NOT_YET, 0)
        waiting.clock.now += 0.01
    assert waiting.store.asked <= asked + 1
    answer, took = waiting(60, {}, "b")  # a second warning would be an error
    assert (answer, took <= 1) == (NOT_YET, True)
    waiting.give()
    waiting.answers.give("b", Identity.of(H100), None)
    waiting.clock.now += ranks.LOOK_SECONDS
    assert waiting(60, {}) == (FOUND, 0)
    assert waiting(60, {}, "b") == (NOTHING, 0)
    # begun just after this rank has looked: the next look waits for the end
    waiting.store.clear()
    assert waiting(60, {1: waiting.begin, 100: waiting.give}) == (FOUND, 100)


def test_rank_0_that_begins_and_never_ends_is_waited_for_once(waiting):
    with pytest.warns(RuntimeWarning, match="rank 0 has not decided"):
        answer, took = waiting(60, {5: waiting.begin})
    assert answer == NOT_YET
    assert took == pytest.approx(ranks.BEGIN_SECONDS + 60 + ranks.END_SECONDS, abs=2)
    waiting.clock.now += 10
    assert waiting(60, {}) == (NOT_YET, 0)
    waiting.clock.now += 10
    waiting.give()
    assert waiting(60, {}) == (FOUND, 0)


@pytest.fixture
def in_a_group(monkeypatch):
    """Pretends that this process is a rank of a group of two, whose store is this one, and held by nobody else."""
    now = {}

    def enter(store, rank=1):
        now.update(store=store, rank=rank)
        if "entered" not in now:  # not before: this process is alone
            now["entered"] = True
            monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
            monkeypatch.setattr(ranks.dist, "get_world_size", lambda: 2)
            monkeypatch.setattr(ranks.dist, "get_rank", lambda: now["rank"])
            monkeypatch.setattr(ranks.dist.distributed_c10d, "_get_default_store", lambda: now["store"])

    monkeypatch.setattr(ranks, "_store", None)
    return enter


def test_groups_are_told_apart(in_a_group):
    """Those that have been destroyed and made again, too, whatever addresses their stores are given."""
    found = []
    for _ in range(20):
        in_a_group(dist.PrefixStore("default_pg", dist.HashStore()))
        found.append(ranks.group())
        assert ranks.group() == found[-1]  # still the same one
    assert len(set(found)) == 20
    gone = ranks._store
    in_a_group(None)
    gc.collect()
    assert gone() is None  # nobody keeps its port


def test_a_new_group_has_nothing_of_an_old_one_with_the_same_store(in_a_group):
    below, identity = dist.HashStore(), Identity.of(H100)
    in_a_group(dist.PrefixStore("default_pg", below))
    first = ranks.Answers.of(ranks.group())
    first.give("a", identity, entry().layout)
    assert ranks.Answers.of(ranks.group()).wait("a", WORK, identity, 60) == FOUND
    in_a_group(dist.PrefixStore("default_pg", below))
    second = ranks.Answers.of(ranks.group())
    assert not second.store.check(["a"])
    in_a_group(dist.PrefixStore("default_pg", below), 0)  # rank 0 has been in one group only
    assert ranks.group().met == 1


def test_one_process_alone_asks_nobody(in_a_group):
    """Nor one whose group has no store to ask in."""
    assert (ranks.rank(), ranks.group()) == (None, None)
    in_a_group(dist.HashStore())
    assert ranks.rank() == 1
    assert ranks.group() is not None
    in_a_group(None)
    assert (ranks.rank(), ranks.group()) == (None, None)
