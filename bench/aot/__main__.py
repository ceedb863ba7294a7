"""The command line of `python -m bench.aot`."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Compile the Triton kernels for GPUs that need not be there, in the layouts that each of them gets by default and in the
ones without grid barrier that they fall back to, and read from the machine code what they need. Fails if a kernel does
not compile, spills registers, exceeds the device's shared memory, uses no matrix unit where there is one for its
products, or if the programs of a sequence-mode launch do not fit on the device together.
"""

EXAMPLES = """\
examples:
  python -m bench.aot                                         everything, on two CPU cores about two hours
  python -m bench.aot --targets sm90 --numbers bf16 --each    one target, a line for each kernel
  python -m bench.aot --hiddens 1024 --batches 64 --out resources.json
  python -m bench.aot atlas --help                            the tracked table of all kernels, and how to renew it
"""

VARIANTS = (
    *(
        "forward/keep",
        "forward/cell+seats",
        "forward/narrow",
        "backward/plain",
        "backward/cell+fill",
        "backward/narrow",
    ),
    *("inference/plain", "inference/cell+keep"),
)
MOMENTS = ("moments/centre", "moments/narrow", "moments/product", "moments/states", "moments/finish")


def _names(known: Any) -> Callable[[str], list[str]]:
    def split(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return split


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(each) for each in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"must be integers of 1 or more, separated by commas, got {text!r}")
    return sizes


def parser(targets: Any, numbers: Any, variants: Any) -> argparse.ArgumentParser:
    """The arguments, with the names that each may have."""
    made = argparse.ArgumentParser(
        prog="python -m bench.aot",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def several(option: str, kind: Any, default: Any, text: str) -> None:
        shown = ",".join(map(str, default))
        made.add_argument(option, type=kind, default=list(default), metavar="A,B", help=f"{text} (default: {shown})")

    several("--targets", _names(targets), targets, "architectures")
    several("--numbers", _names(numbers), numbers, "dtypes of weights and states; tf32 and fp32: of float32 products")
    several("--variants", _names(variants), (*VARIANTS, *MOMENTS), f"kernels, of {', '.join(variants)}")
    several("--batches", _sizes, (16, 64, 256), "batch sizes")
    several("--hiddens", _sizes, (100, 512, 1024, 2048), "hidden sizes")
    several("--directions", _sizes, (1, 2), "1, 2 or both")
    made.add_argument("--jobs", type=int, default=2, metavar="N", help="compiling processes (default: %(default)s)")
    made.add_argument("--each", action="store_true", help="a line for each kernel instead of one for each kind")
    made.add_argument("--out", type=Path, metavar="FILE", help="all figures as JSON")
    return made


def layout(result: dict[str, Any]) -> str:
    """How a kernel is laid out, in short."""
    c, options = result["constants"], result["options"]
    if "U" not in c:
        return ", ".join(f"{name} {value}" for name, value in c.items() if name != "KERNEL")
    stays = "resident" if c["RESIDENT"] else f"S{options['num_stages']}"
    parts = f" {c['SPLITS']}×{c['GROUPS']}" if "SPLITS" in c else ""
    return f"U{c['U']}{parts} BB{c['BB']} BK{c['BK']} W{options['num_warps']} {stays}"


def _matrix(members: list[dict[str, Any]]) -> str:
    """Matrix instructions and how many, from the fewest to the most."""
    counts = [sum(member["resources"]["matrix"].values()) for member in members]
    words = {word for member in members for word in member["resources"]["matrix"]}
    if not words:
        return "–"
    names = ", ".join(sorted({"mfma" if word.startswith("v_") else word for word in words}))
    return f"{names} {counts[0]}" if min(counts) == max(counts) else f"{names} {min(counts)}…{max(counts)}"


def _group(found: list[dict[str, Any]], *, each: bool) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """Kernels by target, kind and mode; (each) also by case and layout."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for result in found:
        if "resources" in result:
            kind = [f"{result['target']} {result['numbers']}", result["kernel"], result["mode"] or "–"]
            if each:
                case = f"B{result['batch']} H{result['hidden']} D{result['directions']}"
                kind.append(f"{case}\n{layout(result)}")
            groups.setdefault(tuple(kind), []).append(result)
    return groups


def table(found: list[dict[str, Any]], *, each: bool) -> Any:
    """What was found as a rich table; kernels of a kind share a line, with the largest figure of each."""
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for heading in ("Target", "Kernel", "Mode"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("n", "KB", "Regs", "Stack", "Matrix", "Instr"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for names, members in _group(found, each=each).items():
        used = [member["resources"] for member in members]
        largest = [str(max(u[figure] for u in used)) for figure in ("registers", "stack")]
        shared = f"{max(u['shared'] for u in used) / 1024:.0f}"
        instructions = str(max(u["instructions"] for u in used))
        if each:
            names = (names[0], f"{names[1]}\n{names[3]}", names[2])
        shown.add_row(*names[:3], str(len(members)), shared, *largest, _matrix(members), instructions)
    return shown


def main(argv: list[str] | None = None) -> int:
    """Compile what the arguments `argv` say, those of the command line if None. The exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        from rich.console import Console

        from .targets import NUMBERS, TARGETS, why_skipped
    except ModuleNotFoundError as error:
        print(f"bench.aot: the package {error.name!r} is missing; run: pip install -e '.[bench]'", file=sys.stderr)
        return 1
    try:
        from .cases import VARIANTS as KNOWN

        versions = {
            "python": platform.python_version(),
            **{name: importlib.import_module(name).__version__ for name in ("torch", "triton", "triton_bnlstm")},
        }
    except ImportError as error:
        print(f"bench.aot: Triton cannot be imported ({error})", file=sys.stderr)
        return 1
    from .checks import Request, results

    if argv[:1] == ["atlas"]:
        from .atlas_command import main as atlas

        return atlas(argv[1:], versions, list(KNOWN))
    made = parser(TARGETS, NUMBERS, KNOWN)
    arguments = made.parse_args(argv)
    if arguments.jobs < 1:
        made.error(f"argument --jobs: must be 1 or more, got {arguments.jobs}")
    if arguments.out is not None and not arguments.out.resolve().parent.is_dir():
        print(f"bench.aot: --out {arguments.out}: there is no such folder", file=sys.stderr)
        return 1
    console = Console(width=None if sys.stdout.isatty() else 140)
    units, skipped = [], []
    for name in arguments.targets:
        for numbers in arguments.numbers:
            reason = why_skipped(TARGETS[name], numbers)
            if reason is None:
                units.append((name, numbers))
            else:
                skipped.append({"target": name, "numbers": numbers, "reason": reason})

    def compile_unit(unit: tuple[str, str]) -> list[dict[str, Any]]:
        target, numbers = unit
        began = time.monotonic()
        request = Request(
            target, [numbers], arguments.variants, arguments.batches, arguments.hiddens, arguments.directions
        )
        found = list(results(request, Path(cache, f"{target}-{numbers}")))
        wrong = sum(bool(result["problems"]) for result in found)
        text = f"{target} {numbers}: {len(found)} kernels in {time.monotonic() - began:.0f} s, {wrong} with problems"
        console.print(text, highlight=False, soft_wrap=True)
        return found

    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(arguments.jobs) as pool:
        found = [result for unit in pool.map(compile_unit, units) for result in unit]
    skipped += [  # what only the compiler knew
        {"target": result["target"], "numbers": result["numbers"], "reason": result["skipped"]}
        for result in found
        if "skipped" in result
    ]
    found = [result for result in found if "skipped" not in result]

    console.print(table(found, each=arguments.each))
    if arguments.each:
        console.print(
            "U units, BB rows and BK inner extent of a tile, W warps, S stages; n×m parts of the inner extent and the\n"
            "rows. A backward step is two launches where its product is divided, of which one has no product",
            style="dim",
            highlight=False,
        )
    console.print(
        "KB of shared memory, registers of a thread, bytes of its stack; the largest of n kernels", style="dim"
    )
    for skip in skipped:
        console.print(f"Skipped {skip['target']} {skip['numbers']}: {skip['reason']}", style="dim", highlight=False)
    bad = [result for result in found if result["problems"]]
    for result in bad:
        name = " ".join(str(result[key]) for key in ("target", "numbers", "kernel", "mode") if key in result)
        if "batch" in result:
            name += f" B{result['batch']} H{result['hidden']} D{result['directions']}, {layout(result)}"
        console.print(f"{name}: {'; '.join(result['problems'])}", style="red", highlight=False, soft_wrap=True)
    if arguments.out is not None:
        content = {"versions": versions, "kernels": found, "skipped": skipped}
        arguments.out.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        console.print(f"Wrote {arguments.out}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"Triton {versions['triton']}: {len(found)} kernels, {len(bad)} with problems", style="bold")
    return 1 if bad or not found else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("bench.aot: interrupted")
