"""What the user sees and keeps: progress bars, tables, a JSON file and a plot."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .data import Task
from .environment import cpu_name
from .training import MODELS, Report, Run, Settings

CPU_NOTE = "Steps/s were taken on a CPU, where BN-LSTM runs its eager reference path: not the library's performance."
CHANCE_NOTE = "±: standard error from the number of test sequences alone. One seed; another gives other figures."
COLOURS = {"nn.LSTM": "#1f5fa8", "BN-LSTM": "#d1621a"}


@dataclass(frozen=True)
class Outcome:
    """All runs on one task."""

    task: Task
    settings: Settings
    runs: list[Run]


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()} (CPU, {torch.get_num_threads()} threads)"


class Bars:
    """One progress bar for each training run on a terminal, one line for each finished run elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        # rich takes a pipe for a terminal where FORCE_COLOR is set; a bar would fill a log with its redrawings
        self.live = console.is_interactive and sys.stdout.isatty()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=18),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not self.live,
        )

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def start(self, title: str, steps: int) -> tuple[Report, Any]:
        """A new bar of `steps` steps: what moves it, and what ends it, called with the run."""
        bar = self.progress.add_task(title, total=steps, note="")

        def move(step: int, loss: float) -> None:
            self.progress.update(bar, completed=step, note=f"loss {loss:.4f}")

        def end(run: Run) -> None:
            accuracy = run.curve[-1][1]
            self.progress.update(bar, completed=steps, note=f"test {accuracy:.1%}")
            if not self.live:
                text = f"{title}: {steps} steps, training loss {run.losses[-1]:.4f}, test accuracy {accuracy:.1%}"
                self.console.print(text, highlight=False, soft_wrap=True)

        return move, end


def with_error(share: float | None, count: int) -> str:
    """A share of `count` sequences in percent, with its standard error; a dash where there is none."""
    if share is None:
        return "–"
    return f"{100 * share:.1f} ± {100 * math.sqrt(share * (1 - share) / count):.1f}"


def table(outcome: Outcome) -> Table:
    """The final scores on one task, a row for each model and kind of statistics."""
    task, settings = outcome.task, outcome.settings
    shown = Table(
        title=f"{task.title}: {len(task.train)} training and {len(task.test)} test sequences, {settings.steps} steps",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title_justify="left",
        title_style="bold",
    )
    shown.add_column("Model")
    shown.add_column("Statistics")
    for heading in ("Test\naccuracy %", "Test\nloss", "Longest\ntenth %", "Training\nsteps/s"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("Backend")
    for run in outcome.runs:
        speed = "–" if run.steps_per_second is None else f"{run.steps_per_second:.1f}"
        for k, (statistics, scores) in enumerate(run.scores.items()):
            shown.add_row(
                run.model,
                "–" if statistics == "none" else statistics,
                with_error(scores.accuracy, scores.sequences),
                f"{scores.loss:.3f}",
                with_error(scores.longest_accuracy, scores.longest_sequences),
                speed if k == 0 else "same run",
                run.backend,
            )
    return shown


def as_json(outcome: Outcome) -> dict[str, Any]:
    """One task's data, settings and runs as JSON's own types."""
    task = outcome.task
    return {
        "name": task.name,
        "title": task.title,
        "train_sequences": len(task.train),
        "test_sequences": len(task.test),
        "lengths": [int(task.lengths.min()), int(task.lengths.max())],
        "features": task.features,
        "settings": asdict(outcome.settings),
        "runs": [asdict(run) for run in outcome.runs],
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content`; a loss that is not finite becomes null, which JSON knows."""

    def finite(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, dict):
            return {key: finite(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [finite(each) for each in value]
        return value

    path.write_text(json.dumps(finite(content), indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")


def write_plot(path: Path, outcomes: list[Outcome], device: str, seed: int) -> None:
    """Training loss and test accuracy against steps, a column for each task."""
    figure = Figure(figsize=(1.5 + 5 * len(outcomes), 7.5), dpi=130, layout="constrained")
    axes = figure.subplots(2, len(outcomes), squeeze=False, sharex="col")
    for (upper, lower), outcome in zip(axes.T, outcomes, strict=True):
        for run in outcome.runs:
            _plot_loss(upper, run)
            _plot_accuracy(lower, run)
        _finish(upper, outcome.task.title, "training loss [nats], log scale")
        _finish(lower, "", "test accuracy")
        lower.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        lower.margins(y=0.08)
        lower.set_ylim(top=1.02)
        lower.set_xlabel("training steps")
    figure.suptitle(
        f"{' and '.join(MODELS)}: same batches, optimiser and learning rate\n{device}, seed {seed}", fontsize=12
    )
    figure.savefig(path)


def _plot_loss(axes: Axes, run: Run) -> None:
    losses = np.array(run.losses)
    window = max(1, len(losses) // 40)
    smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color=COLOURS[run.model], alpha=0.15, linewidth=0.7)
    label = run.model if window == 1 else f"{run.model}, mean of {window} steps"
    marker = "." if window == 1 else None  # a single step has no line
    axes.plot(steps[window - 1 :], smooth, color=COLOURS[run.model], label=label, linewidth=1.8, marker=marker)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")


def _plot_accuracy(axes: Axes, run: Run) -> None:
    steps, accuracies = zip(*run.curve, strict=True)
    label = f"{run.model}, running statistics" if "running" in run.scores else run.model
    colour = COLOURS[run.model]
    axes.plot(steps, accuracies, color=colour, label=label, marker="o", markersize=3.5, linewidth=1.8)
    if "estimated" in run.scores:
        accuracy = run.scores["estimated"].accuracy
        label = f"{run.model}, estimated statistics"
        axes.plot(
            steps[-1],
            accuracy,
            color=colour,
            label=label,
            marker="*",
            markersize=15,
            markerfacecolor="none",  # it often lies on the last points
            markeredgewidth=1.5,
            linestyle="none",
        )


def _finish(axes: Axes, title: str, y: str) -> None:
    axes.set_title(title)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3, which="major")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def notes(outcomes: Iterable[Outcome], device: torch.device) -> list[str]:
    """What a reader of the figures has to know."""
    options = [
        f"BN-LSTM on {outcome.task.title.lower()}: cell_norm={s.cell_norm}, input_stats={s.input_stats!r}, "
        f"initial_noise={s.initial_noise:g}; the layer's defaults are False, 'sequence', 0."
        for outcome in outcomes
        for s in [outcome.settings]
    ]
    return [*options, CHANCE_NOTE, *([CPU_NOTE] if device.type == "cpu" else [])]


def show(console: Console, outcomes: list[Outcome], device: torch.device) -> None:
    """Print the tables and what to know about them."""
    for outcome in outcomes:
        console.print()
        console.print(table(outcome))
    for note in notes(outcomes, device):
        console.print(note, style="dim", highlight=False)


def show_files(console: Console, files: Iterable[Path]) -> None:
    """Print where the figures and the plot are."""
    for path in files:
        console.print(f"Wrote {path}", highlight=False, markup=False, soft_wrap=True)
