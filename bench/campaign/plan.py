"""What a campaign does, in order."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ..cases import CASES, HOT, Case
from ..providers import PROVIDERS, usual


@dataclass(frozen=True)
class Item:
    """One thing to do.

    Attributes:
        kind: a function of `worker`.
        case: what it is about, if anything.
        estimate_s: it is not begun when less time is left.
        options: further arguments of the function, JSON's own types.
        fresh: it needs a process of its own.
    """

    kind: str
    case: Case | None = None
    estimate_s: float = 20.0
    options: dict[str, Any] = field(default_factory=dict)
    fresh: bool = False

    @property
    def key(self) -> str:
        """What the record knows it by."""
        parts = [self.kind, *([self.case.key] if self.case else []), *([",".join(self.options.get("providers", []))])]
        return " ".join(part for part in parts if part)

    @property
    def title(self) -> str:
        """The same for people: providers only where they are not the usual ones."""
        if self.case is None or self.options.get("providers") != usual(self.case):
            return self.key
        return f"{self.kind} {self.case.key}"

    def as_json(self) -> dict[str, Any]:
        """What a worker is sent."""
        return {"kind": self.kind, "case": self.case.as_json() if self.case else None, **self.options}


# Seconds without a word from a worker, in which it must have compiled a kernel or a step, after which it hangs. A
# kernel whose programs do not meet stops by itself after 10.
SILENCE_S = 150.0
# What is compiled for timing is compiled before, by many processes at once.
WARMED = ("sequence", "step", "sequence, recompute", "compiled step")
FIRST_CALLS = ("sequence", "compiled step", "nn.LSTM")


def items() -> list[Item]:
    """All items but the tests and the warming up. Tuning tells what to doubt; nothing that is timed depends on it."""

    def bench(case: Case) -> Item:
        return Item("bench", case, 20.0 if case.steps <= 200 else 30.0, {"providers": usual(case)})

    first, rest = CASES[:5], CASES[5:]
    found = [Item("ceilings", estimate_s=15.0)]
    found += [bench(case) for case in first]
    found += [Item("tune", case, 65.0, {"seconds": 60.0}) for case in HOT]
    found += [Item("stages", case, 40.0) for case in HOT]
    found += [Item("profile", case, 20.0, fresh=True) for case in HOT]
    found += [bench(case) for case in rest[:9]]
    found += [Item("first_call", HOT[0], 60.0, {"providers": [name]}, fresh=True) for name in FIRST_CALLS]
    found += [Item("counters", case, 45.0) for case in HOT]
    found += [bench(case) for case in rest[9:16]]
    limit = PROVIDERS["compiled loop"].limit_s or 0.0
    found += [Item("bench", HOT[0], limit + 20, {"providers": ["compiled loop"]}, fresh=True)]
    found += [bench(case) for case in rest[16:]]
    return found


def toy_items() -> list[Item]:
    """The same at sizes for an interpreter, each once."""
    options: dict[str, dict[str, Any]] = {
        "tune": {"most": 2, "rounds": 1, "seconds": 9.0},
        "bench": {"rounds": 1},
        "stages": {"rounds": 1},
    }
    found: dict[str, Item] = {}
    for item in items():
        case = item.case.toy() if item.case else None
        toy = Item(item.kind, case, 0.0, {**item.options, **options.get(item.kind, {})}, item.fresh)
        found.setdefault(toy.key, toy)
    return list(found.values())


def warm_items(todo: list[Item], most: int) -> list[Item]:
    """What compiles much: neighbours and variants of kernels, and the first cases that will be timed."""
    found = [replace(item, options={**item.options, "rounds": 1}) for item in todo if item.kind in ("tune", "stages")]
    cases = dict.fromkeys(item.case for item in todo if item.kind == "bench" and item.case)
    options = {"providers": list(WARMED)}
    return [*found, *(Item("warm", case, 0.0, options) for case in cases)][:most]
