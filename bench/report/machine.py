"""What was measured on, when and with which versions, and what the device's tests said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .campaign import Campaign, usable
from .text import code, counted, escape, number

PROGRAMS = {
    "torch": "torch",
    "cuda": "CUDA",
    "hip": "HIP",
    "cudnn": "cuDNN",
    "triton": "Triton",
    "triton_bnlstm": "triton_bnlstm",
}


def where(campaign: Campaign, *, short: bool) -> list[str]:
    """Lines about device, host, versions and runs; `short` leaves out what hardly anybody asks for."""
    device = campaign.record["device"]
    told = [*_device(device), *_of_runs(campaign, "limits", device.get("limits"), show=_limits)]
    told += _of_runs(campaign, "driver", device.get("driver"), "driver ")
    lines = [f"{'CPU' if device.get('type') == 'cpu' else 'GPU'}: {', '.join(told)}."] if told else []
    hosts = _of_runs(campaign, "cpu", device.get("cpu"))
    lines += [f"Host: {', '.join(hosts)}."] if hosts else []
    versions = _versions(campaign)
    lines += [f"{', '.join(versions)}."] if versions else []
    return [*lines, *_runs(campaign, short), *_kernels(campaign, short)]


def _device(device: dict[str, Any]) -> list[str]:
    count, memory, cache = (usable(device.get(name)) for name in ("multiprocessors", "memory_bytes", "l2_bytes"))
    told = [counted(int(count), "multiprocessor")] if count else []
    told += [f"{memory / 2**30:.0f} GiB"] if memory else []
    return told + ([f"{cache / 2**20:.3g} MiB of L2"] if cache else [])


def _of_runs(
    campaign: Campaign, name: str, first: Any, what: str = "", show: Callable[[str], str] = escape
) -> list[str]:
    """One of the things that may change from run to run: all that it was, after `what`."""
    given = [*(run.get(name) for run in campaign.entries("runs")), first]
    shown = list(dict.fromkeys(show(str(value)) for value in given if value))
    more = " (not the same in all runs)" if len(shown) > 1 else ""
    return [f"{what}{' or '.join(shown)}{more}"] if shown else []


def _limits(value: str) -> str:
    """What nvidia-smi says of clocks and power."""
    parts = [part.strip() for part in value.split(",")]
    if len(parts) != 3:
        return f"limits {escape(value)}"
    clock, memory, power = map(escape, parts)
    return f"at most {clock} (memory {memory}) and {power.replace('.00 W', ' W')}"


def _versions(campaign: Campaign) -> list[str]:
    versions = campaign.record["versions"]
    told = []
    for key, name in PROGRAMS.items():
        if versions.get(key):
            told.append(f"{name} {escape(cudnn(versions[key]) if key == 'cudnn' else versions[key])}")
    for key, name in (("numpy", "NumPy"), ("python", "Python")):
        told += _of_runs(campaign, key, versions.get(key), f"{name} ")
    return told


def cudnn(value: Any) -> str:
    """91300 is 9.13.0 and 8907 is 8.9.7; anything else stays as it is."""
    if isinstance(value, int) and 10_000 <= value < 1_000_000:
        return f"{value // 10_000}.{value // 100 % 100}.{value % 100}"
    if isinstance(value, int) and 1_000 <= value < 10_000:
        return f"{value // 1_000}.{value // 100 % 10}.{value % 100}"
    return str(value)


def _runs(campaign: Campaign, short: bool) -> list[str]:
    runs = campaign.entries("runs")
    dates = sorted({str(run["utc"])[:10] for run in runs if run.get("utc")})
    when = ""
    if dates:
        when = f" on {escape(dates[0])}" if len(dates) == 1 else f" from {escape(dates[0])} to {escape(dates[-1])}"
    commands = list(dict.fromkeys(code(run["command"]) for run in runs if run.get("command")))
    minutes = sum(run["seconds"] for run in runs if isinstance(run.get("seconds"), int | float)) / 60
    lines = []
    if commands or when:
        text = f"Measured{when}" + (f" with {', '.join(commands)}" if commands else "")
        took = f"{number(minutes)} {'minute' if number(minutes) == '1.00' else 'minutes'}"
        lines += [f"{text} ({counted(len(runs), 'run')}, {took})."]
    loads = [run["load"] for run in runs if run.get("load")]
    if loads and not short:
        lines += [f"Load averages before each run: {escape('; '.join(map(_load, loads)))}."]
    return lines


def _load(load: Any) -> str:
    return ", ".join(map(str, load)) if isinstance(load, list) else str(load)


def _kernels(campaign: Campaign, short: bool) -> list[str]:
    sources = sorted(campaign.sources.items(), key=lambda item: -item[1])
    if len(sources) == 1:
        return [] if short else [f"Kernels' fingerprint: {code(sources[0][0])}."]
    told = ", ".join(f"{code(source)} ({counted(count, 'result')})" for source, count in sources)
    return [f"**Not all figures are of the same kernels.** Fingerprints: {told}."] if sources else []


def said_by_tests(campaign: Campaign, most: int | None = None, rest: str = "") -> list[str]:
    """What became of the tests on the device.

    Args:
        campaign: whose.
        most: failed ones that are named; None: all, and the unfinished ones too.
        rest: where the others are named.
    """
    found = campaign.record["tests"]
    if not found:
        return ["**GPU tests: none recorded.** Nothing here says that the kernels are right on this device."]
    failed, unfinished, passed = found.get("failed") or {}, found.get("unfinished") or [], found.get("passed") or 0
    text = f"{passed} passed, {len(failed)} failed, {len(unfinished)} unfinished, {found.get('skipped') or 0} skipped"
    source = str(found.get("source") or "")
    text += f", of the kernels {code(source)}" if source and set(campaign.sources) - {source} else ""
    loud = "" if passed else " **0 passed: nothing here says that the kernels are right on this device.**"
    lines = [f"GPU tests: {text}.{loud}", ""]
    lines += [f"- failed: {code(name)}: {escape(why)}" for name, why in list(failed.items())[:most]]
    if most is not None and len(failed) > most:
        lines += [f"- and {len(failed) - most} more {rest}"]
    if unfinished and most is None:
        lines += ["", "Unfinished:", "", *(f"- {code(name)}" for name in unfinished)]
    return [*lines, ""]
