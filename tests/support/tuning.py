"""Tuning without a device: a clock that is put forward by hand, kernels whose times are a formula, boards' numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.aot.targets import TARGETS
from triton_bnlstm.kernels import errors
from triton_bnlstm.kernels.config import Config, Device
from triton_bnlstm.tuning import choice, online, ranks, shipped, space
from triton_bnlstm.tuning.device import Provenance, triton_version
from triton_bnlstm.tuning.entry import MEASURED, Candidate, Entry
from triton_bnlstm.tuning.tuner import Unfit
from triton_bnlstm.tuning.work import Layout, Work

H100 = TARGETS["sm90"].device
A100 = TARGETS["sm80"].device
CPU = torch.device("cpu")
WORK = Work("forward", 512, 64, 1, torch.bfloat16)
BY = Provenance("a board", "1.0", torch.__version__, triton_version())


@dataclass
class Clock:
    """Seconds that pass when somebody says so."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def as_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """With an empty cache, whose folder it gives; nothing is shipped, tuned, asked or told."""
    monkeypatch.setenv("TRITON_BNLSTM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(errors, "_told", set())
    monkeypatch.setattr(shipped, "get", lambda identity, key: None)
    monkeypatch.setattr(online, "_done", set())
    monkeypatch.setattr(ranks, "_group", None)
    monkeypatch.setattr(choice, "_stores", {})
    choice.forget()
    yield tmp_path
    choice.forget()


def microseconds(layout: Layout) -> float:
    """Eight units are best, where the default has four; streaming costs, and so do launches."""
    assert isinstance(layout, Config)
    return 4 + abs(layout.units - 8) / 8 + (0 if layout.resident else 1) + (0 if layout.sequence else 3)


@dataclass
class FakeBench:
    """A bench whose kernels take what a formula says.

    Attributes:
        work, numbers: what and where.
        time: of a layout, microseconds.
        clock: is put forward by what compiling and running take.
        compiling: seconds.
        unfit: reasons, by layout, why it cannot run.
        noise: multiplies the time of sample number k.
        prepared, sampled: what was asked for.
    """

    work: Work = WORK
    numbers: Device = H100
    time: Callable[[Layout], float] = microseconds
    clock: Clock = field(default_factory=Clock)
    compiling: float = 1.0
    unfit: dict[Layout, str] = field(default_factory=dict)
    noise: Callable[[int], float] = lambda k: 1.0
    prepared: list[Layout] = field(default_factory=list)
    sampled: list[Layout] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.default = space.analytic(self.numbers, self.work)

    def structures(self) -> Iterable[Layout]:
        return space.structures(self.numbers, self.work)

    def neighbours(self, layout: Layout) -> Iterable[Layout]:
        return [each for each in space.neighbours(layout) if space.why_not(self.numbers, self.work, each) is None]

    def prepare(self, layout: Layout) -> None:
        self.prepared.append(layout)
        self.clock.now += self.compiling
        if layout in self.unfit:
            raise Unfit(self.unfit[layout])

    def sample(self, layout: Layout) -> float:
        assert layout in self.prepared
        self.sampled.append(layout)
        seconds = 1e-6 * self.time(layout) * self.noise(len(self.sampled))
        self.clock.now += seconds
        return seconds


class FakeStore(dict[str, bytes]):
    """The store of a process group, and how often it was asked and told."""

    asked = told = 0

    def said(self) -> list[bytes]:
        """Rank 0's answers, without the name of its group."""
        return [text for name, text in self.items() if not name.endswith("/group")]

    def set(self, name: str, value: str) -> None:
        self.told += 1
        self[name] = value.encode()

    def check(self, names: list[str]) -> bool:
        self.asked += 1
        return all(name in self for name in names)


def entry(
    work: Work = WORK,
    *,
    numbers: Device = H100,
    at: float = 1e9,
    by: Provenance = BY,
    faster: float = 1.25,
    layout: Layout | None = None,
) -> Entry:
    """What a tuning of this work may have found."""
    default = space.analytic(numbers, work)
    found = layout or next(each for each in space.structures(numbers, work) if each != default)
    tried = (Candidate(default, 5.0, 5.0, 15), Candidate(found, 5.0 / faster, 5.0, 15))
    case = {"hidden": work.hidden, "batch": work.batch, "columns": work.columns}
    return Entry(work.key, found, MEASURED, at, by, default, case, tried)


def changed(**changes: Any) -> dict[str, Any]:
    """An entry's JSON with some fields changed, also deep ones: layout__units=3."""
    told = entry().as_json()
    for name, value in changes.items():
        place = told
        *path, last = name.split("__")
        for part in path:
            place = place[part]
        place[last] = value
    return told
