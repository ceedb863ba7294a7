"""Sequence mode under many schedules: bit for bit what step mode gives, whoever is slow, and in whatever order."""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import replace

import pytest
import torch

from tests.support import need_kernels

pytest.importorskip("triton")


from tests.support.concurrent import MOST_PROGRAMS, Programs, ProgramsError, programs_at_once
from tests.support.interpreter import program_place
from tests.support.launches import Copies, OutOfBoundsError, recording
from tests.support.sequence_case import (
    CASES,
    DIVIDED,
    ONE_PROGRAM,
    PLAIN,
    RAGGED,
    call,
    call_by_steps,
    differing,
    recorded,
)
from tests.support.turns import StuckError, Turns
from tests.support.weak_memory import WeakMemory
from triton_bnlstm.kernels import launch

need_kernels()
pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="kernels are compiled here: they run on a GPU")

LIMIT = 60.0  # seconds of a schedule, which takes a tenth of one: a machine may be busy, a hang lasts for ever


def schedules(request, default):
    """Seeds of the schedules that are asked for, else of so many."""
    first, number = request.config.getoption("--first-schedule"), request.config.getoption("--schedules")
    return range(first, first + (default if number is None else number))


def again(request, seed):
    """How to repeat a schedule, the last line of a failure."""
    return f"schedule {seed}; again: pytest '{request.node.nodeid}' --first-schedule {seed} --schedules 1"


@pytest.mark.parametrize("name", CASES)
def test_programs_at_once(request, name):
    """One process for each program, with naps around their accesses to what they share."""
    launched = recorded(name)
    kwargs = {**launched.constants, **launched.options}
    with Programs(
        launched.kernel, launched.grid, (*launched.tensors, *launched.scalars), kwargs, launched.shared
    ) as programs:
        for seed in schedules(request, 20):
            programs.reset()
            trouble = ""
            try:
                programs.run(LIMIT, seed)
            except ProgramsError as error:
                trouble = str(error)
            if trouble:
                pytest.fail(f"{trouble}\n{again(request, seed)}", pytrace=False)
            wrong = launched.differing(programs.args[: len(launched.tensors)])
            assert wrong == [], again(request, seed)


@pytest.mark.parametrize("name", [*CASES, *ONE_PROGRAM])
def test_weak_memory(request, name):
    """Programs take turns, and see of each other only what the barrier makes them see. The seed says everything."""
    launched = recorded(name)
    for seed in schedules(request, 6):
        trouble = ""
        try:
            tensors, outcome = weakly(launched, seed)
            trouble = "\n".join(outcome.races)
        except (StuckError, OutOfBoundsError) as error:
            trouble = str(error)
        if trouble:
            pytest.fail(f"{trouble}\n{again(request, seed)}", pytrace=False)
        assert launched.differing(tensors) == [], again(request, seed)


def weakly(launched, seed):
    copies = Copies()
    tensors = tuple(copies.of(tensor) for tensor in launched.tensors)
    memory = WeakMemory(launched.kernel, launched.grid, tensors, launched.names, seed)
    return tensors, memory.run(lambda: launched.call(tensors))


def test_recorded_launches_are_step_mode():
    """What schedules are held against is what a layer in step mode gives, in all that a caller sees."""
    case = {"lengths": RAGGED, "backward": DIVIDED}
    with recording() as launches:
        found = call(PLAIN, **case)
    assert [each.kernel.__name__ for each in launches] == ["forward_kernel", "backward_kernel"]
    assert differing(found, call_by_steps(**case)) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("forward, equal", {"h_ptr", "counter_ptr"}),
        ("backward, equal", {"d_z_ptr", "deviation_ptr", "counter_ptr"}),  # one memory
        ("backward, in parts, equal", {"d_z_ptr", "deviation_ptr", "parts_ptr", "counter_ptr"}),
        ("evaluation, ragged", {"h_ptr", "counter_ptr"}),
    ],
)
def test_what_programs_share_is_found(name, expected):
    launched = recorded(name)
    assert {launched.names[k] for k in launched.shared} == expected


def test_a_hang_is_told_with_every_position(monkeypatch):
    """Of those that wait, where and for what; of those that are done, that they are."""
    from triton_bnlstm.kernels import forward

    real = forward.arrive

    def arrive(counter_ptr):
        if program_place() != (1, 0, 0):
            real(counter_ptr)

    monkeypatch.setattr(forward, "arrive", arrive)
    with pytest.raises(ProgramsError) as caught, programs_at_once(limit=2.0):
        call(PLAIN, grad=False)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("not finished after 2 s: (0, 0, 0), (1, 0, 0)")
    # it may be looked at in the midst of one of the interpreter's operations, as of any made by a dataclass
    waits = (
        r"(?:<string>:\d+ in \w+, called from )?"
        r"barrier.py:\d+ in wait, called from forward.py:\d+ in forward_kernel \(t = 1, target = 2\)"
    )
    assert [re.sub(waits, "waits", line) for line in lines[1:]] == [
        "  program (0, 0, 0): waits",
        "  program (0, 1, 0): finished",
        "  program (1, 0, 0): waits",
        "  program (1, 1, 0): finished",
    ]
    launched = recorded("forward, equal")
    with pytest.raises(StuckError) as stuck:
        weakly(launched, 0)
    assert len(re.findall(waits, str(stuck.value))) == 2


def test_a_grid_that_is_too_large_is_refused():
    launched = recorded("forward, equal")
    with pytest.raises(ValueError, match=f"at most {MOST_PROGRAMS} programs"):
        Programs(launched.kernel, (MOST_PROGRAMS // 2, 3), launched.tensors, {})


def test_a_seed_says_everything():
    """Of programs that take turns: two runs are the same, choice by choice, and two seeds are not."""

    def order(seed):
        seen = []
        turns = Turns(["a", "b", "c"], seed)

        def body(own):
            for _ in range(5):
                seen.append(own)
                turns.give_way(own)

        turns.run(body)
        return seen

    orders = {seed: order(seed) for seed in range(12)}
    assert all(order(seed) == orders[seed] for seed in orders)
    assert len({tuple(each) for each in orders.values()}) > 8
    assert all(sorted(each) == sorted([0, 1, 2] * 5) for each in orders.values())


def test_a_quick_interpreter_changes_nothing(monkeypatch):
    """Of what tests/conftest.py does for all kernels' tests, to save time."""
    from bench.interpreter import REPLACED

    fast = call(replace(PLAIN, sequence=False), lengths=RAGGED)
    assert len(REPLACED) >= 5
    for owner, name, real in REPLACED:
        monkeypatch.setattr(owner, name, real)
    assert differing(fast, call(replace(PLAIN, sequence=False), lengths=RAGGED)) == []


def test_naps_are_those_of_the_seed(monkeypatch):
    """The same ones again, others for another program, and the slow program is one of the grid."""
    from tests.support.concurrent import Delays
    from tests.support.interpreter import Access

    naps = []
    monkeypatch.setattr(time, "sleep", naps.append)
    delays = {place: Delays([(100, 200)], (place, 0, 0), (3, 1, 1)) for place in range(3)}

    def taken(place, seed, kind="load", address=150):
        naps.clear()
        delays[place].begin(seed)
        for _ in range(200):
            delays[place].before(Access(kind, torch.tensor([address]).numpy()))
        return list(naps)

    assert taken(0, 4)
    assert taken(0, 4) == taken(0, 4)
    assert taken(0, 4) != taken(1, 4)
    assert taken(0, 4) != taken(0, 8)
    assert taken(0, 4, address=250) == []
    assert taken(0, 7) == []
    assert taken(0, 7, kind="atomic")
    for seed in (1, 5, 9):
        assert sorted(bool(taken(place, seed)) for place in range(3)) == [False, False, True]


def test_processes_end_with_their_launch():
    launched = recorded("forward, equal")
    args = (*launched.tensors, *launched.scalars)
    with Programs(launched.kernel, launched.grid, args, launched.constants, launched.shared) as programs:
        started = [each.process.pid for each in programs._processes]
        programs.run(LIMIT)
        os.kill(started[0], signal.SIGKILL)
        with pytest.raises(ProgramsError, match=r"program \(0, 0, 0\) of forward_kernel .* died with exit code -9"):
            programs.run(LIMIT)
    assert len(started) == 4
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
