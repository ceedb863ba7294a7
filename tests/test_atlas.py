"""The kernels compiled for devices that are not here, against the table of what they needed before.

A part of `python -m bench.aot atlas`, which writes the table: each target's most used kernels in both modes, other
number types, and each kernel's every variant.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")

import triton

from bench.aot.atlas import compile_rows, preset, representative
from bench.aot.candidates import precision
from bench.aot.cases import VARIANTS
from bench.aot.checks import Request
from bench.aot.rows import COMMAND, NOTHING, TABLE, Row, differences, missing, read
from bench.aot.targets import NUMBERS, TARGETS

ON_PURPOSE = f"if that is meant, write the table again and commit it: {COMMAND}"
# Much like sm89, which has as much shared memory, and is compiled here: the table has these, this run has not.
ALIKE = [("sm86", [100]), ("sm120", [100])]
PARTS = [part for part in representative(VARIANTS) if (part.target, part.hiddens) not in ALIKE]
# Bytes of stack that are spilled there, by target, kernel, mode and H; nothing else may be wrong. On sm120 it is six
# instructions of 1,389, and without them the pipeline that streams W_hh could be two deep instead of four. With four
# warps instead of eight a few values of cell norm and of phantom rows do not fit; what has neither was 14 % faster with
# them on an H100. On sm75 step mode falls back to it; divided it would not spill, and need two launches for one.
SPILL = {
    ("sm75", "backward/cell+fill", "step", "100"): 56,
    ("sm86", "inference/plain", "sequence", "512"): 8,
    ("sm90", "forward/cell+seats", "sequence", "1000"): 16,
    ("sm90", "forward/cell+seats", "sequence", "1024"): 16,
    ("sm90", "inference/cell+keep", "sequence", "1000"): 16,
    ("sm90", "inference/plain", "step", "512"): 8,
    ("sm100", "forward/cell+seats", "sequence", "1024"): 8,
    ("sm120", "backward/cell+fill", "sequence", "1024"): 24,
}
if triton.__version__.startswith("3.6."):
    SPILL |= {("sm90", "backward/plain", "sequence", "512"): 8, ("sm90", "backward/plain", "sequence", "1024"): 8}
    SPILL |= {("sm100", "backward/cell+fill", "sequence", "1024"): 16}


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part.target}-{'+'.join(part.numbers)}-H{part.hiddens[0]}")
def test_no_kernel_is_worse_than_in_the_table(part: Request, tmp_path):
    rows, reason = compile_rows(part, tmp_path)
    if reason is not None:
        pytest.skip(reason)
    rows = [replace(row, problems=NOTHING) if is_known(row) else row for row in rows]
    assert [f"{row}: {row.problems}" for row in rows if row.problems != NOTHING] == []
    assert {row.name[2] for row in rows} >= set(part.variants)
    check_modes(rows)
    check_products(rows)
    check_residents(rows)
    table = read(TABLE)
    worse = differences(rows, table, triton=triton.__version__) + missing(rows, table)
    assert worse == [], f"{len(worse)} kernels are worse than in {TABLE}; {ON_PURPOSE}"
    if table.head["Triton"] != triton.__version__:
        reason = f"the table is Triton {table.head['Triton']}'s, this is {triton.__version__}"
        pytest.skip(f"all but the growth of loops: {reason}")


def is_known(row: Row) -> bool:
    most = SPILL.get((row.name[0], row.name[2], row.name[3], row.name[5]), 0)
    spills = row.problems.startswith("spills: ") and ";" not in row.problems
    return spills and row.number("stack") <= most


def recurrent(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.name[2].partition("/")[0] in ("forward", "backward", "inference")]


def check_modes(rows: list[Row]) -> None:
    """Every kernel with steps in both modes, on AMD in the one that it has."""
    modes: dict[tuple[str, ...], set[str]] = {}
    for row in recurrent(rows):
        modes.setdefault(row.name[:3], set()).add(row.name[3].partition("/")[0])
    assert modes
    for (target, *_), found in modes.items():
        assert found == ({"step"} if target.startswith("gfx") else {"sequence", "step"})


def check_products(rows: list[Row]) -> None:
    """On matrix units, where the device has some for these numbers, and only there."""
    products = [row for row in recurrent(rows) if not row.name[3].endswith("/cells")]
    assert products
    for row in products:
        device, numbers = TARGETS[row.name[0]].device, NUMBERS[row.name[1]]
        matrix = device.multiplies(numbers.dtype, precision(device, numbers))
        assert (bool(row.matrix), row.number("loop_matrix") > 0) == (matrix, matrix), str(row)


def check_residents(rows: list[Row]) -> None:
    """Where the weights stay on chip their bytes are there: 4H·H of all programs, of the backward once in a group."""
    for row in recurrent(rows):
        kernel, hidden, layout = row.name[2], int(row.name[5]), row.name[7].split(",")
        if layout[-1] != "resident" or hidden < 512:
            continue
        units = int(layout[0][1:])
        splits, groups = (int(n) for n in layout[1].split("x")) if kernel.startswith("backward/") else (1, 1)
        programs = max(-(-hidden // units), splits * groups * -(-hidden // (units * splits * groups)))
        assert row.number("shared") > groups * 4 * hidden * hidden * 2 / programs


def test_the_parts_are_enough():
    assert {part.target for part in PARTS} == set(TARGETS)
    assert {variant for part in PARTS for variant in part.variants} == set(VARIANTS)
    assert {numbers for part in PARTS for numbers in part.numbers} == set(NUMBERS)
    rows = read(TABLE).rows.values()
    large = {row.name[2].partition("/")[0] for row in rows if row.name[0] == "sm90" and row.name[5] == "1024"}
    assert large == {"forward", "backward", "inference"}


def test_the_table_is_whole():
    """It is what the command without options writes, and no default layout in it has a problem that is not known."""
    table = read(TABLE)
    assert table.head["Command"] == COMMAND
    rows = list(table.rows.values())
    wrong = [row for row in rows if row.of == "default" and row.problems != NOTHING and not is_known(row)]
    assert [f"{row}: {row.problems}" for row in wrong] == []
    assert [str(row) for row in rows if row.matrix and row.number("loop_matrix") == 0] == []
    for part in preset(VARIANTS):
        for variant in part.variants:
            for hidden in part.hiddens:
                for numbers in part.numbers:
                    of = "near" if part.near else "default"
                    found = [row for row in rows if row.name[:3] == (part.target, numbers, variant) and row.of == of]
                    shared = variant.startswith("moments/")  # by several sizes, and called after one
                    sized = [row for row in found if shared or row.name[5] == str(hidden)]
                    assert sized, (part.target, numbers, variant, hidden)


def test_the_table_has_what_tuning_may_choose_and_why_not():
    near = [row for row in read(TABLE).rows.values() if row.of == "near"]
    assert {row.name[0] for row in near} == {"sm90", "sm100"}
    assert any(row.problems == NOTHING for row in near)
    assert any("spills" in row.problems for row in near)
    assert any("have to run at the same time" in row.problems for row in near)
