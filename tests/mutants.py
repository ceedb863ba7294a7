"""Defects that a test has to catch, as changes of the kernels' text; `python -m tests.mutation` applies and tells.

Each has its name, what is replaced where, and the test that has to fail. They are what goes wrong in kernels like
these, most of it without a trace on a machine that is lucky.
"""

from __future__ import annotations

from typing import NamedTuple

FORWARD = "tests/test_kernels.py::test_float32[step-3-time-cell norm-ragged]"
WALKED = "tests/test_kernels.py::test_walked_batch[step-cell norm]"
PARTS = "tests/test_kernels.py::test_inner_extent_in_parts[16-False-dtype0]"
DIRECTIONS = "tests/test_kernels.py::test_layers_and_directions[step-3-ragged]"
REVERSED = (
    "tests/test_equations.py::test_outputs_gradients_and_statistics_are_the_papers[True-True-True-ragged-time-True]"
)
STATES = "tests/test_kernels.py::test_states_without_a_gradient[evaluation-host-shorter than T]"
BACKWARD = "tests/test_backward.py::test_divisions_of_the_product[2-1-streamed]"
BACKWARD_WALKED = "tests/test_backward.py::test_a_walked_batch[2-1-cell norm]"
# The interpreter does not come to the code that waits on a GPU: its PTX is looked at.
POLL = "tests/test_poll.py::test_it_waits_until_all_have_arrived[1000-assert]"
TOGETHER = "tests/test_config.py::test_programs_that_meet_are_launched_together"
CHECKED = "tests/test_config.py::test_a_barrier_that_cannot_assert_has_a_kernel_behind_it_that_does[16-True]"
COMPILED = "tests/test_atlas_code.py::test_the_barrier_of_real_kernels[sm90 assert]"


def _weak(case: str) -> str:
    return f"tests/test_schedules.py::test_weak_memory[{case}]"


# In the order of a matrix's columns; each mutant is caught by one of them at least.
TESTS = (
    *(FORWARD, WALKED, PARTS, DIRECTIONS, REVERSED, STATES, BACKWARD, BACKWARD_WALKED),
    *(_weak("forward, ragged"), _weak("forward, walked"), _weak("evaluation, ragged")),
    *(_weak("backward, ragged"), _weak("backward, in parts, ragged"), _weak("backward, in parts, walked")),
    *(COMPILED, POLL, TOGETHER, CHECKED),
    *(_weak("forward, one program"), _weak("backward, one program"), _weak("evaluation, one program")),
)


class Mutant(NamedTuple):
    """A defect.

    Attributes:
        name: what is wrong.
        file: of triton_bnlstm.
        edits: texts, each of which occurs once in it, and what takes their place.
        caught_by: the test that has to fail.
    """

    name: str
    file: str
    edits: tuple[tuple[str, str], ...]
    caught_by: str


MUTANTS = (
    # the barrier
    Mutant(
        "no barrier before h is read",
        "kernels/forward.py",
        (("wait(counter_ptr, (t - t0) * PROGRAMS, SYNC, _NAME)", "pass"),),
        _weak("forward, ragged"),
    ),
    Mutant(
        "h is stored after the arrival",
        "kernels/forward.py",
        (
            (
                "            h = o * tanh(shown)\n            tl.store(",
                '            h = o * tanh(shown)\n            if SYNC != "none":\n                arrive(counter_ptr)\n'
                "            tl.store(",
            ),
            (
                '        if SYNC != "none":\n            arrive(counter_ptr)\n',
                '        if SYNC != "none":\n            pass\n',
            ),
        ),
        _weak("forward, ragged"),
    ),
    Mutant(
        "the barrier waits for one program less",
        "kernels/forward.py",
        (("wait(counter_ptr, (t - t0) * PROGRAMS, SYNC", "wait(counter_ptr, (t - t0) * PROGRAMS - 1, SYNC"),),
        _weak("forward, ragged"),
    ),
    Mutant(
        "the arrival does not release",
        "kernels/barrier.py",
        (('tl.atomic_add(counter_ptr, 1, sem="release"', 'tl.atomic_add(counter_ptr, 1, sem="relaxed"'),),
        _weak("forward, ragged"),
    ),
    Mutant(
        "the poll does not acquire",
        "kernels/barrier.py",
        (('tl.atomic_add(counter_ptr, 0, sem="acquire")', 'tl.atomic_add(counter_ptr, 0, sem="relaxed")'),),
        _weak("forward, ragged"),
    ),
    Mutant(
        "the poll does not acquire, on a GPU",
        "kernels/barrier.py",
        (("SPIN:\n    ld.acquire.gpu", "SPIN:\n    ld.relaxed.gpu"),),
        COMPILED,
    ),
    Mutant(
        "the poll acquires of its own block, on a GPU",
        "kernels/barrier.py",
        (("NAP:\n    ld.acquire.gpu", "NAP:\n    ld.acquire.cta"),),
        COMPILED,
    ),
    Mutant(
        "the poll does not wait, on a GPU",
        "kernels/barrier.py",
        (
            (
                "SPIN:\n    ld.acquire.gpu.global.s32 %seen, [$1];\n    setp.ge.s32 %done, %seen, $2;",
                "SPIN:\n    ld.acquire.gpu.global.s32 %seen, [$1];\n    setp.ge.s32 %done, %seen, 0;",
            ),
        ),
        POLL,
    ),
    Mutant(
        "thread 0 does not poll, on a GPU",
        "kernels/barrier.py",
        (("setp.ne.u32 %done, %polls, 0;", "setp.eq.u32 %done, %polls, 0;"),),
        POLL,
    ),
    Mutant(
        "the launch is not cooperative",
        "kernels/launch.py",
        (('options["launch_cooperative_grid"] = True', 'options["launch_cooperative_grid"] = False'),),
        TOGETHER,
    ),
    Mutant(
        "nobody looks whether the time was up",
        "kernels/launch.py",
        (('if launch.constants["SYNC"] == "drain":', "if False:"),),
        CHECKED,
    ),
    Mutant(
        "no block barrier between steps of one program",
        "kernels/forward.py",
        (("            tl.debug_barrier()  # one program holds the recurrence", "            pass  # one program"),),
        _weak("forward, one program"),
    ),
    Mutant(
        "no block barrier between steps of one program, backwards",
        "kernels/backward.py",
        (("            tl.debug_barrier()  # one program holds the recurrence", "            pass  # one program"),),
        _weak("backward, one program"),
    ),
    Mutant(
        "no block barrier between steps of one program, in evaluation",
        "kernels/inference.py",
        (("            tl.debug_barrier()  # one program holds these rows", "            pass  # one program"),),
        _weak("evaluation, one program"),
    ),
    Mutant(
        "the arrival releases to its own block only",
        "kernels/barrier.py",
        (('sem="release", scope="gpu"', 'sem="release", scope="cta"'),),
        _weak("forward, ragged"),
    ),
    Mutant(
        "no block barrier before the arrival",
        "kernels/barrier.py",
        (("    tl.debug_barrier()  # the release below is one thread's", "    # the release below is one thread's"),),
        _weak("forward, ragged"),
    ),
    Mutant(
        "no block barrier behind the poll",
        "kernels/barrier.py",
        (("    # pipelining the loop over steps, which would load h before its wait.\n    tl.debug_barrier()\n", ""),),
        _weak("forward, ragged"),
    ),
    Mutant(
        "both directions count on one counter",
        "kernels/forward.py",
        (("    counter_ptr += direction * 32\n", ""),),
        _weak("forward, ragged"),
    ),
    Mutant(
        "tiles of the batch count on one counter",
        "kernels/inference.py",
        (("(direction * tl.num_programs(1) + tile) * 32", "direction * tl.num_programs(1) * 32"),),
        _weak("evaluation, ragged"),
    ),
    Mutant(
        "partial sums are read without the second barrier",
        "kernels/backward.py",
        (("wait(counter_ptr, (2 * done + 1) * PROGRAMS, SYNC, _NAME)", "pass"),),
        _weak("backward, in parts, ragged"),
    ),
    Mutant(
        "dz is read without the first barrier",
        "kernels/backward.py",
        (("wait(counter_ptr, done * PROGRAMS * (2 if DIVIDED else 1), SYNC, _NAME)", "pass"),),
        _weak("backward, ragged"),
    ),
    # threads of one program
    Mutant(
        "scratch of a walked batch is read by threads that have not met",
        "kernels/forward.py",
        (("            tl.debug_barrier()  # the scratch is read by other threads than wrote it\n", ""),),
        _weak("forward, walked"),
    ),
    Mutant(
        "scratch of a walked batch is read too early, backwards",
        "kernels/backward.py",
        (("            tl.debug_barrier()  # the scratch is read by other threads than wrote it\n", ""),),
        _weak("backward, in parts, walked"),
    ),
    Mutant(
        "dz is stored where threads still read W_hh h",
        "kernels/gradients.py",
        (("    tl.debug_barrier()  # the same memory may have held what other threads have read above\n", ""),),
        _weak("backward, in parts, walked"),
    ),
    # which rows, which slots, which units
    Mutant(
        "h of the step before the last",
        "kernels/forward.py",
        (
            (
                "source, target = tl.load(first_ptr + t), tl.load(first_ptr + t + 1)",
                "source, target = tl.load(first_ptr + tl.maximum(t - 1, 0)), tl.load(first_ptr + t + 1)",
            ),
        ),
        FORWARD,
    ),
    Mutant(
        "the slot of the next step",
        "kernels/forward.py",
        (
            (
                "        at_step = direction * steps + t\n",
                "        at_step = direction * steps + tl.minimum(t + 1, steps - 1)\n",
            ),
        ),
        FORWARD,
    ),
    Mutant(
        "statistics know who is live, the state does not",
        "kernels/forward.py",
        (
            (
                "            stored = owned_unit[:, None] & live[None, :]  # [U, BB]\n",
                "            stored = owned_unit[:, None] & (b0 < batch)[None, :]  # [U, BB]\n",
            ),
        ),
        FORWARD,
    ),
    Mutant(
        "rows that have ended count in the mean",
        "kernels/forward.py",
        (("        count = tl.maximum(n, 1).to(tl.float32)\n", "        count = batch.to(tl.float32)\n"),),
        FORWARD,
    ),
    Mutant(
        "the state of an ended row goes on",
        "kernels/inference.py",
        (("        c = tl.where(live[None, :], c_new, c)  # [U, BB]\n", "        c = c_new\n"),),
        STATES,
    ),
    Mutant(
        "the gradient of an ended row's state is lost",
        "kernels/backward.py",
        (("            d_c = tl.where(live[None, :], d_c_new * f, d_c)", "            d_c = d_c_new * f"),),
        BACKWARD,
    ),
    Mutant(
        "units that do not exist are stored",
        "kernels/common.py",
        (
            (
                "    return unit, (row % 4) * H + unit_of_row, unit < H, unit_of_row < H\n",
                "    return unit, (row % 4) * H + unit_of_row, unit < H + U, unit_of_row < H\n",
            ),
        ),
        PARTS,
    ),
    Mutant(
        "both directions read the first one's input",
        "kernels/forward.py",
        (("    x_ptr += direction * rows * (1 if NARROW else 4 * H)\n", ""),),
        DIRECTIONS,
    ),
    Mutant(
        "reversed sequences are aligned one step off",
        "packing.py",
        (
            (
                "return first[self.lengths[seat] - 1 - time] + seat",
                "return first[(self.lengths[seat] - time) % self.lengths[seat]] + seat",
            ),
        ),
        REVERSED,
    ),
    # arithmetic
    Mutant(
        "the cell's variance is divided by n − 1",
        "kernels/forward.py",
        (
            (
                "                    squares * share,\n                    own_c_ptr",
                "                    squares / (count - 1.0),\n                    own_c_ptr",
            ),
        ),
        FORWARD,
    ),
    Mutant(
        "statistics of two tiles merge without the gap of their means",
        "kernels/common.py",
        (("squares + other_squares + n * share * gap * gap", "squares + other_squares"),),
        WALKED,
    ),
    Mutant(
        "phantom rows have no part in the variance",
        "kernels/common.py",
        (("weight * var + rest * population_var + weight * rest * gap * gap", "var"),),
        FORWARD,
    ),
    Mutant(
        "the gradient's mean over the rows lacks its 1/(n + κ)",
        "kernels/gradients.py",
        (("scale * (dy - inverse * sum_dy", "scale * (dy - sum_dy"),),
        BACKWARD,
    ),
    Mutant(
        "the gradient treats the standard deviation as a constant",
        "kernels/gradients.py",
        ((" - normalised * (inverse * sum_product))", ")"),),
        BACKWARD,
    ),
    Mutant(
        "gates f and g are swapped",
        "kernels/common.py",
        (("    return i, f, g, o\n", "    return i, g, f, o\n"),),
        FORWARD,
    ),
    Mutant(
        "gates are swapped backwards",
        "kernels/gradients.py",
        (("    return tl.join(tl.join(i, g), tl.join(f, o))\n", "    return tl.join(tl.join(f, g), tl.join(i, o))\n"),),
        BACKWARD,
    ),
)
