"""What the plots show, picked from a record without drawing: the tables link only to plots that have something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from bench.cases import Case

from .campaign import CUDNN, RIVALS, SHOWN_MODES, Campaign, Ratio, StepTime, selected_as, usable

HIDDEN, LENGTH, MEMORY, RATIOS = "step_time_hidden.png", "step_time_length.png", "memory.png", "ratios.png"
PLOTS = (HIDDEN, LENGTH, MEMORY, RATIOS)


@dataclass(frozen=True)
class Panel:
    """Step times against one size: points by provider."""

    title: str
    lines: dict[str, list[tuple[int, StepTime]]] = field(default_factory=dict)

    @property
    def places(self) -> list[int]:
        """All sizes that have a point."""
        return sorted({x for points in self.lines.values() for x, _ in points})


@dataclass(frozen=True)
class Bars:
    """Bytes of one case: peak and kept for backward, by provider."""

    key: str
    bytes: dict[str, tuple[float | None, float | None]]


@dataclass(frozen=True)
class Ratios:
    """Ratios of all cases against one other, worst first."""

    title: str
    ratios: list[Ratio]


def _plain_square(case: Case) -> bool:
    plain = case.layers == 1 and not case.bidirectional and not case.cell_norm and case.lengths == "equal"
    return plain and case.precision == "bfloat16" and case.columns == case.hidden and case.batch == 64


def _panel(
    campaign: Campaign, mode: str, title: str, wanted: Callable[[Case], bool], x: Callable[[Case], int]
) -> Panel:
    panel = Panel(title)
    for provider in campaign.providers:
        points = []
        for key, case in campaign.cases.items():
            planned, time = selected_as(key, case), campaign.time(key, provider, mode)
            if wanted(planned) and time is not None:
                points.append((x(planned), time))
        if points:
            panel.lines[provider] = sorted(points, key=lambda point: point[0])
    return panel


def _worth(panels: list[Panel]) -> list[Panel]:
    """Those with anything, if any has more than one size: a single one is in the tables."""
    return [panel for panel in panels if panel.lines] if any(len(panel.places) > 1 for panel in panels) else []


def against_hidden(campaign: Campaign) -> list[Panel]:
    """Training and inference against H, at B = 64, T = 100, D = H."""
    return _worth(
        [
            _panel(campaign, mode, mode, lambda case: _plain_square(case) and case.steps == 100, lambda c: c.hidden)
            for mode in SHOWN_MODES
        ]
    )


def against_length(campaign: Campaign) -> list[Panel]:
    """Training and inference against T, at 64 × 512 and 64 × 1024, D = H."""
    panels = []
    for hidden in (512, 1024):
        for mode in SHOWN_MODES:

            def wanted(case: Case, hidden: int = hidden) -> bool:
                return _plain_square(case) and case.hidden == hidden

            panels.append(_panel(campaign, mode, f"{mode}, 64 × {hidden}", wanted, lambda case: case.steps))
    return _worth(panels)


def memory(campaign: Campaign) -> list[Bars]:
    """Of the leading cases, or the first few if none of them has been measured."""
    found = []
    for key in campaign.leading or campaign.measured[:8]:
        bars = {}
        for provider in campaign.providers:
            result = campaign.results.get((key, provider))
            if result is not None and (usable(result.peak_bytes) or usable(result.saved_bytes)):
                bars[provider] = (usable(result.peak_bytes), usable(result.saved_bytes))
        if bars:
            found.append(Bars(key, bars))
    return found


def ratios(campaign: Campaign) -> list[Ratios]:
    """Ours over cuDNN and over the compiled step, in training and inference."""
    panels = []
    for mode in SHOWN_MODES:
        for rival in RIVALS:
            found = campaign.ratios(mode, rival)
            if found:
                name = "cuDNN (no batch norm)" if rival == CUDNN else rival
                panels.append(Ratios(f"{mode}: ours / {name}", found))
    return panels


CONTENTS: dict[str, Callable[[Campaign], list[Panel] | list[Bars] | list[Ratios]]] = {
    HIDDEN: against_hidden,
    LENGTH: against_length,
    MEMORY: memory,
    RATIOS: ratios,
}


def available(campaign: Campaign) -> list[str]:
    """File names of the plots that have something to show."""
    return [name for name in PLOTS if CONTENTS[name](campaign)]
