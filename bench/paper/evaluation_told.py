"""Tables and figure of the experiment on evaluating worse than training."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .experiment import Results, Settings
from .numbers import spread
from .seeds import compare, signed

MODELS = ("recipe", "BNLSTM")
KINDS = {
    "batch": "test batch's own",
    "running": "running",
    "rest": "running, after passes at rest",
    "batches": 'estimated, "batches"',
    "whole": 'estimated, "whole"',
    "paper": 'estimated, "paper"',
    "noise": 'estimated, "batches", with noise on h_0',
}
CURVES: dict[str, tuple[str, str, Any]] = {
    "batch": ("test batch's own statistics", "#3c8d40", (0, (4, 2))),
    "running": ("running statistics", "#c0392b", "-"),
    "batches": ("estimate_statistics", "#1f5fa8", "-"),
}


def key(model: str, rate: dict[str, Any], seed: int) -> str:
    """A job's."""
    return f"{model}/{rate['name']}/{seed}"


def _of(settings: Settings, results: Results, model: str, rate: dict[str, Any]) -> list[dict[str, Any]]:
    """Results of a model at a learning rate, those that are there."""
    keys = [key(model, rate, seed) for seed in range(settings["seeds"])]
    return [results[key] for key in keys if key in results]


def gaps(found: list[dict[str, Any]], kind: str, other: str = "batch") -> list[float]:
    """Each seed's loss by `kind` less that by `other`, mean over the later half of the curve.

    A single point says little: running statistics are sometimes near and sometimes far, from one step to the next.
    """
    means = []
    for result in found:
        later = result["curve"][len(result["curve"]) // 2 :]
        means.append(fmean(point[kind][0] - point[other][0] for point in later))
    return means


def _called(rate: dict[str, Any]) -> str:
    return f"{rate['name']} rate {rate['rate']:g}" + (" to 0" if rate["decay"] else "")


def tables(settings: Settings, results: Results) -> list[str]:
    """What each kind of statistics gives at the end, and gaps along the way, in words."""
    lines = [
        "Test loss [nats] and accuracy of the same trained models by the statistics used, at the end of training, and "
        "the loss less that by the test batch's own statistics (gap); mean ± deviation over seeds:",
        "",
        "| model | learning rate | statistics | loss | accuracy % | gap |",
        "|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for rate in settings["rates"]:
            found = _of(settings, results, model, rate)
            for kind in (kind for kind in KINDS if found and kind in found[0]["end"]):
                loss, accuracy = zip(*(result["end"][kind] for result in found), strict=True)
                gap = [result["end"][kind][0] - result["end"]["batch"][0] for result in found]
                lines.append(
                    f"| {model} | {_called(rate)} | {KINDS[kind]} | {spread(loss)} | "
                    f"{spread([100 * share for share in accuracy], 1)} | "
                    f"{signed(gap) if kind != 'batch' else '–'} |"
                )
    lines += [
        "",
        "Over the later half of training, loss by paired differences (mean of the points of a seed's curve):",
        "",
    ]
    for model in MODELS:
        for rate in settings["rates"]:
            if found := _of(settings, results, model, rate):
                for kind, other, name in (
                    ("running", "batch", "running statistics"),
                    ("batches", "batch", "estimate_statistics"),
                    ("batches", "running", "estimate_statistics"),
                ):
                    against = "running statistics" if other == "running" else "the batch's own"
                    what = f"{model}, {_called(rate)}, {name}"
                    lines.append(f"- {compare(gaps(found, kind, other), what, against, 'nats')}")
    return [*lines, "", *_worst(settings, results)]


def _worst(settings: Settings, results: Results) -> list[str]:
    """How far single points were off, and how often an estimate was worse than what was there."""
    lines = []
    for model in MODELS:
        points = [
            point
            for rate in settings["rates"]
            for found in _of(settings, results, model, rate)
            for point in found["curve"]
        ]
        if points:
            drops = [100 * (point["batch"][1] - point["running"][1]) for point in points]
            hurt = [point["batches"][0] - point["running"][0] for point in points]
            times = sum(difference > 0 for difference in hurt)
            lines.append(
                f"- {model}: of {len(points)} points of all curves, running statistics cost up to {max(drops):.0f} "
                f"percentage points of accuracy; an estimate had a greater loss than the running statistics at "
                f"{times}, by up to {max(0.0, *hurt):.3f} nats."
            )
    return lines


def summary(settings: Settings, results: Results) -> list[str]:
    """Accuracy at the end by three kinds of statistics."""
    lines = []
    for model in MODELS:
        cells = []
        for rate in settings["rates"]:
            if found := _of(settings, results, model, rate):
                running, estimated, batch = (
                    spread([100 * result["end"][kind][1] for result in found], 1)
                    for kind in ("running", "batches", "batch")
                )
                cells.append(
                    f"{_called(rate)}: {running} by running statistics, {estimated} estimated, {batch} by the batch"
                )
        if cells:
            lines.append(f"- {_TITLES[model]}, test accuracy in % of the same weights: {'; '.join(cells)}.")
    return lines


def figure(settings: Settings, results: Results, note: str) -> Figure:
    """Loss along the way for each model and rate, and accuracy at the end below."""
    rates = settings["rates"]
    drawn = Figure(figsize=(9, 10.2), dpi=100)
    axes = drawn.subplots(3, len(rates), squeeze=False, height_ratios=[1, 1, 0.9])
    drawn.subplots_adjust(left=0.18, right=0.985, top=0.875, bottom=0.048, hspace=0.45, wspace=0.1)
    for row, model in zip(axes, MODELS, strict=False):
        for place, rate in zip(row, rates, strict=True):
            place.sharey(axes[0, 0])
            _plot_curves(place, _of(settings, results, model, rate), settings["steps"])
            place.set_title(f"{_TITLES[model]},\n{_called(rate)}", fontsize=9.5)
            place.tick_params(labelleft=place is row[0], which="both")
        row[0].set_ylabel("test loss [nats], log scale")
    for place, rate in zip(axes[2], rates, strict=True):
        _plot_end(place, settings, results, rate, labelled=place is axes[2, 0])
    curves = [Line2D([], [], color=c, ls=line, linewidth=1.8, label=name) for name, c, line in CURVES.values()]
    dots = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", alpha=0.7, label=_TITLES[model])
        for model, (colour, _, marker) in _DOTS.items()
    ]
    drawn.legend(handles=curves, loc="upper center", bbox_to_anchor=(0.5, 0.952), ncols=3, frameon=False, fontsize=9.5)
    top = axes[2, 0].get_position().y1
    drawn.text(0.18, top + 0.035, "At the end of training, each seed, and their mean:", fontsize=9.5, va="center")
    place = (0.985, top + 0.035)
    drawn.legend(handles=dots, loc="center right", bbox_to_anchor=place, ncols=2, frameon=False, fontsize=9.5)
    drawn.suptitle("Evaluation against training statistics", fontsize=13, y=0.992)
    drawn.text(0.5, 0.968, f"{note}; bands: deviation over seeds", ha="center", va="top", fontsize=8.5, color="0.35")
    return drawn


_TITLES = {"recipe": "the copied recipe", "BNLSTM": "triton_bnlstm"}
_DOTS = {"recipe": ("#8a5a2b", 0.13, "o"), "BNLSTM": ("#2b6f8a", -0.13, "s")}


def _plot_curves(axes: Axes, found: list[dict[str, Any]], last: int) -> None:
    for kind, (_, colour, line) in CURVES.items():
        if found:
            steps = [point["step"] for point in found[0]["curve"]]
            # in logarithms, as the axis has it: a band below a mean of losses could reach below 0
            losses = torch.tensor([[point[kind][0] for point in result["curve"]] for result in found]).double().log()
            middle, deviation = losses.mean(0), losses.std(0) if len(found) > 1 else torch.zeros(len(steps))
            axes.plot(steps, middle.exp(), color=colour, linestyle=line, linewidth=1.8)
            low, high = (middle - deviation).exp(), (middle + deviation).exp()
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
    axes.set_xlim(0, last * 1.06)
    axes.set_xticks([0, last // 4, last // 2, 3 * last // 4, last])
    axes.set_xlabel("training steps", fontsize=9)
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)


def _plot_end(axes: Axes, settings: Settings, results: Results, rate: dict[str, Any], labelled: bool) -> None:
    kinds = list(KINDS)
    for model, (colour, shift, marker) in _DOTS.items():
        found = _of(settings, results, model, rate)
        for k, kind in enumerate(kinds):
            shares = [100 * result["end"][kind][1] for result in found if kind in result["end"]]
            height = len(kinds) - k + shift
            axes.plot(
                shares, [height] * len(shares), marker, color=colour, alpha=0.55, markersize=4.5, linestyle="none"
            )
            if shares:
                axes.plot([fmean(shares)] * 2, [height - 0.12, height + 0.12], color=colour, linewidth=2.2)
    axes.set_yticks(range(len(kinds), 0, -1), list(_WORDS.values()) if labelled else [""] * len(kinds), fontsize=8.5)
    axes.set_ylim(0.4, len(kinds) + 0.6)
    axes.set_title(_called(rate), fontsize=9.5)
    axes.set_xlabel("test accuracy [%]", fontsize=9)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


_WORDS = {
    "batch": "test batch's own",
    "running": "running",
    "rest": "running, after passes\nwith weights at rest",
    "batches": 'estimated "batches"',
    "whole": 'estimated "whole"',
    "paper": 'estimated "paper"',
    "noise": 'estimated "batches"\nwith noise on $h_0$',
}
