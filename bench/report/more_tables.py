"""The folded parts of a device's section."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench import records
from bench.records import Result

from .campaign import SHOWN_MODES, Campaign, Reason, label, usable
from .cells import COMPARED, case_cell, inline, stacked, step_table, time_cell
from .text import code, details, escape, mebibytes, number, table

HARMLESS = (records.CANNOT, records.OK)
KERNELS = 6  # of a case: those that take the most time
NAMED = 4  # cases that a harmless reason names before it only counts


def all_of(campaign: Campaign, note: str) -> list[str]:
    """Every folded part that has something."""
    parts: list[tuple[str, Callable[[Campaign, str], list[str]]]] = [
        ("Why a figure is missing", _reasons),
        ("Forward and backward by themselves, µs a step", _halves),
        ("Everything else that was run, µs a step", _others),
        ("Memory of a training step: peak and, below it, kept for the backward, MiB", _memory),
        ("Time on the host's clock, µs a step", _wall),
        ("What was timed: graphs or calls", _clocks),
        ("Errors against float64", _errors),
        ("What the device can do: ceilings", _ceilings),
        ("Where the time goes: what a step saves without one stage", _stages),
        ("Kernels of a training step, as the profiler saw them", _kernels),
        ("Layouts of the kernels: the default against the best that was tried", _layouts),
        ("First call in a new process", _first_calls),
    ]
    lines = []
    for title, part in parts:
        found = part(campaign, note)
        if found:
            lines += details(title, found)
    return lines


def reason_line(campaign: Campaign, reason: Reason) -> str:
    """One reason with all that share it."""
    told = []
    for provider, keys in reason.keys.items():
        most = NAMED if reason.status in HARMLESS else len(keys)
        named = "; ".join(inline(campaign, key) for key in keys[:most])
        more = f" and {len(keys) - most} more" if len(keys) > most else ""
        every = "all cases" if len(keys) == len(campaign.measured) > 1 else named + more
        told.append(f"{escape(label(provider))} ({every})")
    status = "note" if reason.status == records.OK else escape(reason.status)
    return f"- <sup>{reason.number}</sup> {status}: {', '.join(told)}: {escape(reason.why)}"


def _case(campaign: Campaign, entry: dict[str, Any]) -> str:
    key = str(entry.get("case"))
    return inline(campaign, key) if key in campaign.cases else code(key, in_table=True)


def _per_step(campaign: Campaign, entry: dict[str, Any], value: Any) -> float | None:
    key, figure = str(entry.get("case")), usable(value)
    return figure / campaign.cases[key].steps if figure is not None and key in campaign.cases else figure


def _reasons(campaign: Campaign, note: str) -> list[str]:
    return [reason_line(campaign, reason) for reason in campaign.reasons if reason.status in HARMLESS]


def _halves(campaign: Campaign, note: str) -> list[str]:
    modes = ("forward", "backward")
    keys = [key for key in campaign.measured if any(campaign.ours(key, mode) for mode in modes)]
    if not keys:
        return []
    text = "As above; forward keeps what the backward needs, backward gives gradients of input and parameters."
    return [text, *step_table(campaign, keys, modes, note)]


def _others(campaign: Campaign, note: str) -> list[str]:
    left = [provider for provider in campaign.providers if provider not in COMPARED]
    rows = []
    for key in campaign.measured:
        cells = [time_cell(campaign, key, provider, SHOWN_MODES) for provider in left]
        if any(cell.replace("<br>", "") for cell in cells):
            rows.append([case_cell(campaign, key), stacked(SHOWN_MODES), *cells])
    if not rows:
        return []
    head = ["B × H, T, D", "", *(escape(label(provider)) for provider in left)]
    return table(head, rows, left=2, note=note)


def _clocks(campaign: Campaign, note: str) -> list[str]:
    counts: dict[str, dict[str, int]] = {}
    for provider in campaign.providers:
        for key in campaign.measured:
            time = next((time for mode in SHOWN_MODES if (time := campaign.time(key, provider, mode))), None)
            if time is not None:
                of_provider = counts.setdefault(provider, {})
                of_provider[time.how] = of_provider.get(time.how, 0) + 1
    words = {"graph": "replays of a CUDA graph", "events": "calls by the host", "cpu": "wall time on a CPU"}
    rows = []
    for provider, hows in counts.items():
        for how, count in sorted(hows.items()):
            kind, colon, why = how.partition(";")
            rows.append([escape(label(provider)), escape(words.get(kind, kind) + colon + why), str(count)])
    if not rows:
        return []
    text = (
        "Device time lies between two events. Where the host enqueues more slowly than the device works, as in an "
        "eager loop, calls by the host show that; replays of a graph do not have it."
    )
    return [text, *table(["", "timed", "cases"], rows, left=2, note=note)]


def _by_provider(campaign: Campaign, note: str, keys: Sequence[str], cell: Callable[[str, Result], str]) -> list[str]:
    """A table of cases by providers, without those that have nothing."""
    cells = {
        (key, provider): text
        for (key, provider), result in campaign.results.items()
        if (text := cell(key, result)).strip("–<br>")
    }
    providers = [name for name in campaign.providers if any((key, name) in cells for key in keys)]
    rows = [
        [case_cell(campaign, key), *(cells.get((key, provider), "") for provider in providers)]
        for key in keys
        if any((key, provider) in cells for provider in providers)
    ]
    if not rows:
        return []
    return table(["B × H, T, D", *(escape(label(provider)) for provider in providers)], rows, note=note)


def _memory(campaign: Campaign, note: str) -> list[str]:
    def cell(key: str, result: Result) -> str:
        return f"{mebibytes(usable(result.peak_bytes))}<br>{mebibytes(usable(result.saved_bytes))}"

    return _by_provider(campaign, note, campaign.measured, cell)


def _wall(campaign: Campaign, note: str) -> list[str]:
    def cell(key: str, result: Result) -> str:
        steps = campaign.cases[key].steps
        walls = [result.modes[mode].wall_us if mode in result.modes else None for mode in SHOWN_MODES]
        return stacked(number(None if usable(wall) is None else float(wall or 0) / steps) for wall in walls)

    found = _by_provider(campaign, note, campaign.leading or campaign.measured, cell)
    text = "From an idle device until it is idle again, launches and all; training above, inference below."
    return [text, *found] if found else []


def _errors(campaign: Campaign, note: str) -> list[str]:
    worst: dict[tuple[str, str], dict[str, float]] = {}
    for provider in campaign.providers:
        for key, case in campaign.cases.items():
            result = campaign.results.get((key, provider))
            for what, value in (result.errors if result is not None and result.status == records.OK else {}).items():
                error = usable(value)
                if error is not None:
                    errors = worst.setdefault((provider, case.precision), {})
                    errors[what] = max(error, errors.get(what, 0.0))
    if not worst:
        return []
    kinds = list(dict.fromkeys(what for errors in worst.values() for what in errors))
    precisions = list(dict.fromkeys(precision for _, precision in worst))
    rows = []
    for provider in dict.fromkeys(provider for provider, _ in worst):
        found = [worst.get((provider, precision), {}) for precision in precisions]
        cells = [stacked(f"{errors[what]:.1e}" if what in errors else "" for what in kinds) for errors in found]
        rows.append([escape(label(provider)), stacked(map(escape, kinds)), *cells])
    text = "Root mean square of the error relative to that of what is compared; the worst case of each precision."
    return [text, *table(["", "", *precisions], rows, left=2, note=note)]


def _ceilings(campaign: Campaign, note: str) -> list[str]:
    ceilings = campaign.record["ceilings"] or {}
    shown = [
        ("copy_bytes_per_second", "device memory, bytes read and written by a copy", 1e-12, "TB/s"),
        ("l2_bytes_per_second", "L2, bytes read by all multiprocessors", 1e-12, "TB/s"),
        ("barrier_seconds", "one meeting of all multiprocessors", 1e6, "µs"),
        ("launch_seconds", "from one kernel of a CUDA graph to the next", 1e6, "µs"),
    ]
    rows = [
        [name, f"{number(value * scale)} {unit}"]
        for key, name, scale, unit in shown
        if (value := usable(ceilings.get(key))) is not None
    ]
    rows += [
        [f"matrix products, {escape(precision)}", f"{number(value * 1e-12)} Tflop/s"]
        for precision, given in (ceilings.get("flops") or {}).items()
        if (value := usable(given)) is not None
    ]
    missing = [f"- {code(name)}: {escape(why)}" for name, why in (ceilings.get("why") or {}).items()]
    lines = table(["", "measured"], rows, note=note) if rows else []
    return [*lines, *(["Not measured:", "", *missing] if missing else [])]


def _stages(campaign: Campaign, note: str) -> list[str]:
    rows = []
    for entry in campaign.entries("stages"):
        whole = _per_step(campaign, entry, entry.get("whole_us"))
        saved = []
        for stage, given in (entry.get("without_us") or {}).items():
            without = _per_step(campaign, entry, given)
            if whole is not None and without is not None:
                saved.append((whole - without, stage))
        saved.sort(reverse=True)
        told = [f"{escape(stage)} {number(us)} ({us / whole:.0%})" for us, stage in saved if whole]
        told += [f"{escape(stage)}: {escape(why)}" for stage, why in (entry.get("failed") or {}).items()]
        rows.append([_case(campaign, entry), escape(entry.get("way")), "; ".join(told), number(whole)])
    if not rows:
        return []
    text = "Stages overlap, so what they save does not add up to the whole. µs a step."
    return [text, *table(["case", "way", "saved without", "whole"], rows, left=3, note=note)]


def _kernels(campaign: Campaign, note: str) -> list[str]:
    rows, counters = [], []
    for entry in campaign.entries("kernels"):
        kernels = [(usable(each.get("us")) or 0.0, each) for each in entry.get("kernels") or []]
        kernels.sort(key=lambda pair: -pair[0])
        total = sum(us for us, _ in kernels)
        for k, (us, each) in enumerate(kernels[:KERNELS]):
            share = f"{us / total:.0%}" if total else ""
            calls = escape(each.get("calls") or "")
            rows.append([_case(campaign, entry) if k == 0 else "", code(each.get("name"), 60, in_table=True), calls])
            rows[-1] += [number(us), share]
        left = kernels[KERNELS:]
        if left:
            us = sum(us for us, _ in left)
            rows.append(["", f"{len(left)} others", "", number(us), f"{us / total:.0%}" if total else ""])
        if entry.get("counters"):
            told = "; ".join(f"{escape(name, 60)}: {escape(value)}" for name, value in entry["counters"].items())
            counters.append(f"- {_case(campaign, entry)}: {told}")
    if not rows:
        return []
    lines = table(["case", "kernel", "calls", "µs of the whole call", "share"], rows, left=2, note=note)
    return [*lines, *(["Counters:", "", *counters] if counters else [])]


def _layouts(campaign: Campaign, note: str) -> list[str]:
    rows, failed = [], []
    for entry in campaign.entries("layouts"):
        default, best = (_per_step(campaign, entry, entry.get(name)) for name in ("default_us", "best_us"))
        old, new = entry.get("default") or {}, entry.get("best") or {}
        changes = [f"{name} {old.get(name)} → {new[name]}" for name in new if new[name] != old.get(name)]
        told = escape(", ".join(changes)) if changes else "the default" if new else ""
        gain = f"{default / best:.2f}" if default and best else ""
        named = f"{_case(campaign, entry)}, {escape(entry.get('way'))}"
        failed += [f"- {named}, {escape(name)}: {escape(why)}" for name, why in (entry.get("failed") or {}).items()]
        row = [_case(campaign, entry), escape(entry.get("way")), told, number(default), number(best), gain]
        rows.append([*row, escape(entry.get("tried") or "")])
    head = ["case", "way", "best", "default, µs a step", "best, µs a step", "default / best", "tried"]
    if not rows:
        return []
    return [*table(head, rows, left=3, note=note), *(["Failed, so not timed:", "", *failed] if failed else [])]


def _first_calls(campaign: Campaign, note: str) -> list[str]:
    rows = []
    for entry in campaign.entries("first_calls"):
        cold, warm = (usable(entry.get(name)) for name in ("cold_s", "warm_s"))
        provider, why = escape(label(str(entry.get("provider")))), escape(entry.get("why") or "")
        rows.append([_case(campaign, entry), provider, why, number(cold), number(warm)])
    if not rows:
        return []
    head = ["case", "", "", "caches empty, s", "caches filled, s"]
    text = "Seconds of the first training step, compilers included."
    return [text, *table(head, rows, left=3, note=note)]
