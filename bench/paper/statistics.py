"""How population statistics settle over time, and what becomes of sequences longer than those trained on.

Cooijmans et al. 2016, section 3 and appendix A: statistics differ in the first steps and then converge to stationary
ones, so those of the last slot may serve all later steps. A character model shows how soon statistics cannot be told
from the last slot's, and what it costs to use the last slot where each step could have had its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from torch import Tensor

from triton_bnlstm import BNLSTM, estimate_statistics
from triton_bnlstm.statistics import Moments

from .data import load_text
from .experiment import Job, Report, Results, Settings
from .learning import Batch, CharacterTask, Model, layer_of, train
from .seeds import compare, middle, short, spread
from .settling import TOLERANCE, WINDOW, settling

TITLE = "Statistics over time, and lengths beyond those trained on"

SIZES: dict[str, Settings] = {
    "quick": {
        "about": "12 units, 10 characters, batches of 16, 20 steps, 2 seeds: shows that it runs, and nothing else",
        "hidden_size": 12,
        "length": 10,
        "batch_size": 16,
        "steps": 20,
        "rate": 5e-3,
        "seeds": 2,
        "estimate_batches": 4,
        "test_batches": 3,
    },
    "reduced": {
        "about": (
            "96 units, trained on 50 characters of Python's help texts, batches of 64, 500 steps of Adam at 0.005 "
            "falling to 0, 5 seeds; statistics from 40 batches, tested on 1,024 stretches of 200 characters. Smaller "
            "than full: units (1000), characters (100), steps (1000), batches for statistics (100)"
        ),
        "hidden_size": 96,
        "length": 50,
        "batch_size": 64,
        "steps": 500,
        "rate": 5e-3,
        "seeds": 5,
        "estimate_batches": 40,
        "test_batches": 16,
    },
    "full": {
        "about": (
            "the paper's sizes for characters of the Penn Treebank on Python's help texts instead: 1000 units, trained "
            "on 100 characters, batches of 64, 1000 steps of Adam at 0.002 falling to 0, 5 seeds; statistics from 100 "
            "batches, tested on 1,024 stretches of 400 characters"
        ),
        "hidden_size": 1000,
        "length": 100,
        "batch_size": 64,
        "steps": 1000,
        "rate": 2e-3,
        "seeds": 5,
        "estimate_batches": 100,
        "test_batches": 16,
    },
}

MODELS = ("BN-LSTM", "BN-LSTM, cell norm", "LSTM")
TIMES = 4  # the longest sequences are so many times as long as those of training
MULTIPLES = (1, 1.5, 2, 3, 4)
BINS = 40  # positions are averaged in so many groups, ten to a training length
SLOTS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)  # numbers of slots that are tried
AFTER_TRAINING = 0.3  # work of estimates and scores against that of training
LSTM_WORK = 0.4  # of its training against a BN-LSTM's
STATISTICS = {
    "last": "population, last slot for all later steps",
    "own": "population, a slot for each step",
    "batch": "the test batch's own",
    "running": "running ones of training, last slot",
}
COLOURS = {"BN-LSTM": "#d1621a", "BN-LSTM, cell norm": "#7a3f98", "LSTM": "#1f5fa8"}
NORMS = {"hh": "$W_{hh}\\,h$", "c": "cell state $c$", "ih": "$W_{ih}\\,x$"}
DASHED = (0, (4, 2))
NORM_COLOURS = {"hh": "#d1621a", "c": "#7a3f98", "ih": "#7d8a93"}


def jobs(settings: Settings, results: Results) -> list[Job]:
    """One for each model and seed."""
    del results
    work = {model: settings["steps"] * (LSTM_WORK if model == "LSTM" else 1 + AFTER_TRAINING) for model in MODELS}
    return [
        Job(_key(model, seed), {"model": model, "seed": seed}, work[model])
        for seed in range(settings["seeds"])
        for model in MODELS
    ]


def _key(model: str, seed: int) -> str:
    return f"{model}/{seed}"


def run(arguments: dict[str, Any], settings: Settings, device: str, report: Report) -> dict[str, Any]:
    """Train one model, and score it on stretches that are TIMES as long, by each kind of statistics.

    bits: by kind of statistics, the loss [bits] of each of BINS groups of positions. With batch norm also settling (see
    `settling`) by norm, and slots: bits of the positions beyond the training length with fewer slots.
    """
    name, seed, where = arguments["model"], arguments["seed"], torch.device(device)
    length, batch_size = settings["length"], settings["batch_size"]
    task = CharacterTask(load_text(), length)
    torch.manual_seed(seed)
    model = Model(layer_of(name, task, settings["hidden_size"]), settings["hidden_size"], task.classes, True).to(where)
    optimiser = torch.optim.Adam(model.parameters(), lr=settings["rate"])
    share = LSTM_WORK if name == "LSTM" else 1.0
    batches = task.batches(batch_size, seed)
    losses = train(model, batches, optimiser, settings["steps"], where, each=lambda done: report(share))
    test = _test_batches(task, settings)
    trained = fmean(losses[-len(losses) // 10 :]) / math.log(2)
    if name == "LSTM":
        return {"trained": short(trained), "bits": {"none": _binned(bits_by_position(model, test, where))}}

    layer = model.layer
    assert isinstance(layer, BNLSTM)
    rest = settings["steps"] * AFTER_TRAINING
    bits = {
        "running": _binned(bits_by_position(model, test, where)),
        "batch": _binned(bits_by_position(model, test, where, training=True)),
    }
    _estimate(model, _stretches(task, settings, seed, "first"), where, length)
    bits["last"] = _binned(bits_by_position(model, test, where))
    report(rest / 4)
    layer.set_max_length(TIMES * length)
    _estimate(model, _stretches(task, settings, seed, "second"), where)
    second = layer.statistics()
    report(rest / 4)
    _estimate(model, _stretches(task, settings, seed, "first"), where)
    first = layer.statistics()
    bits["own"] = _binned(bits_by_position(model, test, where))
    report(rest / 4)
    slots = {}
    for count in (n for n in SLOTS if n <= length):
        keep_slots(layer, count)  # from many slots to few would lose what the next needs
        slots[count] = short(bits_by_position(model, test, where)[length:].mean().item())
        _restore(layer, first)
    report(rest / 4)
    return {
        "trained": short(trained),
        "bits": bits,
        "settling": {norm: settling(first[norm], second[norm], length) for norm in first},
        "slots": {str(count): value for count, value in slots.items()},
    }


def _stretches(task: CharacterTask, settings: Settings, seed: int, which: str) -> Iterator[Batch]:
    """Batches of long stretches from anywhere in the training text; the `first` ones and the `second` are others."""
    long = CharacterTask(task.text, TIMES * task.steps)
    own = 10_000 + 2 * seed + (which == "second")
    return islice(long.batches(settings["batch_size"], own), settings["estimate_batches"])


def _test_batches(task: CharacterTask, settings: Settings) -> list[Batch]:
    """Long stretches from anywhere in the test text, the same for all models and seeds.

    Stretches that follow one another would be of one topic, and so would be the statistics of their batch.
    """
    long = CharacterTask(task.text._replace(train=task.text.test), TIMES * task.steps)
    return list(islice(long.batches(settings["batch_size"], 0), settings["test_batches"]))


def _estimate(model: Model, batches: Iterator[Batch], device: torch.device, steps: int | None = None) -> None:
    """Population statistics from the first `steps` steps of each batch."""
    estimate_statistics(model, batches, forward=lambda called, batch: called(batch[0][:steps].to(device)))


@torch.no_grad()
def bits_by_position(model: Model, batches: list[Batch], device: torch.device, *, training: bool = False) -> Tensor:
    """Mean loss [T] in bits at each position. training: by the batches' own statistics, which are not kept."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train(training)
    total, count = torch.zeros(len(batches[0][1]), dtype=torch.float64), 0
    for x, targets in batches:
        logits = model(x.to(device)).double()
        losses = F.cross_entropy(logits.transpose(1, 2), targets.to(device), reduction="none")  # [T, B]
        total += losses.sum(1).cpu()
        count += losses.shape[1]
    for name, buffer in model.named_buffers():
        buffer.copy_(before[name])
    model.eval()
    return total / count / math.log(2)


@torch.no_grad()
def keep_slots(layer: BNLSTM, slots: int) -> None:
    """What a layer with `slots` slots uses: the last of them in place of each later one."""
    for norm in layer.statistics():
        for part in ("mean", "var", "count"):
            buffer = layer.get_buffer(f"{part}_{norm}_l0")
            buffer[slots:] = buffer[slots - 1].clone()


@torch.no_grad()
def _restore(layer: BNLSTM, statistics: dict[str, Moments]) -> None:
    for norm, moments in statistics.items():
        for part, values in zip(("mean", "var", "count"), moments, strict=True):
            layer.get_buffer(f"{part}_{norm}_l0").copy_(values)


def _binned(bits: Tensor) -> list[float]:
    return [short(value) for value in bits.view(BINS, -1).mean(1).tolist()]


def _of(settings: Settings, results: Results, model: str) -> list[dict[str, Any]]:
    """Results of a model, those that are there."""
    return [results[_key(model, s)] for s in range(settings["seeds"]) if _key(model, s) in results]


def _mean_to(bits: list[float], multiple: float, beyond: bool = False) -> float:
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
                cells = [spread([_mean_to(each["bits"][kind], m, beyond) for each in found]) for m in multiples]
                lines.append(f"| {model} | {STATISTICS.get(kind, '–')} | {' | '.join(cells)} |")
        lines.append("")

    lines += ["All models had one learning rate: losses of different models are no comparison of the models.", ""]
    lines += [f"Beyond the length trained on, up to {TIMES} times as long, ± deviation of the paired differences:", ""]
    for model in normalised:
        if found := _of(settings, results, model):
            for kind in ("own", "batch", "running"):
                differences = [
                    _mean_to(each["bits"]["last"], TIMES, True) - _mean_to(each["bits"][kind], TIMES, True)
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
            for part, name in (("mean", "mean"), ("var", "variance")):
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
            cells = [spread(_slot_costs(found, count), "+.3f") for count in counts]
            lines.append(f"| {model} | {' | '.join(cells)} |")
    return lines


def _slot_costs(found: list[dict[str, Any]], count: str) -> list[float]:
    return [each["slots"][count] - _mean_to(each["bits"]["own"], TIMES, True) for each in found]


def plot(settings: Settings, results: Results, path: Path, note: str) -> None:
    """Distances over slots above, losses over positions below, costs of few slots at the bottom."""
    engine = ConstrainedLayoutEngine(rect=(0, 0, 1, 0.905), hspace=0.04)
    figure = Figure(figsize=(9, 11.5), dpi=100, layout=engine)
    axes = figure.subplots(3, 2)
    normalised = [model for model in MODELS if model != "LSTM"]
    for place, model in zip(axes[0], normalised, strict=True):
        _plot_settling(place, settings, _of(settings, results, model), model)
        place.sharey(axes[0, 0])
    _plot_losses(axes[1, 0], settings, results)
    _plot_differences(axes[1, 1], settings, results, normalised)
    grid = axes[2, 0].get_gridspec()
    for place in axes[2]:
        place.remove()
    _plot_slots(figure.add_subplot(grid[2, :]), settings, results, normalised)
    figure.suptitle(TITLE, fontsize=13, y=0.992)
    figure.text(0.5, 0.97, f"{note}; grey lines: length trained on", ha="center", va="top", fontsize=8.5, color="0.35")
    handles = [Line2D([], [], color=NORM_COLOURS[norm], linewidth=2, label=label) for norm, label in NORMS.items()]
    handles += [
        Line2D([], [], color="0.25", linewidth=1.7, label="variance, relative (band: quartiles of columns)"),
        Line2D([], [], color="0.25", linewidth=1.3, linestyle=DASHED, label="mean, by the standard deviation"),
        Line2D([], [], color="0.25", linewidth=1.2, linestyle=":", label="floor of the variance: chance alone"),
    ]
    figure.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.957), ncols=3, frameon=False, fontsize=8.5
    )
    figure.savefig(path)


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
        quartiles = torch.tensor([[one[part]["quartiles"] for one in each] for part in ("mean", "var")])
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
