"""Writes what the records say into the pages that tell of it: README's short section, and each experiment's tables.

A page has a block for each, between <!-- name --> and <!-- /name -->; what stands in a block is replaced as a whole, so
no figure is copied by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path

from . import figures
from .experiment import NAMES, SIZES, load
from .record import Record, path_of

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGE = Path(__file__).with_name("README.md")
SHORT = "paper"  # the block in README


def main(out: Path, check: bool) -> int:
    """Write README, the page, tables and plots of the records in `out`; or with check say what is out of date.

    Returns:
        The exit status.
    """
    records = committed(out)
    if not records:
        print(f"bench.paper: no complete records in {out}", file=sys.stderr)
        return 1
    texts = {README: put(README.read_text(encoding="utf-8"), SHORT, short(records))}
    page = PAGE.read_text(encoding="utf-8")
    for record in records:
        page = put(page, record.content["experiment"], block(record))
        texts[record.path.with_suffix(".md")] = figures.tables(record)
    texts[PAGE] = page
    if check:
        stale = [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
        stale += [record.path.with_suffix(".png") for record in records if not figures.is_drawn(record)]
        for path in stale:
            print(
                f"bench.paper: {path} is not what the records give; run: python -m bench.paper report", file=sys.stderr
            )
        return 1 if stale else 0
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
        print(f"Wrote {path}")
    for record in records:
        print(f"Wrote {figures.draw(record)}")
    return 0


def committed(out: Path) -> list[Record]:
    """The complete record of the largest size that each experiment has."""
    found = []
    for name in NAMES:
        experiment = load(name)
        for size in reversed(SIZES[1:]):  # what "quick" gives means nothing
            path = path_of(out, name, size)
            if path.exists():
                record = Record(path, name, size, experiment.SIZES[size])
                if figures.complete(record):
                    found.append(record)
                    break
    return found


def put(text: str, name: str, content: str) -> str:
    """`text` with what stands between <!-- name --> and <!-- /name --> replaced.

    Raises:
        ValueError: the two are not there, once each and in this order.
    """
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(opening) != 1 or text.count(closing) != 1 or text.index(opening) > text.index(closing):
        raise ValueError(f"the page needs {opening} and {closing}, once each, around the place of that block")
    before, after = text.split(opening)[0], text.split(closing)[1]
    return f"{before}{opening}\n\n{content.strip()}\n\n{closing}{after}"


def short(records: list[Record]) -> str:
    """README's section: what each experiment says in a few lines."""
    lines = ["Written by `python -m bench.paper report` from the records in `bench/results/paper`."]
    for record in records:
        experiment = load(record.content["experiment"])
        command = f"python -m bench.paper {record.content['experiment'].replace('_', '-')}"
        lines += ["", f"**{experiment.TITLE}** (`{command}`, {figures.note(record)})", ""]
        lines += experiment.summary(record.settings, record.results)
    return "\n".join(lines)


def block(record: Record) -> str:
    """The page's block of one experiment: its plot and its tables."""
    experiment = load(record.content["experiment"])
    picture = Path("..", "results", "paper", record.path.with_suffix(".png").name).as_posix()
    return f"![{experiment.TITLE}]({picture})\n\n{figures.tables(record)}"
