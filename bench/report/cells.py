"""Cells that several tables share, and the table of step times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from .campaign import BASELINE, CUDNN, RIVALS, SEQUENCE, STEP, Campaign, Ratio, StepTime, flags, label, sizes
from .sheet import Sheet, inline
from .text import decimals, escape, fixed, number

COMPARED = (BASELINE, "reference", "F.batch_norm loop", CUDNN)
CASE_HEAD = "B × H, T, D"


def case_cell(campaign: Campaign, key: str) -> str:
    """Sizes above, name and flags below."""
    case = campaign.cases[key]
    told = ", ".join([*([f"**{escape(case.name)}**"] if case.name else []), *map(escape, flags(case))])
    return f"{sizes(case)}<br>{told}"


def stacked(parts: Iterable[str]) -> str:
    """One above the other; nothing if there is nothing in any."""
    parts = list(parts)
    return "<br>".join(parts) if any(parts) else ""


def time_cell(sheet: Sheet, key: str, provider: str, modes: Iterable[str]) -> str:
    """One provider's times, a line for each mode, with the numbers of what goes with them."""
    mark = sheet.mark(key, [provider])
    times = [sheet.campaign.time(key, provider, mode) for mode in modes]
    return stacked(_time(time, mark) for time in times)


def ours_cell(sheet: Sheet, key: str, modes: Iterable[str]) -> str:
    """Times of the mode that the library chooses."""
    campaign = sheet.campaign
    chosen = campaign.chosen(key)
    # where it is step mode, why sequence mode cannot run belongs to it
    mark = sheet.mark(key, [SEQUENCE] if chosen == SEQUENCE else [SEQUENCE, STEP])
    named = " step" if chosen == STEP else ""
    return stacked(_time(campaign.ours(key, mode), mark, named) for mode in modes)


def _time(time: StepTime | None, mark: str, named: str = "") -> str:
    if time is None:
        return f"–{mark}" if mark else ""
    return f"{number(time.us)}{named}{mark}"


def time_head(keys: Iterable[str], modes: Sequence[str], name: str, time: Callable[[str, str], StepTime | None]) -> str:
    """A column's head, which says whose calls the host made.

    Args:
        keys, modes: rows. name: of the column.
        time: of a case in a mode.
    """
    by_host: dict[str, set[bool]] = {mode: set() for mode in modes}
    for key in keys:
        for mode in modes:
            if (found := time(key, mode)) is not None:
                by_host[mode].add(found.how.partition(";")[0] == "events")
    told = [f"{'some ' if False in found else ''}{mode}" for mode, found in by_host.items() if True in found]
    if not told:
        return escape(name)
    everything = all(True in found and False not in found for found in by_host.values() if found)
    return f"{escape(name)}<br>(host calls)" if everything else f"{escape(name)}<br>({' and '.join(told)}: host calls)"


def step_table(sheet: Sheet, keys: Sequence[str], modes: Sequence[str]) -> list[str]:
    """Ours against those that matter, a row for each case."""
    campaign = sheet.campaign
    compared = [provider for provider in COMPARED if provider in campaign.providers]
    ours = {(key, mode): time for key in keys for mode in modes if (time := campaign.ours(key, mode)) is not None}
    head = [CASE_HEAD, "mode", time_head(keys, modes, "ours", campaign.ours)]
    for provider in compared:

        def of_provider(key: str, mode: str, provider: str = provider) -> StepTime | None:
            return campaign.time(key, provider, mode)

        head.append(time_head(keys, modes, label(provider), of_provider))
    columns = []  # of ratios: by case and mode
    for rival, name in zip(RIVALS, ("ours / cuDNN", "ours / compiled step"), strict=True):
        if rival in compared:
            head.append(name)
            others = {place: campaign.time(place[0], rival, place[1]) for place in ours}
            columns.append({place: ours[place].us / time.us for place, time in others.items() if time is not None})
    head.append("ours × floor")
    floors = {place: time.of_floor for place, time in ours.items() if time.of_floor is not None}
    rows = []
    for key in keys:
        row = [case_cell(campaign, key), stacked(modes), ours_cell(sheet, key, modes)]
        row += [time_cell(sheet, key, provider, modes) for provider in compared]
        row += [stacked(_ratio(column, key, mode) for mode in modes) for column in columns]
        places = decimals(floors.values())
        row += [stacked(fixed(floors[key, mode], places) if (key, mode) in floors else "" for mode in modes)]
        rows.append(row)
    return sheet.table(head, rows, left=2)


def _ratio(column: dict[tuple[str, str], float], key: str, mode: str) -> str:
    value = column.get((key, mode))
    if value is None:
        return ""
    text = fixed(value, decimals(column.values()))
    return f"**{text}**" if value > 1 else text


def losing_table(sheet: Sheet, losing: Sequence[Ratio]) -> list[str]:
    """Comparisons in which ours is slower."""
    places = decimals(ratio.value for ratio in losing)
    rows = []
    for ratio in losing:
        unclear = " (spreads overlap)" if ratio.low <= 1 else ""
        ours = f"{number(ratio.ours.us)}{' step' if ratio.stepwise else ''}"
        row = [inline(sheet.campaign, ratio.key), ratio.mode, label(ratio.rival), ours, number(ratio.theirs.us)]
        rows.append([*row, f"**{fixed(ratio.value, places)}**{unclear}"])
    return sheet.table(["case", "mode", "slower than", "ours, µs", "theirs, µs", "ratio"], rows, left=3)
