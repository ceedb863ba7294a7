"""What the command line writes: text, tables, progress; and how it ends."""

from __future__ import annotations

import json
import math
import shutil
import sys
import textwrap
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from .device import Identity, minor, triton_version
from .entry import MEASURED, Entry
from .tuner import Tell, nobody
from .work import Key, hidden_bucket, in_words, power_bucket

DONE, FAILED, USAGE, NO_DEVICE, INTERRUPTED = 0, 1, 2, 3, 130
_SCRIPT, _MODULE = "triton-bnlstm-tuning", "python -m triton_bnlstm.tuning"
NUMBERS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_FLAGS = {
    "seats": "unequal lengths",
    "fill": "lengths given as a tensor on the device",
    "narrow": "one input column",
    "centre": "of the input x",
    "before": "of the states h instead, for the gradient of W_hh",
}
_LAYOUT = {
    "W_hh stays": "on chip through all steps",
    "stage": "of the pipeline that streams W_hh",
    "inner": "elements of one product's inner extent",
    "product": "in how many parts of the inner extent x of the rows the backward divides its product",
}
# Where nobody says how wide the screen is: a file, a pipe.
_WIDTH = 100


class Failure(Exception):
    """Ends a command.

    Args:
        message: one line.
        code: the exit code.
    """

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


def program() -> str:
    """What this process was started by, to be typed again."""
    return _SCRIPT if Path(sys.argv[0]).stem == _SCRIPT else _MODULE


def micro() -> str:
    """The unit "µs", or "us" where stdout cannot write that."""
    try:
        "µ".encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeError, LookupError):
        return "us"
    return "µs"


def duration(seconds: float) -> str:
    """A time to wait: "90 s" or "5 min"."""
    return f"{seconds:g} s" if seconds < 120 else f"{math.ceil(seconds / 60)} min"


def complain(message: str) -> None:
    """One line on stderr, broken where the terminal ends."""
    line = f"{program()}: {one_line(message)}"
    print(_filled(line, "  ") if sys.stderr.isatty() else line, file=sys.stderr, flush=True)


def one_line(text: str) -> str:
    """A text without line breaks, as errors of compilers have them."""
    return " ".join(text.split())


def write_json(document: dict[str, Any]) -> None:
    """The one document of `--json`."""
    print(json.dumps(document, indent=1))


def count(number: int, one: str, many: str | None = None) -> str:
    """A number with its noun: "1 entry", "2 entries"."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def in_order(name: str) -> tuple[str, int]:
    """What sorts names by the numbers at their end: sm90 before sm100."""
    letters = name.rstrip("0123456789")
    return letters, int(name[len(letters) :] or -1)


def listed(names: Sequence[str]) -> str:
    """The names in a sentence: "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def key_cells(key: Key) -> list[str]:
    """What a key says, for a table: kernel, dtype, size, batch, directions, flags."""
    numbers = "tf32" if key.precision == "tf32" else NUMBERS.get(key.dtype, key.dtype)
    size = f"D{key.columns}" if key.kernel == "moments" else f"H{key.hidden}"
    return [key.kernel, numbers, size, f"B{key.batch}", f"x{key.directions}", " ".join(key.flags)]


def key_words(key: Key) -> str:
    """The same in one line: "forward bf16 H512 B64 x1 cell_norm"."""
    return " ".join(each for each in key_cells(key) if each)


def microseconds(value: float | None) -> str:
    """A time with three or four digits."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def time_of(entry: Entry) -> float | None:
    """Microseconds of an entry's layout."""
    found = entry.candidate(entry.layout)
    return None if found is None else found.microseconds


def gain_words(gain: float | None, *, is_default: bool) -> str:
    """How much faster than the default a layout is, for a table."""
    if is_default:
        return "default"
    return "-" if gain is None else f"{gain:.2f} x"


def tune_words(entry: Entry | None) -> str:
    """A command that measures for an entry's sizes."""
    key = None if entry is None else entry.key
    if key is None:
        return f"{program()} tune --hidden 512 --batch 64 --dtype bf16"
    numbers = "tf32" if key.precision == "tf32" else NUMBERS.get(key.dtype, key.dtype)
    hidden = key.hidden
    if key.kernel == "moments":  # of x and of h; else of the four gates' parts of a state
        hidden = key.columns if key.flags else key.columns // 4
    more = {
        " --directions 2": key.directions == 2,
        " --columns 1": "narrow" in key.flags,
        " --cell-norm": "cell_norm" in key.flags,
        " --lengths device": "fill" in key.flags,
        " --kernel moments": key.kernel == "moments",
    }
    asked = f"tune --hidden {hidden} --batch {key.batch} --dtype {numbers}"
    return f"{program()} {asked}{''.join(text for text, needed in more.items() if needed)}"


def date(at: float) -> str:
    """The day of a time in seconds since 1970, in UTC."""
    try:
        return datetime.fromtimestamp(at, timezone.utc).date().isoformat()
    except (ValueError, OverflowError, OSError):
        return "unknown date"


def source_of(entry: Entry) -> str:
    """Who measured an entry, when and with what."""
    if entry.how != MEASURED:
        return entry.how
    by = entry.by
    return f"measured on {by.name}, {date(entry.at)}, torch {by.torch}, Triton {by.triton}"


def candidate_lines(entry: Entry) -> list[tuple[str, str]]:
    """All layouts that were tried, the fastest first, those that failed last: their time, and they or their failure."""
    lines = []
    for each in sorted(entry.candidates, key=lambda each: each.microseconds or float("inf")):
        part = "default: " if each.layout == entry.default else ""
        if each.microseconds is None:
            lines.append(("failed   ", f"{part}{in_words(each.layout)}: {one_line(each.failed)}"))
        else:
            lines.append((f"{microseconds(each.microseconds)} {micro()}", f"{part}{in_words(each.layout)}"))
    return lines


def result_line(entry: Entry, *, anew: bool) -> str:
    """What tuning has found for one key. anew: now; else it was known, and nothing was left to try."""
    unit = "a call" if entry.key.kernel == "moments" else "a step"
    if entry.layout == entry.default:
        gain = "the default is the fastest"
    else:
        gain = "not compared with the default" if entry.gain is None else f"{entry.gain:.2f} x the default's speed"
    failed = sum(bool(each.failed) for each in entry.candidates)
    layouts = f"{count(len(entry.candidates), 'layout')} tried, {failed} failed"
    if not anew:
        layouts += "; nothing new to try"
    time = f"{microseconds(time_of(entry))} {micro()} {unit}"
    return f"{key_words(entry.key)}: {in_words(entry.layout)}: {time}, {gain} ({layouts})"


def stale_words(entry: Entry) -> str:
    """The mark of an entry that another Triton's code was measured for."""
    return f"stale: Triton {minor(entry.by.triton)} then, {minor(triton_version())} now"


def device_heading(identity: Identity, names: set[str]) -> str:
    """A device, with the names it has been measured under."""
    known = ", ".join(sorted(names))
    return f"{identity}" + (f" ({known})" if known else "")


def print_text(text: str, indent: str = "  ") -> None:
    """As many lines on stdout as it takes. indent: of those after the first."""
    print(_filled(text, indent))


def _filled(text: str, indent: str) -> str:
    wide = max(40, shutil.get_terminal_size((_WIDTH, 24)).columns)
    return textwrap.fill(text, wide, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


class Row(NamedTuple):
    """One entry in a table.

    what: cells that say what it is. figures: cells with numbers. details: lines that belong to it; without figures one
    of them goes on the row's own line, where there is room. marks: lines that warn. candidates: `candidate_lines`.
    """

    what: list[str]
    figures: list[str]
    details: list[str]
    marks: list[str]
    candidates: tuple[tuple[str, str], ...] = ()


def legend(entries: list[Entry]) -> list[str]:
    """What a table's words mean, as far as these entries have them."""
    keys = [entry.key for entry in entries]
    words = [in_words(entry.layout) for entry in entries]
    told = [f"{name}: {meaning}" for name, meaning in _LAYOUT.items() if any(name in each for each in words)]
    lines = ["; ".join(told)] if told else []
    flags = {flag for key in keys for flag in key.flags}
    told = [f"{flag}: {words}" for flag, words in _FLAGS.items() if flag in flags]
    if told:
        lines.append("; ".join(told))
    if keys:
        first = next((key for key in keys if key.kernel != "moments"), keys[0])
        size = ("D", first.columns) if first.kernel == "moments" else ("H", first.hidden)
        parts = [_bucket_words(*each) for each in (size, ("B", first.batch))]
        lines.append(
            f"sizes are the largest of their bucket: {parts[0].replace(' for', ' is used for', 1)}, {parts[1]}"
        )
    return lines


def _bucket_words(letter: str, largest: int) -> str:
    """For instance "B64 for 33 to 64"."""
    bucket = hidden_bucket if letter == "H" else power_bucket
    least = 1 + bisect_left(range(1, largest + 1), bucket(largest), key=bucket)
    return f"{letter}{largest} for " + (f"{least} to {largest}" if least < largest else f"{largest} alone")


def print_table(what: list[str], figures: list[str], rows: list[Row]) -> None:
    """A table: by rich on a terminal, where that is installed; else aligned columns with the details below each row.

    what, figures: headings of the two kinds of cells.
    """
    if sys.stdout.isatty():
        try:
            _rich_table(figures, rows)
        except ImportError:
            pass
        else:
            return
    width = shutil.get_terminal_size((_WIDTH, 24)).columns
    lines = [[*row.what, *row.figures] for row in rows]
    widths = [max(len(line[k]) for line in [[*what, *figures], *lines]) for k in range(len(what) + len(figures))]

    def aligned(cells: list[str]) -> str:
        parts = [
            cell.ljust(wide) if k < len(what) else cell.rjust(wide)
            for k, (cell, wide) in enumerate(zip(cells, widths, strict=True))
        ]
        return ("  " + "  ".join(parts)).rstrip()

    print(aligned([*what, *figures]))
    wide = max(40, width)
    for line, row in zip(lines, rows, strict=True):
        details = list(row.details)
        start = f"  {'  '.join(cell.ljust(to) for cell, to in zip(line, widths, strict=True))}"
        if not row.figures and details and len(start) + 2 + len(details[0]) <= wide:
            print(f"{start}  {details.pop(0)}")
        else:
            print(aligned(line))
        for text in details:
            print(textwrap.fill(text, wide, initial_indent="      ", subsequent_indent="        "))
        for time, text in row.candidates:
            print(textwrap.fill(text, wide, initial_indent=f"      {time:>11}  ", subsequent_indent=" " * 19))
        for mark in row.marks:
            print(textwrap.fill(f"! {mark}", wide, initial_indent="      ", subsequent_indent="        "))


def _rich_table(figures: list[str], rows: list[Row]) -> None:
    from rich import box
    from rich.console import Console, Group, RenderableType
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=False)
    table.add_column("kernel and sizes", min_width=20, max_width=34)
    for name in figures:
        table.add_column(name, justify="right", max_width=8)
    table.add_column("layout, and where it comes from")
    for row in rows:
        details: list[RenderableType] = [Text(text, "" if k == 0 else "dim") for k, text in enumerate(row.details)]
        if row.candidates:
            tried = Table.grid(padding=(0, 1))
            tried.add_column(justify="right", no_wrap=True)
            for time, text in row.candidates:
                tried.add_row(Text(time, "dim"), Text(text, "dim"))
            details.append(tried)
        details += [Text(f"! {mark}", "yellow") for mark in row.marks]
        table.add_row(Text(" ".join(each for each in row.what if each)), *map(Text, row.figures), Group(*details))
    Console().print(table)


@contextmanager
def progress(title: str, seconds: float) -> Iterator[Tell]:
    """Shows on stderr what is being done: a bar of the time that is allowed on a terminal with rich, else one line."""
    if sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
        except ImportError:
            pass
        else:
            columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(20))
            # stdout may be a file while stderr is a terminal: what is printed must not be taken to the bar's console
            bar = Progress(
                *columns,
                TimeElapsedColumn(),
                TextColumn(f"of at most {seconds:g} s", markup=False),
                console=Console(stderr=True),
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            with bar:
                task = bar.add_task(title, total=seconds)

                def tell(message: str) -> None:
                    elapsed = bar.tasks[0].elapsed or 0.0
                    bar.update(task, description=f"{title}: {message}", completed=min(elapsed, seconds))

                yield tell
            return
    print(f"{title}: at most {seconds:g} s", file=sys.stderr, flush=True)
    yield nobody
