"""Cells that several tables share, and the table of step times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .campaign import BASELINE, CUDNN, OURS, RIVALS, Campaign, flags, label, sizes
from .text import escape, number, table

COMPARED = (BASELINE, "reference", "F.batch_norm loop", CUDNN)


def case_cell(campaign: Campaign, key: str) -> str:
    """Sizes above, name and flags below."""
    case = campaign.cases[key]
    told = ", ".join([*([f"**{escape(case.name)}**"] if case.name else []), *map(escape, flags(case))])
    return f"{sizes(case)}<br>{told}"


def stacked(parts: Iterable[str]) -> str:
    """One above the other; nothing if there is nothing in any."""
    parts = list(parts)
    return "<br>".join(parts) if any(parts) else ""


def inline(campaign: Campaign, key: str) -> str:
    """The case in one line."""
    case = campaign.cases[key]
    return (f"{escape(case.name)}: " if case.name else "") + escape(", ".join([sizes(case), *flags(case)]))


def time_cell(campaign: Campaign, key: str, provider: str, modes: Iterable[str]) -> str:
    """One provider's times, a line for each mode."""
    return stacked(step_time(campaign, key, [provider], mode) for mode in modes)


def step_time(campaign: Campaign, key: str, providers: Sequence[str], mode: str) -> str:
    """The quickest of these providers, named if there are several, with the numbers of what goes with them."""
    times = [time for provider in providers if (time := campaign.time(key, provider, mode)) is not None]
    numbers = sorted({n for provider in providers if (n := campaign.number(key, provider)) is not None})
    mark = f"<sup>{','.join(map(str, numbers))}</sup>" if numbers else ""
    if not times:
        return f"–{mark}" if mark else ""
    best = min(times, key=lambda time: time.us)
    which = f" {best.provider}" if len(providers) > 1 else ""
    return f"{number(best.us)}{which}{mark}"


def step_table(campaign: Campaign, keys: Iterable[str], modes: Sequence[str], note: str) -> list[str]:
    """Ours against those that matter, a row for each case."""
    head = ["B × H, T, D", "", "ours", *(label(provider) for provider in COMPARED)]
    head += ["ours / cuDNN", "ours / compiled step", "× floor"]
    rows = []
    for key in keys:
        row = [case_cell(campaign, key), stacked(modes)]
        row += [stacked(step_time(campaign, key, OURS, mode) for mode in modes)]
        row += [time_cell(campaign, key, provider, modes) for provider in COMPARED]
        for rival in RIVALS:
            row += [stacked(_ratio(campaign, key, mode, rival) for mode in modes)]
        ours = [campaign.ours(key, mode) for mode in modes]
        row += [stacked(number(time.of_floor) if time and time.of_floor else "" for time in ours)]
        rows.append(row)
    return table(head, rows, left=2, note=note)


def _ratio(campaign: Campaign, key: str, mode: str, rival: str) -> str:
    ours, theirs = campaign.ours(key, mode), campaign.time(key, rival, mode)
    if ours is None or theirs is None:
        return ""
    value = ours.us / theirs.us
    return f"**{value:.2f}**" if value > 1 else f"{value:.2f}"
