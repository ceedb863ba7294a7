"""The command line of tuning on a machine that is made up: its cache, its device, and what that measures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.aot.targets import TARGETS
from triton_bnlstm.kernels.config import Device
from triton_bnlstm.tuning import choice, commands, contents, machine, screens, shipped, space
from triton_bnlstm.tuning.device import Identity, Provenance, triton_version
from triton_bnlstm.tuning.entry import MEASURED, Candidate, Entry
from triton_bnlstm.tuning.machine import Here
from triton_bnlstm.tuning.screens import NO_DEVICE
from triton_bnlstm.tuning.store import Store
from triton_bnlstm.tuning.tuner import Unfit
from triton_bnlstm.tuning.work import Layout, Work

H100, A100 = TARGETS["sm90"].device, TARGETS["sm80"].device
CPU = torch.device("cpu")
FORWARD = Work("forward", 512, 64, 1, torch.bfloat16)
BACKWARD = Work("backward", 512, 64, 2, torch.bfloat16, "ieee", ("cell_norm",))
MOMENTS = Work.of_moments(512, 64, 1, torch.bfloat16, centre=True)
SIZES = ["tune", "--hidden", "64", "--batch", "32", "--dtype", "bf16"]
TUNE = [*SIZES, "--lengths", "equal", "--kernels", "forward,backward,inference,moments"]
BY = Provenance("NVIDIA H100 80GB HBM3", "580.10", "2.9.0", triton_version())


def cache_without_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache's folder, on a machine that has no accelerator and no shipped layouts."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TRITON_BNLSTM_CACHE_DIR", str(folder))
    for name in ("TRITON_BNLSTM_AUTOTUNE", "TRITON_BNLSTM_AUTOTUNE_SECONDS", "TRITON_BNLSTM_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine, "find", no_device)
    monkeypatch.setattr(machine, "find_all", list)
    monkeypatch.setattr(contents, "shipped_texts", list)
    choice.forget()
    yield folder
    choice.forget()


def no_device(name: str | None = None) -> Here:
    """In the place of `machine.find`."""
    raise screens.Failure("torch sees no accelerator on this machine", NO_DEVICE)


Use = Callable[[Callable[[Work, torch.device], Any]], None]


class FakeBench:
    """The fewer units, the faster; nothing is compiled or run."""

    def __init__(self, work: Work, numbers: Device = H100, slow: Iterable[Layout] = (), times: float = 2) -> None:
        self.work, self.numbers, self.slow, self.times = work, numbers, tuple(slow), times
        self.default = space.analytic(numbers, work)
        self.unfit: dict[Layout, str] = {}

    def structures(self) -> Iterable[Layout]:
        return space.structures(self.numbers, self.work)[:5]

    def neighbours(self, layout: Layout) -> Iterable[Layout]:
        found = list(space.neighbours(layout))[:3]
        return [each for each in found if space.why_not(self.numbers, self.work, each) is None]

    def prepare(self, layout: Layout) -> None:
        if layout in self.unfit:
            raise Unfit(self.unfit[layout])

    def sample(self, layout: Layout) -> float:
        size: int = getattr(layout, "units", 0) or getattr(layout, "columns", 1)
        warps: int = getattr(layout, "warps", 1)
        return 1e-6 * (3 + size / 8 + warps / 100) * (self.times if layout in self.slow else 1)


def device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> Use:
    """An H100 that is not there, and what its bench is made by."""
    here = Here(CPU, H100, "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(machine, "find", lambda name=None: here)
    monkeypatch.setattr(machine, "find_all", lambda: [here])
    monkeypatch.setattr(machine, "why_not_measured", lambda device, dtype: None)

    def is_settled(work: Work, numbers: Device, known: Entry | None) -> bool:
        tried = {each.layout for each in known.candidates} if known else set()
        return tried.issuperset(FakeBench(work).structures())

    monkeypatch.setattr(machine, "is_settled", is_settled)

    def use(make: Callable[[Work, torch.device], Any]) -> None:
        monkeypatch.setattr(machine, "make_bench", make)

    use(lambda work, device: FakeBench(work))
    return use


def made(
    work: Work = FORWARD,
    *,
    device: Device = H100,
    layout: Layout | None = None,
    how: str = MEASURED,
    by: Provenance = BY,
    source: str | None = None,
    us: float = 3.2,
) -> Entry:
    """An entry with times that nobody has taken."""
    default = space.analytic(device, work)
    others = [each for each in space.structures(device, work) if each != default]
    layout = layout or others[0]
    candidates = (
        Candidate(default, 4.1, 4.1, 15),
        Candidate(layout, us, 4.1, 15),
        Candidate(others[1], failed="it needs 300000 bytes of shared memory,\n232448 are there"),
    )
    key = work.key if source is None else work.key._replace(source=source)
    case = {"hidden": work.hidden, "batch": work.batch, "columns": work.columns, "steps": 32}
    return Entry(key, layout, how, 1.75e9, by, default, case, candidates if how == MEASURED else ())


def put(root: Path, *entries: Entry, device: Device = H100) -> None:
    """Keep entries in a cache."""
    store = Store(Identity.of(device), root)
    for entry in entries:
        assert store.put(entry)


def run(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of a command."""
    code = commands.main(list(arguments))
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def words(text: str) -> str:
    """A screen without its line breaks, which are where the terminal ends."""
    return " ".join(text.split())


def run_json(capsys: Any, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and what it says in JSON."""
    code, out, _ = run(capsys, *arguments, "--json")
    return code, json.loads(out)


def folder_of(root: Path, device: Device = H100) -> Path:
    """Where a device's files are."""
    folder = Store(Identity.of(device), root).folder
    assert folder is not None
    return folder


def ship(monkeypatch: pytest.MonkeyPatch, *entries: Entry, device: Device = H100) -> None:
    """These come with the package, and nothing else."""
    told = {str(each.key): each.as_json() for each in entries}
    monkeypatch.setattr(contents, "shipped_texts", lambda: [shipped.text_of({Identity.of(device): told})])
