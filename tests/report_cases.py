"""A campaign's record with invented figures, to test the report and to look at its plots. None is a measurement."""

from __future__ import annotations

import builtins
import copy
import importlib
import math
import random
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

import bench.report
from bench import records
from bench.cases import CASES, Case
from bench.records import Result, Timing
from bench.report import page
from bench.report.__main__ import main
from bench.report.campaign import Campaign
from bench.report.tables import block, put

README = "# Title\n\n<!-- results -->\nold words\n<!-- /results -->\n\nlast words\n"
INVENTED = "invented figures, no measurement"
COMMAND = "python -m bench.campaign --minutes 9 --out DIR --resume"
SOURCE = {"source": "aaaaaaaaaaaa"}

# Times the least time, and microseconds that each of T steps costs besides: invented.
SPEEDS = {
    "sequence": (1.6, 1.0),
    "step": (2.2, 3.5),
    "sequence, recompute": (1.8, 1.2),
    "compiled step": (3.0, 9.0),
    "compiled loop": (3.4, 14.0),
    "reference": (6.0, 120.0),
    "F.batch_norm loop": (7.0, 160.0),
    "nn.LSTM": (1.3, 2.4),
    "FlashRNN": (1.5, 1.1),
    "Haste": (2.5, 3.0),
}
SHARES = {"inference": 0.7, "forward": 1.0, "backward": 1.8, "training": 2.8}


def invented(
    cases: Iterable[Case] = CASES, providers: Iterable[str] = tuple(SPEEDS), *, dry_run: bool = False
) -> dict[str, Any]:
    """A record in which every provider has run every case, and all lists hold something."""
    chosen = random.Random(0)
    cases = list(cases)
    record = records.empty() | {
        "dry_run": dry_run,
        "device": {
            "name": f"Test GPU ({INVENTED})",
            "slug": "test-gpu",
            "capability": 90,
            "multiprocessors": 132,
            "memory_bytes": 80 * 2**30,
            "l2_bytes": 50 * 2**20,
            "driver": "580.65.06",
            "limits": "1980 MHz, 2619 MHz, 700.00 W",
            "cpu": "Invented CPU, 16 cores",
        },
        "versions": {
            "python": "3.11.7",
            "torch": "2.99.0",
            "cuda": "13.0",
            "cudnn": 91300,
            "triton": "3.99.0",
            "numpy": "2.9.9",
        },
        "runs": [{"command": COMMAND, "utc": "2001-02-03T17:00:00+00:00", "seconds": 512.0, "load": [0.5]} | SOURCE],
        "tests": {"passed": 170, "failed": {}, "skipped": 3, "unfinished": []} | SOURCE,
        "cases": {case.key: (case.toy() if dry_run else case).as_json() for case in cases},
    }
    record["ceilings"] = {"copy_bytes_per_second": 3.0e12, "l2_bytes_per_second": 5.5e12} | SOURCE
    record["ceilings"] |= {"barrier_seconds": 1.1e-6, "launch_seconds": 1.4e-6}
    record["ceilings"]["flops"] = {"bfloat16": 7.9e14, "tf32": None}
    record["results"] = [result(case, name, chosen).as_json() for case in cases for name in providers]
    for case in cases[:3]:
        _extras(record, case.key)
    return record


def result(case: Case, provider: str, chosen: random.Random) -> Result:
    """One provider's figures in a case: near a floor, with noise."""
    floor = 0.4 + case.batch * case.hidden * (case.hidden + case.columns) * 8 / 4e8 * case.layers * case.directions
    factor, fixed = SPEEDS.get(provider, (2.0, 2.0))
    modes = {}
    for mode, share in SHARES.items():
        us = case.steps * share * (factor * floor + fixed) * math.exp(chosen.gauss(0, 0.25))
        spread = us * chosen.uniform(0.005, 0.05)
        eager = provider in ("reference", "F.batch_norm loop") or (mode == "inference" and "sequence" in provider)
        how = "events" if eager else "graph"
        least = case.steps * share * floor
        modes[mode] = Timing((us, us - spread, us + 2 * spread), 20, how, wall_us=us + 40, floor_us=least)
    kept = case.rows * case.hidden * case.directions * (14 if "recompute" in provider else 22) * factor
    errors = {"outputs": 3e-3 * factor, "gradients": 8e-3 * factor, "inference": 2e-3 * factor}
    return Result(
        case.key,
        provider,
        modes=modes,
        errors=errors,
        saved_bytes=round(kept),
        peak_bytes=round(1.6 * kept + 3e6),
        source=SOURCE["source"],
    )


def _extras(record: dict[str, Any], key: str) -> None:
    for way in ("forward", "backward"):
        layouts = {"default": {"rows": 64, "warps": 4}, "best": {"rows": 32, "warps": 4}}
        record["layouts"].append(
            {"case": key, "way": way, "default_us": 310.0, "best_us": 290.0, "tried": 12} | layouts | SOURCE
        )
        stages = {"without_us": {"product": 200.0, "barrier": 150.0}, "failed": {"gates": "did not compile"}}
        record["stages"].append({"case": key, "way": way, "whole_us": 310.0} | stages | SOURCE)
    kernels = [{"name": f"kernel_{k}|with_a_pipe", "us": 300.0 / (k + 1), "calls": 1} for k in range(9)]
    record["kernels"].append({"case": key, "kernels": kernels, "counters": {"l2 hits": 0.93}} | SOURCE)
    record["first_calls"] += [
        {"case": key, "provider": "sequence", "cold_s": 12.3, "warm_s": 2.1, "why": ""} | SOURCE,
        {"case": key, "provider": "compiled loop", "cold_s": None, "warm_s": None, "why": "too slow"} | SOURCE,
    ]


def spoil(record: dict[str, Any], key: str, provider: str, status: str, why: str) -> None:
    """Make it so that this provider has no times in this case, and why."""
    for k, fields in enumerate(record["results"]):
        if (fields["case"], fields["provider"]) == (key, provider):
            record["results"][k] = {"case": key, "provider": provider, "status": status, "why": why}


def retime(record: dict[str, Any], key: str, provider: str, mode: str, us: float) -> None:
    """Set the device time of a call."""
    for fields in record["results"]:
        if (fields["case"], fields["provider"]) == (key, provider):
            fields["modes"][mode]["us"] = [us, us, us]


def gaps(cases: Iterable[Case] = CASES) -> dict[str, Any]:
    """A record in which providers are missing, wrong or slow in all ways that there are."""
    cases = list(cases)
    record = invented(cases)
    for case in cases:
        spoil(record, case.key, "FlashRNN", records.CANNOT, "flashrnn is not installed")
        spoil(record, case.key, "Haste", records.CANNOT, "haste_pytorch is not installed")
        if case.hidden >= 2000:
            spoil(record, case.key, "sequence", records.CANNOT, "sequence mode: no layout")
        if case.lengths != "equal":
            spoil(record, case.key, "compiled step", records.CANNOT, "equal lengths only")
    square = {hidden: Case(64, hidden, 100, hidden).key for hidden in (128, 256, 512)}
    spoil(record, square[256], "compiled step", records.FAILED, "no kernel image")
    spoil(record, square[512], "sequence", records.WRONG, "gradients are off")
    spoil(record, square[512], "nn.LSTM", records.WRONG, "outputs are off")
    record["troubles"] = [{"item": "stages B64", "why": "hung"}]
    for entry in record["kernels"]:
        entry["counters"] = {"why": "there is no program ncu"}
    record["stages"][0]["without_us"] = {"gates": 310.9, "loads": 330.0}
    run = record["runs"][0]
    record["runs"] = [run | {"driver": "580.65.06", "numpy": "2.9.9"}, run | {"driver": "590.1"}]
    return record


def save(record: dict[str, Any], results: Path, slug: str = "test-gpu") -> Path:
    """Write it where the report looks for it."""
    folder = results / slug
    folder.mkdir(parents=True, exist_ok=True)
    records.write(folder / records.FILE, record)
    return folder / records.FILE


def run(place: Path, *options: str) -> int:
    return main(["--results", str(place / "results"), "--readme", str(place / "README.md"), *options])


def text_of(place: Path) -> str:
    return (place / "README.md").read_text()


def report(place: Path, record: dict[str, Any]) -> str:
    """README with this record's tables, without drawing plots; the device's page is written too."""
    campaign = Campaign(save(record, place / "results"))
    page.write(campaign)
    (place / "README.md").write_text(put(README, block([campaign], place / "README.md")))
    return text_of(place)


def written(place: Path, record: dict[str, Any]) -> str:
    """README after the command itself, plots and all."""
    save(record, place / "results")
    assert run(place) == 0
    return text_of(place)


def rows(text: str, start: str) -> list[list[str]]:
    """Cells of all rows that begin so."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [[cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def page_of(place: Path, record: dict[str, Any] | None = None) -> str:
    """The device's page; with a record, after it has been written of that."""
    if record is not None:
        report(place, record)
    return (place / "results" / "test-gpu" / page.NAME).read_text()


def without_figures(record: dict[str, Any]) -> dict[str, Any]:
    """The same with null in many places, and with a result of a case that is nowhere described."""
    nulls = copy.deepcopy(record)
    for fields in nulls["results"]:
        fields["modes"]["training"] |= {"us": [None, None, None]}
        fields["modes"]["inference"] |= {"floor_us": None, "wall_us": None}
        fields |= {"saved_bytes": None, "peak_bytes": None, "errors": {"outputs": None}}
    nulls["results"][0] |= {"case": "B1-H1-T1-D1-bfloat16"}
    nulls["stages"][0] |= {"whole_us": None}
    layout = {"case": CASES[0].key, "way": "forward", "tried": 3, "default_us": None, "failed": {"x": "y"}}
    nulls["layouts"][0] = layout
    nulls["ceilings"] = {"copy_bytes_per_second": None, "why": {"copy_bytes_per_second": "no memory"}}
    return nulls


def plots() -> Any:
    """`bench.report.plots`, which alone needs matplotlib; without it the test is skipped."""
    pytest.importorskip("matplotlib")
    return importlib.import_module("bench.report.plots")


def hide_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it as if it were not installed."""
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *rest, **named)

    monkeypatch.delitem(sys.modules, "bench.report.plots", raising=False)
    monkeypatch.delattr(bench.report, "plots", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)


def places(axes: Any, wanted: Callable[[Any], bool] = lambda line: True) -> dict[str, list[int]]:
    """Where on the x axis the wanted lines of a plot have points, by their label or, if they have one, their id."""
    lines = [line for line in axes.get_lines() if wanted(line)]
    return {line.get_gid() or line.get_label(): list(line.get_xdata()) for line in lines}


def missing_places(axes: Any) -> dict[str, list[int]]:
    """Where on the x axis lines with whiskers are broken, by label."""
    drawn = {container.get_label(): container.lines[0] for container in axes.containers}
    return {name: [x for x, y in line.get_xydata() if math.isnan(y)] for name, line in drawn.items()}
