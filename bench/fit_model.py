"""Fits the model of a step to what tuning has measured: `python -m bench.fit_model`.

Reads the layouts that campaigns tuned and those measured ones that come with the package, fits
`triton_bnlstm.kernels.model.RATES` to their medians, and prints the rates, how far they are off, and for each kernel
and size by how much the layout that the model would take of those is slower than the fastest. It changes nothing: the
rates are put into the model by hand, since its choices, the shipped layouts and the atlas follow from them.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize  # scikit-learn brings it

from triton_bnlstm.kernels import model
from triton_bnlstm.kernels.config import Config, Device
from triton_bnlstm.tuning import Work, shipped, space
from triton_bnlstm.tuning.device import Identity
from triton_bnlstm.tuning.entry import MEASURED, Entry

from .aot.targets import TARGETS

RESULTS = Path(__file__).parent / "results"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Timed(NamedTuple):
    """One layout's median: of which entry, on which device, for which work, in microseconds."""

    name: str
    device: Device
    work: Work
    layout: Config
    microseconds: float


def measured(folder: Path = RESULTS) -> list[Timed]:
    """Every layout of the recurrence that was measured, of boards in `TARGETS`."""
    boards = {Identity.of(target.device): target for target in TARGETS.values()}
    found: dict[tuple[Identity, str], Entry] = {}
    for identity in boards:
        for fields in shipped.of_device(identity).values():
            entry = Entry.of_json(fields)
            found[identity, str(entry.key)] = entry
    for path in sorted(folder.glob("*/campaign.json")):
        for layout in json.loads(path.read_text(encoding="utf-8"))["layouts"]:
            if "entry" not in layout:  # nothing could be measured
                continue
            entry = Entry.of_json(layout["entry"])  # with every layout that was tried
            found[Identity.of_json(layout["device"]), str(entry.key)] = entry
    return [
        timed
        for (identity, text), entry in found.items()
        if identity in boards and entry.how == MEASURED
        for timed in _timed(f"{boards[identity].name} {text.partition(' @')[0]}", boards[identity].device, entry)
    ]


def _timed(name: str, device: Device, entry: Entry) -> list[Timed]:
    key, case = entry.key, entry.case
    if key.kernel not in ("forward", "inference", "backward"):
        return []
    sizes = (case["hidden"], case["batch"], key.directions, DTYPES[key.dtype], key.precision, tuple(key.flags))
    work = Work(key.kernel, *sizes)
    return [
        Timed(name, device, work, each.layout, each.microseconds)
        for each in entry.candidates
        if each.microseconds is not None and isinstance(each.layout, Config)
    ]


def errors(timed: list[Timed]) -> list[float]:
    """Logarithms of modelled over measured times, with `model.RATES` as they are."""
    return [
        math.log(1e6 * space.modelled_seconds(each.device, each.work, each.layout) / each.microseconds)
        for each in timed
    ]


def fitted(timed: list[Timed], tries: int = 4) -> model.Rates:
    """The rates with the least squares of errors: the best of several searches around the present ones, by one seed."""
    present, random = model.RATES, np.random.default_rng(0)
    start = np.array([max(rate, 0.1) for rate in present])

    def loss(scales: np.ndarray) -> float:
        model.RATES = model.Rates(*(start * np.abs(scales)))
        return float(np.mean(np.square(errors(timed))))

    try:
        found = []
        for attempt in range(tries):
            begin = np.exp(random.normal(0.0, 0.3 * (attempt > 0), len(start)))
            options = {"maxiter": 15_000, "maxfev": 15_000, "adaptive": True}
            found.append(minimize(loss, begin, method="Nelder-Mead", options=options))
        best = min(found, key=lambda result: result.fun)
        return model.Rates(*(float(f"{rate:.3g}") for rate in start * np.abs(best.x)))
    finally:
        model.RATES = present


class Order(NamedTuple):
    """What the model makes of the layouts that were measured for one key.

    layouts: how many. behind: time of the one that it puts first over the fastest's. default: whether the layout that
    users get without tuning is one of them.
    """

    layouts: int
    behind: float
    default: bool


def orders(timed: list[Timed]) -> dict[str, Order]:
    """How the model orders what was measured, by entry. It was fitted to these very times."""
    found: dict[str, Order] = {}
    for name in dict.fromkeys(each.name for each in timed):
        of = [each for each in timed if each.name == name]
        first = min(of, key=lambda each: space.modelled_seconds(each.device, each.work, each.layout))
        default = space.analytic(of[0].device, of[0].work)
        ratio = first.microseconds / min(each.microseconds for each in of)
        found[name] = Order(len(of), ratio, any(each.layout == default for each in of))
    return found


def held_out(timed: list[Timed]) -> dict[int, float]:
    """Root mean square of the errors at one H, with rates that were fitted to all others."""
    present, found = model.RATES, {}
    for hidden in sorted({each.work.hidden for each in timed}):
        try:
            model.RATES = fitted([each for each in timed if each.work.hidden != hidden], tries=1)
            found[hidden] = _root([each for each in timed if each.work.hidden == hidden])
        finally:
            model.RATES = present
    return found


def _root(timed: list[Timed]) -> float:
    return math.sqrt(np.mean(np.square(errors(timed))))


def main() -> None:
    """Fit and print."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.fit_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--held-out", action="store_true", help="also fit without each H, and tell the errors there (two minutes)"
    )
    arguments = parser.parse_args()
    console, timed = Console(highlight=False), measured()
    if not timed:
        raise SystemExit("nothing was measured yet: run a campaign on a GPU, then python -m bench.report")
    with console.status(f"fitting {len(model.Rates._fields)} rates to {len(timed)} medians"):
        found = fitted(timed)
    present = model.RATES
    table = Table("rate", "in the model", "fitted", title=f"{len(timed)} medians")
    for name, before, after in zip(model.Rates._fields, present, found, strict=True):
        table.add_row(name, f"{before:g}", f"{after:g}")
    console.print(table)
    for where, rates in (("in the model", present), ("fitted", found)):
        model.RATES = rates
        console.print(f"root mean square of the errors, {where}: {100 * _root(timed):.1f} %")
    model.RATES = present
    if arguments.held_out:
        for hidden, root in held_out(timed).items():
            console.print(f"the same at H = {hidden}, fitted to all others: {100 * root:.0f} %")
    table = Table("kernel and size", "layouts", "first / fastest", "default", title="How it orders what was measured")
    for name, order in orders(timed).items():
        table.add_row(name, f"{order.layouts}", f"{order.behind:.2f}", "measured" if order.default else "not measured")
    console.print(table)
    console.print("default: whether the layout that users get without tuning was one of those", style="dim")


if __name__ == "__main__":
    main()
