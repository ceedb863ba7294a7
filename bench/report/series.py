"""What the plots show, picked from a record without drawing: the tables link only to plots that have something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from bench import records
from bench.cases import Case

from .campaign import CUDNN, RIVALS, SHOWN_MODES, Campaign, Ratio, StepTime, selected_as, usable

HIDDEN, LENGTH, MEMORY = "step_time_hidden.png", "step_time_length.png", "memory.png"
RATIOS, RATIOS_ALL = "ratios.png", "ratios_all.png"
PLOTS = (HIDDEN, LENGTH, MEMORY, RATIOS, RATIOS_ALL)
OURS = "ours"  # a line of what the library chooses
UNDRAWN = ("sequence", "sequence, recompute", "compiled loop")  # the first is in "ours"
MOST_BARS = 25
BROKEN = (records.WRONG, records.FAILED, records.WITHHELD)


@dataclass(frozen=True)
class Panel:
    """Step times against one size.

    Attributes:
        title: of the panel.
        lines: points by provider, smallest size first; None where others have a time and this one does not.
        crosses: sizes at which a provider was wrong, failed or was withheld.
        floor: the least times.
    """

    title: str
    lines: dict[str, list[tuple[int, StepTime | None]]] = field(default_factory=dict)
    crosses: dict[str, list[int]] = field(default_factory=dict)
    floor: list[tuple[int, float]] = field(default_factory=list)

    @property
    def places(self) -> list[int]:
        """All sizes that have a point or a cross."""
        points = (x for line in self.lines.values() for x, _ in line)
        return sorted({*points, *(x for line in self.crosses.values() for x in line)})


@dataclass(frozen=True)
class Bars:
    """Bytes of one case: peak and kept for backward, by provider."""

    key: str
    bytes: dict[str, tuple[float | None, float | None]]


@dataclass(frozen=True)
class Ratios:
    """Ratios against one other, worst first, and of how many cases there are any."""

    title: str
    ratios: list[Ratio]
    all: int


def _plain_square(case: Case) -> bool:
    plain = case.layers == 1 and not case.bidirectional and not case.cell_norm and case.lengths == "equal"
    return plain and case.precision == "bfloat16" and case.columns == case.hidden and case.batch == 64


def _panel(
    campaign: Campaign, mode: str, title: str, wanted: Callable[[Case], bool], x: Callable[[Case], int]
) -> Panel:
    planned = {key: selected_as(key, case) for key, case in campaign.cases.items()}
    keys = sorted((key for key in campaign.measured if wanted(planned[key])), key=lambda key: x(planned[key]))
    times: dict[str, dict[str, StepTime]] = {}
    panel = Panel(title)
    for name in (OURS, *(provider for provider in campaign.providers if provider not in UNDRAWN)):
        for key in keys:
            provider = campaign.chosen(key) if name == OURS else name
            result, time = campaign.results.get((key, provider)), campaign.time(key, provider, mode)
            if time is not None:
                times.setdefault(name, {})[key] = time
            elif result is not None and result.status in BROKEN:
                panel.crosses.setdefault(name, []).append(x(planned[key]))
    by_anybody = [key for key in keys if any(key in of_provider for of_provider in times.values())]
    for name, of_provider in times.items():
        panel.lines[name] = [(x(planned[key]), of_provider.get(key)) for key in by_anybody]
    floors = ((x(planned[key]), campaign.floor(key, mode)) for key in by_anybody)
    panel.floor.extend((place, floor) for place, floor in floors if floor is not None)
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


def _chosen(campaign: Campaign, found: list[Ratio]) -> list[Ratio]:
    """Those of the leading cases and those in which ours is slower; of these only the worst if they are too many."""
    leading = [ratio for ratio in found if ratio.key in campaign.leading]
    others = [ratio for ratio in found if ratio.losing and ratio not in leading]
    wanted = [*leading, *others][:MOST_BARS] or found[:MOST_BARS]
    return [ratio for ratio in found if ratio in wanted]


def ratios(campaign: Campaign, *, every: bool = False) -> list[Ratios]:
    """Ours over cuDNN and over the compiled step, in training and inference; `every` case or the telling ones."""
    panels = []
    for mode in SHOWN_MODES:
        for rival in RIVALS:
            found = campaign.ratios(mode, rival)
            if found:
                name = "cuDNN (no batch norm)" if rival == CUDNN else rival
                shown = found if every else _chosen(campaign, found)
                panels.append(Ratios(f"{mode}: ours / {name}", shown, len(found)))
    return panels


def all_ratios(campaign: Campaign) -> list[Ratios]:
    """Those of every case, if `ratios` leaves some out."""
    left_out = any(len(panel.ratios) < panel.all for panel in ratios(campaign))
    return ratios(campaign, every=True) if left_out else []


CONTENTS: dict[str, Callable[[Campaign], list[Panel] | list[Bars] | list[Ratios]]] = {
    HIDDEN: against_hidden,
    LENGTH: against_length,
    MEMORY: memory,
    RATIOS: ratios,
    RATIOS_ALL: all_ratios,
}


def available(campaign: Campaign) -> list[str]:
    """File names of the plots that have something to show."""
    return [name for name in PLOTS if CONTENTS[name](campaign)]
