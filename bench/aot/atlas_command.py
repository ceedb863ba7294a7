"""The command line of `python -m bench.aot atlas`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console

from bench.records import RESULTS

from .atlas import Kept, everything, fingerprint, make, preset
from .checks import Request
from .machine import CLASSES
from .rows import COMMAND, NOTHING, TABLE, Row, differences, read, write
from .targets import TARGETS

DESCRIPTION = """\
Compile the kernels for GPUs that need not be there and write a line of each into a table: shared memory, registers,
stack and spills, programs that a multiprocessor holds at the same time, matrix instructions, the grid barrier's parts,
and the instructions of the time loop by class. Tests compile a part of it again and fail where it has become worse;
so run this once kernels are changed on purpose, and look at the table's difference before it is committed.

Without options: every target in its most used dtype with the default layouts of B = 64 and H = 100, 512 and 1024, in
sequence mode and step mode; other dtypes and all variants on sm90; and on sm90 and sm100 the layouts beside the default
that tuning may choose, with the reason for those that cannot run. About a quarter of an hour on two cores.

It may be interrupted: kernels that are done are kept in a file and not compiled again by the next run, as long as
kernels, reading code and Triton are the same.
"""

EPILOG = f"""\
columns:
  shared             bytes of a program                 registers, stack   of a thread, the latter in bytes
  spills             instructions that spill (AMD: registers)
  together           programs that a multiprocessor holds at the same time
  matrix             matrix instructions of the kernel and how many
  barrier            r releases, p polls, a acquiring loads, b block barriers before releases + behind polls
  loop, loop_…       instructions of the time loop, each counted once (bench/aot/machine.py says what that is), and of
                     those {", ".join(CLASSES)}
  of                 "default", or "near": a layout beside the default
  problems           why it spills, does not fit or cannot run; a default must not have any

examples:
  {COMMAND}                                   the tracked table
  {COMMAND} --targets sm90 --table h100.tsv   one target's part of it
  {COMMAND} --check                           compare, and leave the table as it is
  {COMMAND} --everything                      all combinations: some 150,000 kernels, about two days
"""


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = argparse.ArgumentParser(
        prog=COMMAND, description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--everything",
        action="store_true",
        help="every kernel in every dtype, size and layout that tuning may choose, into a table of its own",
    )
    made.add_argument("--targets", metavar="A,B", help=f"only these (default: {','.join(TARGETS)}); needs --table")
    made.add_argument(
        "--table", type=Path, metavar="FILE", help="where to (default: the tracked one, or local results)"
    )
    made.add_argument("--check", action="store_true", help="write nothing; tell what is worse than in the table")
    made.add_argument("--jobs", type=int, default=2, metavar="N", help="compiling processes (default: %(default)s)")
    made.add_argument("--kept", type=Path, metavar="FILE", help="rows that are done (default: in local results)")
    made.add_argument("--fresh", action="store_true", help="compile what an earlier run has kept, too")
    return made


def _arguments(argv: list[str]) -> argparse.Namespace:
    made = parser()
    found = made.parse_args(argv)
    found.targets = found.targets.split(",") if found.targets else list(TARGETS)
    for name in found.targets:
        if name not in TARGETS:
            made.error(f"argument --targets: {name!r} is none of {', '.join(TARGETS)}")
    if found.jobs < 1:
        made.error(f"argument --jobs: must be 1 or more, got {found.jobs}")
    if found.everything and found.check and found.table is None:
        made.error("--check: the tracked table does not hold everything; say with --table which one does")
    local = RESULTS / "local"
    if found.table is None and not found.check:
        if len(found.targets) < len(TARGETS) and not found.everything:
            made.error("--targets: the tracked table holds all of them; say with --table where to write a part")
        found.table = local / "atlas-everything.tsv" if found.everything else TABLE
    found.table = found.table or TABLE
    if not found.check and found.table.parent != local and not found.table.resolve().parent.is_dir():
        made.error(f"argument --table: {found.table}: there is no such folder")
    found.kept = found.kept or local / "atlas.jsonl"
    return found


def main(argv: list[str], versions: dict[str, str], known: list[str]) -> int:
    """Make the table. known: all variants. The exit status: 1 if a default has a problem; (--check) if it is worse."""
    arguments = _arguments(argv)
    console = Console(width=None if sys.stdout.isatty() else 140)
    plan = everything(known) if arguments.everything else preset(known)
    plan = [request for request in plan if request.target in arguments.targets]
    if arguments.fresh:
        arguments.kept.unlink(missing_ok=True)
    kept = Kept(arguments.kept, f"Triton {versions['triton']}")
    if kept.rows:
        console.print(f"{len(kept.rows)} kernels are kept from an earlier run", highlight=False)
    began, done = time.monotonic(), 0

    def tell(request: Request, rows: list[Row], reason: str | None, seconds: float) -> None:
        nonlocal done
        done += 1
        near = ", near the defaults" if request.near else ""
        found = reason or f"{len(rows)} kernels in {seconds:.0f} s"
        text = f"{done}/{len(plan)} {request.target} {','.join(request.numbers)}{near}: {found}"
        console.print(text, highlight=False, soft_wrap=True)

    with console.status("compiling"):
        rows = make(plan, kept, arguments.jobs, tell)
    console.print(f"{len(rows)} kernels in {time.monotonic() - began:.0f} s", highlight=False)
    wrong = [f"{row}: {row.problems}" for row in rows if row.of == "default" and row.problems != NOTHING]
    if arguments.check:
        try:
            wrong = differences(rows, read(arguments.table), triton=versions["triton"])
        except (OSError, ValueError) as error:
            wrong = [str(error)]
    else:
        about: list[str] = [
            "What each kernel needs, compiled ahead of time: see the command's --help",
            f"Command: {COMMAND if arguments.table == TABLE else ' '.join([COMMAND, *argv])}",  # --jobs changes nothing
            *(f"{title}: {versions[title.lower()]}" for title in ("Triton", "torch")),
            f"Kernels: {fingerprint(reading=False)}",
        ]
        arguments.table.parent.mkdir(parents=True, exist_ok=True)
        write(arguments.table, rows, about)
        console.print(f"Wrote {arguments.table}", highlight=False, markup=False, soft_wrap=True)
    for each in wrong:
        console.print(each, style="red", highlight=False, markup=False, soft_wrap=True)
    return 1 if wrong or not rows else 0
