"""Measured layouts become part of the package: `python -m bench.adopt FILE ...`.

A file is the record of a campaign (bench/results/<device>/campaign.json) or what `triton_bnlstm.tuning export` has
written. Its measured entries take the place of modelled ones in triton_bnlstm/tuning/defaults/<architecture>.json, for
the device that they were measured on. Of several for one key the latest counts; those of other code of the kernel are
left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from triton_bnlstm.tuning import shipped
from triton_bnlstm.tuning.device import Identity
from triton_bnlstm.tuning.entry import MEASURED, Entry
from triton_bnlstm.tuning.store import Raw, replace_text

from .defaults import FOLDER, fault_anywhere, read


def measured_in(path: Path) -> Iterator[tuple[Identity, dict[str, Any]]]:
    """Device and JSON of each entry in a file that was measured.

    Raises:
        ValueError: it is neither a record nor an exported file.
        OSError: it cannot be read.
    """
    text = path.read_text(encoding="utf-8")
    held = json.loads(text)
    if isinstance(held, dict) and isinstance(held.get("layouts"), list):
        if held.get("dry_run"):
            raise ValueError("it is the record of a dry run, whose times mean nothing")
        found = [(each.get("device"), each.get("entry")) for each in held["layouts"] if isinstance(each, dict)]
        pairs = [(Identity.of_json(device), entry) for device, entry in found if isinstance(entry, dict)]
    else:
        pairs = [(identity, entry) for identity, entries in shipped.parse(text).items() for entry in entries.values()]
    yield from ((identity, entry) for identity, entry in pairs if entry.get("how") == MEASURED)


def slim(fields: dict[str, Any]) -> dict[str, Any]:
    """An entry with two candidates left, the layout and its default: times of all others stay where they came from."""
    kept = (fields.get("layout"), fields.get("default"))
    return {**fields, "candidates": [each for each in fields["candidates"] if each.get("layout") in kept]}


def adopt(paths: list[Path], folder: Path = FOLDER) -> tuple[int, list[str]]:
    """Put what was measured into the package's files.

    Args:
        paths: records and exported files.
        folder: where the package's files are.

    Returns:
        how many entries are new or changed, and what was left out and why, a line each.

    Raises:
        ValueError, OSError: as `measured_in`.
    """
    taken: dict[Identity, Raw] = {}
    left = []
    for path in paths:
        for identity, fields in measured_in(path):
            try:
                text = str(Entry.of_json(fields).key)
                reason = "it is a CPU's" if identity.backend == "cpu" else fault_anywhere(text, fields)
            except ValueError as error:
                text, reason = "an entry", str(error)
            if reason is not None:
                left.append(f"{path}: {text}: {reason}")
                continue
            known = taken.setdefault(identity, {}).get(text)
            if known is None or known["at"] < fields["at"]:
                taken[identity][text] = slim(fields)
    changed = 0
    for identity, entries in taken.items():
        path = folder / f"{identity.architecture}.json"
        devices = read(path)
        before = devices.get(identity, {})
        devices[identity] = {**before, **entries}
        changed += sum(before.get(text) != fields for text, fields in entries.items())
        replace_text(path, shipped.text_of(devices))
    return changed, left


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 nothing was taken, 2 a file cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m bench.adopt", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="campaign.json, or an exported file")
    try:
        changed, left = adopt(parser.parse_args(argv).files)
    except (OSError, ValueError) as error:
        print(f"bench.adopt: {error}", file=sys.stderr)
        return 2
    for line in left:
        print(f"left out: {line}")
    print(f"{changed} entries are new or changed")
    return 0 if changed else 1


if __name__ == "__main__":
    sys.exit(main())
