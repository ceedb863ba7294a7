"""Layouts that come with the package, for devices that somebody has modelled or measured.

One file for each architecture, `defaults/<architecture>.json`: a list of devices, each with its entries. An entry
counts for a device that is the same (`device.Identity`) and for the same code of the kernel, and for no other.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import resources
from typing import Any

from ..kernels.errors import tell_once
from .device import Identity
from .entry import Entry
from .store import FORMAT, SCHEMA, Foreign
from .work import Key


@lru_cache
def of_device(identity: Identity) -> dict[str, dict[str, Any]]:
    """Entries for a device as JSON, by the text of their key."""
    file = resources.files(__package__) / "defaults" / f"{identity.architecture}.json"
    try:
        return parse(file.read_text(encoding="utf-8")).get(identity, {})
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        tell_once(f"the layouts that come with the package for {identity.architecture} are not used: {error}")
        return {}


def boards() -> list[Identity]:
    """The devices that layouts come with the package for."""
    folder = resources.files(__package__) / "defaults"
    files = sorted(file.name for file in folder.iterdir() if file.name.endswith(".json"))
    return [identity for name in files for identity in parse((folder / name).read_text(encoding="utf-8"))]


def parse(text: str) -> dict[Identity, dict[str, dict[str, Any]]]:
    """Devices and their entries, of a file that `export` has written.

    Raises:
        ValueError: it is not one.
    """
    held = json.loads(text)
    if not isinstance(held, dict) or held.get("format") != FORMAT or held.get("schema") != SCHEMA:
        raise Foreign(f"it is no file of {FORMAT!r} with schema {SCHEMA}")
    devices = held.get("devices")
    if not isinstance(devices, list) or not all(isinstance(each, dict) for each in devices):
        raise Foreign("it has no devices")
    found: dict[Identity, dict[str, dict[str, Any]]] = {}
    for each in devices:
        entries = each.get("entries")
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            raise Foreign("a device has no entries")
        found[Identity.of_json(each.get("device"))] = entries
    return found


def text_of(devices: dict[Identity, dict[str, dict[str, Any]]]) -> str:
    """A file of these: an entry in each line, so that changes can be read."""
    parts = []
    for identity, entries in sorted(devices.items()):
        lines = [f"   {json.dumps(key)}: {json.dumps(entry)}" for key, entry in sorted(entries.items())]
        body = ",\n".join(lines)
        parts.append(f'  {{"device": {json.dumps(identity._asdict())},\n   "entries": {{\n{body}\n  }}}}')
    inner = ",\n".join(parts)
    return f'{{"format": {json.dumps(FORMAT)}, "schema": {SCHEMA}, "devices": [\n{inner}\n]}}\n'


def get(identity: Identity, key: Key) -> Entry | None:
    """The entry of a key, if this device has one."""
    found = of_device(identity).get(str(key))
    if found is None:
        return None
    try:
        entry = Entry.of_json(found)
    except ValueError as error:
        tell_once(f"a layout that comes with the package is not used: {key}: {error}")
        return None
    return entry if entry.key == key else None
