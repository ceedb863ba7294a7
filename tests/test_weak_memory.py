"""The memory that programs see of each other in tests: small kernels that it passes, and others that it must not."""

from __future__ import annotations

import pytest
import torch

from tests.support import need_kernels

pytest.importorskip("triton")

import triton
import triton.language as tl

from tests.support.launches import OutOfBoundsError
from tests.support.turns import StuckError
from tests.support.weak_memory import WeakMemory
from triton_bnlstm.kernels import launch

need_kernels()
pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="kernels are compiled here: they run on a GPU")


@triton.jit
def message(
    data_ptr, flag_ptr, out_ptr, SEND: tl.constexpr, TAKE: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr
):
    """Program 0 writes data and raises a flag; program 1 waits for the flag and reads the data."""
    lane = tl.arange(0, 8)
    if tl.program_id(0) == 0:
        tl.store(data_ptr + lane, lane + 1)
        if BEFORE:
            tl.debug_barrier()
        tl.atomic_add(flag_ptr, 1, sem=SEND)
    else:
        while tl.atomic_add(flag_ptr, 0, sem=TAKE) < 1:
            pass
        if AFTER:
            tl.debug_barrier()
        tl.store(out_ptr + lane, tl.load(data_ptr + lane))


@pytest.mark.parametrize(
    ("changes", "arrives"),
    [
        ({}, True),
        ({"SEND": "acq_rel", "TAKE": "acq_rel"}, True),
        ({"SEND": "relaxed"}, False),
        ({"SEND": "acquire"}, False),
        ({"TAKE": "relaxed"}, False),
        ({"TAKE": "release"}, False),
        ({"BEFORE": False}, False),
        ({"AFTER": False}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(4))
def test_a_message(changes, arrives, seed):
    """It takes a release, an acquire and both block barriers; without any of them old data are read, and told."""
    data, flag, out = torch.zeros(8, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), torch.zeros(8).int()
    constants = {"SEND": "release", "TAKE": "acquire", "BEFORE": True, "AFTER": True, **changes}
    memory = WeakMemory(message, (2,), (data, flag, out), ["data", "flag", "out"], seed)
    races = memory.run(lambda: message[(1,)](data, flag, out, **constants)).races
    assert data.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert out.tolist() == ([1, 2, 3, 4, 5, 6, 7, 8] if arrives else [0] * 8)
    assert len(races) == (0 if arrives else 1)
    if races:
        assert "data[0]: program (1, 0, 0) reads what is stored by program (0, 0, 0)" in races[0]


@triton.jit
def own_scratch(data_ptr, out_ptr, BARRIER: tl.constexpr, OVER: tl.constexpr):
    """A program reads back, reversed, what other threads of it have stored, and (OVER) then stores over it."""
    lane = tl.arange(0, 8)
    tl.store(data_ptr + lane, lane + 1)
    if BARRIER:
        tl.debug_barrier()
    back = tl.load(data_ptr + 7 - lane)
    if OVER:
        tl.store(data_ptr + lane, back)
    tl.store(out_ptr + lane, back)


@pytest.mark.parametrize(("barrier", "over", "races"), [(True, False, 0), (False, False, 1), (True, True, 1)])
def test_threads_of_a_program_are_in_order_by_block_barriers_alone(barrier, over, races):
    data, out = torch.zeros(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    memory = WeakMemory(own_scratch, (1,), (data, out), ["data", "out"], 0)
    found = memory.run(lambda: own_scratch[(1,)](data, out, BARRIER=barrier, OVER=over)).races
    assert len(found) == races
    assert all("no block barrier between" in race for race in found)


def test_memory_beside_the_tensors_is_told():
    data, out = torch.zeros(8, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    with pytest.raises(OutOfBoundsError, match=r"store beside all tensors: test_weak_memory.py:\d+ in own_scratch"):
        WeakMemory(own_scratch, (1,), (data, out), ["data", "out"], 0).run(
            lambda: own_scratch[(1,)](data, out, BARRIER=True, OVER=False)
        )


def run(kernel, grid, *tensors, seed=0, limit=120.0, **constants):
    """The races of a launch."""
    names = [f"t{k}" for k in range(len(tensors))]
    memory = WeakMemory(kernel, (grid,), tensors, names, seed, limit)
    return memory.run(lambda: kernel[(1,)](*tensors, **constants)).races


def counters(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


@triton.jit
def relay(data_ptr, flag_ptr, out_ptr, SCOPE: tl.constexpr):
    """Program 0 → 1 → 2, each with a flag of its own; the last one reads what the first has stored."""
    place = tl.program_id(0)
    if place > 0:
        while tl.atomic_add(flag_ptr + place - 1, 0, sem="acquire", scope=SCOPE) < 1:
            pass
        tl.debug_barrier()
    if place == 0:
        tl.store(data_ptr, 7)
    if place == 2:
        tl.store(out_ptr, tl.load(data_ptr))
    tl.debug_barrier()
    tl.atomic_add(flag_ptr + place, 1, sem="release", scope=SCOPE)


@pytest.mark.parametrize(("scope", "value"), [("gpu", 7), ("sys", 7), ("cta", 0)])
@pytest.mark.parametrize("seed", range(3))
def test_order_is_passed_on_but_not_by_a_block_s_own_scope(scope, value, seed):
    out = counters(0)
    races = run(relay, 3, counters(0), counters(0, 0, 0), out, seed=seed, SCOPE=scope)
    assert (out.item(), len(races)) == (value, int(value == 0))


@triton.jit
def wait_again(flag_ptr, out_ptr):
    """Waits twice for what has happened, and looks five times for what never does."""
    if tl.program_id(0) == 0:
        tl.atomic_add(flag_ptr, 1, sem="release")
    else:
        for _ in range(2):
            while tl.atomic_add(flag_ptr, 0, sem="acquire") < 1:
                pass
        looks = 0
        while looks < 5 and tl.atomic_add(flag_ptr, 0, sem="acquire") < 2:
            looks += 1
        tl.store(out_ptr, looks)


@pytest.mark.parametrize("seed", range(3))
def test_looking_again_is_no_deadlock(seed):
    out = counters(0)
    assert run(wait_again, 2, counters(0), out, seed=seed) == []
    assert out.item() == 5


@triton.jit
def wait_by_load(flag_ptr):
    if tl.program_id(0) == 0:
        tl.store(flag_ptr, 1)
    else:
        while tl.load(flag_ptr) < 1:
            pass


@triton.jit
def wait_for_ever(flag_ptr):
    while tl.atomic_add(flag_ptr, 0, sem="acquire") < 1:
        pass


def test_a_hang_is_cut_off():
    """A plain load never sees another program's store."""
    where = r"program \({}, 0, 0\): test_weak_memory.py:\d+ in wait"
    with pytest.raises(StuckError, match="not finished after 1 s:\n" + where.format(1)):
        run(wait_by_load, 2, counters(0), limit=1.0)
    with pytest.raises(StuckError, match="no program can go on:\n" + where.format(0)):
        run(wait_for_ever, 2, counters(0))


@triton.jit
def set_and_count(flag_ptr):
    if tl.program_id(0) == 0:
        tl.store(flag_ptr, 5)
    else:
        tl.atomic_add(flag_ptr, 1, sem="release")


@pytest.mark.parametrize("seed", range(3))
def test_a_store_to_a_counter_is_a_race(seed):
    assert len(run(set_and_count, 2, counters(0), seed=seed)) == 1


@triton.jit
def count_otherwise(flag_ptr, value, SWAP: tl.constexpr):
    if SWAP:
        tl.atomic_cas(flag_ptr, 0, 1)
    else:
        tl.atomic_add(flag_ptr, value)


@pytest.mark.parametrize(("counter", "value", "swap"), [([0.0], 0.5, False), ([0], -1, False), ([0], 1, True)])
def test_what_it_does_not_know_is_refused(counter, value, swap):
    with pytest.raises(NotImplementedError, match=r"test_weak_memory.py:\d+ in count_otherwise"):
        run(count_otherwise, 1, torch.tensor(counter), value=value, SWAP=swap)
