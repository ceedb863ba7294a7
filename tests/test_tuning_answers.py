"""Under torch.distributed: how long a rank waits for rank 0's answer, and in which group it asks."""

from __future__ import annotations

import gc

import pytest
import torch.distributed as dist

from tests.support.tuning import H100, WORK, Clock, FakeStore, as_a_new_process, entry
from triton_bnlstm.kernels import errors
from triton_bnlstm.tuning import ranks
from triton_bnlstm.tuning.device import Identity

cache = pytest.fixture(autouse=True)(as_a_new_process)


@pytest.fixture
def waiting():
    """Rank 1's answers, and `wait(seconds, happens)`, in which a second passes at each look, and things happen."""
    clock, store, identity = Clock(), FakeStore(), Identity.of(H100)
    answers, zero = (ranks.Answers(store, ranks.Group(store)) for _ in range(2))

    def wait(seconds, happens, name="a"):
        """What it gets, and how long that took."""
        began = clock.now

        def sleep(_):
            clock.now += 1
            assert clock.now - began < 1000
            happens.get(clock.now - began, lambda: None)()

        return answers.wait(name, WORK, identity, seconds, clock=clock, sleep=sleep), clock.now - began

    def forget():
        """Rank 0 starts anew, in the same group's store."""
        store.clear()
        zero.group = ranks.Group(store)

    wait.answers, wait.zero, wait.clock, wait.store, wait.forget = answers, zero, clock, store, forget
    wait.begin = lambda: zero.begin("a")
    wait.later = lambda: zero.later("a")
    wait.give = lambda: zero.give("a", identity, entry().layout)
    wait.give_nothing = lambda: zero.give("a", identity, None)
    return wait


FOUND, NOTHING, NOT_YET = (entry().layout, True), (None, True), (None, False)


def test_a_rank_waits_as_long_as_rank_0_may_take(waiting):
    assert waiting(60, {5: waiting.begin, 100: waiting.give}) == (FOUND, 100)
    waiting.forget()
    assert waiting(60, {5: waiting.begin, 10: waiting.give_nothing}) == (NOTHING, 10)
    waiting.forget()
    assert waiting(60, {3: waiting.later}) == (NOT_YET, 3)  # to be asked again
    assert waiting(60, {}) == (NOT_YET, 0)
    waiting.clock.now += 1000  # this is not on the account of the next wait
    waiting.begin()
    assert waiting(60, {100: waiting.give}) == (FOUND, 100)
    assert waiting(60, {}) == (FOUND, 0)
    for told in (b"{", b"[]", b'{"device": {}}', b'{"device": 1, "layout": null}'):
        waiting.store[f"triton_bnlstm/tuning/{waiting.zero.group.token}/a"] = told
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
    waiting.zero.give("b", Identity.of(H100), None)
    waiting.clock.now += ranks.LOOK_SECONDS
    assert waiting(60, {}) == (FOUND, 0)
    assert waiting(60, {}, "b") == (NOTHING, 0)
    # begun just after this rank has looked: the next look waits for the end
    waiting.forget()
    assert waiting(60, {1: waiting.begin, 100: waiting.give}) == (FOUND, 100)


def test_rank_0_that_begins_and_never_ends_is_waited_for_once(waiting):
    with pytest.warns(RuntimeWarning, match="rank 0 has not decided"):
        answer, took = waiting(60, {5: waiting.begin})
    assert answer == NOT_YET
    assert took == pytest.approx(5 + 60 + ranks.END_SECONDS, abs=2)
    waiting.clock.now += 10
    assert waiting(60, {}) == (NOT_YET, 0)
    waiting.clock.now += 10
    waiting.give()
    assert waiting(60, {}) == (FOUND, 0)


def test_what_rank_0_begins_late_is_waited_for_as_well(waiting):
    """Its time counts from when this rank first sees that it has begun, not from when it first asked."""
    with pytest.warns(RuntimeWarning, match="rank 0 has not decided"):
        assert waiting(60, {})[0] == NOT_YET
    waiting.clock.now += 1000
    waiting.begin()
    assert waiting(60, {150: waiting.give}) == (FOUND, 150)


def test_what_begins_again_after_it_was_put_off_has_its_whole_time(waiting):
    """What it would have had from its first begin is long over."""
    assert waiting(60, {5: waiting.begin, 8: waiting.later}) == (NOT_YET, 8)
    waiting.clock.now += 1000
    waiting.begin()
    assert waiting(60, {150: waiting.give}) == (FOUND, 150)


def test_an_interrupted_wait_begins_anew(waiting):
    """Nor does its silence count: the program that goes on asks as if for the first time."""

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        waiting(60, {5: interrupt})
    assert not waiting.answers.group.waits
    waiting.clock.now += 1000
    assert waiting(60, {50: waiting.begin, 55: waiting.give}) == (FOUND, 55)  # a warning would be an error
    assert not waiting.answers.group.silent


def test_a_store_that_fails_is_asked_again_but_not_at_each_call(waiting, monkeypatch):
    def check(names):
        looks.append(names)
        raise ConnectionError("gone for a moment")

    looks = []
    waiting.give()
    with monkeypatch.context() as patch:
        patch.setattr(waiting.store, "check", check, raising=False)
        with pytest.raises(ConnectionError):
            waiting(60, {})
        for _ in range(10):
            assert waiting(60, {}) == (NOT_YET, 0)
    assert len(looks) == 1
    waiting.clock.now += ranks.BEGIN_SECONDS
    assert waiting(60, {}) == (FOUND, 0)


def test_what_is_put_off_is_looked_at_now_and_then(waiting):
    waiting.later()
    assert waiting(60, {}) == (NOT_YET, 0)
    asked = waiting.store.asked
    for _ in range(100):
        assert waiting(60, {}) == (NOT_YET, 0)
    assert waiting.store.asked == asked
    waiting.clock.now += ranks.LOOK_SECONDS
    waiting.give()
    assert waiting(60, {}) == (FOUND, 0)


def test_two_threads_wait_for_one_answer(waiting):
    """One's wait ends, and is forgotten, while the other still looks."""
    found = []

    def other():
        waiting.give()
        found.append(waiting.answers.wait("a", WORK, Identity.of(H100), 60, clock=waiting.clock))

    assert waiting(60, {5: other}) == (FOUND, 5)
    assert found == [FOUND]
    assert not waiting.answers.group.waits


def test_too_many_questions_leave_the_others_waits_alone(waiting, monkeypatch):
    """Only the oldest is as if it had not been asked; the others do not wait in full again."""
    monkeypatch.setattr(ranks, "_MOST", 10)
    for k in range(15):
        waiting.zero.later(f"{k}")
        assert waiting(60, {}, f"{k}") == (NOT_YET, 0)
    assert list(waiting.answers.group.waits) == [f"{k}" for k in range(5, 15)]
    assert len(waiting.zero.group.put_off) == 10


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

    return enter


def test_groups_are_told_apart(in_a_group):
    """Those that have been destroyed and made again, too, whatever addresses their stores are given."""
    found = []
    for _ in range(20):
        in_a_group(dist.PrefixStore("default_pg", dist.HashStore()))
        found.append(ranks.group())
        assert ranks.group() == found[-1]  # still the same one
    assert len(set(found)) == 20
    gone = ranks._group._store
    in_a_group(None)
    gc.collect()
    assert gone() is None  # nobody keeps its port


def test_a_new_group_has_nothing_of_an_old_one_with_the_same_store(in_a_group, monkeypatch):
    """Whatever rank 0 has answered in it before: its answers are those under its new name for the group."""
    below, identity = dist.HashStore(), Identity.of(H100)
    groups: dict[int, ranks.Group] = {}

    def answers_of(rank, store):
        """This process as that rank, which remembers its own last group."""
        in_a_group(store, rank)
        monkeypatch.setattr(ranks, "_group", groups.get(rank))
        groups[rank] = ranks.group()
        return ranks.Answers.of(groups[rank])

    for answer in (entry().layout, None, entry().layout):
        store = dist.PrefixStore("default_pg", below)
        clock = Clock()

        def sleep(_, clock=clock, store=store, answer=answer):
            clock.now += 1
            if clock.now == 3:  # until then only the last group's answer is there
                answers_of(0, store).give("a", identity, answer)

        found = answers_of(1, store).wait("a", WORK, identity, 60, clock=clock, sleep=sleep)
        assert (found, clock.now) == ((answer, True), 3)


def test_an_answer_of_an_earlier_group_is_none_of_this_one(in_a_group, monkeypatch):
    """Not of the one before the last, either, in which nobody has said anything."""
    identity, clock, below = Identity.of(H100), Clock(), dist.HashStore()
    stores = [dist.PrefixStore("default_pg", below) for _ in range(3)]  # with the same entries
    in_a_group(stores[0])
    ranks.Answers(stores[0], ranks.Group(stores[0])).give("a", identity, entry().layout)  # by rank 0

    def sleep(_):
        clock.now += 1

    def ask():
        return ranks.Answers.of(ranks.group()).wait("a", WORK, identity, 60, clock=clock, sleep=sleep)

    assert ask() == FOUND
    for store in stores[1:]:
        in_a_group(store)
        monkeypatch.setattr(errors, "_told", set())
        with pytest.warns(RuntimeWarning, match="rank 0 has not decided"):
            assert ask() == NOT_YET


def test_one_process_alone_asks_nobody(in_a_group):
    """Nor one whose group has no store to ask in."""
    assert (ranks.rank(), ranks.group()) == (None, None)
    in_a_group(dist.HashStore())
    assert ranks.rank() == 1
    assert ranks.group() is not None
    in_a_group(None)
    assert (ranks.rank(), ranks.group()) == (None, None)
