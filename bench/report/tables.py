"""README's block of results: what is open to see. `more_tables` has the folded parts."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import records

from . import more_tables, series
from .campaign import DRY_RUN, RIVALS, SHOWN_MODES, Campaign, Ratio, label
from .cells import inline, step_table
from .text import code, details, escape, joined, number, table

START, END = "<!-- results -->", "<!-- /results -->"
WORST = 10  # losing cases shown without unfolding

NO_RESULTS = """\
No kernel has run on a GPU yet: what is known of them comes from Triton's interpreter and from compiling them, and
nothing in this README is a claim about their speed. No memory has been measured on a GPU either.

On a machine with a GPU `python -m bench.campaign --minutes 9 --out DIR --resume` measures; it may be called again until
nothing is left to do. Copy the files of DIR to `bench/results/<device>/`; `python -m bench.report` then writes tables
and plots in this place."""

HOW_TO_READ = """\
Microseconds of device time for one time step: a whole call divided by T, median. In each cell the upper figure is
training (forward and backward, gradients of input and parameters), the lower one inference. "Ours" is the quicker of
sequence and step mode, whichever is named. Ratios are our time over the other's: below 1 ours is faster, **bold** means
that it is slower. × floor: multiple of the least time that the ceilings below allow. A dash with a number: there is no
figure, and why is listed under the tables; blank: not run."""


def block(campaigns: Sequence[Campaign], readme: Path) -> str:
    """What stands between the marks in `readme`."""
    if not campaigns:
        return NO_RESULTS
    lines = [
        "Written by `python -m bench.report`; every figure is in `bench/results/<device>/campaign.json`, which "
        "`python -m bench.campaign` made.",
    ]
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
    note = DRY_RUN if campaign.dry_run else ""
    lines = [f"### {escape(campaign.name)}", ""]
    lines += [f"#### {note}", ""] if note else []
    lines += [*_where(campaign), "", *_tests(campaign), ""]
    if not campaign.measured:
        lines += ["No times have been taken.", ""]
    else:
        rest = [key for key in campaign.measured if key not in campaign.leading]
        shown = campaign.leading or rest
        lines += [*_summary(campaign), "", HOW_TO_READ, *step_table(campaign, shown, SHOWN_MODES, note)]
        if campaign.leading and rest:
            title = f"The other {len(rest)} cases" if len(rest) > 1 else "The other case"
            lines += details(title, step_table(campaign, rest, SHOWN_MODES, note))
        lines += [*_plots(campaign, readme), *_losing(campaign, note)]
    lines += _wrong(campaign)
    return [*lines, *more_tables.all_of(campaign, note)]


def _where(campaign: Campaign) -> list[str]:
    device, versions, runs = campaign.record["device"], campaign.record["versions"], campaign.entries("runs")
    shown = {"torch": "torch", "cuda": "CUDA", "cudnn": "cuDNN", "triton": "Triton", "triton_bnlstm": "triton_bnlstm"}
    parts = [f"{name} {escape(versions[key])}" for key, name in shown.items() if versions.get(key)]
    parts += [f"driver {escape(device['driver'])}"] if device.get("driver") else []
    parts += [f"Python {escape(versions['python'])}"] if versions.get("python") else []
    if device.get("multiprocessors"):
        parts += [f"{escape(device['multiprocessors'])} multiprocessors"]
    if isinstance(device.get("memory_bytes"), int | float):
        parts += [f"{device['memory_bytes'] / 2**30:.0f} GiB"]
    lines = [", ".join(parts) + "."] if parts else []
    dates = sorted({str(run["utc"])[:10] for run in runs if run.get("utc")})
    when = ""
    if dates:
        when = f" on {escape(dates[0])}" if len(dates) == 1 else f" from {escape(dates[0])} to {escape(dates[-1])}"
    commands = list(dict.fromkeys(code(run["command"]) for run in runs if run.get("command")))
    seconds = sum(run["seconds"] for run in runs if isinstance(run.get("seconds"), int | float))
    if commands or when:
        text = f"Measured{when}" + (f" with {', '.join(commands)}" if commands else "")
        lines += [f"{text} ({len(runs)} {'run' if len(runs) == 1 else 'runs'}, {number(seconds / 60)} minutes)."]
    loads = [run["load"] for run in runs if run.get("load")]
    lines += [f"Load averages before each run: {escape('; '.join(map(_load, loads)))}."] if loads else []
    sources = sorted(campaign.sources.items(), key=lambda item: -item[1])
    if len(sources) == 1:
        lines += [f"Kernels' fingerprint: {code(sources[0][0])}."]
    elif sources:
        told = ", ".join(f"{code(source)} ({count} results)" for source, count in sources)
        lines += [f"**Not all figures are of the same kernels.** Fingerprints: {told}."]
    return lines


def _load(load: Any) -> str:
    return ", ".join(map(str, load)) if isinstance(load, list) else str(load)


def _tests(campaign: Campaign) -> list[str]:
    tests = campaign.record["tests"]
    if not tests:
        return ["GPU tests: none recorded."]
    failed, unfinished = tests.get("failed") or {}, tests.get("unfinished") or []
    text = f"GPU tests: {tests.get('passed') or 0} passed, {len(failed)} failed, {len(unfinished)} unfinished, "
    text += f"{tests.get('skipped') or 0} skipped"
    source = str(tests.get("source") or "")
    other = source and campaign.sources and set(campaign.sources) != {source}
    lines = [text + (f", of the kernels {code(source)}." if other else ".")]
    lines += ["", *(f"- failed: {code(name)}: {escape(why)}" for name, why in failed.items())]
    if unfinished:
        lines += details("Unfinished tests", [f"- {code(name)}" for name in unfinished])
    return lines


def _summary(campaign: Campaign) -> list[str]:
    items = []
    for mode in SHOWN_MODES:
        for rival in RIVALS:
            found = campaign.ratios(mode, rival)
            if not found:
                continue
            slower = sum(ratio.losing for ratio in found)
            middle = statistics.median(ratio.value for ratio in found)
            items.append(
                f"- {mode}, ours / {label(rival)}: {found[-1].value:.2f} to {found[0].value:.2f}, median "
                f"{middle:.2f}; slower in {slower} of {len(found)} {'case' if len(found) == 1 else 'cases'}"
            )
    return items or ["No case has both a time of ours and one to compare it with."]


def _plots(campaign: Campaign, readme: Path) -> list[str]:
    alternatives = {
        series.HIDDEN: "Time of a step against H",
        series.LENGTH: "Time of a step against T",
        series.MEMORY: "Memory of a training step",
        series.RATIOS: "Our time over cuDNN's and the compiled step's, all cases",
    }
    folder = Path(os.path.relpath(campaign.path.parent, readme.parent)).as_posix()
    lines = []
    for name in series.available(campaign):
        lines += ["", f"![{alternatives[name]}, {escape(campaign.name)}]({folder}/{name})"]
    return [*lines, ""]


def _losing(campaign: Campaign, note: str) -> list[str]:
    compared = [ratio for mode in SHOWN_MODES for rival in RIVALS for ratio in campaign.ratios(mode, rival)]
    losing = sorted((ratio for ratio in compared if ratio.losing), key=lambda ratio: -ratio.value)
    lines = ["", "**Where ours is slower** than cuDNN's LSTM without batch norm or than the compiled step", ""]
    if losing:
        lines += _losing_table(campaign, losing[:WORST], note)
    elif compared:
        lines += [f"In none of the {len(compared)} comparisons."]
    else:
        lines += ["Nothing could be compared."]
    if len(losing) > WORST:
        lines += details(f"The other {len(losing) - WORST}", _losing_table(campaign, losing[WORST:], note))
    for mode in SHOWN_MODES:
        forfeits = campaign.forfeits(mode)
        if forfeits:
            named = "; ".join(inline(campaign, key) for key in forfeits)
            lines += ["", f"No time of ours in {mode} where one of them has one: {named}."]
    return [*lines, ""]


def _losing_table(campaign: Campaign, losing: Iterable[Ratio], note: str) -> list[str]:
    rows = []
    for ratio in losing:
        unclear = " (spreads overlap)" if ratio.low <= 1 else ""
        ours = f"{number(ratio.ours.us)} {ratio.ours.provider}"
        ratio_cell = f"**{ratio.value:.2f}**{unclear}"
        row = [inline(campaign, ratio.key), ratio.mode, label(ratio.rival), ours, number(ratio.theirs.us), ratio_cell]
        rows.append(row)
    return table(["case", "", "slower than", "ours, µs", "theirs, µs", "ratio"], rows, left=3, note=note)


def _wrong(campaign: Campaign) -> list[str]:
    """Everything that went wrong is open to see; what a provider simply lacks is among the folded parts."""
    reasons = [reason for reason in campaign.reasons if reason.status not in more_tables.HARMLESS]
    lines = [more_tables.reason_line(campaign, reason) for reason in reasons]
    lines += [
        f"- {code(each.case)}, {escape(label(each.provider))}: {each.status}, a case that the record does not describe"
        for each in campaign.unknown
    ]
    lines += [
        f"- {code(each.get('item'))}: {escape(each.get('why') or 'no reason was kept')}"
        for each in campaign.entries("troubles")
    ]
    lines = lines or (["Nothing was wrong, failed or withheld."] if campaign.measured else [])
    words = ", ".join([records.WRONG, records.FAILED])
    return ["", f"**Not timed because it was {words} or {records.WITHHELD}**", "", *lines, ""] if lines else []
