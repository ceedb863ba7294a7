"""The user's cache: what is in a file, who may write it at once, and what happens to one that is broken."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.tuning import BY, H100, WORK, entry
from triton_bnlstm.kernels import errors
from triton_bnlstm.kernels.config import Config
from triton_bnlstm.tuning import store as stores
from triton_bnlstm.tuning.device import Identity
from triton_bnlstm.tuning.entry import Candidate, Entry, merged
from triton_bnlstm.tuning.store import FORMAT, SCHEMA, Store, cache_directory, read_file
from triton_bnlstm.tuning.work import FLAGS, KERNELS, Key, Work, hidden_bucket, key_of_json, power_bucket, source_hash

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
    only_then = Candidate(replace(first.layout, warps=4), 9.0, 5.0, 15)
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


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "\x00\x01",
        "[" * 100_000,
        json.dumps({"format": "something else", "schema": 1, "entries": {}}),
        json.dumps({"format": FORMAT, "schema": 99, "entries": {}}),
        json.dumps({"format": FORMAT, "schema": SCHEMA, "entries": []}),
        json.dumps({"format": FORMAT, "schema": SCHEMA, "entries": {"a": 1}}),
    ],
)
def test_a_file_that_is_not_ours_is_set_aside(store, text):
    """Renamed, not deleted; one warning; and the work goes on."""
    path = store.path("forward")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.warns(RuntimeWarning, match=r"forward\.json is of no use .* it is now forward\.json\.corrupt-"):
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


def changed(**changes):
    """An entry's JSON with some fields changed, also deep ones: layout__units=3."""
    told = entry().as_json()
    for name, value in changes.items():
        place = told
        *path, last = name.split("__")
        for part in path:
            place = place[part]
        place[last] = value
    return told


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
        changed(candidates={}),
        changed(candidates=[1]),
        changed(candidates=[{"layout": entry().as_json()["layout"], "us": -1.0}]),
        changed(candidates=[{"layout": entry().as_json()["layout"], "us": float("inf")}]),
        changed(case={"hidden": "many"}),
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

    def briefly(path):
        return original(path, 0.05)

    monkeypatch.setattr(stores, "locked", briefly)
    with FileLock(f"{store.path('forward')}.lock"):
        memory_only(store, r"is held by another process for 0\.05 s")


def test_what_a_killed_writer_has_left_goes_after_an_hour(store):
    store.put(entry())
    old, new = (store.folder / f".forward.json.{k}.tmp" for k in range(2))
    for file in (old, new):
        file.write_text("half")
    os.utime(old, (time.time() - 7200,) * 2)
    store.put(entry(OTHER))
    assert not old.exists()
    assert new.exists()


# Keys


def test_buckets():
    """As the module's page has them."""
    assert [hidden_bucket(h) for h in (1, 7, 16, 17, 100, 112, 113, 512, 513, 1000, 1024, 2000)] == [
        *(1, 7, 16, 20, 112, 112, 128, 512, 640, 1024, 1024, 2048)
    ]
    assert [power_bucket(b) for b in (1, 16, 17, 64, 100)] == [16, 16, 32, 64, 128]
    for hidden in range(1, 3000):
        assert hidden <= hidden_bucket(hidden) <= max(16, 1.25 * hidden)
        assert hidden_bucket(hidden_bucket(hidden)) == hidden_bucket(hidden)
    assert replace(WORK, hidden=1000).key == replace(WORK, hidden=1024).key != WORK.key
    assert replace(WORK, batch=50).key == WORK.key


def test_keys_tell_apart_what_runs_differently():
    works = [WORK, OTHER, replace(WORK, batch=65), replace(WORK, directions=2), replace(WORK, dtype=torch.float16)]
    works += [replace(WORK, dtype=torch.float32, precision=p) for p in ("ieee", "tf32")]
    works += [replace(WORK, flags=(flag,)) for flag in FLAGS["forward"]] + [replace(WORK, kernel="inference")]
    works += [Work.of_moments(c, 64, 1, torch.bfloat16, centre=x) for c in (16, 64) for x in (True, False)]
    assert len({work.key for work in works}) == len({str(work.key) for work in works}) == len(works)
    for work in works:
        assert key_of_json(json.loads(json.dumps(work.key.as_json()))) == work.key
        assert Work.of_key(work.key).key == work.key


def test_the_hash_is_of_the_code_not_of_its_comments(monkeypatch, tmp_path):
    from triton_bnlstm.tuning import work as works

    (tmp_path / "kernels").mkdir()
    (tmp_path / "tuning").mkdir()
    monkeypatch.setattr(works, "__file__", str(tmp_path / "tuning" / "work.py"))

    def hashed(text):
        for name in ("forward", "common", "barrier"):
            (tmp_path / "kernels" / f"{name}.py").write_text(text)
        source_hash.cache_clear()
        return source_hash("forward")

    try:
        plain = hashed("def f(x):\n    return x + 1\n")
        assert plain == hashed('"""A page."""\n\n\n# why\ndef f(x):\n    """What."""\n    return x + 1  # how\n')
        assert plain == hashed("def f(x):\n\n    return (x + 1)\n".replace("(x + 1)", "x + 1"))
        assert plain != hashed("def f(x):\n    return x + 2\n")
        assert plain != hashed("def f(x):\n  if x:\n    return x + 1\n")
    finally:
        source_hash.cache_clear()
    monkeypatch.undo()
    assert source_hash("forward") != source_hash("backward") != source_hash("inference")


def test_an_old_entry_of_other_code_is_another_key():
    key = WORK.key._replace(source="0" * 12)
    assert str(key) != str(WORK.key)
    assert isinstance(key, Key)


def test_entries_survive_json():
    found = Entry.of_json(json.loads(json.dumps(entry().as_json())))
    assert found == entry()
    assert isinstance(found.layout, Config)


# Many writers, and writers that are killed

WRITER = textwrap.dedent(
    """
    import sys, time, warnings
    warnings.simplefilter("error")
    from dataclasses import replace
    from pathlib import Path
    from tests.support.tuning import H100, WORK, CPU, BY, FakeBench
    from triton_bnlstm.tuning import online, choice
    number, begin = int(sys.argv[1]), float(sys.argv[2])
    works = [replace(WORK, hidden=512 * (1 + k % 4), batch=16 << (k // 4)) for k in range(16)]
    online.provenance_of = lambda device: BY
    print("ready", flush=True)
    sys.stdin.readline()
    def make(work, device):
        return FakeBench(work, compiling=0.0)
    # its own first, then those of all others: each is tuned by somebody, and everybody finds it
    for work in works[number:] + works[:number]:
        online.tune_work(work, CPU, H100, make=make, seconds=5.0)
    print("done", flush=True)
    """
)


def start(code, tmp_path, *arguments):
    environment = {
        **os.environ,
        "TRITON_BNLSTM_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
    )


def test_sixteen_processes_tune_and_write_at_once(tmp_path):
    """Sixteen keys in one file: none is lost, whoever writes when, and each is measured once."""
    processes = [start(WRITER, tmp_path, k, 0) for k in range(16)]
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            assert process.stdout.readline() == "done\n"
            assert process.wait(60) == 0
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    entries = read_file(Store(IDENTITY, tmp_path).path("forward"))
    assert len(entries) == 16
    for told in entries.values():
        found = Entry.of_json(told)
        assert found.gain is None or found.gain >= 1
        assert len(found.candidates) > 3
    assert not list(tmp_path.rglob("*.corrupt*"))


HAMMER = textwrap.dedent(
    """
    import sys
    from dataclasses import replace
    from pathlib import Path
    from tests.support.tuning import H100, WORK, entry
    from triton_bnlstm.tuning.device import Identity
    from triton_bnlstm.tuning.store import Store
    store = Store(Identity.of(H100), Path(sys.argv[1]))
    print("ready", flush=True)
    k = 0
    while True:
        k += 1
        store.put(entry(replace(WORK, batch=16 << (k % 8)), at=float(k)))
        print(k, flush=True)
    """
)


def test_a_writer_may_be_killed_at_any_moment(tmp_path):
    """After each kill the file is whole, has all that was reported as written, and can be written."""
    processes = [start(HAMMER, tmp_path, tmp_path) for _ in range(2)]
    store = Store(IDENTITY, tmp_path)
    reader = Store(IDENTITY, tmp_path)
    kills = 0
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for delay in (0.0, 0.003, 0.011, 0.023, 0.041):
            for place, process in enumerate(processes):
                written = [process.stdout.readline() for _ in range(3)]
                time.sleep(delay)
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills += 1
                entries = read_file(store.path("forward"))  # raises where it is not whole
                assert len(entries) >= min(3, int(written[-1]))
                for told in entries.values():
                    Entry.of_json(told)
                assert reader.put(entry(replace(WORK, hidden=100 * kills, batch=16), at=1e9))
                if kills <= 6:
                    processes[place] = start(HAMMER, tmp_path, tmp_path)
                    assert processes[place].stdout.readline() == "ready\n"
            if kills >= 8:
                break
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    entries = read_file(store.path("forward"))
    assert {f"H{hidden_bucket(100 * k)}" for k in range(1, kills + 1)} <= {text.split()[2] for text in entries}
    assert not list(tmp_path.rglob("*.corrupt*"))
