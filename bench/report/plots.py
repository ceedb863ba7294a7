"""Draws what `series` picks, into the record's folder. The only part that needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from . import png, series
from .campaign import DRY_RUN, LABELS, STEP, Campaign, flags, label
from .series import Bars, Panel, Ratios
from .text import counted, decimals, fixed, plain, significant

# Ours in warm colours; by hue and by marker, so that lines stay apart for those who see fewer colours.
STYLES = {
    series.OURS: ("#c8500f", "o"),
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
UNSAID = "B × H; T = 100, D = H and bfloat16 where nothing else is said; cases with a name: see the tables"
# Inches. README is shown some 900 pixels wide, where letters of `SMALL` points are then 11 pixels high.
WIDTH, NARROW = 9.0, 7.0
SMALL = 8
FLOOR = "floor: the least time that the ceilings allow"
STEPWISE = "ours where only step mode can run"
CROSS = "wrong, failed or withheld"
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
        series.RATIOS_ALL: all_ratios,
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
        told = png.description(name, campaign.fingerprint)
        figure.savefig(path, metadata={"Software": None, png.KEY: told})  # the same figures give the same file
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
    size = (WIDTH if columns > 1 else NARROW, 3.4 * rows + 1.7)
    figure = Figure(figsize=size, dpi=140, layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False, sharey="row").flat)
    for axes, panel in zip(grid, panels, strict=False):
        _lines(axes, panel)
        axes.set_xlabel(x)
        axes.set_title(panel.title, fontsize=10)
        if axes in grid[::columns]:
            axes.set_ylabel("µs a step, log scale")
    for k in range(0, len(panels), columns):
        _make_room(grid[k], panels[k : k + columns])
    for axes in grid[len(panels) :]:
        axes.remove()
    _title(figure, campaign, f"Device time of one time step, {sizes}; whiskers: 20th to 80th percentile")
    _legend(figure, columns=3)
    return figure


def _lines(axes: Axes, panel: Panel) -> None:
    for provider, points in panel.lines.items():
        colour, marker = STYLES.get(provider, OTHER)
        times = [time for _, time in points]
        spread = [
            [math.nan if time is None else max(0.0, each) for time, each in zip(times, side, strict=True)]
            for side in (
                [0.0 if time is None else time.us - time.low for time in times],
                [0.0 if time is None else time.high - time.us for time in times],
            )
        ]
        axes.errorbar(
            [x for x, _ in points],
            [math.nan if time is None else time.us for time in times],  # the line is broken there
            yerr=spread,
            color=colour,
            marker=marker,
            markersize=7 if marker == "*" else 4.5,
            linewidth=2.2 if provider == series.OURS else 1.2,
            capsize=2,
            label=_name(provider),
            zorder=3 if provider == series.OURS else 2,
        )
    _step_points(axes, panel)
    if panel.floor:
        xs, floors = zip(*panel.floor, strict=True)
        axes.plot(xs, floors, color="#222222", linestyle="--", linewidth=1, label=FLOOR)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(panel.places))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:e}"[0] in "25" else "")
    axes.tick_params(which="both", labelsize=SMALL)
    _crosses(axes, panel)
    _finish(axes)
    axes.grid(alpha=0.15, which="minor", axis="y")


def _step_points(axes: Axes, panel: Panel) -> None:
    """Where ours is step mode."""
    points = [
        (x, time.us) for x, time in panel.lines.get(series.OURS, []) if time is not None and time.provider == STEP
    ]
    if points:
        xs, medians = zip(*points, strict=True)
        style: dict[str, Any] = {"markerfacecolor": "white", "markeredgewidth": 1.5, "zorder": 4}
        axes.plot(xs, medians, "o", color=STYLES[series.OURS][0], markersize=6.5, label=STEPWISE, **style)


def _crosses(axes: Axes, panel: Panel) -> None:
    """At the axis, those of one size above each other."""
    above: dict[int, int] = {}
    for provider, places in panel.crosses.items():
        for x in places:
            height = 0.03 + 0.05 * above.get(x, 0)
            above[x] = above.get(x, 0) + 1
            style: dict[str, Any] = {"markersize": 7, "markeredgewidth": 2, "clip_on": False, "zorder": 5}
            colour = STYLES.get(provider, OTHER)[0]
            (cross,) = axes.plot([x], [height], "x", color=colour, transform=axes.get_xaxis_transform(), **style)
            cross.set_gid(f"cross {provider}")
    if above:
        axes.plot([], [], "x", color="#444444", markersize=7, markeredgewidth=2, label=CROSS)


def _make_room(axes: Axes, row: Sequence[Panel]) -> None:
    """Below all lines of a row, which share an axis, for its crosses."""
    most = 0
    for panel in row:
        places = [x for each in panel.crosses.values() for x in each]
        most = max([most, *(places.count(x) for x in places)])
    if most:
        least, largest = axes.get_ylim()
        axes.set_ylim(least / (largest / least) ** (0.05 + 0.06 * most), largest)


def _name(provider: str) -> str:
    return "ours, as the library chooses" if provider == series.OURS else label(provider)


def memory(campaign: Campaign) -> Figure:
    """Peak and what is kept for the backward, each case on a linear scale of its own that starts at nothing."""
    panels = series.memory(campaign)
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    most = max(len(panel.bytes) for panel in panels)
    size = (WIDTH if columns > 1 else NARROW, (0.22 * most + 0.9) * rows + 1.2)
    figure = Figure(figsize=size, dpi=140, layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, panel in zip(grid, panels, strict=False):
        _bars(axes, campaign, panel)
    for axes in grid[len(panels) :]:
        axes.remove()
    peaks = [peak is not None for panel in panels for peak, _ in panel.bytes.values()]
    shown = (
        "peak" if all(peaks) else "peak, where there is one, or what is kept" if any(peaks) else "kept for the backward"
    )
    text = f"Memory of a training step, besides what was there before it; numbers: {shown}"
    _title(figure, campaign, f"{text}\n{UNSAID}")
    _legend(figure, columns=2)
    return figure


def _bars(axes: Axes, campaign: Campaign, panel: Bars) -> None:
    unit, name = campaign.memory_unit
    most = max(each for both in panel.bytes.values() for each in both if each)
    names = list(panel.bytes)
    for kind, title, height, alpha in ((0, "peak", 0.8, 0.4), (1, "kept for the backward", 0.4, 1.0)):
        places = [k for k, provider in enumerate(names) if panel.bytes[provider][kind]]
        widths = [(panel.bytes[names[k]][kind] or 0.0) / unit for k in places]
        colours = [STYLES.get(names[k], OTHER)[0] for k in places]
        bars = axes.barh(places, widths, height=height, color=colours, alpha=alpha)
        if len(bars):
            bars.set_label(title)
    for k, provider in enumerate(names):
        both = [each for each in panel.bytes[provider] if each]  # the peak, if there is one, comes first
        place = (max(both) / unit, k)
        text = significant(both[0] / unit)
        axes.annotate(text, place, (3, 0), textcoords="offset points", va="center", fontsize=SMALL)
    axes.set_yticks(range(len(names)), [label(provider) for provider in names], fontsize=SMALL)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.22 * most / unit)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_title(_safe(_case(campaign, panel.key)), fontsize=9)
    axes.set_xlabel(name, fontsize=SMALL)
    axes.tick_params(axis="x", labelsize=SMALL)
    _finish(axes)
    axes.grid(visible=False, axis="y")


def ratios(campaign: Campaign) -> Figure:
    """The leading cases and those in which ours is slower."""
    return _all_bars(campaign, series.ratios(campaign))


def all_ratios(campaign: Campaign) -> Figure:
    """Every case."""
    return _all_bars(campaign, series.all_ratios(campaign))


def _all_bars(campaign: Campaign, panels: Sequence[Ratios]) -> Figure:
    """A bar for each case from 1 to its ratio, as long as it is on a log scale: twice as fast is as far as half."""
    columns = min(2, len(panels))
    rows = [panels[k : k + columns] for k in range(0, len(panels), columns)]
    heights = [max(len(panel.ratios) for panel in row) * 0.18 + 0.95 for row in rows]
    size = (WIDTH if columns > 1 else NARROW, sum(heights) + 1.3)
    figure = Figure(figsize=size, dpi=140, layout="constrained")
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
    places = decimals(ratio.value for ratio in panel.ratios)
    for k, ratio in enumerate(panel.ratios):
        colour = SLOWER if ratio.losing else FASTER
        axes.barh(k, ratio.value - 1, left=1, height=0.75, color=colour)
        axes.plot([ratio.low, ratio.high], [k, k], color="#222222", linewidth=0.7)
        # away from the bar: on the other side of the line at 1
        at, side = (min(1.0, ratio.low), "right") if ratio.losing else (max(1.0, ratio.high), "left")
        axes.annotate(
            fixed(ratio.value, places).replace("&lt;", "<"),
            (at, k),
            (-3 if ratio.losing else 3, 0),
            textcoords="offset points",
            ha=side,
            va="center",
            fontsize=SMALL,
            color=colour if ratio.losing else "#333333",
            fontweight="bold" if ratio.losing else "normal",
        )
    axes.axvline(1, color="#222222", linewidth=0.9)
    axes.set_xscale("log")
    lowest = min([0.5, *(ratio.low for ratio in panel.ratios)])
    highest = max([1.25, *(ratio.high for ratio in panel.ratios)])
    room = max(highest / lowest, 1.5) ** 0.2  # for the numbers beside the line
    axes.set_xlim(lowest / room, highest * room)
    ticks = [each for each in _round_numbers() if lowest / room <= each <= highest * room]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.tick_params(axis="x", labelsize=SMALL, top=True, labeltop=True)
    names = [_safe(_case(campaign, ratio.key) + (", step" if ratio.stepwise else "")) for ratio in panel.ratios]
    axes.set_yticks(range(len(names)), names, fontsize=SMALL)
    for tick, ratio in zip(axes.get_yticklabels(), panel.ratios, strict=True):
        tick.set_color(SLOWER if ratio.losing else "#222222")
    axes.set_ylim(len(panel.ratios) - 0.4, -0.6)
    some = f"{len(panel.ratios)} of " if len(panel.ratios) < panel.all else ""
    axes.set_title(f"{panel.title}\n{some}{counted(panel.all, 'case')}", fontsize=9.5)
    _finish(axes)
    axes.grid(visible=False, axis="y")


def _round_numbers() -> Iterable[float]:
    return [digit * 10.0**power for power in range(-4, 5) for digit in (1, 2, 5)]


def _case(campaign: Campaign, key: str) -> str:
    """A case by its name, or else by its sizes."""
    case = campaign.cases[key]
    told = [plain(case.name, 24)] if case.name else [f"{case.batch} × {case.hidden}"]
    told += [f"T {case.steps}"] if case.steps != 100 and not case.name else []
    told += [f"D {case.columns}"] if case.columns != case.hidden and not case.name else []
    # a name has its lengths, and the tables have its sizes
    said = [each for each in flags(case) if each != "bfloat16"]
    return ", ".join([*told, *(each for each in said if not (case.name and each.startswith("lengths")))])


def _title(figure: Figure, campaign: Campaign, text: str) -> None:
    versions = campaign.record["versions"]
    programs = {"torch": "torch", "triton": "Triton"}
    told = [f"{name} {plain(versions[key], 24)}" for key, name in programs.items() if versions.get(key)]
    heading = ", ".join([campaign.name, *told])
    loud = f"{DRY_RUN}\n" if campaign.dry_run else ""
    figure.suptitle(f"{loud}{text}\n{_safe(heading)}", fontsize=9.5, color=SLOWER if loud else "black")


def _legend(figure: Figure, columns: int) -> None:
    """One for all panels, in the order of `LABELS`."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    order = [_name(series.OURS), STEPWISE, *LABELS.values()]
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
    """Say in every panel, behind what it shows, that it is no measurement."""
    figure.draw_without_rendering()  # only then the panels have their places
    words = DRY_RUN.replace(": ", ":\n").replace(", ", ",\n")
    widest = max(map(len, words.splitlines()))
    for axes in figure.axes:
        box = axes.get_window_extent()
        points = 72 / figure.dpi * min(box.width / (0.6 * widest), box.height / 4.5)
        text = axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", fontsize=points)
        text.set(color="red", alpha=0.15, zorder=0, in_layout=False)


def _safe(text: str) -> str:
    """Text from a record: matplotlib takes dollars for formulas."""
    return text.replace("$", r"\$")


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.3, which="major")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
