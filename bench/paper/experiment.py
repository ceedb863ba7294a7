"""What an experiment is: settings by size, jobs, and what is made of their results."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Settings = dict[str, Any]  # JSON: what a size is made of
Results = dict[str, Any]  # what a job returned, by its key
Report = Callable[[float], None]

# in the order in which the page tells of them; a name on the command line is the module's with dashes
NAMES = ("gradient_flow", "convergence", "statistics", "lengths", "evaluation")
SIZES = ("quick", "reduced", "full")


class Job(NamedTuple):
    """One part that is run as a whole, in a process of its own, and whose result is kept.

    key: its name in the record. arguments: JSON. work: how much it is, in any unit that all jobs of the experiment
    share; the job reports as much by the end.
    """

    key: str
    arguments: dict[str, Any]
    work: float


class Experiment(Protocol):
    """The names that an experiment's module has.

    Attributes:
        TITLE: one line.
        SIZES: settings for "quick" (does it run?), "reduced" (what a CPU does in reasonable time; "reduction" says what
            is smaller than in "full") and "full".
    """

    TITLE: str
    SIZES: dict[str, Settings]

    def jobs(self, settings: Settings, results: Results) -> list[Job]:
        """All jobs that are known by now: later ones may depend on earlier results, as after a grid of rates."""

    def run(self, arguments: dict[str, Any], settings: Settings, device: str, report: Report) -> dict[str, Any]:
        """One job's result, JSON. It reports how much work has been done since the last report."""

    def tables(self, settings: Settings, results: Results) -> list[str]:
        """Lines of Markdown, from complete results or from a part of them."""

    def summary(self, settings: Settings, results: Results) -> list[str]:
        """A few lines of Markdown for README, from complete results."""

    def figure(self, settings: Settings, results: Results, note: str) -> Figure:
        """The figure. note: the device and size, for a place below the title."""


def load(name: str) -> Experiment:
    """The experiment of one of NAMES."""
    return cast(Experiment, importlib.import_module(f"{__package__}.{name}"))
