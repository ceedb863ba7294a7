"""What a campaign leaves: one JSON file per device, which the report reads and the next campaign goes on from.

    schema        of this layout: 1
    dry_run       true: toy sizes on a CPU, in the interpreter; figures mean nothing
    device        name, slug, capability, multiprocessors, memory_bytes, l2_bytes, driver
    versions      of python, torch, cuda, cudnn, triton, numpy, triton_bnlstm
    runs          one per command: command, utc, seconds, source, code, commit, seed, load, state (clock, temperature
                  and power at its end), and what may change from one to the next: driver, limits, cpu, python, numpy
    tests         passed, failed (a message by test), skipped, unfinished; seen: those that passed or were skipped;
                  source, code
    ceilings      figures of `ceilings.Ceilings`, and source
    cases         fields of `cases.Case` by key
    results       one per case and provider, see `Result`
    layouts       tuning: one per case and way, candidates with their times; entry and device: as the library keeps them
    stages        where the time goes: one per case and way, times with one stage left out
    kernels       device time of each kernel of a training step, as the profiler saw it; one per case
    first_calls   seconds of the first training step in a new process: one per case and provider
    troubles      items of the plan that failed as a whole, and why
    done          items of the plan that need not be run again for this source; not ok: only for this code

"source" is a fingerprint of the library's files, so that a figure of other kernels is never taken for one of these;
"code" one of benchmarks and tests too, so that what failed is tried again once any of them has changed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton_bnlstm

from .cases import Case

SCHEMA = 1
FILE = "campaign.json"
RESULTS = Path(__file__).parent / "results"
LISTS = ("runs", "results", "layouts", "stages", "kernels", "first_calls", "troubles", "done")

# What became of a provider in a case. Only "ok" has times.
OK = "ok"
CANNOT = "cannot"  # it has no such thing, and says so
WRONG = "wrong"  # its outputs or gradients are off, so it was not timed
FAILED = "failed"  # an error, a crash or a hang
WITHHELD = "withheld"  # its tests failed on this device, so it was not timed
STATUSES = (OK, CANNOT, WRONG, FAILED, WITHHELD)


def _told(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value not in (None, "", {})}


@dataclass
class Timing:
    """Of one mode. Device microseconds of a call: median, 20th and 80th percentile; wall microseconds: median.

    how: "graph" (a CUDA graph's replays) or "events" (between events around the call); "cpu" without a GPU, where the
        figure is wall time.
    samples_us: all of them; not stored.
    """

    us: tuple[float, float, float]
    rounds: int
    how: str
    wall_us: float | None = None
    floor_us: float | None = None
    samples_us: list[float] = field(default_factory=list)

    @property
    def of_floor(self) -> float | None:
        """Device time as a multiple of the least one."""
        return self.us[0] / self.floor_us if self.floor_us else None


@dataclass
class Result:
    """One provider in one case.

    Attributes:
        case: key of the case. provider: its name.
        status, why: what became of it, and the reason where it is not "ok".
        modes: times by mode.
        errors: largest relative RMS error against float64 by what was compared ("outputs", "gradients", "inference").
        saved_bytes: kept from forward for backward. peak_bytes: most memory of a training step besides what was there.
        first_call_s: seconds of the process's first training step, with what the compilers' caches did not hold.
        layout: of the kernels, forward and backward.
        source: fingerprint of the library.
    """

    case: str
    provider: str
    status: str = OK
    why: str = ""
    modes: dict[str, Timing] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    first_call_s: float | None = None
    layout: dict[str, Any] | None = None
    source: str = ""

    def as_json(self) -> dict[str, Any]:
        """Its fields, without those that say nothing."""
        found = asdict(self)
        for timing in found["modes"].values():
            del timing["samples_us"]
        found["modes"] = {mode: _told(timing) for mode, timing in found["modes"].items()}
        return _told(found)

    @classmethod
    def of_json(cls, fields: dict[str, Any]) -> Result:
        """The same again."""
        modes = {
            mode: Timing(**{**timing, "us": tuple(timing["us"])}) for mode, timing in fields.get("modes", {}).items()
        }
        return cls(**{**fields, "modes": modes})


def source() -> str:
    """Fingerprint of the library's Python files."""
    found = hashlib.sha256()
    package = Path(triton_bnlstm.__file__).parent
    for path in sorted(package.rglob("*.py")):
        found.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def code() -> str:
    """Fingerprint of all that decides what a campaign finds: library, benchmarks and tests."""
    found = hashlib.sha256(source().encode())
    root = Path(__file__).parents[1]
    for path in sorted(p for folder in ("bench", "tests") for p in (root / folder).rglob("*.py")):
        found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def empty() -> dict[str, Any]:
    """A record of nothing yet."""
    record: dict[str, Any] = {"schema": SCHEMA, "dry_run": False, "device": {}, "versions": {}, "tests": {}}
    return record | {"ceilings": {}, "cases": {}} | {name: [] for name in LISTS}


def identity(entry: dict[str, Any]) -> tuple[Any, ...]:
    """What an entry of a list is about; a new one takes an old one's place."""
    return tuple(entry.get(name) for name in ("case", "provider", "way"))


def add_floors(record: dict[str, Any]) -> None:
    """Every time's least one, from the device's ceilings."""
    from .ceilings import Ceilings
    from .floor import floor

    if not record["ceilings"] or not record["device"].get("multiprocessors"):
        return
    ceilings = Ceilings.of_json(record["ceilings"])
    least: dict[tuple[str, str], float | None] = {}
    for fields in record["results"]:
        for mode, timing in fields.get("modes", {}).items():
            key = fields["case"], mode
            if key not in least:
                try:
                    found = floor(Case(**record["cases"][key[0]]), mode, ceilings, record["device"]["multiprocessors"])
                except (ArithmeticError, KeyError, TypeError):  # a ceiling measured as nothing, a case not described
                    found = None
                least[key] = None if found is None else 1e6 * found.total_seconds
            timing["floor_us"] = least[key]


def results_of(record: dict[str, Any]) -> list[Result]:
    """Its results."""
    return [Result.of_json(fields) for fields in record["results"]]


def read(path: Path) -> dict[str, Any]:
    """The record in this file.

    Raises:
        ValueError: it is none, or of another layout.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); move it away to begin anew") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ValueError(f"{path}: not a campaign's record of schema {SCHEMA}")
    return empty() | record


def write(path: Path, record: dict[str, Any]) -> None:
    """Replace the file at once: whoever stops the campaign finds the old record or the new one."""

    def finite(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}") if math.isfinite(value) else None
        if isinstance(value, dict):
            return {key: finite(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [finite(each) for each in value]
        return value

    lines = []
    for key, value in record.items():
        value = finite(value)
        if isinstance(value, list) and value:  # one entry a line: compact, and a change shows where it is
            entries = ",\n".join(f"  {json.dumps(entry, ensure_ascii=False)}" for entry in value)
            lines.append(f" {json.dumps(key)}: [\n{entries}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    beside = path.with_name(path.name + ".new")
    beside.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    os.replace(beside, path)


# What makes figures of two runs comparable. Driver, limits and the rest are noted with each run.
SAME_DEVICE = ("name", "type", "capability", "multiprocessors")
SAME_VERSIONS = ("torch", "cuda", "hip", "cudnn", "triton")


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What keeps a campaign from going on with an earlier record: "torch 2.10.0 → 2.11.0" and so on."""
    pairs = [("device", name) for name in SAME_DEVICE] + [("versions", name) for name in SAME_VERSIONS]
    found = [] if before["dry_run"] == now["dry_run"] else [f"dry run {before['dry_run']} → {now['dry_run']}"]
    for part, name in pairs:
        old, new = before[part].get(name), now[part].get(name)
        if old != new:
            found.append(f"{name} {old} → {new}")
    return found


def committed(results: Path = RESULTS) -> list[Path]:
    """Records of all devices under `results`."""
    return sorted(results.glob(f"*/{FILE}"))
