"""The commands `export` and `import`: measured layouts out of a cache, and into another one."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import contents, screens, shipped
from .contents import Broken, Contents, Found
from .device import Identity
from .doctor import why_unusable
from .entry import Entry, is_believed
from .screens import DONE, FAILED, USAGE, Failure
from .store import Raw, Store, replace_text


def export(arguments: argparse.Namespace) -> int:
    """`export`: what the package ships, made from a cache."""
    if arguments.json and arguments.out is None:
        raise Failure("export --json needs --out: without it the layouts, which are JSON, go to stdout", USAGE)
    if arguments.out is not None and not arguments.out.absolute().parent.is_dir():
        raise Failure(f"--out: there is no folder {arguments.out.absolute().parent}", USAGE)
    cache = contents.of_cache(contents.needed_root())
    package = contents.of_package()
    unreadable = [each for each in cache.unreadable if _is_asked_for(each, cache, arguments)]
    for broken in unreadable:  # first: it may be why there is nothing else
        screens.complain(f"not exported: {broken}{broken.advice}")
    good = _exported(cache.found, package, arguments)
    known = sorted({each.identity.architecture for each in good})
    if len(known) > 1 and not arguments.architecture:
        raise Failure(f"the cache has layouts for {', '.join(known)}: choose with --architecture", USAGE)
    slower = [each for each in good if each.is_slower]
    good = [each for each in good if not each.is_slower]
    if slower:
        screens.complain(f"left out: {screens.count(len(slower), 'entry', 'entries')}, slower than the default")
    if not good:
        raise Failure("nothing to export: all that is there is slower than the default")
    devices: dict[Identity, Raw] = {}
    for each in good:
        assert each.entry is not None
        entry = each.entry if arguments.with_candidates else _without_candidates(each)
        devices.setdefault(each.identity, {})[each.text] = entry.as_json()
    text = shipped.text_of(devices)
    if arguments.out is None:
        sys.stdout.write(text)
    else:
        try:
            _write(arguments.out, text)
        except OSError as error:
            raise Failure(f"{arguments.out} cannot be written ({error.strerror or error})") from None
    stale = sum(each.is_stale for each in good)
    if stale:
        were = f"{screens.count(stale, 'entry was', 'entries were')} measured with another Triton than there is here"
        screens.complain(f"{were}: they are used all the same, and tuned again on request")
    if arguments.json:
        found = {"file": str(arguments.out.absolute()), "entries": len(good), "left_out": len(slower), "stale": stale}
        slugs = [identity.slug for identity in devices]
        screens.write_json({**found, "devices": slugs, "unreadable": [each.as_json() for each in unreadable]})
    elif arguments.out is not None:
        there = screens.count(len(devices), "device")
        screens.print_text(f"{arguments.out}: {screens.count(len(good), 'entry', 'entries')} of {there}")
    return FAILED if unreadable else DONE


def _write(path: Path, text: str) -> None:
    """A file is replaced as a whole, the one that a link leads to; what is no file is written to."""
    path = path.resolve()
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
    else:
        replace_text(path, text)


def _is_asked_for(broken: Broken, cache: Contents, arguments: argparse.Namespace) -> bool:
    """Whether a file would have layouts that are asked for."""
    if arguments.kernel is not None and broken.kernel not in arguments.kernel:
        return False
    names = {each.lower() for each in arguments.architecture or ()}
    return not names or cache.folders[broken.path.parent].architecture in names


def _exported(found: list[Found], package: list[Found], arguments: argparse.Namespace) -> list[Found]:
    """What can be exported, of what is asked for.

    Raises:
        Failure: there is none.
    """
    asked = [each for each in found if arguments.kernel is None or each.kernel in arguments.kernel]
    asked = contents.of_architectures(asked, arguments.architecture, [*found, *package])
    measured = [each for each in asked if each.measured]
    good = [each for each in measured if not each.of_other_code]
    if good:
        return good
    if measured:
        raise Failure("nothing to export: what was measured is for other versions of the kernels' code")
    of = f" of {screens.listed(arguments.kernel)}" if arguments.kernel else ""
    of += f" for {screens.listed(arguments.architecture)}" if arguments.architecture else ""
    there = contents.what_there_is([each for each in found if each.measured], [])
    raise Failure(f"nothing to export: the cache has no measured layouts{of}" + (f"; {there}" if found and of else ""))


def _without_candidates(each: Found) -> Entry:
    """But for those that say what is gained: the layout and the defaults, of then and of today."""
    assert each.entry is not None
    layouts = (each.entry.layout, each.entry.default, each.default)
    kept = tuple(one for one in each.entry.candidates if one.layout in layouts)
    return replace(each.entry, candidates=kept)


@dataclass
class _Taken:
    """What came of an import.

    failed: kernels' files that entries could not be put into, and why. lost: how many of each. aside: files of no use
    that were in the place of these, under their new names.
    """

    new: int = 0
    same: int = 0
    older: int = 0
    undated: int = 0
    devices: set[Identity] = field(default_factory=set)
    failed: dict[Path, str] = field(default_factory=dict)
    lost: Counter[Path] = field(default_factory=Counter)
    aside: list[Path] = field(default_factory=list)
    skipped: dict[Path, Counter[str]] = field(default_factory=dict)


def take(arguments: argparse.Namespace) -> int:
    """`import`: put what `export` wrote, maybe elsewhere, into the cache; nothing, if a file is not one of ours."""
    held = [(path, _read(path)) for path in _files(arguments.files)]
    root = contents.root_of_cache()
    reason = contents.why_no_cache() if root is None else contents.why_no_folder(root) or why_unusable(root)
    if root is None or reason is not None:
        raise Failure(f"nothing could be kept: {reason}")
    before = contents.of_cache(root).aside
    taken = _Taken()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a library says of its user's cache is said here in other words
        for path, devices in held:
            skipped = taken.skipped.setdefault(path, Counter())
            for identity, entries in devices.items():
                if contents.of_slug(identity.slug) != identity:  # a folder is named by it, and must be its own
                    skipped[f"for {identity.slug!r}, which is the name of no device"] += len(entries)
                    continue
                for text, raw in entries.items():
                    each = contents.found_of(identity, "", text, "", raw)
                    why = _why_not_taken(each)
                    if why is not None or each.entry is None:
                        skipped[why or each.problem] += 1
                        continue
                    _take_one(each.entry, Store(identity, root), taken)
    taken.aside = [path for path in contents.of_cache(root).aside if path not in before]
    code = DONE if taken.new + taken.same + taken.older + taken.undated and not taken.failed else FAILED
    if arguments.json:
        screens.write_json(_as_json(taken, root))
    else:
        _print(taken, root)
    return code


def _files(paths: list[Path]) -> list[Path]:
    """Files as they are, of folders all that may have been exported."""
    found = []
    for path in paths:
        inside = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not inside:
            raise Failure(f"{path} has no file *.json", USAGE)
        found += inside
    return found


def _read(path: Path) -> dict[Identity, Raw]:
    try:
        return shipped.parse(path.read_text(encoding="utf-8-sig"))  # editors may have put a mark before it
    except OSError as error:
        raise Failure(f"{path} cannot be read ({error.strerror or error})", USAGE) from None
    except (ValueError, RecursionError) as error:
        raise Failure(f"{path} is no file that `export` has written ({error})", USAGE) from None


def _why_not_taken(each: Found) -> str | None:
    if each.entry is None:
        return f"that cannot be used: {each.problem}"
    if not each.measured:
        return "modelled, not measured"
    return "for another version of the kernel's code" if each.of_other_code else None


def _take_one(entry: Entry, store: Store, taken: _Taken) -> None:
    path = store.path(entry.key.kernel)
    assert path is not None
    if path in taken.failed:  # whoever holds its lock would be waited for once more
        taken.lost[path] += 1
        return
    before = store.get(entry.key)
    if not store.put(entry):
        taken.lost[path] += 1
        try:  # once more, for the reason
            store.change(entry.key.kernel, lambda entries: entries)
        except OSError as error:
            taken.failed[path] = str(error.strerror or error)
        else:
            taken.failed[path] = "it could not be written"
        return
    taken.devices.add(store.identity)
    kept = store.get(entry.key)
    if before is not None and _same(before, entry):
        taken.same += 1
    elif kept is not None and kept.as_json()["at"] == entry.as_json()["at"]:
        taken.new += 1
    elif is_believed(entry.at):
        taken.older += 1
    else:
        taken.undated += 1


def _same(known: Entry, new: Entry) -> bool:
    """Whether it is the same measurement; what was exported may lack candidates."""
    return (known.layout, known.as_json()["at"], known.by) == (new.layout, new.as_json()["at"], new.by)


def _as_json(taken: _Taken, root: Path) -> dict[str, Any]:
    return {
        "cache": str(root),
        "new": taken.new,
        "already_there": taken.same,
        "older_than_what_was_there": taken.older,
        "dated_in_the_future": taken.undated,
        "devices": sorted(identity.slug for identity in taken.devices),
        "skipped": [
            {"file": str(path), "entries": number, "why": why}
            for path, reasons in taken.skipped.items()
            for why, number in reasons.items()
        ],
        "failed": {str(path): why for path, why in taken.failed.items()},
        "not_kept": taken.lost.total(),
        "set_aside": [str(path) for path in taken.aside],
    }


def _print(taken: _Taken, root: Path) -> None:
    for path, reasons in taken.skipped.items():
        for why, number in reasons.items():
            screens.complain(f"{path}: skipped {screens.count(number, 'entry', 'entries')} {why}")
    for path, why in taken.failed.items():
        entries = screens.count(taken.lost[path], "entry is", "entries are")
        screens.complain(f"{path} could not be written ({why}): {entries} not kept")
    for path in taken.aside:
        screens.complain(f"a file that was of no use is now {path}; {contents.remedy(path)}")
    of = f" for {screens.count(len(taken.devices), 'device')}" if taken.devices else ""
    told = [f"Took {screens.count(taken.new, 'entry', 'entries')}{of} into {root}"]
    if taken.same:
        told.append(f"{taken.same} already there")
    if taken.older:
        told.append(f"for {taken.older} what was there is newer, and stays")
    if taken.undated:
        told.append(f"{taken.undated} dated in the future, which nobody believes: what was there stays")
    screens.print_text("; ".join(told))
