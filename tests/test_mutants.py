"""Each defect of `tests.mutants` is caught by its test, on a copy of the library; and only by failing for its sake."""

from __future__ import annotations

import pytest

from tests.support import need_kernels

pytest.importorskip("triton")

from tests.mutants import FORWARD, MUTANTS, TESTS, Mutant
from tests.mutation import BEGIN, ROOT, TABLE, StaleMutantError, caught, edited, main, serving, table
from triton_bnlstm.kernels import launch

need_kernels()
pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="kernels are compiled here: they run on a GPU")


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_is_caught(server, mutant):
    assert caught(server.outcomes(mutant, [mutant.caught_by])) == [mutant.caught_by]


SEE_OS = ("import triton\nimport", "import os\n\nimport triton\n\ntriton.os = os\nimport")
HARMLESS = Mutant("another comment", "kernels/forward.py", (("# the cell state stays", "# It stays"),), FORWARD)


def test_what_is_no_defect_is_not_caught(server):
    assert server.outcomes(HARMLESS, [FORWARD]) == {FORWARD: "passed"}


def test_a_mutant_that_is_no_python_is_broken_and_not_caught(server):
    broken = HARMLESS._replace(edits=(("unit, column, owned_unit, owned = owned_columns(U, H)", "gone"),))
    with pytest.raises(RuntimeError, match=r"(?s)no verdict.*NameError"):
        server.outcomes(broken, [FORWARD])
    with pytest.raises(RuntimeError, match="no verdict"):
        server.outcomes(HARMLESS, ["tests/test_kernels.py::test_that_is_not_there"])


def test_a_test_that_crashes_has_noticed_and_the_others_are_run_again(server):
    crash = HARMLESS._replace(
        file="kernels/inference.py",
        edits=(("    tile = tl.program_id(1)\n", "    triton.os.abort()\n    tile = tl.program_id(1)\n"), SEE_OS),
    )
    harmless = next(test for test in TESTS if "test_schedules" in test and "forward" in test)
    assert server.outcomes(crash, [FORWARD, harmless]) == {FORWARD: "crashed", harmless: "passed"}


@pytest.mark.parametrize("text", ["", "a b a"], ids=["gone", "twice"])
def test_a_mutant_whose_text_is_not_there_once_is_told(text):
    with pytest.raises(StaleMutantError, match=r"another: \d times in file"):
        edited(text, Mutant("another", "file", (("a", "b"),), FORWARD))


def test_the_table_is_that_of_these_mutants():
    """Which other tests catch a defect, only `python -m tests.mutation` knows."""
    written = TABLE.read_text(encoding="utf-8")
    expected = table((mutant, [mutant.caught_by]) for mutant in MUTANTS)
    head, rows = expected.split(BEGIN)
    assert written.startswith(head), "run python -m tests.mutation"
    found = written.split(BEGIN)[1].splitlines()
    for row, line in zip(rows.splitlines(), found, strict=True):
        name, _, mark = row.rpartition(" | ")
        assert line.startswith(name), "run python -m tests.mutation"
        assert mark.removesuffix(" |") in line


def test_names_are_different_and_files_are_there():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 12
    assert all((ROOT / "triton_bnlstm" / mutant.file).is_file() for mutant in MUTANTS)
    assert {mutant.caught_by for mutant in MUTANTS} <= set(TESTS)


def test_a_name_that_no_mutant_has(capsys):
    with pytest.raises(SystemExit) as caught_exit:
        main(["--only", "no such thing"])
    assert caught_exit.value.code == 2
    assert "no mutant has that in its name" in capsys.readouterr().err
