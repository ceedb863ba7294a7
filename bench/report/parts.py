"""Parts that README's section of a device and the device's own page have in common."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from urllib.parse import quote

from . import series
from .campaign import CUDNN, RIVALS, SEQUENCE, SHOWN_MODES, STEP, Campaign, Ratio, label
from .cells import losing_table
from .sheet import Sheet, inline
from .text import code, counted, decimals, escape, fixed

NOTICED = 1.02  # times that step mode is quicker before it is told

HOW_TO_READ = """\
Microseconds of device time for one time step: a whole call divided by T, median. In each cell the upper figure is
training (forward and backward, gradients of input and parameters), the lower one inference. "Ours" is what the
library chooses by itself: sequence mode, or step mode, then marked "step", where sequence mode cannot run. Two clocks
are mixed: figures are of a CUDA graph's replays, in which the host has no part, but where a column's head says "host
calls" the host made each call, and what the device waited for it is in the figure. Ratios are our time over the
other's: below 1 ours is faster, **bold** means that it is slower. × floor: multiple of the least time that the
device's measured ceilings allow. A dash with a number: there is no figure, and why is listed; blank: not run."""

ALTERNATIVES = {
    series.HIDDEN: "Time of a step against H",
    series.RATIOS: "Our time over cuDNN's and the compiled step's: the leading cases and those in which ours is slower",
    series.LENGTH: "Time of a step against T",
    series.MEMORY: "Memory of a training step",
    series.RATIOS_ALL: "Our time over cuDNN's and the compiled step's, all cases",
}


def images(campaign: Campaign, names: Iterable[str], folder: str = "") -> list[str]:
    """Those of these plots that the campaign has, as Markdown; `folder` is where they are, with a slash."""
    available = series.available(campaign)
    lines = []
    for name in names:
        if name in available:
            lines += ["", f"![{ALTERNATIVES[name]}, {escape(campaign.name)}]({quote(folder)}{name})"]
    return [*lines, ""]


def summary(campaign: Campaign) -> list[str]:
    """Ours against both rivals, and against our own other mode where that was quicker."""
    items = []
    for mode in SHOWN_MODES:
        for rival in RIVALS:
            found = campaign.ratios(mode, rival)
            if not found:
                continue
            slower = sum(ratio.losing for ratio in found)
            least, most, middle = found[-1].value, found[0].value, statistics.median(ratio.value for ratio in found)
            places = decimals([most])
            items.append(
                f"- {mode}, ours / {label(rival)}: {fixed(least, places)} to {fixed(most, places)}, median "
                f"{fixed(middle, places)}; slower in {slower} of {counted(len(found), 'case')}"
            )
    items = items or ["No case has both a time of ours and one to compare it with."]
    return [*items, *_step_is_quicker(campaign)]


def _step_is_quicker(campaign: Campaign) -> list[str]:
    told = []
    for mode in SHOWN_MODES:
        gains = []
        for key in campaign.measured:
            sequence, step = campaign.time(key, SEQUENCE, mode), campaign.time(key, STEP, mode)
            if sequence is not None and step is not None:
                gains.append((sequence.us / step.us, key))
        quicker = sorted((gain for gain in gains if gain[0] > NOTICED), key=lambda gain: -gain[0])
        if quicker:
            gain, key = quicker[0]
            worst = f"{fixed(gain, decimals([gain]))} times as fast with {inline(campaign, key)}"
            told.append(f"{mode} in {len(quicker)} of {counted(len(gains), 'case')} (at most {worst})")
    text = "- step mode, which is not chosen where sequence mode runs, was more than 2 % faster than it in "
    return [text + ", and in ".join(told)] if told else []


def losing(campaign: Campaign) -> tuple[list[Ratio], int]:
    """Comparisons in which ours is slower, worst first, and how many comparisons there are."""
    compared = [ratio for mode in SHOWN_MODES for rival in RIVALS for ratio in campaign.ratios(mode, rival)]
    return sorted((ratio for ratio in compared if ratio.losing), key=lambda ratio: -ratio.value), len(compared)


def slower(sheet: Sheet, most: int | None = None, rest: str = "") -> list[str]:
    """Where ours is slower, at most so many comparisons, and where it could not even be compared."""
    campaign = sheet.campaign
    found, compared = losing(campaign)
    lines = ["", f"**Where ours is slower** than {label(CUDNN)} or than the compiled step", ""]
    if found:
        lines += losing_table(sheet, found[:most])
        left = len(found) - len(found[:most])
        lines += [f"and {left} more {rest}", ""] if left else []
    elif compared:
        lines += [f"In none of {counted(compared, 'comparison')}."]
    else:
        lines += ["Nothing could be compared."]
    forfeits: dict[tuple[str, ...], list[str]] = {}
    for mode in SHOWN_MODES:
        if keys := tuple(campaign.forfeits(mode)):
            forfeits.setdefault(keys, []).append(mode)
    for keys, modes in forfeits.items():
        named = "; ".join(inline(campaign, key) for key in keys)
        lines += ["", f"No time of ours in {' and '.join(modes)} where one of them has one: {named}."]
    return [*lines, ""]


def mistakes(sheet: Sheet) -> list[str]:
    """What was wrong, failed or was withheld, and results of cases that nobody knows."""
    campaign = sheet.campaign
    lines = sheet.footnotes(harmless=False, unmarked=True)
    lines += [
        f"- {code(each.case)}, {escape(label(each.provider))}: {each.status}, a case that the record does not describe"
        for each in campaign.unknown
    ]
    lines = lines or (["Nothing was wrong, failed or withheld."] if campaign.measured else [])
    return ["", "**Not timed because it was wrong, failed or withheld**", "", *lines, ""] if lines else []
