"""The text that waits on a GPU, run as one of its threads would: no interpreter of Triton comes to it."""

from __future__ import annotations

import re

import pytest

from tests.support import need_kernels

pytest.importorskip("triton")

from triton_bnlstm.kernels import barrier

need_kernels()

LIMIT = 10_000_000_000  # ns
TEXTS = {"assert": barrier._POLL_TO_ASSERT.value, "drain": barrier._POLL_TO_DRAIN.value}


class Waited(Exception):
    """The text has not come to its end."""


def run(text, thread, counter, target, *, steps=100_000, nanoseconds=1000):
    """A thread's run of the text: what it gives, the loads that it made, and what it left in the counter.

    counter: what the n-th load finds. nanoseconds: that each instruction takes.
    """
    lines = [line.strip() for line in text.strip().strip("{}").splitlines()]
    lines = [line for line in lines if line and not line.startswith(".reg")]
    labels = {line[:-1]: k for k, line in enumerate(lines) if line.endswith(":")}
    values = {"$2": target, "$3": LIMIT, "%tid.x": thread}
    at, now, loads, left = 0, 0, [], None

    def value(operand):
        return values[operand] if operand in values else int(operand)

    for _ in range(steps):
        if at == len(lines):
            return values["$0"], loads, left
        line, at, now = lines[at], at + 1, now + nanoseconds
        if line.endswith(":"):
            continue
        predicate, opcode, operands = re.fullmatch(r"(?:@(%\w+)\s+)?([\w.]+)\s+(.*);", line).groups()
        if predicate is not None and not values[predicate]:
            continue
        operands = operands.split(", ")
        values["%globaltimer"] = now
        match opcode.split("."):
            case ["bra"]:
                at = labels[operands[0]]
            case ["mov", *_]:
                values[operands[0]] = value(operands[1])
            case ["setp", compared, _]:
                a, b = map(value, operands[1:])
                values[operands[0]] = {"eq": a == b, "ne": a != b, "ge": a >= b, "lt": a < b}[compared]
            case ["add", _]:
                values[operands[0]] = value(operands[1]) + value(operands[2])
            case ["sub", _]:
                values[operands[0]] = value(operands[1]) - value(operands[2])
            case ["ld", "acquire", "gpu", "global", "s32"]:
                assert operands[1] == "[$1]"
                loads.append(counter(len(loads)))
                values[operands[0]] = loads[-1]
            case ["red", "relaxed", "gpu", "global", "max", "s32"]:
                assert operands[0] == "[$1]"
                left = max(loads[-1], value(operands[1]))
            case ["nanosleep", _]:
                now += value(operands[0])
            case _:
                raise AssertionError(line)
    raise Waited


of_texts = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)


@of_texts
def test_thread_0_alone_polls(text):
    assert run(text, 1, lambda n: 0, 5) == (0, [], None)
    assert run(text, 31, lambda n: 0, 5) == (0, [], None)


@of_texts
@pytest.mark.parametrize("polls", [1, 2, 1000, 1023, 1024, 1025, 1500])
def test_it_waits_until_all_have_arrived(text, polls):
    """Before and after it begins to nap, and no longer."""
    late, loads, left = run(text, 0, lambda n: 5 if n == polls - 1 else 4, 5)
    assert (late, len(loads), left) == (0, polls, None)


@of_texts
def test_more_arrivals_than_it_waits_for_are_enough(text):
    """Others may be a step ahead."""
    assert run(text, 0, lambda n: 6, 5)[0] == 0


@of_texts
def test_it_does_not_give_up_early(text):
    with pytest.raises(Waited):
        run(text, 0, lambda n: 4, 5, steps=100_000, nanoseconds=1)


def test_after_ten_seconds_it_says_so():
    late, loads, left = run(TEXTS["assert"], 0, lambda n: 4, 5, nanoseconds=1_000_000)
    assert (late, left) == (1, None)
    assert len(loads) > 1024


def test_after_ten_seconds_it_lets_everybody_go():
    """Beyond every target, and so far below 2³¹ that arrivals do not wrap it."""
    late, _, left = run(TEXTS["drain"], 0, lambda n: 4, 5, nanoseconds=1_000_000)
    assert (late, left) == (0, barrier.MOST_ARRIVALS)
    assert run(TEXTS["drain"], 0, lambda n: left, 2**30 - 1)[0] == 0
    assert barrier._DRAINED.value == barrier.MOST_ARRIVALS == 2**30


def test_no_memory_access_is_kept_across_it():
    assert "~{memory}" in barrier._CONSTRAINTS.value.split(",")
    assert barrier._LIMIT_NS.value == LIMIT
