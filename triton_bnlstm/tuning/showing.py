"""The command `show`: what is known, where each entry comes from, and what it gains."""

from __future__ import annotations

import argparse
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from . import contents, machine, screens
from .choice import SHIPPED
from .contents import Contents, Found
from .device import Identity
from .entry import Entry
from .screens import DONE, FAILED, Row
from .work import in_words

_WHAT = ["kernel", "dtype", "size", "batch", "dirs", "flags"]


class _Listed(NamedTuple):
    """What is asked for: entries, and beside them all that there is in the cache and in the package."""

    found: list[Found]
    cache: Contents
    package: list[Found]


def show(arguments: argparse.Namespace) -> int:
    """`show`: what is known."""
    here = machine.find() if arguments.device == "this" else machine.find_any()
    root = contents.root_of_cache()
    cache, package = contents.of_cache(root), contents.of_package()
    found = [*cache.found, *(package if arguments.shipped else [])]
    if arguments.device == "this" and here is not None:
        found = [each for each in found if each.identity == here.identity]
    hidden = contents.shadowed(found)
    if arguments.kernel is not None:
        found = [each for each in found if each.kernel in arguments.kernel]
    found = contents.of_architectures(found, arguments.architecture, [*cache.found, *package])
    found.sort(key=contents.by_size)
    code = FAILED if cache.unreadable or root is None else DONE
    if arguments.json:
        screens.write_json(
            {
                "cache": None if root is None else str(root),
                "why_no_cache": contents.why_no_cache() if root is None else None,
                "entries": [_as_json(each, hidden, arguments.candidates) for each in found],
                "unreadable": [each.as_json() for each in cache.unreadable],
                "set_aside": [str(path) for path in cache.aside],
            }
        )
        return code
    for broken in cache.unreadable:
        screens.print_text(f"cannot be used: {broken}{broken.advice}")
    for identity, group in groupby(found, key=lambda each: each.identity):
        _print_device(identity, list(group), hidden, candidates=arguments.candidates)
    _print_rest(_Listed(found, cache, package), arguments)
    ours = [each for each in package if here is not None and each.identity == here.identity]
    if ours and not arguments.shipped:
        modelled = sum(not each.measured for each in ours)
        layouts = screens.count(len(ours), "layout is", "layouts are")
        screens.print_text(
            f"{layouts} shipped for this device ({modelled} modelled, not measured): `show --shipped` lists them"
        )
    return code


def _marks(each: Found, hidden: set[tuple[Identity, str]]) -> list[str]:
    if each.entry is None:
        return [f"not used: {each.problem}"]
    marks = []
    if each.of_other_code:
        marks.append("not used: measured for another version of the kernel's code")
    if each.is_stale:
        again = screens.tune_words(each.entry)
        marks.append(f"{screens.stale_words(each.entry)}; still used. Measured anew by: {again}")
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
    others = [each for each in group if each not in modelled]
    # what all have in common is said once
    origins = {_origin(each, each.entry) for each in others if each.entry is not None}
    stale = {screens.stale_words(each.entry) for each in others if each.entry is not None and each.is_stale}
    shared = len(others) > 1 and len(origins) == 1
    shared_stale = shared and len(stale) == 1 and all(each.is_stale for each in others if each.entry is not None)
    rows = []
    for each in others:
        entry, marks = each.entry, _marks(each, hidden)
        if entry is None:
            blank = [""] * (len(_WHAT) - 1)
            rows.append(Row([each.kernel, *blank], ["-", "-"], [each.text], marks))
            continue
        if shared_stale:
            marks = [mark for mark in marks if not mark.startswith("stale")]
        details = [in_words(entry.layout), *([] if shared else [_origin(each, entry)])]
        tried = tuple(screens.candidate_lines(entry)) if candidates else ()
        gain = screens.gain_words(each.gain, is_default=entry.layout == each.default)
        figures = [screens.microseconds(screens.time_of(entry)), gain]
        rows.append(Row(screens.key_cells(entry.key), figures, details, marks, tried))
    names = {each.entry.by.name for each in group if each.measured and each.entry is not None}
    names = names or {each.entry.by.name for each in modelled if each.entry is not None}
    heading = screens.device_heading(identity, names)
    if rows:
        print(heading)
        if shared:
            screens.print_text(origins.pop())
        if shared_stale:
            again = screens.tune_words(next(each.entry for each in others if each.entry is not None))
            screens.print_text(f"! {stale.pop()}; still used. Measured anew by, for instance: {again}")
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


def _print_rest(listed: _Listed, arguments: argparse.Namespace) -> None:
    found, cache = listed.found, listed.cache
    if any(each.measured for each in found):
        screens.print_text(
            f"{screens.micro()} of a step, for moments of a call; gain: how many times as fast as the default, "
            '"-" where that was not measured'
        )
    for line in screens.legend([each.entry for each in found if each.entry is not None]):
        screens.print_text(line)
    if cache.root is None:
        screens.print_text(f"{contents.why_no_cache()[0].upper()}{contents.why_no_cache()[1:]}.")
    else:
        screens.print_text(f"Cache: {cache.root}")
    if not found:
        there = [*cache.found, *listed.package]
        if arguments.kernel or arguments.architecture or arguments.device == "this":
            told = contents.what_there_is(cache.found, [] if arguments.shipped else listed.package)
            screens.print_text(f"There is no entry{_asked(arguments)}; {told}." if there else "There are no entries.")
            if listed.package and not arguments.shipped:
                print("`show --shipped` lists what is shipped, too.")
        if not cache.found:
            print(f"No tuned layouts yet. To measure some, on the machine with the GPU:\n  {screens.tune_words(None)}")
    for path in cache.aside:
        name = path.relative_to(cache.root or Path())
        screens.print_text(f"set aside as unreadable: {name}; {contents.remedy(path)}")


def _asked(arguments: argparse.Namespace) -> str:
    """What was asked for, in words."""
    of = f" of {screens.listed(arguments.kernel)}" if arguments.kernel else ""
    on = f" for {screens.listed(arguments.architecture)}" if arguments.architecture else ""
    return f"{of}{on}{' for the GPU of this machine' * (arguments.device == 'this')}"


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
        "gain": each.gain,
        "gain_when_measured": entry.gain,
        "stale": each.is_stale,
        "other_code": each.of_other_code,
        "layout_in_words": in_words(entry.layout),
    }
    details = entry.as_json()
    if not candidates:
        del details["candidates"]
    return told | {"entry": details}
