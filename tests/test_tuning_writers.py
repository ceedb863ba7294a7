"""Many processes that tune and write at once, and writers that are killed: real processes, fake kernels."""

from __future__ import annotations

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
