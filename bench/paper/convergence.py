"""Does it learn faster, and better? LSTM against BN-LSTM, with and without cell norm, as the paper's tables 1 to 3.

Each model has the same budget of steps, the same optimiser, and a learning rate of its own out of the same grid, chosen
by the validation loss of seeds that are not used again. All start from the same kind of weights (see
`learning.layer_of`), so batch norm is what differs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure

from triton_bnlstm import estimate_statistics

from . import data, learning
from .experiment import Job, Report, Results, Settings
from .numbers import paired, rounded, shown, spread
from .seeds import middle

TITLE = "Convergence: LSTM against BN-LSTM"
MODELS = ("LSTM", "BN-LSTM", "BN-LSTM, cell norm")
SEQUENCE = "BN-LSTM, input over sequences"
COLOURS = {"LSTM": "#2b8a3e", "BN-LSTM": "#f0a04b", "BN-LSTM, cell norm": "#c8500f", SEQUENCE: "#1f5fa8"}
TITLES = {
    "digits": "8×8 digits, pixel by pixel",
    "text": "characters of Python's help texts",
    "mnist": "MNIST, pixel by pixel",
    "pmnist": "permuted MNIST",
}
_GRID: dict[str, Any] = {"rates": [0.003, 0.01, 0.03, 0.1], "tuning_seeds": [100], "seeds": [0, 1, 2, 3, 4]}

SIZES: dict[str, Settings] = {
    "quick": {
        "about": "a handful of steps, to see that it runs",
        "rates": [0.003, 0.01],
        "tuning_seeds": [100],
        "seeds": [0, 1],
        "tasks": {
            "digits": {"hidden": 8, "batch": 32, "steps": 12, "noise": 0.1},
            "text": {"hidden": 8, "batch": 16, "steps": 12, "length": 8, "noise": 0.0},
        },
    },
    "reduced": {
        "about": "MNIST's 5,000 images averaged to 14×14 (196 steps instead of 784), 48 units instead of 100, 500 "
        "batches of 64 instead of 10,000 of 100; text with 96 units instead of 1000, T = 50 instead of 100, 700 "
        "batches of 32 instead of 5,000 of 64; Adam, 4 rates that one seed chooses from, 5 other seeds",
        **_GRID,
        "tasks": {
            "digits": {"hidden": 48, "batch": 32, "steps": 700, "noise": 0.1},
            "text": {"hidden": 96, "batch": 32, "steps": 700, "length": 50, "noise": 0.0},
            "mnist": {"hidden": 48, "batch": 64, "steps": 500, "side": 14, "noise": 0.1},
            "pmnist": {"hidden": 48, "batch": 64, "steps": 500, "side": 14, "noise": 0.1},
        },
    },
    "full": {
        "about": "MNIST's 5,000 images as 784 steps, 100 units, 10,000 batches of 100; text with 1000 units, T = 100, "
        "5,000 batches of 64; Adam, 5 rates that three seeds choose from, 5 other seeds",
        **_GRID,
        "rates": [0.0003, 0.001, 0.003, 0.01, 0.03],
        "tuning_seeds": [100, 101, 102],
        "tasks": {
            "digits": {"hidden": 100, "batch": 64, "steps": 3000, "noise": 0.1},
            "text": {"hidden": 1000, "batch": 64, "steps": 5000, "length": 100, "noise": 0.0},
            "mnist": {"hidden": 100, "batch": 100, "steps": 10000, "side": 28, "noise": 0.1},
            "pmnist": {"hidden": 100, "batch": 100, "steps": 10000, "side": 28, "noise": 0.1},
        },
    },
}

LOOKS = 20  # evaluations on the validation part in a run
# of a step on a CPU, about: for the progress bar
_COST = {"LSTM": 1.0, "BN-LSTM": 3.0, "BN-LSTM, cell norm": 3.3, SEQUENCE: 3.0}


def _models(task: str) -> tuple[str, ...]:
    """Statistics of the input over sequences are tried where a run is cheap."""
    return (*MODELS, SEQUENCE) if task in ("digits", "text") else MODELS


def _tasks(settings: Settings) -> list[str]:
    """In the order of the page; JSON need not keep that of the settings."""
    return [name for name in TITLES if name in settings["tasks"]]


def _task(name: str, settings: dict[str, Any]) -> Any:
    if name == "text":
        return learning.CharacterTask(data.load_text(), settings["length"])
    images = data.load_digits() if name == "digits" else data.load_mnist(settings["side"], name == "pmnist")
    return learning.PixelTask(images)


def _key(task: str, model: str, rate: float, seed: int) -> str:
    return f"{task}/{model}/{rate:g}/{seed}"


def _job(settings: Settings, task: str, model: str, rate: float, seed: int, final: bool) -> Job:
    of = settings["tasks"][task]
    length = of.get("length") or of.get("side", 8) ** 2
    work = of["steps"] * _COST[model] * length * of["batch"] * (64 + of["hidden"]) / 1e6
    arguments = {"task": task, "model": model, "rate": rate, "seed": seed, "final": final, "work": work}
    return Job(_key(task, model, rate, seed), arguments, work)


def best_rate(settings: Settings, results: Results, task: str, model: str) -> float | None:
    """The grid's rate with the lowest mean validation loss over the tuning seeds; None while any is missing."""
    found = {}
    for rate in settings["rates"]:
        keys = [_key(task, model, rate, seed) for seed in settings["tuning_seeds"]]
        if any(key not in results for key in keys):
            return None
        losses = [results[key]["validation"]["loss"] for key in keys]
        found[rate] = fmean(losses) if all(math.isfinite(loss) for loss in losses) else math.inf
    return min(found, key=lambda rate: found[rate])


def jobs(settings: Settings, results: Results) -> list[Job]:
    """The grid for each task and model, and once that is there the seeds that count."""
    found = []
    for task in _tasks(settings):
        for model in _models(task):
            for rate in settings["rates"]:
                found += [_job(settings, task, model, rate, seed, False) for seed in settings["tuning_seeds"]]
            if (best := best_rate(settings, results, task, model)) is not None:
                found += [_job(settings, task, model, best, seed, True) for seed in settings["seeds"]]
    return found


def run(arguments: dict[str, Any], settings: Settings, device: str, report: Report) -> dict[str, Any]:
    """Train one model: validation scores along the way and in the end, test scores if it is one that counts."""
    on = torch.device(device)
    of = settings["tasks"][arguments["task"]]
    task = _task(arguments["task"], of)
    torch.manual_seed(arguments["seed"])
    name = arguments["model"]
    options: dict[str, Any] = {} if name == "LSTM" else {"initial_noise": of["noise"]}
    if name == SEQUENCE:
        options["input_stats"] = "sequence"
    layer = learning.layer_of(name, task, of["hidden"], **options)
    model = learning.Model(layer, of["hidden"], task.classes, task.every_step).to(on)
    optimiser = torch.optim.Adam(model.parameters(), lr=arguments["rate"])
    validation, every = task.held_out("validation"), max(1, of["steps"] // LOOKS)
    curve: list[tuple[int, float, float]] = []

    def each(done: int) -> None:
        report(arguments["work"] / of["steps"])
        if done % every == 0 or done == of["steps"]:
            found = learning.scores(model, validation, on)
            loss, accuracy = rounded([found["loss"], found["accuracy"]])
            curve.append((done, loss, accuracy))

    batches = task.batches(of["batch"], arguments["seed"])
    losses = learning.train(model, batches, optimiser, of["steps"], on, each=each)
    result: dict[str, Any] = {
        "curve": curve,
        "losses": _means(losses, LOOKS),
        "validation": learning.scores(model, validation, on),
    }
    if not arguments["final"]:
        return result
    by = {"running": result["validation"]}
    states = {"running": {key: value.clone() for key, value in model.state_dict().items()}}
    if name != "LSTM":
        some = [next(batches)[0].to(on) for _ in range(40)]
        estimate_statistics(model, some)
        by["estimated"] = learning.scores(model, validation, on)
        states["estimated"] = {key: value.clone() for key, value in model.state_dict().items()}
    chosen = min(by, key=lambda key: by[key]["loss"])  # by the validation part alone
    result["statistics"] = chosen
    result["test"] = {}
    for key, state in states.items():
        model.load_state_dict(state)
        result["test"][key] = learning.scores(model, task.held_out("test"), on)
    return result


def _means(losses: list[float], parts: int) -> list[float]:
    """Mean training losses of equal parts of the run."""
    size = max(1, len(losses) // parts)
    return rounded([fmean(losses[k : k + size]) for k in range(0, len(losses) - size + 1, size)])


def _finals(settings: Settings, results: Results, task: str, model: str) -> list[dict[str, Any]]:
    rate = best_rate(settings, results, task, model)
    keys = [] if rate is None else [_key(task, model, rate, seed) for seed in settings["seeds"]]
    return [results[key] for key in keys if key in results and "test" in results[key]]


def _test(run: dict[str, Any], what: str) -> float:
    return float(run["test"][run["statistics"]][what])


def steps_to(curve: Iterable[tuple[int, float, float]], loss: float) -> int | None:
    """The first look at which the validation loss is at most `loss`; None if there is none."""
    return next((int(step) for step, found, _ in curve if found <= loss), None)


def tables(settings: Settings, results: Results) -> list[str]:
    """A table for each task, and beneath it whether batch norm helps."""
    lines = []
    for task in _tasks(settings):
        of = settings["tasks"][task]
        runs = {model: _finals(settings, results, task, model) for model in _models(task)}
        if not all(runs.values()) or len({len(each) for each in runs.values()}) > 1:
            lines += [f"{TITLES[task]}: not all runs are there yet.", ""]
            continue
        lines += _table(settings, results, task, of, runs)
    return lines


def _table(
    settings: Settings, results: Results, task: str, of: dict[str, Any], runs: dict[str, list[dict[str, Any]]]
) -> list[str]:
    text = task == "text"
    scale = 1 / math.log(2) if text else 1.0
    unit, other = ("bits per character", "accuracy, %") if text else ("test loss, nats", "test accuracy, %")
    target = fmean(run["validation"]["loss"] for run in runs["LSTM"])
    lines = [
        f"*{TITLES[task]}*: {len(runs['LSTM'])} seeds, {of['steps']} steps of {of['batch']} sequences, "
        f"H = {of['hidden']}",
        "",
        f"| model | rate | {unit} | {other} | steps to LSTM's final validation loss, median (range) |",
        "|:--|--:|--:|--:|--:|",
    ]
    losses = {model: [scale * _test(run, "loss") for run in found] for model, found in runs.items()}
    for model, found in runs.items():
        reached = [steps_to(run["curve"], target) for run in found]
        steps = middle(reached)
        accuracy = spread([100 * _test(run, "accuracy") for run in found], 1)
        rate = best_rate(settings, results, task, model)
        lines.append(f"| {model} | {rate:g} | {spread(losses[model])} | {accuracy} | {steps} |")
    lines += ["", *(f"- {said(model, losses[model], losses['LSTM'])}" for model in _models(task)[1:]), ""]
    return lines


def said(model: str, losses: list[float], of_lstm: list[float]) -> str:
    """Whether a BN-LSTM is better than LSTM, in words that the numbers decide."""
    found = paired(losses, of_lstm)
    verdict = "does not differ clearly from LSTM"
    if found.p < 0.05:
        verdict = "is better than LSTM" if found.difference < 0 else "is worse than LSTM: batch norm does not help here"
    numbers = f"difference {found.difference:+.3f}, p {shown(found.p)}, lower in {found.lower} of {found.pairs} seeds"
    return f"{model} {verdict} ({numbers})."


def summary(settings: Settings, results: Results) -> list[str]:
    """One line for each task."""
    lines = []
    for task in _tasks(settings):
        runs = {model: _finals(settings, results, task, model) for model in _models(task)}
        scale = 1 / math.log(2) if task == "text" else 1.0
        losses = {model: [scale * _test(run, "loss") for run in found] for model, found in runs.items()}
        unit = "bits per character" if task == "text" else "nats"
        parts = []
        for model in _models(task)[1:]:
            found = paired(losses[model], losses["LSTM"])
            word = "no clear difference" if not found.p < 0.05 else "better" if found.difference < 0 else "worse"
            parts.append(f"{model} {spread(losses[model], 2)} ({word})")
        lines.append(f"- {TITLES[task]}, test loss, {unit}: LSTM {spread(losses['LSTM'], 2)}; {'; '.join(parts)}.")
    return lines


def figure(settings: Settings, results: Results, note: str) -> Figure:
    """Validation loss over steps for each task, mean and range of the seeds."""
    tasks = _tasks(settings)
    columns = min(2, len(tasks))
    drawn = Figure(figsize=(4.6 * columns, 3.4 * math.ceil(len(tasks) / columns) + 0.7), dpi=130, layout="constrained")
    grid = drawn.subplots(math.ceil(len(tasks) / columns), columns, squeeze=False).flat
    for axes, task in zip(grid, tasks, strict=False):
        scale = 1 / math.log(2) if task == "text" else 1.0
        for model in _models(task):
            runs = _finals(settings, results, task, model)
            if not runs:
                continue
            steps = [step for step, _, _ in runs[0]["curve"]]
            curves = [[scale * loss for _, loss, _ in run["curve"]] for run in runs]
            by_step = list(zip(*curves, strict=True))
            rate = best_rate(settings, results, task, model)
            axes.plot(steps, [fmean(v) for v in by_step], color=COLOURS[model], label=f"{model} (rate {rate:g})")
            low, high = [min(v) for v in by_step], [max(v) for v in by_step]
            axes.fill_between(steps, low, high, color=COLOURS[model], alpha=0.18, linewidth=0)
        axes.set_title(TITLES[task], fontsize=10)
        axes.set_ylabel("validation, bits per character" if task == "text" else "validation loss, nats", fontsize=9)
        axes.set_yscale("linear" if task == "text" else "log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
        axes.set_xlabel("training steps", fontsize=9)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    count = len(settings["seeds"])
    drawn.suptitle(f"{TITLE}\nmean and range of {count} seeds, running statistics; {note}", fontsize=10)
    return drawn
