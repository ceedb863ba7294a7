"""The picture of the runs on unequal lengths."""

from __future__ import annotations

from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .experiment import Results, Settings
from .lengths_tables import OURS, SHORT, finals, scale, sets_of, values

COLOURS = {"time": "#c8500f", "sequence": "#1f5fa8"}
LSTM = "#2b8a3e"


def figure(settings: Settings, results: Results, note: str) -> Figure:
    """Test loss of every formulation, all sequences above and the longest tenth below; each seed is a dot."""
    sets = [of for of in sets_of(settings) if finals(settings, results, of)]
    drawn = Figure(figsize=(max(9.0, 3.1 * len(sets) + 1.4), 7.2), dpi=130, layout="constrained")
    grid = drawn.subplots(2, max(1, len(sets)), squeeze=False, sharey=True)
    for column, of in enumerate(sets):
        for row, what in enumerate(("loss", "long_loss")):
            axes = grid[row, column]
            _panel(axes, settings, results, of, what)
            axes.set_title(SHORT[of] + (", longest tenth" if row else ""), fontsize=10)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    seeds = len(settings["seeds"])
    drawn.suptitle(
        f"Test loss by what a step's statistics are made of\ncell norm, {seeds} seeds (dots), mean (bar); {note}",
        fontsize=10,
    )
    return drawn


def _panel(axes: Axes, settings: Settings, results: Results, of: str, what: str) -> None:
    found = finals(settings, results, of)
    names = [name for name in settings["formulations"] if any(key[0] == name and key[2] for key in found)]
    for place, name in enumerate(reversed(names)):
        for stats, shift in (("time", 0.16), ("sequence", -0.16)):
            scores = found.get((name, stats, True))
            if scores is None:
                continue
            dots = [scale(of) * v for v in values(scores, what)]
            text = f'input_stats="{stats}"' if place == 0 else None
            axes.plot(dots, [place + shift] * len(dots), ".", color=COLOURS[stats], alpha=0.5, markersize=5, label=text)
            axes.plot(
                [fmean(dots)] * 2, [place + shift - 0.14, place + shift + 0.14], color=COLOURS[stats], linewidth=2.2
            )
    lstm = found.get(("LSTM", "time", False))
    if lstm is not None:
        mean = fmean(scale(of) * v for v in values(lstm, what))
        axes.axvline(mean, color=LSTM, linestyle="--", linewidth=1.3, label="nn.LSTM, mean")
    axes.set_yticks(
        range(len(names)), [f"{name} (default)" if name == OURS else name for name in reversed(names)], fontsize=9
    )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    low, high = axes.get_xlim()
    shown = "235" if high < 30 * low else ""  # over more than that they would run into each other
    axes.xaxis.set_minor_formatter(lambda x, _: f"{x:.3g}" if f"{x:e}"[0] in shown and shown else "")
    axes.tick_params(axis="x", labelsize=8, which="both")
    axes.set_xlabel("bits per character" if of == "sentences" else "nats, log scale", fontsize=9)
    axes.grid(alpha=0.3, which="major")
    axes.spines[["top", "right"]].set_visible(False)
