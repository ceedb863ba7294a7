"""A device's own page beside its record: everything for which README has no room."""

from __future__ import annotations

from pathlib import Path

from . import machine, more_tables, series
from .campaign import LISTS, SHOWN_MODES, Campaign
from .cells import step_table
from .parts import HOW_TO_READ, images, mistakes, slower, summary
from .sheet import Sheet
from .text import escape, joined

NAME = "README.md"


def worth(campaign: Campaign) -> bool:
    """Whether there is anything to be told on a page."""
    return bool(campaign.measured or campaign.record["ceilings"] or any(campaign.entries(name) for name in LISTS))


def path_of(campaign: Campaign) -> Path:
    """Where its page is."""
    return campaign.path.parent / NAME


def text_of(campaign: Campaign) -> str:
    """The page; empty if there is nothing to be told."""
    if not worth(campaign):
        return ""
    sheet = Sheet(campaign)
    lines = [f"# {escape(campaign.name)}", "", *([f"## {sheet.note}", ""] if sheet.note else [])]
    lines += ["Written by `python -m bench.report` from `campaign.json` beside it; changes here are lost.", ""]
    lines += [*machine.where(campaign, short=False), "", *machine.said_by_tests(campaign), ""]
    if campaign.measured:
        lines += ["## Time of a step", "", *summary(campaign), "", HOW_TO_READ]
        lines += step_table(sheet, campaign.measured, SHOWN_MODES)
        lines += [*sheet.absent(), *images(campaign, (series.HIDDEN, series.LENGTH)), *slower(sheet)]
        all_ratios = series.RATIOS_ALL in series.available(campaign)
        lines += images(campaign, [series.RATIOS_ALL if all_ratios else series.RATIOS])
        lines += more_tables.times(sheet)
    lines += mistakes(sheet)
    cannot = sheet.footnotes(harmless=True, unmarked=True)
    lines += ["", "**Why other figures are missing**", "", *cannot, ""] if cannot else []
    lines += [*sheet.troubles(), *more_tables.rest(sheet)]
    return joined(lines) + "\n"


def write(campaign: Campaign) -> Path | None:
    """Write the page, or remove one that no longer has anything to tell. Its path if it was written."""
    path, text = path_of(campaign), text_of(campaign)
    if not text:
        path.unlink(missing_ok=True)
        return None
    path.write_text(text, encoding="utf-8")
    return path
