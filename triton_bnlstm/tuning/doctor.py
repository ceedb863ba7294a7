"""The command `doctor`: what tuning rests on here, and what of it does not work."""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from collections import Counter
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import backend, checks
from ..backend import backend_report
from . import contents, machine, mode, online, screens
from .contents import Found
from .device import provenance_of, triton_version
from .machine import Here
from .screens import DONE, FAILED, Failure
from .store import SCHEMA, VARIABLE, locked

_PACKAGES = {
    "filelock": "tuned layouts cannot be kept",
    "platformdirs": f"there is a cache only where {VARIABLE} names a folder",
    "rich": "progress and tables are plain text",
}


def doctor(arguments: argparse.Namespace) -> int:
    """`doctor`: look at everything."""
    problems: list[str] = []
    devices = _devices(problems)
    report = asdict(backend_report())
    packages = {name: _version(name) for name in _PACKAGES}
    told: dict[str, Any] = {
        "versions": {
            "triton_bnlstm": report["version"],
            "torch": report["torch"],
            "triton": report["triton"],
            "python": platform.python_version(),
            **packages,
        },
        "devices": [_device(each) for each in devices],
        "backend": {"name": report["backend"], "reason": report["reason"]},
        "autotune": _autotune(problems),
    }
    idle = {here.device: machine.why_not_measured(here.device, machine.FLOAT) for here in devices}
    problems += [f"{device}: nothing can be measured: {why}" for device, why in idle.items() if why is not None]
    try:
        asked = [f"backend={name!r} is" for name in [backend.requested_backend(None)] if name == "triton"]
    except ValueError as error:
        problems.append(str(error))
        asked = []
    asked += ["TRITON_INTERPRET=1 is"] if os.environ.get("TRITON_INTERPRET") == "1" else []
    if asked and triton_version() == "none":
        problems.append(f"{asked[0]} asked for, and Triton is {report['triton']}")
    if packages["filelock"] is None:
        problems.append(f"the package filelock is missing: {_PACKAGES['filelock']}")
    told["cache"] = _cache(devices, problems)
    told["shipped"] = _shipped(devices, problems)
    told["why_not_tune"] = _why_not_tune(list(idle.values()), told["cache"])
    told["can_tune"] = told["why_not_tune"] is None
    told["problems"] = problems
    if arguments.json:
        screens.write_json(told)
    else:
        _print(told)
    return FAILED if problems else DONE


def _why_not_tune(idle: list[str | None], cache: dict[str, Any]) -> str | None:
    """Why `tune` would refuse, and the next step; None: it would not.

    Args:
        idle: of each device why nothing can be measured on it.
        cache: what is told of it.
    """
    if not idle:
        return (
            f"there is no GPU of use: {machine.why_none()}. What is tuned on another machine comes here by `export` "
            "there and `import` here"
        )
    if None not in idle:
        return f"nothing can be measured: {idle[0]}"
    if cache.get("read_only"):
        return f"the cache can only be read: tune where it can be written, or name another folder in {VARIABLE}"
    return None if cache["usable"] else f"nothing could be kept, see below: name another folder in {VARIABLE}"


def _devices(problems: list[str]) -> list[Here]:
    try:
        return machine.find_all()
    except Failure as failure:
        problems.append(str(failure))
        return []


def _device(here: Here) -> dict[str, Any]:
    numbers = {name: value for name, value in asdict(here.numbers).items() if name not in ("backend", "name")}
    return {
        "device": str(here.device),
        "name": here.name,
        "driver": provenance_of(here.device).driver,
        "identity": here.identity.slug,
        "numbers": numbers,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _autotune(problems: list[str]) -> dict[str, Any]:
    told: dict[str, Any] = {
        "mode": "off",
        "from": f"{mode.VARIABLE}" if os.environ.get(mode.VARIABLE) else "default",
        "seconds": online.SECONDS,
        "seconds_from": online.SECONDS_VARIABLE if os.environ.get(online.SECONDS_VARIABLE) else "default",
    }
    try:
        told["mode"] = checks.choice(mode.VARIABLE, os.environ.get(mode.VARIABLE) or "off", mode.MODES)
    except ValueError as error:
        told["mode"] = None
        problems.append(str(error))
    try:
        told["seconds"] = online.seconds_allowed()
    except ValueError as error:
        told["seconds"] = None
        problems.append(str(error))
    return told


def _cache(devices: list[Here], problems: list[str]) -> dict[str, Any]:
    origin = VARIABLE if os.environ.get(VARIABLE) else "platformdirs"
    root = contents.root_of_cache()
    if root is None:
        problems.append(contents.why_no_cache())
        return {"folder": None, "from": origin, "usable": False}
    asked = os.environ.get(VARIABLE) or str(root)
    if not Path(asked).expanduser().is_absolute():
        problems.append(
            f"{VARIABLE}={asked} depends on the folder that a process is started in, now {Path.cwd()}: what is tuned "
            "in one is not found in another; name a folder in full"
        )
    try:
        cache = contents.of_cache(root)
    except Failure as failure:
        problems.append(str(failure))
        return {"folder": str(root), "from": origin, "usable": False}
    places = [root]
    for here in devices:
        folder = root / f"v{SCHEMA}" / here.identity.slug
        if folder.exists():
            places.append(folder)
    tried = [(place, why_unusable(place)) for place in places]
    wrong = [(place, reason) for place, reason in tried if reason is not None]
    # A folder that others have filled and this user may only read is a way to share it, not a fault.
    problems += [reason for place, reason in wrong if not _is_read_only(place)]
    read_only = bool(wrong) and all(_is_read_only(place) for place, _ in wrong)
    for broken in cache.unreadable:
        set_aside = broken.is_foreign and not wrong and os.access(broken.path.parent, os.W_OK)
        next_use = "; the next use sets it aside" if set_aside else ""
        problems.append(f"{broken.path} cannot be used: {broken.why}{next_use}{broken.advice}")
    ours = {here.identity.slug for here in devices}
    return {
        "folder": str(root),
        "from": origin,
        "exists": root.exists(),
        "usable": not wrong,
        "read_only": read_only,
        "entries_here": sum(each.identity.slug in ours for each in cache.found),
        "entries_elsewhere": sum(each.identity.slug not in ours for each in cache.found),
        "stale": sum(each.is_stale for each in cache.found),
        "other_code": sum(each.of_other_code for each in cache.found),
        "unusable_entries": sum(each.entry is None for each in cache.found),
        "set_aside": [str(path) for path in cache.aside],
    }


def _is_read_only(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.R_OK | os.X_OK) and not os.access(folder, os.W_OK)


def why_unusable(folder: Path) -> str | None:
    """Why files cannot be written, read, replaced and locked in a folder, tried out; None if all that works.

    Of a folder that does not exist, the nearest one above it that does is tried. Nothing is left there.
    """
    there = folder.absolute()
    try:
        reason = contents.why_no_folder(there)
        if reason is not None:
            return reason
        while not there.exists():
            there = there.parent
        with tempfile.TemporaryDirectory(prefix=".triton_bnlstm-", dir=there) as name:
            text, new, file = "tried", Path(name, "new"), Path(name, "file")
            file.write_text("before", encoding="utf-8")
            new.write_text(text, encoding="utf-8")
            os.replace(new, file)
            if file.read_text(encoding="utf-8") != text:
                return f"{there}: what is written is not what is read"
            return _why_no_locks(file)
    except OSError as error:
        return f"{there} cannot be written ({error.strerror or error})"


def _why_no_locks(file: Path) -> str | None:
    """Whether a lock can be had, and keeps others out."""
    try:
        with locked(file, 1):
            try:
                with locked(file, 0):
                    return f"{file.parent.parent}: locks of files do not keep others out on this file system"
            except OSError:
                return None
    except OSError as error:
        return f"{file.parent.parent}: files cannot be locked ({error.strerror or error})"


def _shipped(devices: list[Here], problems: list[str]) -> dict[str, int]:
    try:
        found: list[Found] = contents.of_package()
    except Failure as failure:
        problems.append(str(failure))
        return {}
    ours = {here.identity for here in devices}
    counted = Counter(
        each.entry.how for each in found if each.identity in ours and each.entry is not None and not each.of_other_code
    )
    return {"measured": counted["measured"], "modelled": counted["modelled"]}


def _print(told: dict[str, Any]) -> None:
    versions = told["versions"]
    lines = [(name, versions[name]) for name in ("triton_bnlstm", "torch", "triton", "python")]
    lines += [(name, versions[name] or f"missing: {without}") for name, without in _PACKAGES.items()]
    for device in told["devices"]:
        n = device["numbers"]
        registers, threads = n["registers_per_multiprocessor"], n["threads_per_multiprocessor"]
        shared, most = n["shared_per_multiprocessor"] // 1024, n["shared_per_program"] // 1024
        lines += [
            (device["device"], f"{device['name']}, driver {device['driver']}"),
            ("", f"{device['identity']}: {n['multiprocessors']} multiprocessors, each with {registers}"),
            ("", f"registers, {threads} threads and {shared} KB of shared memory,"),
            ("", f"of which a program can have {most} KB"),
        ]
    if not told["devices"]:
        lines.append(("devices", "no accelerator of use"))
    lines.append(("backend", f"{told['backend']['name']}: {told['backend']['reason']}"))
    lines.append(("tuning", f"not here: {told['why_not_tune']}" if told["why_not_tune"] else "can be done here"))
    autotune = told["autotune"]
    lines.append(("autotune", f"{autotune['mode'] or 'wrong'} ({autotune['from']})"))
    if autotune["seconds"] is not None:
        lines.append(("", f"at most {autotune['seconds']:g} s for a kernel ({autotune['seconds_from']})"))
    lines += _cache_lines(told["cache"])
    if told["devices"] and told["shipped"]:
        shipped = told["shipped"]
        lines.append(("shipped", f"for these devices: {shipped['measured']} measured, {shipped['modelled']} modelled"))
    wide = max(len(name) for name, _ in lines)
    for name, text in lines:
        screens.print_text(f"{name:<{wide}}  {text}", " " * (wide + 2))
    print()
    if not told["problems"]:
        print("no problems found")
        return
    print(f"{screens.count(len(told['problems']), 'problem')}:")
    for problem in told["problems"]:
        screens.print_text(f"  - {screens.one_line(problem)}", "    ")


def _cache_lines(cache: dict[str, Any]) -> list[tuple[str, str]]:
    if cache["folder"] is None or "exists" not in cache:
        return [("cache", f"{cache['folder'] or 'none'} (from {cache['from']})")]
    here = screens.count(cache["entries_here"], "entry", "entries")
    missing = "" if cache["exists"] else ", not made yet"
    works = "can be read, written and locked" if cache["usable"] else "cannot be used"
    if cache.get("read_only"):
        works = "can be read, not written: what is there is used, and nothing new is kept"
    lines = [
        ("cache", f"{cache['folder']} (from {cache['from']}{missing})"),
        ("", works if cache["exists"] else f"the folder above it {works}"),
        ("", f"{here} for devices of this machine, {cache['entries_elsewhere']} for others"),
    ]
    remarks = [
        (cache["stale"], "measured with another Triton: still used"),
        (cache["other_code"], "for another version of the kernels' code: not used"),
        (cache["unusable_entries"], "that cannot be understood: not used"),
    ]
    lines += [("", f"{number} {text}") for number, text in remarks if number]
    lines += [("", f"set aside as unreadable: {path}") for path in cache["set_aside"]]
    return lines
