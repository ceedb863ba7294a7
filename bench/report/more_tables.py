"""The tables of a device's own page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench import records
from bench.records import Result

from . import series
from .campaign import SHOWN_MODES, Campaign, StepTime, label, usable
from .cells import CASE_HEAD, COMPARED, case_cell, stacked, step_table, time_cell, time_head
from .parts import images
from .sheet import Sheet, inline
from .text import code, counted, decimals, escape, fixed, number, rate, seconds, significant

KERNELS = 6  # of a case: those that take the most time
Part = Callable[[Sheet], list[str]]


def times(sheet: Sheet) -> list[str]:
    """More times of the cases; marks in them lead to reasons that come after."""
    parts: list[tuple[str, Part]] = [
        ("Forward and backward by themselves, µs a step", _halves),
        ("Everything else that was run, µs a step", _others),
    ]
    return _told(sheet, parts)


def rest(sheet: Sheet) -> list[str]:
    """Everything else there is."""
    campaign = sheet.campaign
    has_peak = any(usable(result.peak_bytes) for result in campaign.results.values())
    shown = "peak and, below it, kept for the backward" if has_peak else "kept for the backward"
    parts: list[tuple[str, Part]] = [
        (f"Memory of a training step: {shown}, {campaign.memory_unit[1]}", _memory),
        ("Time on the host's clock, µs a step", _wall),
        ("What was timed: graphs or calls", _clocks),
        ("Errors against float64", _errors),
        ("What the device can do: ceilings", _ceilings),
        ("Where the time goes: what a step saves without one stage", _stages),
        ("Kernels of a training step, as the profiler saw them", _kernels),
        ("Layouts of the kernels: the default against the best that was tried", _layouts),
        ("First call in a new process", _first_calls),
    ]
    return _told(sheet, parts)


def _told(sheet: Sheet, parts: Sequence[tuple[str, Part]]) -> list[str]:
    lines = []
    for title, part in parts:
        found = part(sheet)
        if found:
            lines += ["", f"## {title}", "", *found]
    return lines


def _case(campaign: Campaign, entry: dict[str, Any]) -> str:
    key = str(entry.get("case"))
    return inline(campaign, key) if key in campaign.cases else code(key, in_table=True)


def _per_step(campaign: Campaign, entry: dict[str, Any], value: Any) -> float | None:
    key, figure = str(entry.get("case")), usable(value)
    return figure / campaign.cases[key].steps if figure is not None and key in campaign.cases else figure


def _halves(sheet: Sheet) -> list[str]:
    campaign, modes = sheet.campaign, ("forward", "backward")
    keys = [key for key in campaign.measured if any(campaign.ours(key, mode) for mode in modes)]
    if not keys:
        return []
    text = "As above; forward keeps what the backward needs, backward gives gradients of input and parameters."
    return [text, *step_table(sheet, keys, modes)]


def _others(sheet: Sheet) -> list[str]:
    campaign = sheet.campaign
    timed = {
        provider
        for key, provider in campaign.results
        if any(campaign.time(key, provider, mode) is not None for mode in SHOWN_MODES)
    }
    # who has no figure at all is among the reasons, not a column of dashes
    left = [provider for provider in campaign.providers if provider not in COMPARED and provider in timed]
    rows = []
    for key in campaign.measured:
        cells = [time_cell(sheet, key, provider, SHOWN_MODES) for provider in left]
        if any(cell.replace("<br>", "") for cell in cells):
            rows.append([case_cell(campaign, key), stacked(SHOWN_MODES), *cells])
    if not rows:
        return []
    head = [CASE_HEAD, "mode"]
    for provider in left:

        def of_provider(key: str, mode: str, provider: str = provider) -> StepTime | None:
            return campaign.time(key, provider, mode)

        head.append(time_head(campaign.measured, SHOWN_MODES, label(provider), of_provider))
    return sheet.table(head, rows, left=2)


def _clocks(sheet: Sheet) -> list[str]:
    campaign = sheet.campaign
    counts: dict[tuple[str, str], dict[str, int]] = {}
    for provider in campaign.providers:
        for key in campaign.measured:
            for mode in SHOWN_MODES:
                if (time := campaign.time(key, provider, mode)) is not None:
                    of_kind = counts.setdefault((provider, time.how), dict.fromkeys(SHOWN_MODES, 0))
                    of_kind[mode] += 1
    words = {"graph": "replays of a CUDA graph", "events": "calls by the host", "cpu": "wall time on a CPU"}
    rows = []
    for (provider, how), of_kind in counts.items():
        kind, colon, why = how.partition(";")
        shown = [str(of_kind[mode] or "") for mode in SHOWN_MODES]
        rows.append([escape(label(provider)), escape(words.get(kind, kind) + colon + why), *shown])
    if not rows:
        return []
    text = (
        "Device time lies between two events. Where the host enqueues more slowly than the device works, as in an "
        "eager loop, calls by the host show that; replays of a graph do not have it. Numbers of cases:"
    )
    return [text, *sheet.table(["provider", "timed", *SHOWN_MODES], rows, left=2)]


def _by_provider(sheet: Sheet, keys: Sequence[str], cell: Callable[[str, Result], str]) -> list[str]:
    """A table of cases by providers, without those that have nothing."""
    campaign = sheet.campaign
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
    return sheet.table([CASE_HEAD, *(escape(label(provider)) for provider in providers)], rows)


def _memory(sheet: Sheet) -> list[str]:
    campaign = sheet.campaign
    scale, _ = campaign.memory_unit
    kinds = [
        kind
        for kind in ("peak_bytes", "saved_bytes")
        if any(usable(getattr(result, kind)) for result in campaign.results.values())
    ]

    def cell(key: str, result: Result) -> str:
        found = [usable(getattr(result, kind)) for kind in kinds]
        return "<br>".join(significant(None if each is None else each / scale) for each in found)

    found = _by_provider(sheet, campaign.measured, cell)
    return [*images(campaign, [series.MEMORY]), *found] if found else []


def _wall(sheet: Sheet) -> list[str]:
    campaign = sheet.campaign

    def cell(key: str, result: Result) -> str:
        steps = campaign.cases[key].steps
        walls = [campaign.wall(key, result.provider, mode) for mode in SHOWN_MODES]
        return "<br>".join(number(None if wall is None else wall / steps) for wall in walls)

    found = _by_provider(sheet, campaign.measured, cell)
    text = (
        "Called as users do, the compiled step as a replay of its graph, from an idle device until it is idle again; "
        "training above, inference below."
    )
    return [text, *found] if found else []


def _errors(sheet: Sheet) -> list[str]:
    campaign = sheet.campaign
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
    return [text, *sheet.table(["provider", "error of", *precisions], rows, left=2)]


def _ceilings(sheet: Sheet) -> list[str]:
    ceilings = sheet.campaign.record["ceilings"] or {}
    shown: list[tuple[str, str, Callable[[float], str]]] = [
        ("copy_bytes_per_second", "device memory, bytes read and written by a copy", _bytes_per_second),
        ("l2_bytes_per_second", "L2, bytes read by all multiprocessors", _bytes_per_second),
        ("barrier_seconds", "one meeting of all multiprocessors", seconds),
        ("launch_seconds", "from one kernel of a CUDA graph to the next", seconds),
    ]
    rows = [[name, told(value)] for key, name, told in shown if (value := usable(ceilings.get(key))) is not None]
    rows += [
        [f"matrix products, {escape(precision)}", rate(value, "flop/s")]
        for precision, given in (ceilings.get("flops") or {}).items()
        if (value := usable(given)) is not None
    ]
    missing = [f"- {code(name)}: {escape(why)}" for name, why in (ceilings.get("why") or {}).items()]
    lines = sheet.table(["ceiling", "measured"], rows) if rows else []
    return [*lines, *(["Not measured:", "", *missing] if missing else [])]


def _bytes_per_second(value: float) -> str:
    return rate(value, "B/s")


def _saved(us: float, whole: float) -> str:
    """What a stage costs; noise about nothing may be on either side of it."""
    share = us / whole
    if abs(share) < 0.005:
        return "about 0"
    return f"{number(us)} ({share:.0%})".replace("-", "−")


def _stages(sheet: Sheet) -> list[str]:
    campaign = sheet.campaign
    rows = []
    for entry in campaign.entries("stages"):
        whole = _per_step(campaign, entry, entry.get("whole_us"))
        saved = []
        for stage, given in (entry.get("without_us") or {}).items():
            without = _per_step(campaign, entry, given)
            if whole is not None and without is not None:
                saved.append((whole - without, stage))
        saved.sort(reverse=True)
        told = [f"{escape(stage)} {_saved(us, whole)}" for us, stage in saved if whole]
        told += [f"{escape(stage)}: {escape(why)}" for stage, why in (entry.get("failed") or {}).items()]
        rows.append([_case(campaign, entry), escape(entry.get("way")), "; ".join(told), number(whole)])
    if not rows:
        return []
    text = (
        "Stages overlap, so what they save does not add up to the whole. µs a step; below zero: it was slower without."
    )
    return [text, *sheet.table(["case", "way", "saved without", "whole"], rows, left=3)]


def _kernels(sheet: Sheet) -> list[str]:
    campaign = sheet.campaign
    rows = []
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
            rows.append(["", counted(len(left), "other"), "", number(us), f"{us / total:.0%}" if total else ""])
    if not rows:
        return []
    head = ["case", "kernel", "calls", "µs of the whole call", "share"]
    return [*sheet.table(head, rows, left=2), *_counters(campaign)]


def _counters(campaign: Campaign) -> list[str]:
    """What was counted in kernels; and, once for all cases, why nothing was."""
    lists: list[str] = []
    missing: dict[str, list[str]] = {}
    for entry in campaign.entries("kernels"):
        found = entry.get("counters") or {}
        named = _case(campaign, entry)
        if "why" in found:
            missing.setdefault(str(found["why"]), []).append(named)
        for name, value in found.items():
            if isinstance(value, dict):
                told = "; ".join(f"{escape(each, 60)} {_counter(figure)}" for each, figure in value.items())
                lists.append(f"- {named}, {code(name, 60)}: {told}")
        flat = {name: value for name, value in found.items() if name != "why" and not isinstance(value, dict)}
        if flat:
            lists.append(f"- {named}: " + "; ".join(f"{escape(k, 60)} {_counter(v)}" for k, v in flat.items()))
    lines = ["Counters:", "", *lists, ""] if lists else []
    return lines + [f"No counters: {escape(why)} ({'; '.join(keys)})." for why, keys in missing.items()]


def _counter(value: Any) -> str:
    return significant(float(value)) if isinstance(value, float) else escape(value)


def _layouts(sheet: Sheet) -> list[str]:
    campaign = sheet.campaign
    rows, failed, gains = [], [], []
    for entry in campaign.entries("layouts"):
        default, best = (_per_step(campaign, entry, entry.get(name)) for name in ("default_us", "best_us"))
        old, new = entry.get("default") or {}, entry.get("best") or {}
        changes = [f"{name} {old.get(name)} → {new[name]}" for name in new if new[name] != old.get(name)]
        told = escape(", ".join(changes)) if changes else "the default" if new else ""
        gains.append(default / best if default and best else None)
        named = f"{_case(campaign, entry)}, {escape(entry.get('way'))}"
        failed += [f"- {named}, {escape(name)}: {escape(why)}" for name, why in (entry.get("failed") or {}).items()]
        row = [_case(campaign, entry), escape(entry.get("way")), told, number(default), number(best)]
        rows.append([*row, escape(entry.get("tried") or "")])
    if not rows:
        return []
    places = decimals(gain for gain in gains if gain is not None)
    for row, gain in zip(rows, gains, strict=True):
        row.insert(5, "" if gain is None else fixed(gain, places))
    head = ["case", "way", "best", "default, µs a step", "best, µs a step", "default / best", "tried"]
    return [*sheet.table(head, rows, left=3), *(["Failed, so not timed:", "", *failed] if failed else [])]


def _first_calls(sheet: Sheet) -> list[str]:
    campaign = sheet.campaign
    rows, untimed = [], []
    for entry in campaign.entries("first_calls"):
        cold, warm = (usable(entry.get(name)) for name in ("cold_s", "warm_s"))
        provider, why = escape(label(str(entry.get("provider")))), escape(entry.get("why") or "")
        if cold is None and warm is None:
            untimed.append(f"- {_case(campaign, entry)}, {provider}: {why or 'no reason was kept'}")
        else:
            rows.append([_case(campaign, entry), provider + (f" ({why})" if why else ""), number(cold), number(warm)])
    text = "Seconds of the first training step, compilers included."
    head = ["case", "provider", "caches empty, s", "caches filled, s"]
    lines = [text, *sheet.table(head, rows, left=2)] if rows else []
    lines += ["Not timed:", "", *untimed] if untimed else []
    return [*lines, *_compiled_loop(campaign)]


def _compiled_loop(campaign: Campaign) -> list[str]:
    """What torch.compile takes for a loop over all steps, or that it was not through when its time was."""
    told = []
    for (key, provider), result in campaign.results.items():
        if provider == "compiled loop":
            seconds = usable(result.first_call_s)
            what = f"{number(seconds)} s" if seconds is not None else escape(result.why)
            told.append(f"- {inline(campaign, key)}: {what}")
    return ["First training step of the compiled loop over all steps:", "", *told] if told else []
