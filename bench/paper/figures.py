"""Tables and plots of a record, beside it and on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

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
    done = f"{len(record.results)} runs, {record.seconds / 3600:.1f} hours of computing"
    head = [f"**{experiment.TITLE}** ({note(record)}; {done})", "", f"Size: {record.settings['about']}", ""]
    return "\n".join([*head, *experiment.tables(record.settings, record.results)]) + "\n"


def plot(record: Record) -> Path:
    """Draw the plot; where it is."""
    path = record.path.with_suffix(".png")
    load(record.content["experiment"]).plot(record.settings, record.results, path, note(record))
    return path


def show(record: Record, console: Console) -> None:
    """Print the tables, and write them and the plot."""
    text = tables(record)
    console.print(text, highlight=False, markup=False)
    path = record.path.with_suffix(".md")
    path.write_text(text, encoding="utf-8")
    drawn = plot(record)
    for written in (record.path, path, drawn):
        console.print(f"Wrote {written}", highlight=False, markup=False, soft_wrap=True)
