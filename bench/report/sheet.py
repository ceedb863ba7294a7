"""A text about one device, README's section or its own page: footnotes are numbered in the order of their marks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench import records

from .campaign import DRY_RUN, Campaign, Reason, inline_label, label
from .text import counted, escape, table

HARMLESS = (records.CANNOT, records.OK)
NAMED = 4  # cases that a harmless reason names before it only counts


class Sheet:
    """What is written about `campaign`; `note` is what has to stand above every table."""

    def __init__(self, campaign: Campaign) -> None:
        self.campaign = campaign
        self.note = DRY_RUN if campaign.dry_run else ""
        self._numbers: dict[int, int] = {}

    def mark(self, key: str, providers: Iterable[str]) -> str:
        """Numbers of what goes with these providers' results in a case; empty where there is nothing to say."""
        found = [index for provider in providers if (index := self.campaign.reason(key, provider)) is not None]
        numbers = {self._numbers.setdefault(index, len(self._numbers) + 1) for index in found}
        return f"<sup>{','.join(map(str, sorted(numbers)))}</sup>" if numbers else ""

    def table(self, head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> list[str]:
        """With the note above it."""
        return table(head, rows, left=left, note=self.note)

    def footnotes(self, *, harmless: bool, unmarked: bool) -> list[str]:
        """Reasons by number; then, if `unmarked`, those that no mark leads to."""
        reasons = self.campaign.reasons
        order = [*self._numbers, *(k for k in range(len(reasons)) if unmarked and k not in self._numbers)]
        return [self._line(k, reasons[k]) for k in order if (reasons[k].status in HARMLESS) == harmless]

    def _line(self, index: int, reason: Reason) -> str:
        told = []
        together: dict[tuple[str, ...], list[str]] = {}
        for provider, keys in reason.keys.items():
            together.setdefault(tuple(keys), []).append(escape(label(provider)))
        for cases, names in together.items():
            # a mistake is told with every case
            most = NAMED if reason.status in HARMLESS else len(cases)
            named = "; ".join(inline(self.campaign, key) for key in cases[:most])
            more = f" and {len(cases) - most} more" if len(cases) > most else ""
            every = "all cases" if len(cases) == len(self.campaign.measured) > 1 else named + more
            told.append(f"{'; '.join(names)} ({every})")
        status = "note" if reason.status == records.OK else escape(reason.status)
        mark = f"<sup>{self._numbers[index]}</sup> " if index in self._numbers else ""
        return f"- {mark}{status}: {', '.join(told)}: {escape(reason.why)}"

    def absent(self) -> list[str]:
        """A line about packages that are not there."""
        missing = self.campaign.absent
        return [f"{', '.join(map(escape, missing))}: not installed.", ""] if missing else []

    def troubles(self, most: int | None = None, rest: str = "") -> list[str]:
        """Parts of the plan that failed as a whole, at most so many."""
        entries = self.campaign.entries("troubles")
        shown = entries[:most]
        lines = [f"- {escape(each.get('item'))}: {escape(each.get('why') or 'no reason was kept')}" for each in shown]
        lines += [f"- and {len(entries) - len(shown)} more {rest}"] if len(shown) < len(entries) else []
        return (
            ["", f"**Failed as a whole: {counted(len(entries), 'item')} of the campaign**", "", *lines, ""]
            if lines
            else []
        )


def inline(campaign: Campaign, key: str) -> str:
    """The case in one line."""
    return escape(inline_label(campaign.cases[key]))
