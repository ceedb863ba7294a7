"""Many processes that tune and write at once, and writers that are killed: real processes, fake kernels."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

from tests.support.tuning import H100, WORK, entry
from triton_bnlstm.tuning.device import Identity
from triton_bnlstm.tuning.entry import Entry
from triton_bnlstm.tuning.store import Store, read_file
from triton_bnlstm.tuning.work import hidden_bucket

IDENTITY = Identity.of(H100)
ROOT = Path(__file__).parents[1]


WRITERS = textwrap.dedent(
    """
    import os, sys, traceback, warnings
    warnings.simplefilter("error")
    from dataclasses import replace
    from tests.support.tuning import H100, WORK, CPU, BY, FakeBench
    from triton_bnlstm.tuning import online
    works = [replace(WORK, hidden=512 * (1 + k % 4), batch=16 << (k // 4)) for k in range(16)]
    online.provenance_of = lambda device: BY
    def make(work, device):
        return FakeBench(work, compiling=0.0)
    def write(number):
        # its own first, then those of all others: each is tuned by somebody, and everybody finds it
        for work in works[number:] + works[:number]:
            online.tune_work(work, CPU, H100, make=make, seconds=5.0)
    # sixteen processes of one import, which wait until all of them are there
    hold, release = os.pipe()
    children = []
    for number in range(16):
        child = os.fork()
        if not child:
            os.close(release)
            os.read(hold, 1)
            try:
                write(number)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    os.close(release)
    print([os.waitpid(child, 0)[1] for child in children], flush=True)
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
    process = start(WRITERS, tmp_path)
    try:
        assert process.communicate(timeout=120)[0] == f"{[0] * 16}\n"
    finally:
        process.kill()
        process.communicate()
    entries = read_file(Store(IDENTITY, tmp_path).path("forward"))
    assert len(entries) == 16
    for told in entries.values():
        found = Entry.of_json(told)
        assert found.gain is None or found.gain >= 1
        assert len(found.candidates) > 3
    assert not list(tmp_path.rglob("*.corrupt*"))


def hammer(folder, tell):
    """Write entries for ever, and tell the number of each that is written."""
    store = Store(IDENTITY, folder)
    for k in itertools.count(1):
        store.put(entry(replace(WORK, batch=16 << (k % 8)), at=float(k)))
        tell.send(k)


def hammering(folder):
    """A process that does so, forked from one that has imported everything and does nothing; and what it tells."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    told, tell = processes.Pipe(duplex=False)
    process = processes.Process(target=hammer, args=(folder, tell), daemon=True)
    process.start()
    tell.close()
    return process, told


def test_a_writer_may_be_killed_at_any_moment(tmp_path):
    """After each kill the file is whole, has all that was reported as written, and can be written."""
    writers = [hammering(tmp_path) for _ in range(2)]
    store = Store(IDENTITY, tmp_path)
    reader = Store(IDENTITY, tmp_path)
    kills = 0
    try:
        for delay in (0.0, 0.003, 0.011, 0.023, 0.041):
            for place, (process, told) in enumerate(writers):
                written = [told.recv() for _ in range(3)]
                time.sleep(delay)
                assert process.is_alive()
                process.kill()
                process.join()
                assert process.exitcode == -signal.SIGKILL
                told.close()
                kills += 1
                entries = read_file(store.path("forward"))  # raises where it is not whole
                assert len(entries) >= min(3, written[-1])
                for told in entries.values():
                    Entry.of_json(told)
                assert reader.put(entry(replace(WORK, hidden=100 * kills, batch=16), at=1e9))
                if kills <= 6:
                    writers[place] = hammering(tmp_path)
            if kills >= 8:
                break
    finally:
        for process, told in writers:
            process.kill()
            process.join()
            told.close()
    entries = read_file(store.path("forward"))
    assert {f"H{hidden_bucket(100 * k)}" for k in range(1, kills + 1)} <= {text.split()[2] for text in entries}
    assert not list(tmp_path.rglob("*.corrupt*"))
