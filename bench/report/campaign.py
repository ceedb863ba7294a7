"""One device's record, as tables and plots ask for it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import records
from bench.cases import CASES, HOT, Case
from bench.records import OK

from .text import plain

# Names in records, in the order in which they are shown.
LABELS = {
    "sequence": "ours, sequence mode",
    "step": "ours, step mode",
    "sequence, recompute": "ours, sequence mode, recompute",
    "sequence, device lengths": "ours, sequence mode, lengths on the device",
    "compiled step": "compiled step, CUDA graph",
    "compiled loop": "compiled loop",
    "reference": "reference, eager",
    "F.batch_norm loop": "F.batch_norm loop",
    "nn.LSTM": "cuDNN nn.LSTM (no batch norm)",
    "FlashRNN": "FlashRNN (no batch norm)",
    "Haste": "Haste (layer norm)",
}
SEQUENCE, STEP = "sequence", "step"
CUDNN, BASELINE = "nn.LSTM", "compiled step"
RIVALS = (CUDNN, BASELINE)
SHOWN_MODES = ("training", "inference")  # what users run; the other two are its parts
LISTS = ("layouts", "stages", "kernels", "first_calls", "troubles")  # of the record, besides results
DRY_RUN = "dry run: toy sizes on a CPU, no measurement"

_PLANNED = {case.key: case for case in CASES}
_ABSENT = re.compile(r"\S+ is not installed")
_REST = 2  # rank of cases that do not come first
_STATUS_ORDER = (records.WRONG, records.FAILED, records.WITHHELD, records.CANNOT, OK)


@dataclass(frozen=True)
class StepTime:
    """Device microseconds of one of T steps: median, 20th and 80th percentile; and as a multiple of the least time."""

    provider: str
    us: float
    low: float
    high: float
    of_floor: float | None
    how: str


@dataclass(frozen=True)
class Ratio:
    """Our time over another's, in one case and mode."""

    key: str
    mode: str
    rival: str
    ours: StepTime
    theirs: StepTime

    @property
    def value(self) -> float:
        """Of the medians; below 1 ours is faster."""
        return self.ours.us / self.theirs.us

    @property
    def low(self) -> float:
        """Our 20th percentile over the other's 80th."""
        return self.ours.low / self.theirs.high

    @property
    def high(self) -> float:
        """Our 80th percentile over the other's 20th."""
        return self.ours.high / self.theirs.low

    @property
    def losing(self) -> bool:
        """Ours is slower."""
        return self.value > 1

    @property
    def stepwise(self) -> bool:
        """Ours is step mode, since sequence mode cannot run."""
        return self.ours.provider == STEP


@dataclass(frozen=True)
class Reason:
    """Why figures are missing, once for all cases that share it."""

    status: str
    why: str
    keys: dict[str, list[str]]  # by provider


def usable(value: Any) -> float | None:
    """A figure that can be shown: a record has null where it was not finite."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    return float(value) if good else None


def label(provider: str) -> str:
    """Its name for readers."""
    return LABELS.get(provider, provider)


def sizes(case: Case) -> str:
    """B, H, T and D in a few letters."""
    return f"{case.batch} × {case.hidden}, T {case.steps}, D {case.columns}"


def inline_label(case: Case) -> str:
    """Everything about it in one line."""
    return (f"{case.name}: " if case.name else "") + ", ".join([sizes(case), *flags(case)])


def flags(case: Case) -> list[str]:
    """Everything besides the sizes that tells it from others."""
    found = [case.precision]
    found += [f"{case.layers} layers"] if case.layers > 1 else []
    found += ["bidirectional"] if case.bidirectional else []
    found += ["cell_norm"] if case.cell_norm else []
    unequal = {"uniform": "unequal lengths", "vowels": f"lengths 7 to {case.steps}"}
    found += [unequal[case.lengths]] if case.lengths in unequal else []
    return found


def selected_as(key: str, case: Case) -> Case:
    """The case as it was planned: a dry run has other sizes under the same key."""
    return _PLANNED.get(key, case)


class Campaign:
    """A record and where it lies.

    Attributes:
        path: of the record. record: what is in it.
        cases: by key, those of the paper and the field first. results: by key and provider.
        unknown: results whose case is nowhere described.
        absent: providers whose package is not installed. reasons: why figures are missing, mistakes first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = records.read(path)
        try:
            found = records.results_of(self.record)
            described = {key: Case(**fields) for key, fields in self.record["cases"].items()}
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: not as bench.records describes it: {plain(error)}") from error
        wanted = {result.case for result in found}
        known = {key: described.get(key, _PLANNED.get(key)) for key in wanted | set(described)}
        order = {key: k for k, key in enumerate(_PLANNED)}
        keys = sorted(known, key=lambda key: (_rank(known[key]), order.get(key, len(order)), key))
        self.cases = {key: case for key in keys if (case := known[key]) is not None}
        self.results = {(result.case, result.provider): result for result in found if result.case in self.cases}
        self.unknown = [result for result in found if result.case not in self.cases]
        self.absent = self._absent()
        self.reasons = self._reasons()
        self._index = {
            (key, provider): k
            for k, reason in enumerate(self.reasons)
            for provider, keys_of in reason.keys.items()
            for key in keys_of
        }

    @property
    def fingerprint(self) -> str:
        """Of all that the record says."""
        content = json.dumps(self.record, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def dry_run(self) -> bool:
        """Its figures mean nothing."""
        return bool(self.record["dry_run"])

    @property
    def name(self) -> str:
        """Of the device."""
        return plain(self.record["device"].get("name") or self.path.parent.name)

    @property
    def providers(self) -> list[str]:
        """All that have a result, in the order of `LABELS`, others after them; not those that are not installed."""
        names = {provider for _, provider in self.results} - set(self.absent)
        return [name for name in LABELS if name in names] + sorted(names - set(LABELS))

    @property
    def measured(self) -> list[str]:
        """Keys of cases with results."""
        wanted = {key for key, _ in self.results}
        return [key for key in self.cases if key in wanted]

    @property
    def leading(self) -> list[str]:
        """The measured cases that are shown first."""
        return [key for key in self.measured if _rank(self.cases[key]) < _REST]

    @property
    def sources(self) -> dict[str, int]:
        """How many results each fingerprint of the kernels has."""
        counts: dict[str, int] = {}
        for result in self.results.values():
            if result.source:
                counts[result.source] = counts.get(result.source, 0) + 1
        return counts

    @property
    def newest_source(self) -> str:
        """Fingerprint at the last run; empty if none was kept."""
        runs = [run.get("source") for run in reversed(self.entries("runs"))]
        return next((str(source) for source in [*runs, *reversed(self.sources)] if source), "")

    def entries(self, name: str) -> list[dict[str, Any]]:
        """One of the record's lists, without what is no entry."""
        return [entry for entry in self.record.get(name) or [] if isinstance(entry, dict)]

    def time(self, key: str, provider: str, mode: str) -> StepTime | None:
        """Of one step; None if there is no such figure."""
        result = self.results.get((key, provider))
        timing = result.modes.get(mode) if result is not None and result.status == OK else None
        median = usable(timing.us[0]) if timing is not None else None
        if timing is None or median is None:
            return None
        steps = self.cases[key].steps
        low, high = (usable(each) or median for each in (*timing.us[1:], None, None)[:2])
        floor = usable(timing.floor_us)
        of_floor = median / floor if floor else None
        return StepTime(provider, median / steps, low / steps, high / steps, of_floor, timing.how)

    def floor(self, key: str, mode: str) -> float | None:
        """Least microseconds of one step, whoever takes it."""
        timings = [result.modes.get(mode) for (case, _), result in self.results.items() if case == key]
        found = (usable(timing.floor_us) for timing in timings if timing is not None)
        least = next((floor for floor in found if floor is not None), None)
        return None if least is None else least / self.cases[key].steps

    def wall(self, key: str, provider: str, mode: str) -> float | None:
        """Microseconds of a whole call on the host's clock."""
        result = self.results.get((key, provider))
        timing = result.modes.get(mode) if result is not None and result.status == OK else None
        return None if timing is None else usable(timing.wall_us)

    def chosen(self, key: str) -> str:
        """The mode that the library takes: step mode where sequence mode cannot run, and nowhere else."""
        sequence = self.results.get((key, SEQUENCE))
        return STEP if sequence is not None and sequence.status == records.CANNOT else SEQUENCE

    def ours(self, key: str, mode: str) -> StepTime | None:
        """What users get, which need not be the quicker of our modes."""
        return self.time(key, self.chosen(key), mode)

    @property
    def memory_unit(self) -> tuple[int, str]:
        """Bytes and name of the unit in which all its tables and plots tell memory."""
        most = max(
            (usable(each) or 0.0 for r in self.results.values() for each in (r.peak_bytes, r.saved_bytes)), default=0
        )
        return (2**20, "MiB") if most < 1e5 * 2**20 else (2**30, "GiB")

    def ratios(self, mode: str, rival: str) -> list[Ratio]:
        """Of every case that both have run, worst first."""
        found = []
        for key in self.cases:
            ours, theirs = self.ours(key, mode), self.time(key, rival, mode)
            if ours is not None and theirs is not None:
                found.append(Ratio(key, mode, rival, ours, theirs))
        return sorted(found, key=lambda ratio: -ratio.value)

    def forfeits(self, mode: str) -> list[str]:
        """Cases in which a rival has a time and we have none: worse than slow."""
        return [
            key
            for key in self.measured
            if self.ours(key, mode) is None and any(self.time(key, rival, mode) for rival in RIVALS)
        ]

    def reason(self, key: str, provider: str) -> int | None:
        """Where in `reasons` this result is told of."""
        return self._index.get((key, provider))

    def _absent(self) -> list[str]:
        found: dict[str, bool] = {}
        for (_, provider), result in self.results.items():
            missing = result.status == records.CANNOT and _ABSENT.fullmatch(result.why) is not None
            found[provider] = found.get(provider, True) and missing
        return sorted(provider for provider, missing in found.items() if missing)

    def _reasons(self) -> list[Reason]:
        shared: dict[tuple[str, str], dict[str, list[str]]] = {}
        for provider in self.providers:
            for key in self.cases:
                result = self.results.get((key, provider))
                if result is None or (result.status == OK and not result.why):
                    continue
                why = plain(result.why) or "no reason was kept"
                shared.setdefault((result.status, why), {}).setdefault(provider, []).append(key)
        rank = {status: k for k, status in enumerate(_STATUS_ORDER)}
        ordered = sorted(shared.items(), key=lambda item: rank.get(item[0][0], -1))  # stable: first seen, first told
        return [Reason(status, why, keys) for (status, why), keys in ordered]


def _rank(case: Case | None) -> int:
    if case is None:
        return _REST
    return 0 if case.name else 1 if case in HOT else _REST


def committed(results: Path) -> list[Path]:
    """Records under `results`, without those that git does not keep."""
    return [path for path in records.committed(results) if path.parent.name != "local"]
