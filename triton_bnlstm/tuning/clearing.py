"""The command `clear`: remove what a cache holds, or say what would be removed."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from . import contents, machine, screens
from .contents import Contents, Found
from .device import Identity, minor, triton_version
from .screens import DONE, FAILED, USAGE, Failure
from .store import Raw, Store, locked, read_file
from .work import KERNELS


@dataclass
class _Plan:
    """What would go: entries by their file, whole files, those set aside, and what was left behind in folders."""

    entries: dict[Path, list[Found]] = field(default_factory=dict)
    broken: list[Path] = field(default_factory=list)
    denied: dict[Path, str] = field(default_factory=dict)  # may be all right
    aside: list[Path] = field(default_factory=list)
    left_behind: list[Path] = field(default_factory=list)
    swept: list[Path] = field(default_factory=list)

    @property
    def folders(self) -> set[Path]:
        return {path.parent for path in (*self.entries, *self.broken, *self.aside, *self.left_behind)}


@dataclass
class _Done:
    """What came of it. failed: files that could not be changed, and why."""

    entries: int = 0
    files: list[Path] = field(default_factory=list)
    failed: dict[Path, str] = field(default_factory=dict)


def clear(arguments: argparse.Namespace) -> int:
    """`clear`: remove entries, files that cannot be used, and with --all whatever else is in the devices' folders."""
    if not (arguments.all or arguments.unused or arguments.stale or arguments.kernel):
        raise Failure("clear needs --all, --unused, --stale or --kernel", USAGE)
    root = contents.needed_root()
    cache = contents.of_cache(root)
    plan = _plan(cache, _of_devices(arguments), arguments)
    if arguments.dry_run:
        return _tell_plan(plan, root, arguments)
    locked_out = sorted(folder for folder in plan.folders if not os.access(folder, os.W_OK))
    if locked_out:
        raise Failure(f"the cache can only be read: {locked_out[0]}; nothing is removed")
    done = _carry_out(plan, cache, arguments)
    if arguments.json:
        told = {"cache": str(root), "removed": done.entries, "other_files": len(done.files)}
        told |= {"files": [str(path) for path in done.files], "failed": {str(p): why for p, why in done.failed.items()}}
        screens.write_json(told)
        return FAILED if done.failed else DONE
    for path, why in done.failed.items():
        screens.complain(f"{path} could not be changed ({why})")
    for path in done.files:
        screens.print_text(f"Removed the file {path.relative_to(root)}")
    more = f" and {screens.count(len(done.files), 'other file')}" if done.files else ""
    removed = screens.count(done.entries, "entry", "entries")
    screens.print_text(f"Removed {removed}{more} from {root}{_stale_by(arguments)}")
    return FAILED if done.failed else DONE


def _of_devices(arguments: argparse.Namespace) -> Identity | None:
    """The device whose entries are meant; None: all."""
    if arguments.device == "this":
        return machine.find().identity
    if arguments.device == "all" or not arguments.stale:
        return None
    # what is stale goes by this environment's Triton, which says nothing of another machine's
    here = machine.find_any()
    if here is None:
        raise Failure(
            f"--stale goes by the Triton of this environment ({triton_version()}), and there is no GPU that uses it "
            "here: say --device all if the entries of all devices are meant",
            USAGE,
        )
    return here.identity


def _plan(cache: Contents, identity: Identity | None, arguments: argparse.Namespace) -> _Plan:
    plan = _Plan()
    folders = [folder for folder in cache.folders if identity is None or folder.name == identity.slug]
    kernels = arguments.kernel or KERNELS
    whole = not (arguments.unused or arguments.stale)  # everything of these kernels
    for each in cache.found:
        folder = next((one for one in folders if one.name == each.identity.slug), None)
        if folder is not None and each.kernel in kernels and (whole or _goes(each, arguments)):
            plan.entries.setdefault(folder / f"{each.kernel}.json", []).append(each)
    if arguments.stale:
        return plan
    broken = [each for each in cache.unreadable if each.path.parent in folders and each.kernel in kernels]
    plan.broken = [each.path for each in broken if whole or each.is_foreign]
    plan.denied = {each.path: each.why for each in broken if not whole and not each.is_foreign}
    aside = [path for path in cache.aside if path.parent in folders]
    plan.aside = [path for path in aside if path.name.partition(".")[0] in kernels]
    if arguments.all and not arguments.kernel:
        plan.swept = folders
        plan.left_behind = [path for folder in folders for path in _abandoned(folder)]
    return plan


def _goes(each: Found, arguments: argparse.Namespace) -> bool:
    if arguments.stale:
        return each.is_stale and not each.of_other_code
    return bool(each.problem) or each.of_other_code


def _tell_plan(plan: _Plan, root: Path, arguments: argparse.Namespace) -> int:
    going = [each for found in plan.entries.values() for each in found]
    files = [*plan.broken, *plan.aside, *plan.left_behind]
    if arguments.json:
        keys = [{"device": each.identity.slug, "key": each.text} for each in going]
        told = {"cache": str(root), "would_remove": keys, "files": [str(path) for path in files]}
        screens.write_json({**told, "failed": {str(path): why for path, why in plan.denied.items()}})
        return FAILED if plan.denied else DONE
    for each in going:
        what = each.text if each.entry is None else screens.key_words(each.entry.key)
        print(f"{each.identity.slug} {what}")
    for path in files:
        print(f"the file {path.relative_to(root)}")
    for path, why in plan.denied.items():
        screens.complain(f"{path} could not be changed ({why})")
    entries = screens.count(len(going), "entry", "entries")
    more = f" and {screens.count(len(files), 'file')}" if files else ""
    screens.print_text(f"Would remove {entries}{more} from {root}{_stale_by(arguments)}")
    return FAILED if plan.denied else DONE


def _carry_out(plan: _Plan, cache: Contents, arguments: argparse.Namespace) -> _Done:
    done = _Done(failed=dict(plan.denied))
    for path, going in plan.entries.items():
        with _noting(path, done):
            done.entries += _removed(path, going, cache, arguments)
    for path in plan.broken:
        with _noting(path, done), locked(path):
            if contents.is_of_use(path):  # by now: somebody has put another in its place
                continue
            if path.is_dir():
                if any(path.iterdir()):  # whoever's: not the cache's
                    raise OSError("it is a folder with files in it: remove it yourself")
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
            done.files.append(path)
    for path in plan.aside:
        with _noting(path, done):
            path.unlink(missing_ok=True)
            done.files.append(path)
    for folder in plan.swept:
        done.files += _sweep(folder)
    return done


@contextmanager
def _noting(path: Path, done: _Done) -> Iterator[None]:
    """What keeps a file from being changed is noted, and the others go on."""
    try:
        yield
    except OSError as error:
        done.failed[path] = str(error.strerror or error)


def _removed(path: Path, going: list[Found], cache: Contents, arguments: argparse.Namespace) -> int:
    """Take entries out of a file. How many; what others have put there meanwhile is looked at like the rest."""
    identity, kernel = going[0].identity, path.stem
    gone: list[int] = []
    whole = not (arguments.unused or arguments.stale)

    def kept(entries: Raw) -> Raw:
        found = [contents.found_of(identity, kernel, text, "", raw) for text, raw in entries.items()]
        left = [] if whole else [each for each in found if not _goes(each, arguments)]
        gone.append(len(entries) - len(left))
        return {each.text: each.raw for each in left}

    Store(identity, cache.root).change(kernel, kept)
    return sum(gone)


def _abandoned(folder: Path, kernel: str = "*") -> list[Path]:
    """Temporary files of writers that were killed, or are at work."""
    return sorted(folder.glob(f".{kernel}.json.*.tmp"))


def _sweep(folder: Path) -> list[Path]:
    """Remove temporary and empty files of a device that no other process is at work on. Which temporary ones.

    Empty files come and go by themselves. The locks of the cache's files stay: who waits for one that is removed would
    hold it beside whoever makes it anew. With those of measuring all that could happen is that two processes measure
    the same.
    """
    removed = []
    for kernel in KERNELS:
        path = folder / f"{kernel}.json"
        if not path.exists() and not _abandoned(folder, kernel):
            continue
        with suppress(OSError, ValueError), locked(path, 0):
            for abandoned in _abandoned(folder, kernel):  # whoever writes holds the lock
                abandoned.unlink()
                removed.append(abandoned)
            if not read_file(path):
                path.unlink(missing_ok=True)
    measuring = folder / "measuring"
    for lock in measuring.glob("*.lock"):
        with suppress(OSError), locked(lock.with_suffix(""), 0):
            lock.unlink()
    with suppress(OSError):
        measuring.rmdir()
    return removed


def _stale_by(arguments: argparse.Namespace) -> str:
    """What a removal of stale entries went by."""
    if not arguments.stale:
        return ""
    if triton_version() == "none":
        return "; what is stale goes by the Triton of this environment, and there is none"
    return f"; stale is what another Triton measured than that of this environment, {minor(triton_version())}"


def stale_hint() -> str:
    """What `--stale` goes by, for its help."""
    return f"what was measured with another Triton than this environment's ({minor(triton_version())}), and is used"
