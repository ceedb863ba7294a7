"""The user's cache: one JSON file for each device and kernel, which many processes may read and write at once.

A file is replaced as a whole, so a reader sees what was there before or what is there now, whoever is killed when.
A writer holds the file's lock while it reads what others have written, merges its own and puts a new file in its place.
What goes wrong here costs a warning, never the work: entries then live in this process alone.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import RLock
from typing import Any

from ..kernels.errors import tell_once
from .device import Identity
from .entry import Entry, merged
from .work import KERNELS, Key

VARIABLE = "TRITON_BNLSTM_CACHE_DIR"
FORMAT, SCHEMA = "triton_bnlstm tuning", 1
LOCK_SECONDS = 30.0
# A temporary file that is older belongs to a writer that was killed.
_ABANDONED_SECONDS = 3600.0

Raw = dict[str, dict[str, Any]]  # entries as JSON, by the text of their key


class Foreign(ValueError):
    """A file is not one of ours, or not whole."""


class Busy(OSError):
    """A lock is held by another process for too long."""

    def __str__(self) -> str:
        return f"{self.filename} is {self.strerror}"


def cache_directory() -> Path | None:
    """Where the cache is: TRITON_BNLSTM_CACHE_DIR, else the user's cache directory; None where nobody knows one."""
    asked = os.environ.get(VARIABLE)
    if asked:
        try:
            return Path(asked).expanduser()
        except RuntimeError as error:  # there is no such user
            tell_once(f"{VARIABLE}={asked} names no folder ({error}): tuned layouts last for this process only")
            return None
    try:
        import platformdirs  # not at the top: a bare GPU machine may lack it
    except ImportError:
        tell_once(
            "the package platformdirs is missing, so tuned layouts last for this process only: "
            f"install it, or name a folder in {VARIABLE}"
        )
        return None
    found = Path(platformdirs.user_cache_dir("triton_bnlstm", appauthor=False))
    if found.parts[:1] == ("~",):  # it would be a folder of that name wherever the process is
        tell_once(f"this user has no home, so tuned layouts last for this process only: name a folder in {VARIABLE}")
        return None
    return found


def read_file(path: Path, identity: Identity | None = None) -> Raw:
    """Entries of a file, as they are; no entries where there is no file.

    Args:
        path: the file.
        identity: whose it has to be; None: anybody's.

    Raises:
        Foreign: it is not one of ours, or not whole.
        OSError: it cannot be read.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError("it is not a regular file")
            text = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    try:
        held = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Foreign(f"it is not JSON ({error})") from None
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        raise Foreign(f"its format is not {FORMAT!r}")
    if held.get("schema") != SCHEMA:
        raise Foreign(f"its schema is {held.get('schema')!r}, not {SCHEMA}")
    if identity is not None and held.get("device") != identity._asdict():
        raise Foreign("it belongs to another device")
    entries = held.get("entries")
    if not isinstance(entries, dict) or any(not isinstance(each, dict) for each in entries.values()):
        raise Foreign("it has no entries")
    return entries


def _open_at_once(path: str, flags: int) -> int:
    """Without waiting for somebody to write, where it is a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def write_file(path: Path, identity: Identity, kernel: str, entries: Raw) -> None:
    """Put a file in place of what is there, so that at any moment one of both is there as a whole.

    Raises:
        OSError: it cannot be written; what was there still is.
    """
    held = {
        "format": FORMAT,
        "schema": SCHEMA,
        "device": identity._asdict(),
        "kernel": kernel,
        "entries": dict(sorted(entries.items())),
    }
    replace_text(path, json.dumps(held, indent=1) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a file beside it, see that it is on the disk, and put it in its place.

    Raises:
        OSError: it cannot be written; what was there still is.
    """
    name = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # others may read it, as the umask says
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    with suppress(OSError):  # not every file system lets a folder be synchronised
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def locked(path: Path, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Nobody else holds this file's lock within it. The system takes it from a process that is killed.

    Raises:
        Busy: not in time.
        OSError: it cannot be had.
    """
    try:
        import filelock  # not at the top: only who writes needs it
    except ImportError as error:
        raise OSError("the package filelock is missing") from error
    try:
        lock = filelock.FileLock(f"{path}.lock", timeout=seconds)
        lock.acquire()
    except filelock.Timeout as error:
        raise Busy(errno.EAGAIN, f"held by another process for {seconds:g} s", f"{path}.lock") from error
    except NotImplementedError as error:  # a file system without locks
        raise OSError(str(error)) from error
    try:
        yield
    finally:
        lock.release()


class Store:
    """Tuned layouts of one device.

    What cannot be written stays in memory, and so for this process only, unless a later write succeeds.

    Args:
        identity: whose.
        root: the cache's folder; None: memory only.
    """

    def __init__(self, identity: Identity, root: Path | None) -> None:
        self.identity, self.root = identity, root
        self._lock = RLock()
        self._unsaved: dict[str, Raw] = {}  # what this process has put, and could not write
        self._read: dict[str, Raw] = {}

    @property
    def folder(self) -> Path | None:
        """Where this device's files are."""
        return None if self.root is None else self.root / f"v{SCHEMA}" / self.identity.slug

    def path(self, kernel: str) -> Path | None:
        """The file of a kernel."""
        return None if self.folder is None else self.folder / f"{kernel}.json"

    def raw(self, kernel: str, *, again: bool = False) -> Raw:
        """Entries of a kernel as JSON, from its file and from memory. again: look into the file even if known."""
        with self._lock:  # of what two threads read, the later stays
            if again or kernel not in self._read:
                self._read[kernel] = self._load(kernel)
            return _with(self._read[kernel], self._unsaved.get(kernel, {}))

    def forget(self) -> None:
        """Look into the files again. What could not be written stays: it is nowhere else."""
        with self._lock:
            self._read.clear()

    def _load(self, kernel: str) -> Raw:
        path = self.path(kernel)
        if path is None:
            return {}
        try:
            return read_file(path, self.identity)
        except Foreign as error:
            return self._set_aside(path, error)
        except OSError as error:
            tell_once(f"{path} cannot be read ({error}): layouts tuned earlier are not used")
            return {}

    def _set_aside(self, path: Path, error: Foreign) -> Raw:
        """Rename a file that is not one of ours, unless somebody has done so by now, or is writing: a lookup waits for
        nobody.
        """
        try:
            with locked(path, 0):
                return self._whole(path)
        except OSError as why:
            tell_once(f"{path} is of no use ({error}), and cannot be renamed ({why}): it is left alone")
            return {}

    def _whole(self, path: Path) -> Raw:
        """Its entries; a file that is not one of ours is renamed, by who holds its lock."""
        try:
            return read_file(path, self.identity)
        except Foreign as error:
            aside = path.with_name(f"{path.name}.corrupt-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
            os.replace(path, aside)
            tell_once(f"{path} is of no use ({error}): it is now {aside.name}, and tuning starts anew")
            return {}

    def get(self, key: Key, *, again: bool = False) -> Entry | None:
        """The entry of a key; None where there is none, or one that cannot be understood."""
        found = self.raw(key.kernel, again=again).get(str(key))
        if found is None:
            return None
        try:
            entry = Entry.of_json(found)
        except ValueError as error:
            tell_once(f"the tuned layout of {key} is not used: {error} ({self.path(key.kernel)})")
            return None
        return entry if entry.key == key else None

    def entries(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Everything: kernel and JSON of each entry."""
        for kernel in KERNELS:
            for found in self.raw(kernel, again=True).values():
                yield kernel, found

    def put(self, entry: Entry) -> bool:
        """Keep an entry, merged with what others have written meanwhile. Whether it is on the disk."""
        kernel, new = entry.key.kernel, {str(entry.key): entry.as_json()}
        with self._lock:
            waiting = self._unsaved[kernel] = _with(self._unsaved.get(kernel, {}), new)
        try:
            self._write(kernel, lambda entries: entries)
        except OSError as error:
            if self.root is not None:  # without the error's file, whose name is another one each time
                why = error.strerror or error
                tell_once(f"tuned layouts cannot be kept in {self.root} ({why}): they last for this process only")
            return False
        with self._lock:
            left = {text: told for text, told in self._unsaved[kernel].items() if told is not waiting.get(text)}
            self._unsaved[kernel] = left
        return True

    def change(self, kernel: str, how: Callable[[Raw], Raw]) -> None:
        """Apply a change to a kernel's entries as they are on the disk now.

        Raises:
            OSError: they cannot be written; nothing has changed.
        """
        self._write(kernel, how)

    def _write(self, kernel: str, how: Callable[[Raw], Raw]) -> None:
        path = self.path(kernel)
        if path is None:
            raise OSError("there is no folder for it")
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):
            _remove_abandoned(path)
            entries = how(_with(self._whole(path), self._unsaved.get(kernel, {})))
            write_file(path, self.identity, kernel, entries)
            with self._lock:  # still under the file's lock: else what a thread writes next could be here first
                self._read[kernel] = entries


def _with(entries: Raw, more: Raw) -> Raw:
    """Entries with more of them: of two of one key what `merged` says, unless the first is none of that key."""
    found = dict(entries)
    for text, told in more.items():
        known = entries.get(text)
        try:
            if known is not None and str(Entry.of_json(known).key) != text:
                known = None
        except ValueError:
            known = None  # nothing of it can be trusted
        found[text] = told if known is None else merged(known, told)
    return found


def _remove_abandoned(path: Path) -> None:
    """Temporary files of writers that were killed."""
    for file in path.parent.glob(f".{path.name}.*.tmp"):
        with suppress(OSError):
            if time.time() - file.stat().st_mtime > _ABANDONED_SECONDS:
                file.unlink()
