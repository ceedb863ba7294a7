"""Sequence mode, all steps in one launch, is step mode bit for bit; and a grid barrier that fails does not go unseen.

Programs run as processes here (`tests.support.concurrent`), so that they really meet at the barrier.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

import pytest

from tests.support import need_kernels

pytest.importorskip("triton")

import triton.language as tl

from tests.support.concurrent import ProgramsError, programs_at_once
from tests.support.interpreter import program_place
from tests.support.sequence_case import (
    BACKWARD,
    DIVIDED,
    EQUAL,
    PLAIN,
    RAGGED,
    RAGGED_TILES,
    RESIDENT,
    STEPS,
    call,
    call_by_steps,
    differing,
)
from triton_bnlstm import fused_backward
from triton_bnlstm.kernels import backward, forward, inference, launch
from triton_bnlstm.kernels.errors import KernelError

need_kernels()
pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="kernels are compiled here: they run on a GPU")

KERNELS = {"forward": forward, "inference": inference, "backward": backward, "backward in parts": backward}

of_lengths = pytest.mark.parametrize("lengths", [EQUAL, RAGGED], ids=["equal", "ragged"])
of_tiles = pytest.mark.parametrize("lengths", [EQUAL, RAGGED_TILES], ids=["equal", "ragged"])
of_weights = pytest.mark.parametrize("config", [PLAIN, RESIDENT], ids=["streamed", "resident"])
of_cells = pytest.mark.parametrize("cell_norm", [False, True], ids=["no_cell_norm", "cell_norm"])
of_grad = pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
of_mode = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
of_kernels = pytest.mark.parametrize("kernel", KERNELS)


def run(config, *, limit=60.0, **case):
    """Every tensor that a call gives or changes by name, and the grids of the launches whose programs met."""
    with programs_at_once(limit) as grids:
        return call(config, **case), grids


def assert_same_as_steps(*grids, **case):
    """Sequence mode ran in launches with these grids and gave what step mode gives."""
    found, met = run(**{"config": PLAIN, **case})
    assert met == list(grids)
    assert differing(found, call_by_steps(**case)) == []


@of_cells
@of_lengths
@of_weights
def test_training_is_step_mode(config, lengths, cell_norm):
    assert_same_as_steps((2, 2), config=config, lengths=lengths, cell_norm=cell_norm)


@of_cells
@of_tiles
def test_training_walks_a_batch_of_several_tiles(lengths, cell_norm):
    assert_same_as_steps((2, 2), batch=18, lengths=lengths, cell_norm=cell_norm)


@of_grad
@of_lengths
@of_weights
def test_evaluation_is_step_mode(config, lengths, grad):
    """Without gradients only the last cell states are kept."""
    assert_same_as_steps((2, 1, 2), config=config, training=False, lengths=lengths, grad=grad)


@of_grad
@of_tiles
def test_evaluation_splits_the_batch(lengths, grad):
    """Two tiles of each direction, which do not wait for each other; ragged, the second soon has no live row."""
    assert_same_as_steps((2, 2, 2), training=False, batch=18, lengths=lengths, grad=grad, cell_norm=False)


@of_cells
@of_lengths
@pytest.mark.parametrize("save", ["preactivations", "recompute"])
@pytest.mark.parametrize(
    "layout", [BACKWARD, DIVIDED, replace(DIVIDED, resident=True)], ids=["whole", "parts", "resident"]
)
def test_backward_is_step_mode(layout, save, lengths, cell_norm):
    """With the product of a program's own units, and with partial sums behind a second barrier."""
    assert_same_as_steps((2, 2), (2, 2), backward=layout, lengths=lengths, cell_norm=cell_norm, save=save)


@of_tiles
@pytest.mark.parametrize("layout", [BACKWARD, replace(DIVIDED, groups=2)], ids=["whole", "parts"])
def test_backward_walks_a_batch_of_several_tiles(layout, lengths):
    grid = (4, 1) if layout.divided else (2, 1)
    assert_same_as_steps((2, 1), grid, backward=layout, lengths=lengths, batch=18, bidirectional=False)


@pytest.mark.parametrize("layout", [BACKWARD, DIVIDED], ids=["whole", "parts"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_backward_of_one_column(layout, training):
    forward_grid = (2, 2) if training else (2, 1, 2)
    assert_same_as_steps(forward_grid, (2, 2), backward=layout, input_size=1, lengths=RAGGED, training=training)


def test_arrivals_at_both_barriers_count(monkeypatch):
    """Towards what a counter can hold: three steps of four programs that meet twice."""
    monkeypatch.setattr(launch, "MOST_ARRIVALS", 2 * STEPS * 4)
    run(PLAIN, backward=BACKWARD)
    with pytest.raises(KernelError, match="sequence mode"):
        run(PLAIN, backward=DIVIDED)


def test_backward_in_blocks_of_steps(monkeypatch):
    """A launch for each block; the first steps of one are behind the last of the next."""
    monkeypatch.setattr(fused_backward, "_BLOCK_ROWS", 5)
    assert_same_as_steps(*[(2, 2)] * 3, backward=DIVIDED, save="recompute", lengths=RAGGED)


def test_backward_with_more_parts_of_the_product_than_units():
    """Twelve units are three programs' cells, and four parts of a product of two times eight units."""
    layout = replace(DIVIDED, splits=2, inner=32)
    assert_same_as_steps((3, 1), (4, 1), backward=layout, hidden=12, bidirectional=False)


@of_mode
@pytest.mark.parametrize(
    ("config", "hidden", "programs"),
    [
        (PLAIN, 16, 4),
        # the last program has 4 units of 8; W_hh h is two products, the second with 4 columns of 16
        (replace(PLAIN, units=8), 20, 3),
        (replace(RESIDENT, units=8), 20, 3),
    ],
    ids=["four", "three", "three_resident"],
)
def test_more_programs(config, hidden, programs, training):
    grid = (programs, 1) if training else (programs, 1, 1)
    assert_same_as_steps(grid, config=config, hidden=hidden, bidirectional=False, training=training)


@of_mode
def test_narrow_input(training):
    """One column: the kernels make W_ih x themselves."""
    assert_same_as_steps((2, 2) if training else (2, 1, 2), input_size=1, lengths=RAGGED, training=training)


def case_of(kernel, tiles=1):
    """A call in which programs of this kernel alone meet."""
    case = {"training": kernel != "inference", "batch": 18 if tiles > 1 else 5, "grad": kernel.startswith("backward")}
    if case["grad"]:
        back = DIVIDED if kernel == "backward in parts" else BACKWARD
        return {**case, "config": replace(PLAIN, sequence=False), "backward": back}
    return {**case, "config": PLAIN}


@pytest.mark.parametrize("slow", [(0, 0, 0), (1, 1, 0)], ids=str)
@of_kernels
def test_a_slow_program_is_waited_for(monkeypatch, kernel, slow):
    """By its own direction and tile alone: the others are steps ahead, and their arrivals must not count here."""
    module, case = KERNELS[kernel], case_of(kernel, tiles=2)
    if kernel == "inference" and slow != (0, 0, 0):
        slow = (1, 1, 1)
    real_arrive = module.arrive

    def arrive(counter_ptr):
        pause = 0.1 if program_place() == slow else 0.0
        time.sleep(pause)
        real_arrive(counter_ptr)
        time.sleep(pause)  # what the others read from now on has been stored before

    monkeypatch.setattr(module, "arrive", arrive)
    found, met = run(**case)
    monkeypatch.undo()
    assert len(met) == 1
    assert differing(found, call_by_steps(**case)) == []


# the layer, too, sees what a training step with garbage in it has given
@pytest.mark.filterwarnings("ignore:1 training step:RuntimeWarning")
@pytest.mark.parametrize("missing", [1, 4 * STEPS], ids=["one_arrival", "all_arrivals"])
@pytest.mark.parametrize("tiles", [1, 2])
@of_kernels
def test_a_barrier_that_does_not_wait_is_seen(monkeypatch, kernel, tiles, missing):
    """What the tests above would say if the barrier returned too early.

    Luck has no part in it: one program holds still until the other is a step ahead, and a right barrier would never
    let it get there. Partial sums are first exchanged in the second step, between whose two barriers it is held.
    """
    module, case = KERNELS[kernel], case_of(kernel, tiles)
    held_at = 4 if kernel == "backward in parts" else 0
    real_wait = module.wait

    def wait(counter_ptr, target, *how):
        if program_place()[0] == 0 and target == held_at:
            while tl.atomic_add(counter_ptr, 0) < held_at + 2:
                pass
        real_wait(counter_ptr, target - missing, *how)

    monkeypatch.setattr(module, "wait", wait)
    found, met = run(**case)
    monkeypatch.undo()
    assert len(met) == 1
    wrong = {"gradient of x", "gradient of weight_hh_l0"} if case["grad"] else {"output", "h_n", "c_n"}
    assert wrong <= set(differing(found, call_by_steps(**case)))


@of_kernels
def test_a_program_that_never_arrives_is_told(monkeypatch, kernel):
    """Its direction waits for ever; the other one has its own counter and finishes."""
    module = KERNELS[kernel]
    real_arrive = module.arrive

    def arrive(counter_ptr):
        if program_place() != (1, 0, 0):
            real_arrive(counter_ptr)

    monkeypatch.setattr(module, "arrive", arrive)
    with pytest.raises(ProgramsError, match=r"not finished after 5 s: \(0, 0, 0\), \(1, 0, 0\)\n"):
        run(limit=5.0, **case_of(kernel))


def test_a_program_that_raises_is_told(monkeypatch):
    """With its own traceback, and long before the time is up, although the others wait for it."""
    real_arrive = forward.arrive

    def arrive(counter_ptr):
        if program_place() == (1, 1, 0):
            raise ArithmeticError("said by one program")
        real_arrive(counter_ptr)

    monkeypatch.setattr(forward, "arrive", arrive)
    with pytest.raises(ProgramsError, match="said by one program") as caught:
        run(PLAIN, limit=600.0)
    message = str(caught.value)
    assert message.startswith("program (1, 1, 0) of forward_kernel with grid (2, 2, 1): Traceback")
    assert "in arrive\n" in message
    assert (0, 1, 0) in caught.value.unfinished


def test_a_program_that_dies_is_told(monkeypatch):
    real_arrive = forward.arrive

    def arrive(counter_ptr):
        if program_place() == (0, 0, 0):
            os.kill(os.getpid(), signal.SIGKILL)
        real_arrive(counter_ptr)

    monkeypatch.setattr(forward, "arrive", arrive)
    with pytest.raises(
        ProgramsError, match=r"program \(0, 0, 0\) of forward_kernel .* died with exit code -9"
    ) as caught:
        run(PLAIN, limit=600.0)
    assert (1, 0, 0) in caught.value.unfinished
