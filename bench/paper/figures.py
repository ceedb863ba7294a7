"""Tables and plots of a record, beside it and on the terminal."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from bench.report import png

from .experiment import load
from .record import Record

if TYPE_CHECKING:
    from rich.console import Console


def complete(record: Record) -> bool:
    """Whether no job is left to do."""
    results = record.results
    return all(job.key in results for job in load(record.content["experiment"]).jobs(record.settings, results))


def note(record: Record) -> str:
    """Size and machine in one line."""
    machines = []
    for run in record.content["runs"]:
        device, versions = run["device"], run["versions"]
        name = device["cpu"] if device["type"] == "cpu" else device["name"]
        machines.append(f"{name}, torch {versions['torch']}")
    return f"{record.content['size']} size; {'; '.join(dict.fromkeys(machines))}"


def tables(record: Record) -> str:
    """All of them, in Markdown."""
    experiment = load(record.content["experiment"])
    done = f"{len(record.results)} runs, {record.seconds / 3600:.1f} hours of their time beside other work"
    head = [f"**{experiment.TITLE}** ({note(record)}; {done})", "", f"Size: {record.settings['about']}", ""]
    return "\n".join([*head, *experiment.tables(record.settings, record.results)]) + "\n"


def _described(record: Record) -> str:
    """What the picture says of the results and settings that it was drawn from."""
    told = {name: record.content[name] for name in ("experiment", "size", "settings")}
    text = json.dumps([told, record.results], sort_keys=True)
    return png.description(record.path.stem, hashlib.sha256(text.encode()).hexdigest()[:16])


def draw(record: Record) -> Path:
    """Draw the figure beside the record; where it is."""
    path = record.path.with_suffix(".png")
    figure = load(record.content["experiment"]).figure(record.settings, record.results, note(record))
    figure.savefig(path, metadata={png.KEY: _described(record)})
    return path


def is_drawn(record: Record) -> bool:
    """Whether the figure beside the record is of these results."""
    path = record.path.with_suffix(".png")
    return path.exists() and png.described(path) == _described(record)


def show(record: Record, console: Console) -> None:
    """Print the tables, and write them and the plot."""
    text = tables(record)
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    path = record.path.with_suffix(".md")
    path.write_text(text, encoding="utf-8")
    drawn = draw(record)
    for written in (record.path, path, drawn):
        console.print(f"Wrote {written}", highlight=False, markup=False, soft_wrap=True)
