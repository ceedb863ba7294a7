"""Draws what `series` picks, into the record's folder. The only part that needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from . import series
from .campaign import DRY_RUN, LABELS, Campaign, flags, label
from .series import Bars, Panel, Ratios
from .text import plain

# Ours in warm colours; by hue and by marker, so that lines stay apart for those who see fewer colours.
STYLES = {
    "sequence": ("#c8500f", "o"),
    "step": ("#f0a04b", "s"),
    "sequence, recompute": ("#8c2d04", "^"),
    "compiled step": ("#1f5fa8", "D"),
    "compiled loop": ("#7fb2e5", "v"),
    "reference": ("#6b6b6b", "P"),
    "F.batch_norm loop": ("#b0b0b0", "X"),
    "nn.LSTM": ("#2b8a3e", "*"),
    "FlashRNN": ("#7b3fa0", "<"),
    "Haste": ("#c49ad9", ">"),
}
OTHER = ("#000000", ".")
UNSAID = "B×H; D = H and bfloat16 where nothing else is said"
FASTER, SLOWER = "#4c8dca", "#d0342c"


def write(campaign: Campaign) -> list[Path]:
    """Draw every plot that has something to show, and remove those that no longer have.

    Returns:
        The files that were written.
    """
    written = []
    drawn: dict[str, Callable[[Campaign], Figure]] = {
        series.HIDDEN: hidden,
        series.LENGTH: length,
        series.MEMORY: memory,
        series.RATIOS: ratios,
    }
    available = series.available(campaign)
    for name, draw in drawn.items():
        path = campaign.path.parent / name
        if name not in available:
            path.unlink(missing_ok=True)
            continue
        figure = draw(campaign)
        if campaign.dry_run:
            stamp(figure)
        figure.savefig(path, metadata={"Software": None})  # the same figures give the same file
        written.append(path)
    return written


def hidden(campaign: Campaign) -> Figure:
    """Training and inference against H."""
    panels = series.against_hidden(campaign)
    return _against(campaign, panels, len(panels), "H = D", "B = 64, T = 100, bfloat16")


def length(campaign: Campaign) -> Figure:
    """Training and inference against T, a row for each H."""
    panels = series.against_length(campaign)
    return _against(campaign, panels, min(2, len(panels)), "T", "B = 64, D = H, bfloat16")


def _against(campaign: Campaign, panels: Sequence[Panel], columns: int, x: str, sizes: str) -> Figure:
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.9 * columns + 0.4, 3.5 * rows + 1.6), dpi=140, layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False, sharey="row").flat)
    for axes, panel in zip(grid, panels, strict=False):
        _lines(axes, panel)
        axes.set_xlabel(x)
        axes.set_title(panel.title)
        if axes in grid[::columns]:
            axes.set_ylabel("µs a step, log scale")
    for axes in grid[len(panels) :]:
        axes.remove()
    _title(figure, campaign, f"Device time of one time step, {sizes}; whiskers: 20th to 80th percentile")
    _legend(figure, columns=3)
    return figure


def _lines(axes: Axes, panel: Panel) -> None:
    for provider, points in panel.lines.items():
        colour, marker = STYLES.get(provider, OTHER)
        xs, times = zip(*points, strict=True)
        medians = [time.us for time in times]
        spread = [[time.us - time.low for time in times], [time.high - time.us for time in times]]
        axes.errorbar(
            xs,
            medians,
            yerr=[[max(0.0, each) for each in side] for side in spread],
            color=colour,
            marker=marker,
            markersize=7 if marker == "*" else 4.5,
            linewidth=2 if provider == "sequence" else 1.3,
            capsize=2,
            label=label(provider),
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(panel.places))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:e}"[0] in "25" else "")
    axes.tick_params(axis="y", which="both", labelsize=8)
    _finish(axes)
    axes.grid(alpha=0.15, which="minor", axis="y")


def memory(campaign: Campaign) -> Figure:
    """Peak and what is kept for the backward, each case on a linear scale of its own that starts at nothing."""
    panels = series.memory(campaign)
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    most = max(len(panel.bytes) for panel in panels)
    figure = Figure(figsize=(5.2 * columns + 0.6, (0.22 * most + 0.9) * rows + 1.2), dpi=140, layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, panel in zip(grid, panels, strict=False):
        _bars(axes, campaign, panel)
    for axes in grid[len(panels) :]:
        axes.remove()
    _title(figure, campaign, f"Memory of a training step, besides what was there before it; numbers: peak\n{UNSAID}")
    _legend(figure, columns=2)
    return figure


def _bars(axes: Axes, campaign: Campaign, panel: Bars) -> None:
    most = max(each for both in panel.bytes.values() for each in both if each)
    unit, name = (2**30, "GiB") if most >= 2**30 else (2**20, "MiB")
    names = list(panel.bytes)
    for kind, title, height, alpha in ((0, "peak", 0.8, 0.4), (1, "kept for the backward", 0.4, 1.0)):
        places = [k for k, provider in enumerate(names) if panel.bytes[provider][kind]]
        widths = [(panel.bytes[names[k]][kind] or 0.0) / unit for k in places]
        colours = [STYLES.get(names[k], OTHER)[0] for k in places]
        bars = axes.barh(places, widths, height=height, color=colours, alpha=alpha)
        if len(bars):
            bars.set_label(title)
    for k, provider in enumerate(names):
        peak = panel.bytes[provider][0]
        if peak:
            widest = max(each for each in panel.bytes[provider] if each)
            place = (widest / unit, k)
            axes.annotate(f"{peak / unit:.3g}", place, (3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(range(len(names)), [label(provider) for provider in names], fontsize=7.5)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * most / unit)
    axes.set_title(_safe(_case(campaign, panel.key)), fontsize=9)
    axes.set_xlabel(name, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    _finish(axes)
    axes.grid(visible=False, axis="y")


def ratios(campaign: Campaign) -> Figure:
    """A bar for each case from 1 to its ratio, as long as it is on a log scale: twice as fast is as far as half."""
    panels = series.ratios(campaign)
    columns = min(2, len(panels))
    rows = [panels[k : k + columns] for k in range(0, len(panels), columns)]
    heights = [max(len(panel.ratios) for panel in row) * 0.145 + 0.75 for row in rows]
    figure = Figure(figsize=(5.3 * columns + 0.4, sum(heights) + 1.3), dpi=140, layout="constrained")
    grid = list(figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights).flat)
    for axes, panel in zip(grid, panels, strict=False):
        _ratio_bars(axes, campaign, panel)
    for axes in grid[len(panels) :]:
        axes.remove()
    text = (
        "Our time over another's, log scale: below 1 (blue) ours is faster, above 1 (red) slower\n"
        "whiskers: from our 20th percentile over the other's 80th to the reverse\n"
    )
    _title(figure, campaign, text + UNSAID)
    return figure


def _ratio_bars(axes: Axes, campaign: Campaign, panel: Ratios) -> None:
    for k, ratio in enumerate(panel.ratios):
        colour = SLOWER if ratio.losing else FASTER
        axes.barh(k, ratio.value - 1, left=1, height=0.75, color=colour)
        axes.plot([ratio.low, ratio.high], [k, k], color="#222222", linewidth=0.7)
        # away from the bar: on the other side of the line at 1
        at, side = (min(1.0, ratio.low), "right") if ratio.losing else (max(1.0, ratio.high), "left")
        axes.annotate(
            f"{ratio.value:.2f}",
            (at, k),
            (-3 if ratio.losing else 3, 0),
            textcoords="offset points",
            ha=side,
            va="center",
            fontsize=6.5,
            color=colour if ratio.losing else "#333333",
            fontweight="bold" if ratio.losing else "normal",
        )
    axes.axvline(1, color="#222222", linewidth=0.9)
    axes.set_xscale("log")
    lowest = min([0.5, *(ratio.low for ratio in panel.ratios)])
    highest = max([1.25, *(ratio.high for ratio in panel.ratios)])
    room = max(highest / lowest, 1.5) ** 0.13  # for the numbers beside the line
    axes.set_xlim(lowest / room, highest * room)
    ticks = [each for each in _round_numbers() if lowest / room <= each <= highest * room]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.tick_params(axis="x", labelsize=8)
    axes.set_yticks(
        range(len(panel.ratios)), [_safe(_case(campaign, ratio.key)) for ratio in panel.ratios], fontsize=6.5
    )
    for tick, ratio in zip(axes.get_yticklabels(), panel.ratios, strict=True):
        tick.set_color(SLOWER if ratio.losing else "#222222")
    axes.set_ylim(len(panel.ratios) - 0.4, -0.6)
    axes.set_title(panel.title, fontsize=9.5)
    _finish(axes)
    axes.grid(visible=False, axis="y")


def _round_numbers() -> Iterable[float]:
    return [digit * 10.0**power for power in range(-4, 5) for digit in (1, 2, 5)]


def _case(campaign: Campaign, key: str) -> str:
    case = campaign.cases[key]
    sizes = f"{case.batch}×{case.hidden}, T {case.steps}"
    sizes += f", D {case.columns}" if case.columns != case.hidden else ""
    short = [{"bfloat16": "", "float16": "fp16", "float32": "fp32"}.get(each, each) for each in flags(case)]
    short = [each for each in short if each]
    return ", ".join([*([plain(case.name, 24)] if case.name else []), sizes, *short])


def _title(figure: Figure, campaign: Campaign, text: str) -> None:
    versions = campaign.record["versions"]
    told = [f"{name} {plain(versions[name], 24)}" for name in ("torch", "triton") if versions.get(name)]
    heading = ", ".join([campaign.name, *told])
    figure.suptitle(f"{text}\n{_safe(heading)}", fontsize=10)


def _legend(figure: Figure, columns: int) -> None:
    """One for all panels, in the order of `LABELS`."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    order = list(LABELS.values())
    names = sorted(handles, key=lambda name: order.index(name) if name in order else len(order))
    figure.legend(
        handles=[handles[name] for name in names],
        labels=names,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
    )


def stamp(figure: Figure) -> None:
    """Say across all of it that it shows no measurement."""
    angle = math.degrees(math.atan2(figure.get_figheight(), figure.get_figwidth()))
    size = 2.4 * math.hypot(figure.get_figheight(), figure.get_figwidth())
    figure.text(
        0.5, 0.5, DRY_RUN, ha="center", va="center", rotation=angle, fontsize=size, color="red", alpha=0.45, zorder=10
    )


def _safe(text: str) -> str:
    """Text from a record: matplotlib takes dollars for formulas."""
    return text.replace("$", r"\$")


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.3, which="major")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
