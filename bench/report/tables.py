"""README's block of results: what readers see without a click. `page` has the rest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from . import machine, page, series
from .campaign import BASELINE, CUDNN, SHOWN_MODES, Campaign, label
from .cells import CASE_HEAD, case_cell, step_table
from .parts import HOW_TO_READ, images, mistakes, slower, summary
from .sheet import Sheet
from .text import escape, joined, number

START, END = "<!-- results -->", "<!-- /results -->"
WORST = 10  # of a list before README leaves the rest to the device's page
FEW = 8  # cases in README if none of those that come first has been measured

NO_RESULTS = """\
No kernel has run on a GPU yet: what is known of them comes from Triton's interpreter and from compiling them, and
nothing in this README is a claim about their speed. No memory has been measured on a GPU either.

On a machine with a GPU `python -m bench.campaign --minutes 9 --out DIR --resume` measures; it may be called again until
nothing is left to do. Copy the files of DIR to `bench/results/<device>/`; `python -m bench.report` then writes tables
and plots in this place."""

WRITTEN = """\
Written by `python -m bench.report`; every figure is in `bench/results/<device>/campaign.json`, which
`python -m bench.campaign` made."""


def block(campaigns: Sequence[Campaign], readme: Path) -> str:
    """What stands between the marks in `readme`."""
    if not campaigns:
        return NO_RESULTS
    lines = [WRITTEN]
    if any(campaign.measured for campaign in campaigns):
        lines += ["", "**How to read the tables**", "", HOW_TO_READ]
    for campaign in campaigns:
        lines += ["", *device(campaign, readme)]
    return joined(lines)


def put(readme: str, text: str) -> str:
    """`readme` with `text` between the marks.

    Raises:
        ValueError: the marks are not there exactly once.
    """
    if readme.count(START) != 1 or readme.count(END) != 1 or readme.index(START) > readme.index(END):
        raise ValueError(f"must have {START} and, after it, {END}, each once")
    before, _, rest = readme.partition(START)
    return f"{before}{START}\n\n{text}\n\n{END}{rest.partition(END)[2]}"


def device(campaign: Campaign, readme: Path) -> list[str]:
    """The section of one device."""
    sheet = Sheet(campaign)
    folder = Path(os.path.relpath(campaign.path.parent, readme.parent)).as_posix() + "/"
    link = f"[{escape(folder + page.NAME)}]({quote(folder)}{page.NAME})"
    lines = [f"### {escape(campaign.name)}", "", *([f"#### {sheet.note}", ""] if sheet.note else [])]
    lines += [*machine.where(campaign, short=True), "", *machine.said_by_tests(campaign, WORST, f"in {link}"), ""]
    if campaign.measured:
        keys = campaign.leading or campaign.measured[:FEW]
        lines += [*summary(campaign), "", *step_table(sheet, keys, SHOWN_MODES)]
        lines += [*sheet.footnotes(harmless=True, unmarked=False), "", *sheet.absent(), *_wall(sheet, keys)]
        lines += [*images(campaign, (series.HIDDEN, series.RATIOS), folder), *slower(sheet, WORST, f"in {link}")]
    else:
        lines += ["No times have been taken.", ""]
    lines += [*mistakes(sheet), *sheet.troubles(WORST, f"in {link}")]
    if page.worth(campaign):
        lines += ["", f"All cases, memory, errors, ceilings, where the time goes and more: {link}."]
    return lines


def _wall(sheet: Sheet, keys: Sequence[str]) -> list[str]:
    """The other clock, which says what a user waits for."""
    campaign = sheet.campaign
    shown = [name for name in (BASELINE, CUDNN, "reference") if name in campaign.providers]
    rows = []
    for key in keys:
        chosen = campaign.chosen(key)
        walls = [campaign.wall(key, provider, "training") for provider in (chosen, *shown)]
        if any(walls):
            cells = [number(wall / 1e3) if wall is not None else "" for wall in walls]
            cells[0] += " step" if cells[0] and chosen == "step" else ""
            rows.append([case_cell(campaign, key), *cells])
    if not rows:
        return []
    text = (
        "Milliseconds on the host's clock for a whole training step, forward and backward over all T time steps, "
        "called as its users do (the compiled step as a replay of its graph, all others launch by launch), from an "
        "idle device until it is idle again:"
    )
    return [text, *sheet.table([CASE_HEAD, "ours", *(escape(label(name)) for name in shown)], rows)]
