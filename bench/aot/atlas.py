"""What the atlas holds, and how it is made: in several processes, and from where it was when it was cut off."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Lock

import triton_bnlstm

from .checks import Request, results
from .rows import Row, line, of_line, row
from .targets import NUMBERS, TARGETS, why_skipped

# Each kernel once with as little and once with as much as can be compiled in, in what the layer launches it with.
MOST_USED = ["forward/keep", "backward/plain", "inference/plain"]
WITH_CELL_NORM = ["forward/cell+seats", "backward/cell+fill", "inference/cell+keep"]


def common_numbers(target: str) -> str:
    """bfloat16, and float16 where there is no such thing."""
    return "fp16" if why_skipped(TARGETS[target], "bf16") else "bf16"


def preset(known: Iterable[str]) -> list[Request]:
    """The tracked table's. known: all variants, `cases.VARIANTS`.

    Every target with its default layouts, in both modes where it has both; on one every other number type and every
    variant; and what tuning may choose instead, where it is the most used.
    """
    near = [
        Request(target, ["bf16"], [variant], [64], [512, 1024], [1], near=True)
        for target in ("sm90", "sm100")
        for variant in sorted(MOST_USED)  # the backward, which takes longest, first
    ]
    variants = [*MOST_USED, *WITH_CELL_NORM, *(name for name in known if name.startswith("moments/"))]
    defaults = [Request(target, [common_numbers(target)], variants, [64], [100, 512, 1024], [1]) for target in TARGETS]
    return [
        *near,
        *defaults,
        Request("sm90", ["fp16", "tf32", "fp32"], MOST_USED, [64], [512], [1]),
        Request("sm90", ["bf16"], list(known), [16], [64], [1]),
        Request("sm90", ["bf16"], WITH_CELL_NORM, [64], [1000], [1]),  # the last parts of products are not whole
    ]


def everything(known: Iterable[str]) -> list[Request]:
    """All kernels in all layouts that tuning may choose, on all targets in all their numbers."""
    sizes = ([16, 64, 256], [100, 512, 1024, 2048], [1, 2])
    found = []
    for target, of in TARGETS.items():
        for numbers in NUMBERS:
            if why_skipped(of, numbers) is None:
                plain = Request(target, [numbers], list(known), *sizes)
                found += [plain, replace(plain, near=True)]
    return found


def representative(known: Iterable[str]) -> list[Request]:
    """A part of the preset that says enough and takes little: see tests/test_atlas.py."""
    plan = []
    for target in TARGETS:
        hiddens = [1024] if target in ("sm90", "sm100") else [100]
        plan.append(Request(target, [common_numbers(target)], MOST_USED, [64], hiddens, [1]))
    # what needs most registers
    plan += [
        Request(target, ["bf16"], ["backward/cell+fill"], [64], [1024], [1]) for target in ("sm80", "sm86", "sm120")
    ]
    plan.append(Request("sm90", ["bf16"], WITH_CELL_NORM, [64], [1000], [1]))
    plan.append(Request("sm90", ["tf32", "fp32"], ["forward/keep"], [64], [512], [1]))
    plan.append(Request("sm90", ["bf16"], list(known), [16], [64], [1]))
    return plan


_WITHOUT_FIGURES = ("__init__", "__main__", "atlas", "atlas_command")


def fingerprint(*, reading: bool) -> str:
    """Of the kernels and how they are launched; (reading) and of what compiles them and reads what they need."""
    found = hashlib.sha256()
    kernels, here = Path(triton_bnlstm.__file__).parent / "kernels", Path(__file__).parent
    paths = sorted(kernels.glob("*.py"))
    if reading:
        paths += [path for path in sorted(here.glob("*.py")) if path.stem not in _WITHOUT_FIGURES]
        paths.append(kernels.parent / "tuning" / "space.py")
    for path in paths:
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


class Kept:
    """Rows that are done, in a file that outlives a run that is cut off.

    A row is taken again if kernels, reading code and Triton are those that it was made with.
    """

    def __init__(self, path: Path, version: str) -> None:
        self.path, self.of, self.lock = path, f"{version} {fingerprint(reading=True)}", Lock()
        self.rows: dict[tuple[str, ...], Row] = {}
        for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                entry = json.loads(text)
                found = of_line(entry["row"]) if entry["of"] == self.of else None
            except (ValueError, KeyError, TypeError):
                continue  # a line that was cut off
            if found is not None:
                self.rows[found.name] = found
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"of": self.of, "row": line(each)}) for each in self.rows.values()]
        path.write_text("".join(f"{each}\n" for each in lines), encoding="utf-8")

    def add(self, row: Row) -> None:
        """Once more, safe against being cut off."""
        with self.lock:
            self.rows[row.name] = row
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"of": self.of, "row": line(row)}) + "\n")


def compile_rows(
    request: Request, cache: Path, kept: Kept | None = None, tell: Callable[[Row], None] = lambda row: None
) -> tuple[list[Row], str | None]:
    """Rows of what is asked for; and why there is none, where this Triton cannot compile for the target.

    Args:
        request: what.
        cache: folder for what Triton keeps.
        kept: rows that are not compiled again; takes the others.
        tell: is told each row as it comes.
    """
    of = "near" if request.near else "default"
    if kept is not None:
        request = replace(request, skip=[name for name in list(kept.rows) if name[0] == request.target])
    rows: list[Row] = []
    for result in results(request, cache):
        if "skipped" in result:
            return rows, str(result["skipped"])
        if kept is not None and "done" in result:
            rows.append(replace(kept.rows[tuple(result["done"])], of=of))
        else:
            rows.append(row(result, of))
            if kept is not None and ("resources" in result or "cannot" in result):  # an error may not come again
                kept.add(rows[-1])
        tell(rows[-1])
    return rows, None


def make(
    plan: list[Request], kept: Kept, jobs: int, tell: Callable[[Request, list[Row], str | None, float], None]
) -> list[Row]:
    """All rows of a plan, each kernel once.

    tell: is told each request that is done, its rows, why there are none, and the seconds that it took.
    """

    def part(request: Request) -> list[Row]:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as cache:
            rows, reason = compile_rows(request, Path(cache), kept)
        tell(request, rows, reason, time.monotonic() - began)
        return rows

    found: dict[tuple[str, ...], Row] = {}
    pool = ThreadPoolExecutor(jobs)
    try:
        for rows in pool.map(part, plan):
            for each in rows:
                if each.name not in found or found[each.name].of == "near":  # what is a default, too, is one
                    found[each.name] = each
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # whoever interrupts it does not wait for what has not begun
    return list(found.values())
