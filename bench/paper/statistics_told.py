"""Tables and figure of the experiment on statistics over time."""

from __future__ import annotations

from statistics import fmean, median
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from .experiment import Results, Settings
from .numbers import spread
from .seeds import compare, middle, signed
from .settling import TOLERANCE, WINDOW

MODELS = ("BN-LSTM", "BN-LSTM, cell norm", "LSTM")
TIMES = 4  # the longest sequences are so many times as long as those of training
BINS = 40  # positions are averaged in so many groups, ten to a training length
SLOTS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)  # numbers of slots that are tried
MULTIPLES = (1, 1.5, 2, 3, 4)
STATISTICS = {
    "last": "population, last slot for all later steps",
    "own": "population, a slot for each step",
    "batch": "the test batch's own",
    "running": "running ones of training, last slot",
}
COLOURS = {"BN-LSTM": "#d1621a", "BN-LSTM, cell norm": "#7a3f98", "LSTM": "#1f5fa8"}
PARTS = ("mean", "var")
NORMS = {"hh": "$W_{hh}\\,h$", "c": "cell state $c$", "ih": "$W_{ih}\\,x$"}
DASHED = (0, (4, 2))
NORM_COLOURS = {"hh": "#d1621a", "c": "#7a3f98", "ih": "#7d8a93"}


def key(model: str, seed: int) -> str:
    """A job's."""
    return f"{model}/{seed}"


def _of(settings: Settings, results: Results, model: str) -> list[dict[str, Any]]:
    """Results of a model, those that are there."""
    return [results[key(model, s)] for s in range(settings["seeds"]) if key(model, s) in results]


def mean_to(bits: list[float], multiple: float, beyond: bool = False) -> float:
    """Loss up to so many training lengths; beyond: from the first training length on."""
    one = BINS // TIMES
    return fmean(bits[one if beyond else 0 : round(multiple * one)])


def tables(settings: Settings, results: Results) -> list[str]:
    """Losses by length, what the last slot costs, how soon statistics settle and how many slots are enough."""
    normalised = [model for model in MODELS if model != "LSTM"]
    lines: list[str] = []
    for beyond in (False, True):
        multiples = [m for m in MULTIPLES if m > 1 or not beyond]
        where = f"positions beyond the {settings['length']} trained on alone" if beyond else "all positions"
        lines += [
            f"Loss in bits per character over {where} of test stretches, by their length in training lengths; mean ± "
            "deviation over seeds:",
            "",
            f"| model | statistics | {' | '.join(f'× {m:g}' for m in multiples)} |",
            f"|---|---|{'---|' * len(multiples)}",
        ]
        for model in MODELS:
            found = _of(settings, results, model)
            for kind in found[0]["bits"] if found else ():
                cells = [spread([mean_to(each["bits"][kind], m, beyond) for each in found]) for m in multiples]
                lines.append(f"| {model} | {STATISTICS.get(kind, '–')} | {' | '.join(cells)} |")
        lines.append("")

    lines += ["All models had one learning rate: losses of different models are no comparison of the models.", ""]
    lines += [f"Beyond the length trained on, up to {TIMES} times as long, ± deviation of the paired differences:", ""]
    for model in normalised:
        if found := _of(settings, results, model):
            for kind in ("own", "batch", "running"):
                differences = [
                    mean_to(each["bits"]["last"], TIMES, True) - mean_to(each["bits"][kind], TIMES, True)
                    for each in found
                ]
                lines.append(f"- {compare(differences, f'{model}, last slot', _OTHERS[kind], 'bits')}")
    lines += ["", *_settling_table(settings, results, normalised), "", *_slots_table(settings, results, normalised)]
    return lines


_OTHERS = {"own": "a slot for each step", "batch": "the test batch's own statistics", "running": "running statistics"}


def _settling_table(settings: Settings, results: Results, models: list[str]) -> list[str]:
    lines = [
        f"Distance of slots from the last one of training, {settings['length']} (median over columns; means by the "
        "standard deviation, variances relative; median over seeds). Floor: between two independent estimates of one "
        f"slot. Settled: first slot from which on {WINDOW} are within {TOLERANCE:g} × the floor in the mean, and its "
        "range over seeds. Later: mean distance of all slots beyond, as a multiple of the floor (1: stationary):",
        "",
    ]
    chosen = [slot for slot in (1, 2, 3, 5, 10, 20) if slot <= settings["length"]]
    lines += [
        f"| model | norm | of | {' | '.join(f'slot {slot}' for slot in chosen)} | floor | settled | later |",
        f"|---|---|---|{'---|' * (len(chosen) + 3)}",
    ]
    for model in models:
        found = _of(settings, results, model)
        for norm in found[0]["settling"] if found else ():
            for part, name in zip(PARTS, ("mean", "variance"), strict=True):
                each = [result["settling"][norm] for result in found]
                cells = []
                for slot in chosen:
                    k = each[0]["at"].index(slot)  # the first ten are all kept
                    cells.append(f"{median([one[part]['quartiles'][k][1] for one in each]):.3f}")
                cells.append(f"{median([one[part]['floor'] for one in each]):.3f}")
                cells.append(middle([one[part]["settled"] for one in each]))
                later = [one[part]["later"] for one in each if one[part]["later"] is not None]
                cells.append(f"{median(later):.2f}" if later else "–")
                lines.append(f"| {model} | {norm} | {name} | {' | '.join(cells)} |")
    return lines


def _slots_table(settings: Settings, results: Results, models: list[str]) -> list[str]:
    counts = [str(n) for n in SLOTS if n <= settings["length"]]
    lines = [
        "Loss in bits per character beyond the length trained on with so many slots, the last of which serves all "
        "later steps, less the loss with a slot for each step:",
        "",
        f"| model | {' | '.join(counts)} |",
        f"|---|{'---|' * len(counts)}",
    ]
    for model in models:
        if found := _of(settings, results, model):
            cells = [signed(_slot_costs(found, count)) for count in counts]
            lines.append(f"| {model} | {' | '.join(cells)} |")
    return lines


def _slot_costs(found: list[dict[str, Any]], count: str) -> list[float]:
    return [each["slots"][count] - mean_to(each["bits"]["own"], TIMES, True) for each in found]


def summary(settings: Settings, results: Results) -> list[str]:
    """When statistics have settled, and what reuse of the last slot costs."""
    lines = []
    for model in MODELS:
        found = _of(settings, results, model)
        if not found or model == "LSTM":
            continue
        norms = [norm for norm in ("hh", "c") if norm in found[0]["settling"]]
        slots = [[result["settling"][norm][part]["settled"] for result in found] for norm in norms for part in PARTS]
        latest = [None if None in each else max(each) for each in zip(*slots, strict=True)]
        cost = [
            mean_to(each["bits"]["last"], TIMES, True) - mean_to(each["bits"]["own"], TIMES, True) for each in found
        ]
        lines.append(
            f"- {model}: the mean and variance of {' and '.join(norms)} are within chance of the last slot's from slot "
            f"{middle(latest)} of {settings['length']} on. Beyond the length trained on, up to {TIMES} × as long, "
            f"{compare(cost, 'the last slot for all later steps', 'a slot for each step', 'bits per character')}."
        )
    return lines


def figure(settings: Settings, results: Results, note: str) -> Figure:
    """Distances over slots above, losses over positions below, costs of few slots at the bottom."""
    engine = ConstrainedLayoutEngine(rect=(0, 0, 1, 0.905), hspace=0.04)
    drawn = Figure(figsize=(9, 11.5), dpi=100, layout=engine)
    axes = drawn.subplots(3, 2)
    normalised = [model for model in MODELS if model != "LSTM"]
    for place, model in zip(axes[0], normalised, strict=True):
        _plot_settling(place, settings, _of(settings, results, model), model)
        place.sharey(axes[0, 0])
    _plot_losses(axes[1, 0], settings, results)
    _plot_differences(axes[1, 1], settings, results, normalised)
    grid = axes[2, 0].get_gridspec()
    for place in axes[2]:
        place.remove()
    _plot_slots(drawn.add_subplot(grid[2, :]), settings, results, normalised)
    drawn.suptitle("Statistics over time, and lengths beyond those trained on", fontsize=13, y=0.992)
    drawn.text(0.5, 0.97, f"{note}; grey lines: length trained on", ha="center", va="top", fontsize=8.5, color="0.35")
    handles = [Line2D([], [], color=NORM_COLOURS[norm], linewidth=2, label=label) for norm, label in NORMS.items()]
    handles += [
        Line2D([], [], color="0.25", linewidth=1.7, label="variance, relative (band: quartiles of columns)"),
        Line2D([], [], color="0.25", linewidth=1.3, linestyle=DASHED, label="mean, by the standard deviation"),
        Line2D([], [], color="0.25", linewidth=1.2, linestyle=":", label="floor of the variance: chance alone"),
    ]
    drawn.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.957), ncols=3, frameon=False, fontsize=8.5)
    return drawn


def _finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10.5, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3, which="major")
    axes.spines[["top", "right"]].set_visible(False)


def _plot_settling(axes: Axes, settings: Settings, found: list[dict[str, Any]], model: str) -> None:
    for norm in found[0]["settling"] if found else ():
        each = [result["settling"][norm] for result in found]
        at, colour = each[0]["at"], NORM_COLOURS[norm]
        quartiles = torch.tensor([[one[part]["quartiles"] for one in each] for part in PARTS])
        means, variances = quartiles.median(1).values  # of seeds: [S', 3]
        axes.plot(at, variances[:, 1], color=colour, linewidth=1.8)
        axes.fill_between(at, variances[:, 0], variances[:, 2], color=colour, alpha=0.15, linewidth=0)
        axes.plot(at, means[:, 1], color=colour, linewidth=1.3, linestyle=DASHED)
        axes.axhline(median(one["var"]["floor"] for one in each), color=colour, linewidth=1.2, linestyle=":")
    axes.axvline(settings["length"], color="0.6", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(3e-3, 2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    _finish(axes, f"{model}: distance from slot {settings['length']}", "slot", "distance, median over columns")


def _positions(settings: Settings) -> list[float]:
    """Middle of each group of positions."""
    group = TIMES * settings["length"] / BINS
    return [group * (k + 0.5) for k in range(BINS)]


def _band(axes: Axes, x: list[float], rows: list[list[float]], colour: str, label: str, line: Any = "-") -> None:
    """Mean of the seeds' rows with a band of one deviation."""
    values = torch.tensor(rows, dtype=torch.float64)
    mean, deviation = values.mean(0), values.std(0) if len(rows) > 1 else torch.zeros(len(x))
    axes.plot(x, mean, color=colour, label=label, linewidth=1.7, linestyle=line)
    axes.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)


def _plot_losses(axes: Axes, settings: Settings, results: Results) -> None:
    for model in MODELS:
        if found := _of(settings, results, model):
            kind = "none" if model == "LSTM" else "last"
            _band(axes, _positions(settings), [each["bits"][kind] for each in found], COLOURS[model], model)
    axes.axvline(settings["length"], color="0.6", linewidth=1)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8.5)
    title = "Loss by position, last slot for all later ones"
    _finish(axes, title, "position in the stretch", "test loss [bits per character]")


def _plot_differences(axes: Axes, settings: Settings, results: Results, models: list[str]) -> None:
    for model in models:
        found = _of(settings, results, model)
        for kind, line in (("last", "-"), ("batch", DASHED)):
            rows = [[a - b for a, b in zip(each["bits"][kind], each["bits"]["own"], strict=True)] for each in found]
            if rows:
                _band(axes, _positions(settings), rows, COLOURS[model], "", line)
    axes.axhline(0, color="0.25", linewidth=1, linestyle=":")
    axes.axvline(settings["length"], color="0.6", linewidth=1)
    axes.set_yscale("symlog", linthresh=0.002)  # what the last slot costs is seen beside what a batch's noise does
    axes.yaxis.set_major_formatter("{x:g}")
    lines = [
        Line2D([], [], color="0.25", linewidth=1.7, label="last slot for all later steps"),
        Line2D([], [], color="0.25", linewidth=1.7, linestyle=DASHED, label="test batch's own statistics"),
    ]
    axes.legend(handles=lines, frameon=False, fontsize=8.5, loc="upper right", bbox_to_anchor=(1, 0.89))
    title = "Loss less that with a slot for each step"
    _finish(axes, title, "position in the stretch", "difference [bits per character]")


def _plot_slots(axes: Axes, settings: Settings, results: Results, models: list[str]) -> None:
    counts = [n for n in SLOTS if n <= settings["length"]]
    for model in models:
        if found := _of(settings, results, model):
            rows = [list(each) for each in zip(*(_slot_costs(found, str(n)) for n in counts), strict=True)]
            _band(axes, [float(n) for n in counts], rows, COLOURS[model], model)
    axes.axhline(0, color="0.25", linewidth=1, linestyle=":")
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.minorticks_off()
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_ylim(bottom=-0.015)
    axes.yaxis.set_major_formatter("{x:g}")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8.5)
    length = settings["length"]
    title = f"How many slots are enough? Loss at positions {length + 1} to {TIMES * length}"
    _finish(
        axes, title, "slots; the last one serves all later steps", "loss less that with\na slot for each step [bits]"
    )
