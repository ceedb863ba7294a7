"""The atlas's rows, one of each kernel: from what the compiler found, to and from lines of text, and against before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import naming
from .machine import CLASSES
from .targets import NUMBERS, TARGETS

TABLE = Path(__file__).parent / "atlas.tsv"
COMMAND = "python -m bench.aot atlas"
MOST_GROWTH = 1.05  # of the time loop's instructions, before somebody has to say that it is meant
NOTHING = "-"


@dataclass(frozen=True)
class Row:
    """One kernel; `NOTHING` where there is no such figure.

    Attributes:
        name: what is compiled, `naming.NAMES`.
        of: "default", or "near" for a layout beside the default.
        figures: by the names in `FIGURES`.
        problems: what is wrong; near a default it may be, and is only told.
    """

    name: tuple[str, ...]
    of: str
    figures: dict[str, str]
    problems: str

    def number(self, figure: str) -> int:
        """A figure, 0 where there is none."""
        return 0 if self.figures[figure] == NOTHING else int(self.figures[figure])

    @property
    def matrix(self) -> set[str]:
        """The kinds of matrix instructions."""
        return {each.partition(":")[0] for each in self.figures["matrix"].split(",") if each != NOTHING}

    def __str__(self) -> str:
        target, numbers, kernel, mode, batch, hidden, directions, layout = self.name
        return f"{target} {numbers} {kernel} {mode} B{batch} H{hidden} D{directions} {layout}"


# Bytes of shared memory, registers of a thread, bytes of its stack, spilling instructions; programs that a
# multiprocessor holds at the same time; matrix instructions of the kernel; releases, polls, acquires and block barriers
# of the grid barrier; instructions of the time loop, and of those each class.
FIGURES = (
    *("shared", "registers", "stack", "spills", "together", "matrix", "barrier", "loop"),
    *(f"loop_{each}" for each in CLASSES),
)
COLUMNS = (*naming.NAMES, "of", *FIGURES, "problems")


def row(result: dict[str, Any], of: str) -> Row:
    """What the compiling process found, "default" or "near" one."""
    figures = dict.fromkeys(FIGURES, NOTHING)
    if "resources" in result:
        used, device = result["resources"], TARGETS[result["target"]].device
        figures |= {each: str(used[each]) for each in ("shared", "registers", "stack", "spills")}
        together = device.resident_programs(used["shared"], used["registers"], result["options"]["num_warps"])
        figures["together"] = str(together // device.multiprocessors)
        figures["matrix"] = ",".join(f"{word}:{n}" for word, n in sorted(used["matrix"].items())) or NOTHING
        shape = used["barrier"]
        if shape and (shape["releases"] or shape["polls"]):
            blocks = f"{shape['before']}+{shape['behind']}"
            figures["barrier"] = f"r{shape['releases']},p{shape['polls']},a{shape['acquires']},b{blocks}"
        if used["loop"]:
            figures["loop"] = str(sum(used["loop"].values()))
            figures |= {f"loop_{each}": str(n) for each, n in used["loop"].items()}
    problems = " ".join("; ".join(result["problems"]).split()) or NOTHING
    name = naming.name(result) if "config" in result or "constants" in result else _unnamed(result)
    return Row(name, of, figures, problems)


def _unnamed(result: dict[str, Any]) -> tuple[str, ...]:
    """Of what failed before there was a kernel."""
    return tuple(str(result.get(each, NOTHING)) for each in naming.NAMES)


def line(row: Row) -> str:
    """As text."""
    return "\t".join([*row.name, row.of, *(row.figures[each] for each in FIGURES), row.problems])


def of_line(text: str) -> Row:
    """The same again.

    Raises:
        ValueError: not a row with these columns.
    """
    cells = text.rstrip("\n").split("\t")
    if len(cells) != len(COLUMNS):
        raise ValueError(f"not a row of {len(COLUMNS)} columns: {text!r}")
    n = len(naming.NAMES)
    return Row(tuple(cells[:n]), cells[n], dict(zip(FIGURES, cells[n + 1 : -1], strict=True)), cells[-1])


def _order(row: Row) -> tuple[Any, ...]:
    target, numbers, kernel, mode, *sizes, layout = row.name
    places = [
        list(known).index(each) if each in known else -1 for each, known in ((target, TARGETS), (numbers, NUMBERS))
    ]
    hidden_first = [int(sizes[k]) if sizes[k].isdecimal() else -1 for k in (1, 0, 2)]
    return (*places, kernel, *hidden_first, mode, row.of, layout)


def write(path: Path, rows: Iterable[Row], about: list[str]) -> None:
    """The table, sorted. about: lines at its head."""
    lines = [*(f"# {each}" for each in about), "\t".join(COLUMNS), *(line(each) for each in sorted(rows, key=_order))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Table:
    """What is in the file: its head, "Triton" and so on, and its rows by name."""

    head: dict[str, str]
    rows: dict[tuple[str, ...], Row]


def read(path: Path) -> Table:
    """The table.

    Raises:
        ValueError: not with these columns.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    about = [each[2:] for each in lines if each.startswith("# ")]
    rest = [each for each in lines if not each.startswith("#")]
    if not rest or rest[0].split("\t") != list(COLUMNS):
        raise ValueError(f"{path}: not a table with these columns; write it again: {COMMAND}")
    head = dict(each.split(": ", 1) for each in about if ": " in each)
    rows = [of_line(each) for each in rest[1:]]
    return Table(head, {each.name: each for each in rows})


def unordered_barrier(row: Row) -> str:
    """The barrier without its block barriers: another Triton puts other ones of its own beside them."""
    return row.figures["barrier"].partition(",b")[0]


def differences(now: Iterable[Row], table: Table, *, triton: str) -> list[str]:
    """What is worse than in the table or not in it, or so much better that it should be in it, row by row.

    Args:
        now: rows of kernels that were compiled just now.
        table: what was written before.
        triton: the version that compiled them. Where it is another one than the table's, another number of
            instructions and of block barriers is not told.
    """
    same = triton == table.head.get("Triton")
    found = []
    for row in now:
        before = table.rows.get(row.name)
        if before is None:
            found.append(f"{row}: not in the table")
            continue
        if row.problems not in (NOTHING, before.problems):
            found.append(f"{row}: {row.problems}")
        gone = before.matrix - row.matrix
        if gone:
            found.append(f"{row}: matrix instruction {', '.join(sorted(gone))} is gone")
        barriers = [each.figures["barrier"] if same else unordered_barrier(each) for each in (before, row)]
        if barriers[0] != barriers[1]:
            found.append(f"{row}: barrier {barriers[0]} → {barriers[1]}")
        if same and row.number("together") < before.number("together"):
            found.append(f"{row}: together {before.figures['together']} → {row.figures['together']}")
        old, new = before.number("loop"), row.number("loop")
        if same and new > old * MOST_GROWTH:
            parts = [(each, before.number(f"loop_{each}"), row.number(f"loop_{each}")) for each in CLASSES]
            grown = ", ".join(f"{each} {a} → {b}" for each, a, b in parts if b > a)
            found.append(f"{row}: loop {old} → {new} instructions ({grown})")
        elif same:
            found += [f"{row}: loop_{each} {a} → {b}" for each, a, b in _grown(before, row)]
        if same and new < old / MOST_GROWTH:  # else what was gained could be lost again unseen
            found.append(f"{row}: loop {old} → {new} instructions: less than the table says")
        if same and row.number("loop_matrix") != before.number("loop_matrix"):
            found.append(f"{row}: loop_matrix {before.figures['loop_matrix']} → {row.figures['loop_matrix']}")
    return found


# Of these each instruction waits for something; those of the other classes may take each other's place.
_WAITING = ("global", "shared", "barrier", "transcendental", "shuffle")


def _grown(before: Row, row: Row) -> Iterator[tuple[str, int, int]]:
    """Classes that have grown by more than a twentieth, and by more than a few instructions."""
    for each in _WAITING:
        a, b = before.number(f"loop_{each}"), row.number(f"loop_{each}")
        if b > max(a * MOST_GROWTH, a + 4):
            yield each, a, b


def missing(now: Iterable[Row], table: Table) -> list[str]:
    """Default rows of the table that are not among those just compiled, of the kernels and sizes that these are of."""
    rows = list(now)
    sizes = {(*row.name[:3], *row.name[4:7]) for row in rows}
    names = {row.name for row in rows}
    gone = [row for row in table.rows.values() if row.of == "default" and row.name not in names]
    return [f"{row}: in the table, and not compiled now" for row in gone if (*row.name[:3], *row.name[4:7]) in sizes]
