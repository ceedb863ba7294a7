"""The commands that look after a cache: show, export, import, clear."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from . import contents, machine, screens, shipped
from .choice import SHIPPED
from .contents import Contents, Found
from .device import Identity
from .doctor import why_unusable
from .entry import Entry
from .screens import DONE, FAILED, USAGE, Failure, Row
from .store import Raw, Store, locked, read_file, replace_text
from .work import KERNELS, in_words

_WHAT = ["kernel", "dtype", "size", "batch", "dirs", "flags"]


def show(arguments: argparse.Namespace) -> int:
    """`show`: what is known."""
    here = machine.find() if arguments.device == "this" else machine.find_any()
    cache = contents.of_cache(contents.root_of_cache())
    found = list(cache.found)
    package = contents.of_package() if arguments.shipped or here is not None else []
    if arguments.shipped:
        found += package
    if arguments.device == "this" and here is not None:
        found = [each for each in found if each.identity == here.identity]
    hidden = contents.shadowed(found)
    if arguments.kernel is not None:
        found = [each for each in found if each.kernel == arguments.kernel]
    if arguments.architecture:
        found = [each for each in found if each.identity.architecture in arguments.architecture]
    found.sort(key=contents.by_size)
    if arguments.json:
        screens.write_json(
            {
                "cache": None if cache.root is None else str(cache.root),
                "entries": [_as_json(each, hidden, arguments.candidates) for each in found],
                "unreadable": [{"file": str(path), "why": why} for path, why in cache.unreadable],
                "set_aside": [str(path) for path in cache.aside],
            }
        )
        return DONE
    for identity, group in groupby(found, key=lambda each: each.identity):
        _print_device(identity, list(group), hidden, candidates=arguments.candidates)
    _print_rest(cache, found)
    ours = [each for each in package if here is not None and each.identity == here.identity]
    if ours and not arguments.shipped:
        modelled = sum(not each.measured for each in ours)
        layouts = screens.count(len(ours), "layout is", "layouts are")
        print(f"{layouts} shipped for this device ({modelled} modelled, not measured): `show --shipped` lists them")
    return DONE


def _marks(each: Found, hidden: set[tuple[Identity, str]]) -> list[str]:
    if each.entry is None:
        return [f"not used: {each.problem}"]
    marks = []
    if each.of_other_code:
        marks.append("not used: measured for another version of the kernel's code")
    if each.is_stale:
        marks.append(f"{screens.stale_words(each.entry)}; still used, and `tune` measures it again")
    if each.is_slower:
        marks.append("slower than the default")
    if each.origin == SHIPPED and (each.identity, each.text) in hidden:
        marks.append("not used: your cache has its own")
    return marks


def _origin(each: Found, entry: Entry) -> str:
    return f"{'shipped' if each.origin == SHIPPED else 'your cache'}: {screens.source_of(entry)}"


def _print_device(
    identity: Identity, group: list[Found], hidden: set[tuple[Identity, str]], *, candidates: bool
) -> None:
    modelled = [each for each in group if each.entry is not None and not each.measured]
    rows = []
    for each in group:
        entry = each.entry
        if each in modelled:
            continue
        if entry is None:
            blank = [""] * (len(_WHAT) - 1)
            rows.append(Row([each.kernel, *blank], ["-", "-"], [each.text], _marks(each, hidden)))
            continue
        details = [in_words(entry.layout), _origin(each, entry)]
        tried = tuple(screens.candidate_lines(entry)) if candidates else ()
        figures = [screens.microseconds(screens.time_of(entry)), screens.gain_of(entry)]
        rows.append(Row(screens.key_cells(entry.key), figures, details, _marks(each, hidden), tried))
    names = {each.entry.by.name for each in group if each.measured and each.entry is not None}
    names = names or {each.entry.by.name for each in modelled if each.entry is not None}
    heading = screens.device_heading(identity, names)
    if rows:
        print(heading)
        screens.print_table(_WHAT, [screens.micro(), "gain"], rows)
        print()
    for origin, part in groupby(sorted(modelled, key=lambda each: each.origin), key=lambda each: each.origin):
        print(f"{heading}: {'shipped' if origin == SHIPPED else 'your cache'}, modelled, not measured")
        lines = [
            Row(screens.key_cells(each.entry.key), [], [in_words(each.entry.layout)], _marks(each, hidden))
            for each in part
            if each.entry is not None
        ]
        screens.print_table(_WHAT, [], lines)
        print()


def _print_rest(cache: Contents, found: list[Found]) -> None:
    if any(each.measured for each in found):
        screens.print_text(
            f"{screens.micro()} of a step, for moments of a call; gain: how many times as fast as the default"
        )
    for line in screens.legend(each.entry.key for each in found if each.entry is not None):
        screens.print_text(line)
    if cache.root is None:
        print(contents.why_no_cache())
        return
    print(f"Cache: {cache.root}")
    if not found:
        print(
            "No tuned layouts to show. To measure some, on the machine with the GPU:\n"
            f"  {screens.program()} tune --hidden 512 --batch 64 --dtype bf16"
        )
    for path, why in cache.unreadable:
        print(f"  cannot be used: {path.relative_to(cache.root)}: {why}")
    for path in cache.aside:
        print(f"  set aside as unreadable: {path.relative_to(cache.root)}")


def _as_json(each: Found, hidden: set[tuple[Identity, str]], candidates: bool) -> dict[str, Any]:
    entry = each.entry
    told: dict[str, Any] = {
        "device": each.identity._asdict(),
        "kernel": each.kernel,
        "key": each.text,
        "origin": each.origin,
        "shadowed": each.origin == SHIPPED and (each.identity, each.text) in hidden,
        "problem": each.problem or None,
    }
    if entry is None:
        return told
    told |= {
        "us": screens.time_of(entry),
        "gain": entry.gain,
        "stale": each.is_stale,
        "other_code": each.of_other_code,
        "layout_in_words": in_words(entry.layout),
    }
    details = entry.as_json()
    if not candidates:
        del details["candidates"]
    return told | {"entry": details}


def export(arguments: argparse.Namespace) -> int:
    """`export`: what the package ships, made from a cache."""
    cache = contents.of_cache(contents.root_of_cache())
    found = [each for each in cache.found if arguments.kernel in (None, each.kernel)]
    good = [each for each in found if each.measured and not each.of_other_code]
    if arguments.architecture is not None:
        good = [each for each in good if each.identity.architecture == arguments.architecture]
    if not good:
        raise Failure(
            "nothing to export: the cache has no measured layouts"
            + (f" of {arguments.kernel}" if arguments.kernel else "")
            + (f" for {arguments.architecture}" if arguments.architecture else "")
            + " for this version of the kernels"
        )
    slower = sum(each.is_slower for each in good)
    if slower:
        screens.complain(f"left out: {screens.count(slower, 'entry', 'entries')}, slower than the default")
        good = [each for each in good if not each.is_slower]
        if not good:
            raise Failure("nothing to export: all that is there is slower than the default")
    known = sorted({each.identity.architecture for each in good})
    if len(known) > 1:
        raise Failure(f"the cache has layouts for {', '.join(known)}: choose with --architecture", USAGE)
    devices: dict[Identity, Raw] = {}
    for each in good:
        assert each.entry is not None
        entry = each.entry if arguments.with_candidates else _without_candidates(each.entry)
        devices.setdefault(each.identity, {})[each.text] = entry.as_json()
    stale = sum(each.is_stale for each in good)
    if stale:
        screens.complain(f"{screens.count(stale, 'entry was', 'entries were')} measured with another Triton")
    text = shipped.text_of(devices)
    if arguments.out is None:
        sys.stdout.write(text)
        return DONE
    try:
        replace_text(arguments.out, text)
    except OSError as error:
        raise Failure(f"{arguments.out} cannot be written ({error.strerror or error})") from None
    entries, devices_there = screens.count(len(good), "entry", "entries"), screens.count(len(devices), "device")
    print(f"{arguments.out}: {entries} of {devices_there}")
    return DONE


def _without_candidates(entry: Entry) -> Entry:
    """But for those that say what is gained: the layout and the default."""
    kept = tuple(each for each in entry.candidates if each.layout in (entry.layout, entry.default))
    return replace(entry, candidates=kept)


def take(arguments: argparse.Namespace) -> int:
    """`import`: put what `export` wrote, maybe elsewhere, into the cache; nothing, if a file is not one of ours."""
    held = [(path, _exported(path)) for path in arguments.files]
    root = contents.root_of_cache()
    reason = contents.why_no_cache() if root is None else contents.why_no_folder(root) or why_unusable(root)
    if reason is not None:
        raise Failure(f"nothing could be kept: {reason}")
    taken, older = 0, 0
    devices: set[Identity] = set()
    for path, each_device in held:
        for identity, entries in each_device.items():
            store = Store(identity, root)
            for text, raw in entries.items():
                each = contents.found_of(identity, "", text, "", raw)
                why = _why_not_taken(each)
                if why is None and each.entry is not None:
                    if store.put(each.entry):
                        kept = store.get(each.entry.key)
                        older += kept is not None and kept.as_json()["at"] != each.entry.as_json()["at"]
                        taken, devices = taken + 1, devices | {identity}
                        continue
                    why = "it could not be kept"
                screens.complain(f"{path}: skipped {text}: {why}")
    more = f"; for {older} of them what was there is newer, and stays" if older else ""
    entries_, devices_ = screens.count(taken, "entry", "entries"), screens.count(len(devices), "device")
    print(f"Took {entries_} for {devices_} into {root}{more}")
    return DONE if taken else FAILED


def _exported(path: Path) -> dict[Identity, Raw]:
    try:
        return shipped.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Failure(f"{path} cannot be read ({error.strerror or error})", USAGE) from None
    except (ValueError, RecursionError) as error:
        raise Failure(f"{path} is no file that `export` has written ({error})", USAGE) from None


def _why_not_taken(each: Found) -> str | None:
    if contents.of_slug(each.identity.slug) is None:  # a folder is named by it
        return f"{each.identity.slug!r} names no device"
    if each.entry is None:
        return f"it cannot be used: {each.problem}"
    if not each.measured:
        return "it is modelled, not measured"
    return "it is for another version of the kernel's code" if each.of_other_code else None


def clear(arguments: argparse.Namespace) -> int:
    """`clear`: remove entries, and with --all whatever else is in the devices' folders."""
    here = machine.find() if arguments.device == "this" else None
    root = contents.root_of_cache()
    cache = contents.of_cache(root)
    removed, files, failed = 0, 0, []
    for folder, identity in cache.folders.items():
        if identity is None or (here is not None and identity.slug != here.identity.slug):
            continue
        store = Store(identity, root)
        for kernel in KERNELS if arguments.kernel is None else [arguments.kernel]:
            if not (folder / f"{kernel}.json").exists():
                continue
            gone: list[int] = []
            how = partial(_kept, kernel=kernel, arguments=arguments, gone=gone)
            try:
                store.change(kernel, how)
            except OSError as error:
                screens.complain(f"{folder / kernel}.json could not be changed ({error})")
                failed.append(f"{folder / kernel}.json")
            else:
                removed += sum(gone)
        if arguments.all:
            files += _sweep(folder)
    if arguments.json:
        told = {"cache": None if root is None else str(root), "removed": removed, "other_files": files}
        screens.write_json({**told, "failed": failed})
        return FAILED if failed else DONE
    more = f" and {screens.count(files, 'other file')}" if files else ""
    print(f"Removed {screens.count(removed, 'entry', 'entries')}{more} from {root or 'no cache: there is none'}")
    return FAILED if failed else DONE


def _kept(entries: Raw, kernel: str, arguments: argparse.Namespace, gone: list[int]) -> Raw:
    """What stays. gone: takes how many do not."""
    kept = {}
    if arguments.stale or arguments.unused:
        identity = Identity("", "", 0, 0)
        looked_at = {text: contents.found_of(identity, kernel, text, "", raw) for text, raw in entries.items()}
        if arguments.unused:
            bad = {text for text, each in looked_at.items() if each.problem or each.of_other_code}
        else:
            bad = {text for text, each in looked_at.items() if each.is_stale}
        kept = {text: raw for text, raw in entries.items() if text not in bad}
    gone.append(len(entries) - len(kept))
    return kept


def _sweep(folder: Path) -> int:
    """Remove set-aside, temporary and empty files of a device that no other process is at work on. How many.

    Set-aside and temporary files are counted: empty files come and go by themselves. The locks of the cache's files
    stay: who waits for one that is removed would hold it beside whoever makes it anew. With those of measuring all
    that could happen is that two processes measure the same.
    """
    counted = 0
    for path in folder.glob("*.corrupt-*"):
        with suppress(OSError):
            path.unlink()
            counted += 1
    for kernel in KERNELS:
        path = folder / f"{kernel}.json"
        with suppress(OSError, ValueError), locked(path, 0):
            for abandoned in folder.glob(f".{path.name}.*.tmp"):  # whoever writes holds the lock
                abandoned.unlink()
                counted += 1
            if not read_file(path):
                path.unlink(missing_ok=True)
    measuring = folder / "measuring"
    for lock in measuring.glob("*.lock"):
        with suppress(OSError), locked(lock.with_suffix(""), 0):
            lock.unlink()
    with suppress(OSError):
        measuring.rmdir()
    return counted
