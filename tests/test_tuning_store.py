"""The user's cache: what is in a file, who may write it at once, and what happens to one that is broken."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.tuning import BY, H100, WORK, changed, entry
from triton_bnlstm.kernels import errors
from triton_bnlstm.tuning import store as stores
from triton_bnlstm.tuning.device import Identity
from triton_bnlstm.tuning.entry import Candidate, merged
from triton_bnlstm.tuning.store import FORMAT, SCHEMA, Store, cache_directory, read_file
from triton_bnlstm.tuning.work import KERNELS

IDENTITY = Identity.of(H100)
ROOT = Path(__file__).parents[1]
OTHER = replace(WORK, hidden=1024)


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch):
    monkeypatch.setattr(errors, "_told", set())


@pytest.fixture
def store(tmp_path):
    return Store(IDENTITY, tmp_path)


def anew(store):
    """As another process finds it."""
    return Store(store.identity, store.root)


def test_what_is_put_is_there(store):
    assert store.get(WORK.key) is None
    assert store.put(entry())
    assert store.get(WORK.key) == anew(store).get(WORK.key) == entry()
    assert anew(store).get(OTHER.key) is None
    assert store.path("forward") == store.root / "v1" / "cuda-sm90-132x227KB" / "forward.json"
    held = json.loads(store.path("forward").read_text())
    assert (held["format"], held["schema"], held["kernel"]) == (FORMAT, SCHEMA, "forward")
    assert Identity.of_json(held["device"]) == IDENTITY
    assert [path.name for path in store.folder.glob("*.tmp")] == []


def test_every_kernel_has_a_file_and_every_device_a_folder(store):
    other = Store(IDENTITY._replace(multiprocessors=114), store.root)
    for kernel in KERNELS:
        store.put(entry(replace(WORK, kernel=kernel, columns=16 * (kernel == "moments"))))
    other.put(entry())
    assert sorted(path.name for path in store.folder.glob("*.json")) == sorted(f"{k}.json" for k in KERNELS)
    assert other.folder != store.folder
    assert len(list(store.entries())) == len(KERNELS)


def test_a_later_entry_takes_the_place_of_an_earlier_one_and_keeps_what_that_had_tried(store):
    first = entry(at=1.0)
    only_then = Candidate(replace(first.layout, warps=2), 9.0, 5.0, 15)
    store.put(replace(first, candidates=(*first.candidates, only_then)))
    anew(store).put(entry(at=2.0, faster=1.5))
    found = store.get(WORK.key, again=True)
    assert found.gain == pytest.approx(1.5, rel=1e-3)
    assert found.candidate(only_then.layout) == only_then
    anew(store).put(entry(at=1.5, faster=1.1))  # from a process that had begun before
    assert store.get(WORK.key, again=True).gain == pytest.approx(1.5, rel=1e-3)


def test_times_of_another_triton_are_not_mixed():
    older = entry(at=1.0, by=BY._replace(triton="2.1.0")).as_json()
    more = Candidate(replace(entry().layout, warps=4), 9.0, 5.0, 15).as_json()
    newer = merged({**older, "candidates": [*older["candidates"], more]}, entry(at=2.0).as_json())
    assert newer == entry(at=2.0).as_json()


# Broken files


def file_with(**changes):
    """A file of ours but for some fields; None: without it."""
    held = {"format": FORMAT, "schema": SCHEMA, "device": IDENTITY._asdict(), "kernel": "forward", "entries": {}}
    return json.dumps({name: value for name, value in {**held, **changes}.items() if value is not None})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "its format is not"),
        ("null", "its format is not"),
        ("\x00\x01", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("9" * 5000, "not JSON"),  # more digits than Python reads
        (file_with(format="something else"), "its format is not"),
        (file_with(schema=SCHEMA + 1), "its schema is 2, not 1"),
        (file_with(schema=None), "its schema is None, not 1"),
        (file_with(device=None), "another device"),
        (file_with(entries=[]), "no entries"),
        (file_with(entries={"a": 1}), "no entries"),
    ],
)
def test_a_file_that_is_not_ours_is_set_aside(store, text, why):
    """Renamed, not deleted; one warning; and the work goes on."""
    path = store.path("forward")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    aside = rf"forward\.json is of no use \(.*{why}.*\): it is now forward\.json\.corrupt-"
    with pytest.warns(RuntimeWarning, match=aside):
        assert store.get(WORK.key) is None
    assert store.put(entry())  # a second warning would be an error
    (aside,) = path.parent.glob("*.corrupt-*")
    assert aside.read_text() == text
    assert anew(store).get(WORK.key) == entry()


def test_a_file_that_breaks_before_it_is_written_is_set_aside(store):
    store.put(entry())
    store.path("forward").write_text("{")
    with pytest.warns(RuntimeWarning, match="is of no use"):
        assert store.put(entry(OTHER))
    assert anew(store).get(OTHER.key) == entry(OTHER)


@pytest.mark.parametrize(
    "told",
    [
        {},
        changed(layout=None),
        changed(layout__units=3),
        changed(layout__units=8.0),
        changed(layout__units=True),
        changed(layout__units=1 << 40),
        changed(layout__sequence=1),
        changed(layout={"units": 8}),
        changed(layout={**entry().as_json()["layout"], "colour": 1}),
        changed(how="guessed"),
        changed(at="yesterday"),
        changed(at=float("nan")),
        changed(at=10**400),
        changed(at=-1),
        changed(at=True),
        changed(candidates={}),
        changed(candidates=[]),  # measured, without a time
        changed(candidates=entry().as_json()["candidates"][:1]),  # of another layout
        changed(candidates=[1]),
        changed(candidates=[{"layout": entry().as_json()["layout"], "us": -1.0}]),
        changed(candidates=[{"layout": entry().as_json()["layout"], "us": float("inf")}]),
        changed(candidates=[{"layout": entry().as_json()["layout"], "us": 10**400}]),
        changed(candidates=[{"layout": entry().as_json()["layout"], "us": 1.0, "default_us": 10**400}]),
        changed(candidates=[{"layout": entry().as_json()["layout"], "us": 1.0, "rounds": 10**400}]),
        changed(case={"hidden": "many"}),
        changed(case={"hidden": 10**400}),
        changed(key__dtype="float8"),
        changed(key__flags=["colourful"]),
        changed(key__kernel="sideways"),
        changed(key__hidden=-1),
        changed(key={}),
    ],
)
def test_an_entry_that_cannot_be_understood_is_not_used(store, told):
    """The others in its file are; and it stays in the file, for whoever wrote it."""
    store.change("forward", lambda entries: {**entries, str(WORK.key): told, str(OTHER.key): entry(OTHER).as_json()})
    fresh = anew(store)
    with pytest.warns(RuntimeWarning, match="the tuned layout of forward bfloat16 H512 B64 x1 .* is not used"):
        assert fresh.get(WORK.key) is None
    assert fresh.get(OTHER.key) == entry(OTHER)
    fresh.put(entry(replace(WORK, batch=128)))
    assert str(WORK.key) in read_file(store.path("forward"))


def test_an_entry_that_cannot_be_understood_is_replaced(store):
    """Nothing of it is carried over, however late it says it is."""
    broken = changed(candidates=[{"layout": entry().as_json()["layout"], "us": -1.0}], at=9e9)
    store.change("forward", lambda entries: {str(WORK.key): broken})
    store.put(entry())
    assert anew(store).get(WORK.key) == entry()


def test_a_file_of_another_device_is_set_aside(store):
    """A folder that somebody has copied: its cooperative grids may not fit here."""
    other = Store(IDENTITY._replace(multiprocessors=114), store.root)
    other.put(entry())
    store.folder.mkdir(parents=True)
    store.path("forward").write_bytes(other.path("forward").read_bytes())
    with pytest.warns(RuntimeWarning, match="it belongs to another device"):
        assert store.get(WORK.key) is None


def test_an_entry_under_another_ones_key_is_not_used(store):
    store.change("forward", lambda entries: {str(WORK.key): entry(OTHER).as_json()})
    assert store.get(WORK.key) is None


def test_an_entry_under_another_ones_key_does_not_keep_that_one_out(store):
    store.change("forward", lambda entries: {str(WORK.key): entry(OTHER, at=2e9).as_json()})
    for stores_ in (store, anew(store)):
        assert stores_.put(entry(at=1e9))
        assert anew(store).get(WORK.key) == entry(at=1e9)
        store.change("forward", lambda entries: {str(WORK.key): entry(OTHER, at=1.5e9).as_json()})


def test_what_a_store_knows_is_what_was_written_last(store, monkeypatch):
    """By whichever of its threads: what is known is set while the file's lock is held."""
    held, locked = [], stores.locked

    @contextmanager
    def noted(path, seconds=stores.LOCK_SECONDS):
        with locked(path, seconds):
            held.append(True)
            yield
            held.append("forward" in store._read)

    monkeypatch.setattr(stores, "locked", noted)
    store.put(entry())
    assert held == [True, True]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir])
def test_what_is_no_file_is_neither_waited_for_nor_renamed(store, make):
    store.folder.mkdir(parents=True)
    make(store.path("forward"))
    with pytest.warns(RuntimeWarning, match=r"forward\.json cannot be read"):
        assert store.get(WORK.key) is None
    memory_only(store, "they last for this process only")
    assert [path.name for path in store.folder.iterdir() if path.suffix == ".json"] == ["forward.json"]


def test_a_lookup_waits_for_nobody(store):
    """A broken file whose lock somebody holds is left alone: whoever writes sets it aside."""
    from filelock import FileLock

    store.put(entry())
    store.path("forward").write_text("{")
    began = time.monotonic()
    with FileLock(f"{store.path('forward')}.lock"), pytest.warns(RuntimeWarning, match="it is left alone"):
        assert anew(store).get(WORK.key) is None
    assert time.monotonic() - began < stores.LOCK_SECONDS / 3
    assert store.path("forward").read_text() == "{"


# Folders that cannot be written


def memory_only(store, match):
    with pytest.warns(RuntimeWarning, match=match):
        assert not store.put(entry())
    assert not store.put(entry(OTHER))  # a second warning would be an error
    assert store.get(WORK.key) == store.get(WORK.key, again=True) == entry()
    assert store.get(OTHER.key) == entry(OTHER)


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    memory_only(Store(IDENTITY, tmp_path / "file"), "cannot be kept in .* they last for this process only")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_folder_that_is_read_only(store):
    store.put(entry(replace(WORK, batch=128)))
    before = store.path("forward").read_bytes()
    store.folder.chmod(0o500)
    try:
        memory_only(anew(store), "they last for this process only")
    finally:
        store.folder.chmod(0o700)
    assert store.path("forward").read_bytes() == before


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_disk_that_is_full(store, monkeypatch, call):
    """What was there still is, and nothing is left over."""
    store.put(entry(replace(WORK, batch=128)))
    before = store.path("forward").read_bytes()
    real = getattr(os, call)

    def full(*arguments, **options):
        if call == "open" and ".tmp" not in str(arguments[0]):
            return real(*arguments, **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stores.os, call, full)
    memory_only(store, "No space left on device")
    monkeypatch.undo()
    assert store.path("forward").read_bytes() == before
    assert not list(store.folder.glob(".*.tmp"))
    monkeypatch.setattr(errors, "_told", set())
    assert store.put(entry())  # there is room again: what was only remembered is written, too
    assert anew(store).get(OTHER.key) == entry(OTHER)


def test_after_a_write_that_failed_nothing_of_the_others_is_lost(store, monkeypatch):
    """What could not be written is all that is remembered: not what others have replaced or removed since."""
    third = entry(replace(WORK, batch=128))
    store.put(entry(at=1.0, faster=1.1))
    store.put(third)
    mine = anew(store)
    assert mine.get(WORK.key).gain == pytest.approx(1.1, rel=1e-3)  # it has read all

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(stores, "write_file", full)
        with pytest.warns(RuntimeWarning, match="they last for this process only"):
            assert not mine.put(entry(OTHER))
    store.put(entry(at=2.0, faster=1.5))
    store.change("forward", lambda entries: {k: v for k, v in entries.items() if k != str(third.key)})
    fourth = entry(replace(WORK, batch=256))
    assert mine.put(fourth)
    for found in (mine, anew(store)):
        assert found.get(WORK.key, again=True).gain == pytest.approx(1.5, rel=1e-3)
        assert found.get(third.key) is None
        assert found.get(OTHER.key) == entry(OTHER)
        assert found.get(fourth.key) == fourth
    # and what was not written is no better than what others have found later
    with monkeypatch.context() as disk:
        disk.setattr(stores, "write_file", full)
        assert not mine.put(entry(at=3.0, faster=1.2))
    assert mine.get(WORK.key).gain == pytest.approx(1.2, rel=1e-3)
    store.put(entry(at=4.0, faster=1.6))
    assert mine.get(WORK.key, again=True).gain == pytest.approx(1.6, rel=1e-3)
    assert mine.put(entry(OTHER))
    assert anew(store).get(WORK.key).gain == pytest.approx(1.6, rel=1e-3)


def test_what_another_thread_could_not_write_meanwhile_is_kept(store, monkeypatch):
    """It came after this write had begun, so it is not in the file."""
    real = stores.write_file

    def write(path, identity, kernel, entries):
        if str(OTHER.key) not in entries:
            monkeypatch.setattr(stores, "write_file", full)
            assert not store.put(entry(OTHER))  # as the other thread
            monkeypatch.setattr(stores, "write_file", write)
        real(path, identity, kernel, entries)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stores, "locked", lambda *_: nullcontext())
    monkeypatch.setattr(stores, "write_file", write)
    with pytest.warns(RuntimeWarning, match="they last for this process only"):
        assert store.put(entry())
    assert store.get(OTHER.key) == entry(OTHER)
    assert store.put(entry(replace(WORK, batch=128)))
    assert anew(store).get(OTHER.key) == entry(OTHER)


def test_what_is_written_is_no_longer_remembered(store):
    """Else what others remove would be there again with the next write."""
    assert store.put(entry())
    anew(store).change("forward", lambda entries: {})
    assert store.put(entry(OTHER))
    assert anew(store).get(WORK.key) is None
    assert store.get(WORK.key, again=True) is None


def test_file_and_folder_are_on_the_disk_before_it_is_told(store, monkeypatch):
    """A file that was renamed into a folder is only there when the folder is, too."""
    synchronised, real = [], os.fsync
    monkeypatch.setattr(
        stores.os, "fsync", lambda handle: synchronised.append(os.fstat(handle).st_mode) or real(handle)
    )
    assert store.put(entry())
    assert [stat.S_ISDIR(mode) for mode in synchronised] == [False, True]


def test_a_change_that_cannot_be_written_changes_nothing(store, monkeypatch):
    store.put(entry())
    with monkeypatch.context() as disk:
        disk.setattr(store, "root", None)
        with pytest.raises(OSError, match="no folder"):
            store.change("forward", lambda entries: {})
    assert store.get(WORK.key, again=True) == entry()


def test_no_folder_is_known(monkeypatch):
    monkeypatch.delenv(stores.VARIABLE)
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    with pytest.warns(RuntimeWarning, match=r"platformdirs is missing, .* TRITON_BNLSTM_CACHE_DIR"):
        assert cache_directory() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it has been told
        silent = Store(IDENTITY, None)
        assert not silent.put(entry())
        assert silent.get(WORK.key) == entry()


def test_the_folder_is_the_users(monkeypatch, tmp_path):
    platformdirs = pytest.importorskip("platformdirs")
    monkeypatch.setenv(stores.VARIABLE, str(tmp_path / "mine"))
    assert cache_directory() == tmp_path / "mine"
    monkeypatch.setenv(stores.VARIABLE, "~/mine")
    assert cache_directory() == Path.home() / "mine"
    monkeypatch.setenv(stores.VARIABLE, "~nobody-has-this-name/cache")
    with pytest.warns(RuntimeWarning, match="names no folder"):
        assert cache_directory() is None
    monkeypatch.delenv(stores.VARIABLE)
    assert cache_directory() == Path(platformdirs.user_cache_dir("triton_bnlstm", appauthor=False))
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *_, **__: "~/.cache/triton_bnlstm")
    with pytest.warns(RuntimeWarning, match="no home"):  # and not a folder "~" where the process is
        assert cache_directory() is None


def test_nothing_is_imported_before_it_is_needed():
    """A bare GPU machine may lack both, and who never tunes needs neither."""
    code = "import sys, triton_bnlstm, triton_bnlstm.tuning as t; from triton_bnlstm.tuning import store, choice\n"
    code += "print([name for name in ('platformdirs', 'filelock_', 'rich', 'triton') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_others_may_read_what_the_umask_lets_them(store):
    before = os.umask(0o022)
    try:
        store.put(entry())
    finally:
        os.umask(before)
    assert stat.S_IMODE(store.path("forward").stat().st_mode) == 0o644


def test_a_lock_that_is_held_too_long(store, monkeypatch):
    store.put(entry(replace(WORK, batch=128)))
    from filelock import FileLock

    original = stores.locked

    def briefly(path, seconds=None):
        return original(path, 0.05)

    monkeypatch.setattr(stores, "locked", briefly)
    with FileLock(f"{store.path('forward')}.lock"):
        memory_only(store, r"\(held by another process for 0\.05 s\)")


def test_what_a_killed_writer_has_left_goes_after_an_hour(store):
    store.put(entry())
    old, new = (store.folder / f".forward.json.{k}.tmp" for k in range(2))
    for file in (old, new):
        file.write_text("half")
    os.utime(old, (time.time() - 7200,) * 2)
    store.put(entry(OTHER))
    assert not old.exists()
    assert new.exists()
