"""The layouts that come with the package: `python -m bench.defaults` writes triton_bnlstm/tuning/defaults/*.json.

One file for each architecture, for the one board of it in `bench.aot.targets`. Without a GPU nothing can be timed, so
an entry says "modelled", but it is more than the analytic choice once more: the kernel is compiled ahead of time. Where
the analytic layout spills, does not fit or leaves the matrix unit unused, the next layout in the model's order that
does none of this takes its place. Beside the fields of a `tuning.entry.Entry` an entry has

    checked   the Triton that has compiled it; absent where nobody has
    problem   what is wrong with the analytic layout, `default`; where `layout` is the same, it remains, since nothing
              near it is better

Entries that were measured stay as long as the code of their kernel does, and are never compiled here.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import triton_bnlstm
from triton_bnlstm.tuning import Work, shipped, space
from triton_bnlstm.tuning.device import Identity, Provenance, triton_version
from triton_bnlstm.tuning.entry import MEASURED, MODELLED, Entry
from triton_bnlstm.tuning.store import Raw, replace_text
from triton_bnlstm.tuning.work import source_hash

from .aot.candidates import precision
from .aot.targets import NUMBERS, TARGETS, Target, why_skipped
from .trials import CannotCompile, CompilerFailed, Finding, Size, alternatives, compiled

FOLDER = Path(triton_bnlstm.__file__).parent / "tuning" / "defaults"
ARCHITECTURES = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "gfx942")

HIDDENS, BATCHES, USUAL_BATCH = (128, 256, 512, 1024, 2048), (32, 64, 128), 64
# float16 has bfloat16's layouts: the model asks for bytes of an element only. So a few sizes will do.
FEW_HIDDENS = (512, 1024)
# What is compiled for a kernel without and with cell norm. Training keeps deviations for its backward; of the variants
# with cell norm none does so too, and that without seats is the nearest, since seats are a flag, and so a key, of their
# own. Of inference the one with cell norm keeps its cell states besides, which only needs more.
VARIANTS = {
    "forward": {(): "forward/keep", ("cell_norm",): "forward/cell"},
    "backward": {(): "backward/plain", ("cell_norm",): "backward/cell"},
    "inference": {(): "inference/plain", ("cell_norm",): "inference/cell+keep"},
}
DESCRIPTION = """\
Write the layouts that come with the package, one file for each architecture: of each kernel, dtype and size the
analytic layout, or where that spills, does not fit or leaves the matrix unit unused the next one of the model that does
not. Each is compiled ahead of time, so no GPU is needed. All seven take about 20 minutes, in one
process: 123 kernels of each architecture, one to two seconds a kernel.

Entries that were measured on a GPU stay as long as their kernel's code does. Entries that this Triton has compiled are
not compiled again: a run that was interrupted goes on where it was.
"""

EPILOG = """\
examples:
  python -m bench.defaults                  everything that is missing or out of date
  python -m bench.defaults --targets sm90   one architecture
  python -m bench.defaults --check          say what is missing or out of date, in seconds
"""


def sizes(target: Target) -> list[Size]:
    """What a target's file holds, without what was measured."""
    plain: tuple[str, ...] = ()
    cell_norm = ("cell_norm",)
    full = [
        *((hidden, batch, 1, plain) for hidden, batch in product(HIDDENS, BATCHES)),
        *((hidden, batch, 1, cell_norm) for hidden, batch in product(HIDDENS, BATCHES)),
        *((hidden, USUAL_BATCH, 2, plain) for hidden in HIDDENS),
    ]
    single = "fp32" if why_skipped(target, "tf32") else "tf32"
    wanted = {
        "bf16": full,
        "fp16": [(hidden, USUAL_BATCH, 1, plain) for hidden in FEW_HIDDENS],
        single: [(hidden, USUAL_BATCH, 1, plain) for hidden in HIDDENS[1:]],
    }
    found = []
    for numbers, combinations in wanted.items():
        of = NUMBERS[numbers]
        for kernel, (hidden, batch, directions, flags) in product(VARIANTS, combinations):
            work = Work(kernel, hidden, batch, directions, of.dtype, precision(target.device, of), flags)
            found.append(Size(work, numbers, VARIANTS[kernel][flags]))
    return found


def entry_of(target: Target, size: Size, finding: Finding | None, version: str) -> dict[str, Any]:
    """An entry's JSON. finding: None where nothing was compiled. version: the Triton that did."""
    default = space.analytic(target.device, size.work)
    by = Provenance(target.board, "none", "none", "none" if finding is None else version)
    layout = default if finding is None else finding.layout
    told = Entry(size.work.key, layout, MODELLED, 0, by, default).as_json()
    if finding is not None:
        told["checked"] = f"Triton {version}"
        if finding.problem:
            told["problem"] = finding.problem
    return told


def read(path: Path) -> dict[Identity, Raw]:
    """Devices and entries of a file, none where there is no file.

    Raises:
        ValueError: it is not one of ours.
        OSError: it cannot be read.
    """
    try:
        return shipped.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def fault(target: Target, text: str, fields: dict[str, Any]) -> str | None:
    """What is wrong with an entry of a target's board, as far as that can be told without compiling; None: nothing."""
    reason = fault_anywhere(text, fields)
    if reason is not None:
        return reason
    entry = Entry.of_json(fields)
    work = Work.of_key(entry.key)
    reason = space.why_not(target.device, work, entry.layout)
    if reason is not None:
        return f"its layout cannot run: {reason}"
    if entry.how == MEASURED:
        return None
    if text not in {size.name for size in sizes(target)}:
        return "it is modelled, and not of a size that is"
    if entry.default != space.analytic(target.device, work):
        return "the analytic layout is another one by now"
    if entry.layout == entry.default:
        return None
    if not isinstance(fields.get("problem"), str) or not isinstance(fields.get("checked"), str):
        return "its layout is not the analytic one, and it does not say why"
    return None if entry.layout in alternatives(target.device, work) else "its layout is none that would be tried"


def fault_anywhere(text: str, fields: dict[str, Any]) -> str | None:
    """What is wrong with an entry, whatever the device; None: nothing."""
    try:
        entry = Entry.of_json(fields)
    except ValueError as error:
        return str(error)
    if text != str(entry.key):
        return f"its key is {entry.key}"
    if entry.key.source != source_hash(entry.key.kernel):
        return "its kernel's code is another one by now"
    if entry.how == MEASURED and entry.by.name in ("", "none", "unknown"):
        return "it is measured, and does not say on what"
    return None


def faults(target: Target, folder: Path = FOLDER) -> list[str]:
    """What a target's file has that generating would not write, and what it lacks, each in a line."""
    path = folder / f"{target.name}.json"
    try:
        held = read(path)
    except (OSError, ValueError) as error:
        return [f"{path.name}: {error}"]
    board = Identity.of(target.device)
    found = []
    for identity, entries in held.items():
        for text, fields in entries.items():
            reason = fault(target, text, fields) if identity == board else fault_anywhere(text, fields)
            if reason is None and identity != board and fields["how"] != MEASURED:
                reason = f"it is modelled, and for another board than {target.board}"
            if reason is not None:
                found.append(f"{path.name}: {text}: {reason}")
    there = held.get(board, {})
    return found + [f"{path.name}: {size.name}: missing" for size in sizes(target) if size.name not in there]


class Summary(NamedTuple):
    """What came of a target: how many entries were measured, kept from before, made; why nothing was compiled."""

    measured: int
    kept: int
    made: int
    reason: str = ""


def generate(
    target: Target,
    folder: Path = FOLDER,
    *,
    compiling: bool = True,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> Summary:
    """Write a target's file, also if it is interrupted: with what it has by then.

    Args:
        target: whose.
        folder: where its file is.
        compiling: else layouts are the analytic ones, unless they have been checked before.
        tell: is told how many entries are done, of how many.

    Raises:
        CompilerFailed: see there.
        ValueError: what is there is not one of our files.
        OSError: it cannot be read or written.
    """
    path, board, version = folder / f"{target.name}.json", Identity.of(target.device), triton_version()
    held = read(path)
    devices = {identity: _measured(entries) for identity, entries in held.items()}
    entries = devices.setdefault(board, {})
    measured = sum(map(len, devices.values()))
    left = []
    for size in sizes(target):
        known = held.get(board, {}).get(size.name)
        checked = known is not None and (known.get("checked") == f"Triton {version}" or not compiling)
        if size.name in entries:
            continue
        if known is not None and checked and fault(target, size.name, known) is None:
            entries[size.name] = known
        else:
            left.append(size)
    kept, reason = len(entries), ""
    kept -= len([each for each in entries.values() if each["how"] == MEASURED])
    try:
        if compiling and left:
            reason = _compile(target, left, entries, tell)
        if not compiling or reason:
            for size in left:
                entries.setdefault(size.name, entry_of(target, size, None, version))
    finally:
        text = shipped.text_of({identity: found for identity, found in devices.items() if found})
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            replace_text(path, text)
    return Summary(measured, kept, len(left), reason)


def _measured(entries: Raw) -> Raw:
    """Those that were measured, of kernels that are the same still."""
    return {
        text: each
        for text, each in entries.items()
        if each.get("how") == MEASURED and fault_anywhere(text, each) is None
    }


def _compile(target: Target, left: list[Size], entries: Raw, tell: Callable[[int, int], None]) -> str:
    """Put what the compiler says into entries. Why it cannot, if so."""
    tell(0, len(left))
    with tempfile.TemporaryDirectory() as cache:
        try:
            for done, (size, finding) in enumerate(compiled(target, left, Path(cache)), start=1):
                entries[size.name] = entry_of(target, size, finding, triton_version())
                tell(done, len(left))
        except CannotCompile as error:
            return str(error)
    return ""


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = argparse.ArgumentParser(
        prog="python -m bench.defaults",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--targets", metavar="A,B", help=f"only these (default: {','.join(ARCHITECTURES)})")
    made.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile each layout; without, those that are missing are the analytic ones, unchecked",
    )
    made.add_argument("--check", action="store_true", help="write nothing; tell what is missing or out of date")
    made.add_argument(
        "--folder", type=Path, default=FOLDER, metavar="DIR", help="of the files (default: the package's)"
    )
    return made


def differing(target: Target, folder: Path = FOLDER) -> list[str]:
    """Modelled entries with a problem, each in a line: what is wrong, and whether another layout was found.

    Raises:
        ValueError: the file is not one of ours.
        OSError: it cannot be read.
    """
    found = []
    for text, fields in read(folder / f"{target.name}.json").get(Identity.of(target.device), {}).items():
        if fields.get("problem"):
            came = "remains" if fields["layout"] == fields["default"] else "another layout instead"
            found.append(f"{target.name} {text}: {fields['problem']}: {came}")
    return found


def main(argv: list[str] | None = None) -> int:
    """Write or (--check) compare what the arguments `argv` say, those of the command line if None. The exit status."""
    made = parser()
    arguments = made.parse_args(argv)
    names = arguments.targets.split(",") if arguments.targets else list(ARCHITECTURES)
    for name in names:
        if name not in ARCHITECTURES:
            made.error(f"argument --targets: {name!r} is none of {', '.join(ARCHITECTURES)}")
    if not arguments.folder.is_dir():
        made.error(f"argument --folder: {arguments.folder}: there is no such folder")
    console = Console(width=None if sys.stdout.isatty() else 140)
    if arguments.check:
        wrong = [each for name in names for each in faults(TARGETS[name], arguments.folder)]
        for each in wrong:
            console.print(each, style="red", highlight=False, markup=False, soft_wrap=True)
        console.print(f"{len(names)} files, {len(wrong)} entries missing or out of date", highlight=False)
        return 1 if wrong else 0
    try:
        for name in names:
            _generate_one(TARGETS[name], arguments, console)
    except (CompilerFailed, OSError, ValueError) as error:
        console.print(f"bench.defaults: {name}: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return 1
    return 0


def _generate_one(target: Target, arguments: argparse.Namespace, console: Console) -> None:
    """A target's file, with a bar on a terminal and lines about what came of it."""
    began = time.monotonic()
    live = console.is_interactive and sys.stdout.isatty()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not live, transient=True) as progress:
        bar = progress.add_task(target.name, total=None)

        def tell(done: int, of: int) -> None:
            progress.update(bar, completed=done, total=of)

        found = generate(target, arguments.folder, compiling=arguments.compile, tell=tell)
    lines = differing(target, arguments.folder)
    for line in lines:
        console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)
    counts = f"{found.measured} measured, {found.kept} kept, {found.made} made, {len(lines)} with a problem"
    why = f"; not compiled: {found.reason}" if found.reason else ""
    text = f"{target.name}: {counts}, in {time.monotonic() - began:.0f} s{why}"
    console.print(text, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("bench.defaults: interrupted; what was done is kept")
