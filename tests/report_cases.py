"""A campaign's record with invented figures, to test the report and to look at its plots. None is a measurement."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import records
from bench.cases import CASES, Case
from bench.records import Result, Timing

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
        },
        "versions": {"python": "3.11.7", "torch": "2.99.0", "cuda": "13.0", "cudnn": 91300, "triton": "3.99.0"},
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
        how = "events" if provider in ("reference", "F.batch_norm loop") else "graph"
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


def save(record: dict[str, Any], results: Path, slug: str = "test-gpu") -> Path:
    """Write it where the report looks for it."""
    folder = results / slug
    folder.mkdir(parents=True, exist_ok=True)
    records.write(folder / records.FILE, record)
    return folder / records.FILE
