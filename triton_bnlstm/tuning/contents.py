"""What a cache and the package hold, read as it is: nothing here changes a file, or sets one aside."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import warnings
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from . import machine, screens, shipped, space
from .choice import CACHE, SHIPPED
from .device import Identity, is_stale, triton_version
from .entry import MEASURED, Entry
from .screens import USAGE, Failure, program
from .store import SCHEMA, VARIABLE, Raw, cache_directory, read_file
from .work import KERNELS, Key, Layout, Work, source_hash

# An entry with less of a gain is slower than the default beyond what noise explains.
_SLOWER = 0.98
_SLUG = re.compile(r"(?P<backend>[a-z]+)-(?P<architecture>[a-z0-9]+)-(?P<multiprocessors>\d+)x(?P<shared>\d+)KB")


class Found(NamedTuple):
    """One entry as it was found.

    identity, kernel: whose. text: of its key. origin: "cache" or "shipped". raw: its JSON. entry: None where `problem`
    says why it cannot be understood.
    """

    identity: Identity
    kernel: str
    text: str
    origin: str
    raw: dict[str, Any]
    entry: Entry | None
    problem: str

    @property
    def measured(self) -> bool:
        """Whether somebody has measured it."""
        return self.entry is not None and self.entry.how == MEASURED

    @property
    def of_other_code(self) -> bool:
        """Whether its kernel has changed since: no call looks for it any more."""
        return self.entry is not None and self.entry.key.source != source_hash(self.kernel)

    @property
    def is_stale(self) -> bool:
        """Whether another minor version of Triton compiled what was measured; unknown, so no, without any Triton."""
        return self.measured and triton_version() != "none" and self.entry is not None and is_stale(self.entry.by)

    @property
    def default(self) -> Layout | None:
        """The default layout of today, which may be another one than when it was measured; None: not known."""
        if self.entry is None or self.of_other_code:
            return None
        numbers = machine.numbers_of(self.identity) or machine.numbers_here(self.identity)
        return None if numbers is None else space.analytic(numbers, work_of(self.entry))

    @property
    def gain(self) -> float | None:
        """How many times as fast as the default of today its layout is; None: not both are known and measured."""
        default = self.default
        if self.entry is None or not self.measured or default is None:
            return None
        return self.entry.gain_over(default)

    @property
    def is_slower(self) -> bool:
        """Whether the default is faster, as far as both were measured."""
        return self.gain is not None and self.gain < _SLOWER


def work_of(entry: Entry) -> Work:
    """What was measured; the largest of its key's sizes where that is not recorded."""
    largest = Work.of_key(entry.key)
    sizes = {name: entry.case[name] for name in ("hidden", "batch", "columns") if name in entry.case}
    if len(sizes) < 3 or min(sizes.values()) < 0 or not sizes["batch"]:
        return largest
    measured = replace(largest, hidden=sizes["hidden"], batch=sizes["batch"], columns=sizes["columns"])
    return measured if measured.key == entry.key else largest


class Broken(NamedTuple):
    """A file that cannot be used.

    path: which. why: the reason. is_foreign: it can be read, and is not one of ours or not whole: who next looks for a
    layout in it sets it aside. Else it could not be looked into, and may be all right.
    """

    path: Path
    why: str
    is_foreign: bool

    @property
    def slug(self) -> str:
        """Of the device that its folder is for."""
        return self.path.parent.name

    @property
    def kernel(self) -> str:
        """What it would have layouts of."""
        return self.path.stem

    @property
    def advice(self) -> str:
        """What to do about it; what cannot be read may be all right, and somebody else's."""
        return f"; {remedy(self.path)}" if self.is_foreign else "; let it be read, or remove it yourself"

    def as_json(self) -> dict[str, str]:
        """For `--json`."""
        return {"file": str(self.path), "why": self.why}

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


@dataclass
class Contents:
    """Of a cache.

    Attributes:
        root: its folder; None: nobody knows one.
        found: entries.
        unreadable: files that cannot be read, are not ours or not whole.
        aside: files that were set aside as such.
        folders: devices' folders. No call looks into others, which somebody else may have put there.
    """

    root: Path | None
    found: list[Found] = field(default_factory=list)
    unreadable: list[Broken] = field(default_factory=list)
    aside: list[Path] = field(default_factory=list)
    folders: dict[Path, Identity] = field(default_factory=dict)


def root_of_cache() -> Path | None:
    """The cache's folder, from the top; None: there is none, see `why_no_cache`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # commands say it in their own words
        found = cache_directory()
    return None if found is None else found.absolute()


def why_no_cache() -> str:
    """What is at fault where there is none, and the remedy."""
    asked = os.environ.get(VARIABLE)
    if asked:
        return f"there is no cache: {VARIABLE}={asked} names a home folder that cannot be found: name a folder in full"
    if importlib.util.find_spec("platformdirs") is None:
        return f"there is no cache: the package platformdirs is missing: install it, or name a folder in {VARIABLE}"
    return f"there is no cache: there is no home folder to have it in: set HOME, or name a folder in {VARIABLE}"


def why_no_folder(path: Path) -> str | None:
    """Whether something else than a folder is in the way of one; None: it is one, or could be made.

    Raises:
        OSError: nobody may look.
    """
    there = path.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    return None if there.is_dir() else f"{there} is not a folder"


def of_cache(root: Path | None) -> Contents:
    """Everything in a cache.

    Raises:
        Failure: it cannot be read, or is no folder.
    """
    contents = Contents(root)
    if root is None:
        return contents
    try:
        top = root / f"v{SCHEMA}"
        reason = why_no_folder(top)
        if reason is not None:
            raise Failure(f"the cache cannot be used: {reason}")
        for folder in sorted(top.iterdir()) if top.is_dir() else []:
            identity = of_slug(folder.name)
            if identity is not None and folder.is_dir():
                contents.folders[folder] = identity
                _look_into(folder, contents)
    except OSError as error:
        raise Failure(f"{root} cannot be read ({error.strerror or error})") from None
    return contents


def needed_root() -> Path:
    """The cache's folder.

    Raises:
        Failure: there is none.
    """
    root = root_of_cache()
    if root is None:
        raise Failure(why_no_cache())
    return root


def remedy(*paths: Path) -> str:
    """What gets rid of files that cannot be used."""
    who = "" if all(os.access(path.parent, os.W_OK) for path in paths) else ", by who may write there"
    return f"`{program()} clear --unused` removes what cannot be used{who}"


def _look_into(folder: Path, contents: Contents) -> None:
    contents.aside += sorted(folder.glob("*.corrupt-*"))
    for kernel in KERNELS:
        path = folder / f"{kernel}.json"
        try:
            identity, entries = _of_file(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            contents.unreadable.append(Broken(path, f"it cannot be read ({error.strerror or error})", False))
            continue
        except ValueError as error:
            contents.unreadable.append(Broken(path, str(error), True))
            continue
        contents.folders[folder] = identity
        contents.found += [found_of(identity, kernel, text, CACHE, raw) for text, raw in entries.items()]


def _of_file(path: Path) -> tuple[Identity, Raw]:
    """Whose a file is, and its entries.

    Raises:
        ValueError: it is not one of ours, or not of its folder's device.
        OSError: it cannot be read.
    """
    entries = read_file(path)
    held = json.loads(path.read_bytes())
    if "device" not in held:
        raise ValueError("it names no device")
    identity = Identity.of_json(held["device"])
    if of_slug(path.parent.name) != identity:
        raise ValueError(f"it is of another device ({identity}) than its folder")
    return identity, entries


def is_of_use(path: Path) -> bool:
    """Whether a file of the cache can be read, and is its folder's."""
    try:
        _of_file(path)
    except (OSError, ValueError):
        return False
    return True


def of_slug(name: str) -> Identity | None:
    """Whose folder it is, for all that its name says."""
    match = _SLUG.fullmatch(name)
    if match is None:
        return None
    return Identity(match["backend"], match["architecture"], int(match["multiprocessors"]), 1024 * int(match["shared"]))


def found_of(identity: Identity, kernel: str, text: str, origin: str, raw: dict[str, Any]) -> Found:
    """An entry with what is wrong with it; kernel: "" where only its key says which."""
    try:
        entry = Entry.of_json(raw)
    except ValueError as error:
        return Found(identity, kernel or text.partition(" ")[0], text, origin, raw, None, str(error))
    if str(entry.key) != text or kernel not in ("", entry.key.kernel):
        return Found(identity, kernel or entry.key.kernel, text, origin, raw, None, "it is kept under another key")
    return Found(identity, entry.key.kernel, text, origin, raw, entry, "")


def shipped_texts() -> list[str]:
    """The files that come with the package."""
    folder = resources.files(shipped.__name__.rpartition(".")[0]) / "defaults"
    if not folder.is_dir():
        return []
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".json")), key=lambda file: file.name)
    return [file.read_text(encoding="utf-8") for file in files]


def of_package() -> list[Found]:
    """Everything that is shipped.

    Raises:
        Failure: a file of the package is broken.
    """
    found = []
    for text in shipped_texts():
        try:
            devices: dict[Identity, Raw] = shipped.parse(text)
        except ValueError as error:
            raise Failure(f"a file that comes with the package is broken: {error}") from None
        for identity, entries in devices.items():
            found += [found_of(identity, "", key, SHIPPED, raw) for key, raw in entries.items()]
    return found


def of_architectures(found: list[Found], asked: list[str] | None, shipped_: list[Found]) -> list[Found]:
    """Those of the architectures that are asked for, in capitals or not; all if None is.

    Args:
        found: of the cache, and maybe of the package.
        asked: names.
        shipped_: what comes with the package, whose architectures are known, too.

    Raises:
        Failure: nobody knows an architecture of that name.
    """
    if asked is None:
        return found
    names = {each.lower() for each in asked}
    known = {*machine.ARCHITECTURES, *(each.identity.architecture for each in (*found, *shipped_))}
    if not names <= known:
        strange = ", ".join(repr(each) for each in sorted(names - known))
        there = ", ".join(sorted(known, key=screens.in_order))
        raise Failure(f"--architecture: nobody knows {strange}; known are {there}", USAGE)
    return [each for each in found if each.identity.architecture in names]


def what_there_is(cache: list[Found], shipped_: list[Found]) -> str:
    """The architectures and kernels that there are entries of, for who has asked for others."""
    parts = []
    for where, found in (("in your cache", cache), ("shipped", shipped_)):
        if found:
            architectures = sorted({each.identity.architecture for each in found}, key=screens.in_order)
            kernels = [kernel for kernel in KERNELS if any(each.kernel == kernel for each in found)]
            parts.append(f"{where}: {', '.join(kernels)} for {', '.join(architectures)}")
    return "; ".join(parts) or "there are none at all"


def shadowed(found: list[Found]) -> set[tuple[Identity, str]]:
    """Devices and keys whose shipped entries are not looked at, as the cache has its own."""
    return {(each.identity, each.text) for each in found if each.origin == CACHE and each.entry is not None}


def by_size(each: Found) -> tuple[Any, ...]:
    """The order of a list: devices, kernels, then their sizes."""
    kernel = KERNELS.index(each.kernel) if each.kernel in KERNELS else len(KERNELS)
    key: Key | None = None if each.entry is None else each.entry.key
    sizes = () if key is None else (key.dtype, key.precision, key.hidden, key.columns, key.batch, key.directions)
    return (each.identity, kernel, key is None, sizes, each.text, each.origin)
