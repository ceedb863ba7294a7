"""What tuning has found for one key, and its JSON."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from .device import Provenance
from .work import Key, Layout, key_of_json, layout_as_json, layout_of_json

MODELLED, MEASURED = "modelled", "measured"
_MOST = 1 << 31  # of any size in a file
_DAY = 86400.0


class Candidate(NamedTuple):
    """One layout that was tried.

    layout: which. microseconds: median of a step (of a call, for the input side); None where `failed` says why there is
    none. standard: the default layout's median in the same rounds. rounds: how many.
    """

    layout: Layout
    microseconds: float | None = None
    standard: float | None = None
    rounds: int = 0
    failed: str = ""

    def as_json(self) -> dict[str, Any]:
        """Its fields, those that are empty left out."""
        told: dict[str, Any] = {"layout": layout_as_json(self.layout)}
        if self.microseconds is not None:
            told |= {"us": _short(self.microseconds), "default_us": _short(self.standard), "rounds": self.rounds}
        return told | ({"failed": self.failed} if self.failed else {})

    @classmethod
    def of_json(cls, kernel: str, fields: Any) -> Candidate:
        """From its JSON.

        Raises:
            ValueError: it is not one.
        """
        if not isinstance(fields, dict):
            raise ValueError("a candidate is an object")
        us, standard = fields.get("us"), fields.get("default_us")
        rounds, failed = fields.get("rounds", 0), fields.get("failed", "")
        for name, value in (("us", us), ("default_us", standard)):
            if value is not None and not _is_time(value):
                raise ValueError(f"{name}: {value!r} is no time")
        if type(rounds) is not int or not 0 <= rounds < _MOST or not isinstance(failed, str):
            raise ValueError("rounds is a number, failed a text")
        return cls(layout_of_json(kernel, fields.get("layout")), us, standard, rounds, failed)


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _is_time(value: Any) -> bool:
    """Whether it is a number, not NaN and within reason: JSON has integers of any size."""
    return type(value) in (int, float) and 0 < value < 1e15


@dataclass(frozen=True)
class Entry:
    """What is known for one key on one device.

    Attributes:
        key: for what.
        layout: the best one.
        how: "measured", or "modelled" where nothing was.
        at: when, in seconds since 1970.
        by: the device's name, driver, torch and Triton.
        case: sizes that were measured: hidden, batch, columns, steps.
        candidates: every layout that was tried.
        default: the analytic layout that it is compared with.
    """

    key: Key
    layout: Layout
    how: str
    at: float
    by: Provenance
    default: Layout
    case: dict[str, int] = field(default_factory=dict)
    candidates: tuple[Candidate, ...] = ()

    def candidate(self, layout: Layout) -> Candidate | None:
        """What is known of a layout."""
        return next((each for each in self.candidates if each.layout == layout), None)

    def later_than(self, known: Entry) -> Entry:
        """This entry, dated after one that was known when it was made, whose clock may be ahead."""
        if self.at > known.at or not is_believed(known.at):
            return self
        return replace(self, at=known.at + 0.002)

    @property
    def gain(self) -> float | None:
        """Time of the default that it was compared with over that of the layout, by turns; None: not taken."""
        return self.gain_over(self.default)

    def gain_over(self, other: Layout) -> float | None:
        """Time of another layout that was tried over that of the layout, as far as both were measured.

        Each was measured by turns with the default of then, whose time takes the rounds' differences out.
        """
        best, known = self.candidate(self.layout), self.candidate(other)
        if best is None or best.microseconds is None:
            return None
        if other == self.layout:
            return 1.0
        if best.standard is None:
            return None
        if other == self.default:
            return best.standard / best.microseconds
        if known is None or known.microseconds is None or known.standard is None:
            return None
        return (known.microseconds / known.standard) / (best.microseconds / best.standard)

    def as_json(self) -> dict[str, Any]:
        """Its fields."""
        return {
            "key": self.key.as_json(),
            "layout": layout_as_json(self.layout),
            "default": layout_as_json(self.default),
            "how": self.how,
            "at": _at(self.at),
            "by": self.by._asdict(),
            "case": self.case,
            "candidates": [each.as_json() for each in self.candidates],
        }

    @classmethod
    def of_json(cls, fields: Any) -> Entry:
        """From its JSON, every field looked at.

        Raises:
            ValueError: it is not one.
        """
        if not isinstance(fields, dict):
            raise ValueError("an entry is an object")
        key = key_of_json(fields.get("key"))
        how, case = fields.get("how"), fields.get("case", {})
        at: Any = fields.get("at")
        candidates = fields.get("candidates", [])
        if how not in (MODELLED, MEASURED):
            raise ValueError(f"how: {how!r} is neither {MODELLED} nor {MEASURED}")
        if not (_is_time(at) or (type(at) in (int, float) and at == 0)):  # 0: nobody has measured
            raise ValueError(f"at: {at!r} is no time")
        if not isinstance(case, dict) or any(type(each) is not int or abs(each) > _MOST for each in case.values()):
            raise ValueError("case: sizes are numbers")
        if not isinstance(candidates, list):
            raise ValueError("candidates: no list")
        entry = cls(
            key,
            layout_of_json(key.kernel, fields.get("layout")),
            how,
            float(at),
            Provenance.of_json(fields.get("by")),
            layout_of_json(key.kernel, fields.get("default")),
            case,
            tuple(Candidate.of_json(key.kernel, each) for each in candidates),
        )
        best = entry.candidate(entry.layout)
        if how == MEASURED and (best is None or best.microseconds is None):
            raise ValueError("it is measured, and does not say how long it took")
        return entry


def merged(known: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Two entries of one key as JSON: the later one, with what only the earlier one has tried.

    Times of another Triton say nothing about this one's code: its candidates are left behind. What says that it will be
    measured tomorrow or later is from a clock that was wrong, and counts as the earliest: else nothing would replace
    it.
    """
    older, newer = sorted((known, new), key=_when)  # of equal ones the second is newer
    if _triton(older) != _triton(newer):
        return newer
    tried = _candidates(newer)
    layouts = [each.get("layout") for each in tried]
    more = [each for each in _candidates(older) if each.get("layout") not in layouts]
    return {**newer, "candidates": [*tried, *more]}


def _when(entry: dict[str, Any]) -> float:
    at = entry.get("at")
    return float(at) if isinstance(at, int | float) and is_believed(at) else 0.0


def is_believed(at: float) -> bool:
    """Clocks of hosts that share a cache may differ; not by a day."""
    return 0 < at <= time.time() + _DAY


def _at(seconds: float) -> float:
    """In a file. Never later than it is."""
    return math.floor(seconds * 1000) / 1000


def _triton(entry: dict[str, Any]) -> str:
    return ".".join(Provenance.of_json(entry.get("by")).triton.split(".")[:2])


def _candidates(entry: dict[str, Any]) -> list[dict[str, Any]]:
    found: Iterable[Any] = entry.get("candidates") or ()
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []
