"""What the command line of tuning rests on: devices, folders and screens as they may be, and what scripts go by."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.support import tuning_command
from tests.support.tuning_command import BY, FORWARD, H100, FakeBench, folder_of, made, put, run, run_json, ship
from triton_bnlstm.tuning import commands, contents, machine, screens, space
from triton_bnlstm.tuning.device import Identity, minor
from triton_bnlstm.tuning.entry import MODELLED, Candidate
from triton_bnlstm.tuning.store import Store, locked

is_settled = machine.is_settled  # before a fixture puts another one in its place
root = pytest.fixture(autouse=True)(tuning_command.cache_without_device)
h100 = pytest.fixture(tuning_command.device_that_is_not_there)


def test_exit_codes_are_what_help_says(capsys, root):
    """Scripts have these numbers in them."""
    assert run(capsys, "show")[0] == 0
    assert run(capsys, "export")[0] == 1  # there is nothing
    assert run(capsys, "tune", "--hidden", "64")[0] == 2
    assert run(capsys, *tuning_command.SIZES)[0] == 3
    assert (screens.DONE, screens.FAILED, screens.USAGE, screens.NO_DEVICE, screens.INTERRUPTED) == (0, 1, 2, 3, 130)


def test_an_interrupted_command_ends_as_scripts_know_it(capsys, monkeypatch):
    """Wherever it is interrupted; `tune` while it measures has a line of its own."""

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "show", interrupted)
    code, out, err = run(capsys, "show")
    assert (code, out, err.count("\n")) == (130, "", 1)
    assert "interrupted" in err


def test_what_is_settled():
    """What has nothing new to be tried, as far as is known before anything is compiled."""
    every = (*space.structures(H100, FORWARD), *space.neighbours(made().layout))
    tried = tuple(Candidate(layout, 4.0, 4.0, 15) for layout in dict.fromkeys(every))
    known = replace(made(), candidates=tried)
    assert is_settled(FORWARD, H100, known)
    assert not is_settled(FORWARD, H100, None)
    assert not is_settled(FORWARD, H100, replace(known, how=MODELLED))
    assert not is_settled(FORWARD, H100, replace(known, by=BY._replace(triton="2.0.0")))
    assert is_settled(FORWARD, H100, replace(known, by=BY._replace(triton=f"{minor(BY.triton)}.99")))
    for k in (0, 1, len(tried) - 1):
        assert not is_settled(FORWARD, H100, replace(known, candidates=tried[:k] + tried[k + 1 :]))


def test_why_there_is_no_cache(monkeypatch):
    """Three reasons, each with its remedy."""
    monkeypatch.setenv("TRITON_BNLSTM_CACHE_DIR", "~nobody-has-this-name/cache")
    assert "names a home folder that cannot be found" in contents.why_no_cache()
    monkeypatch.delenv("TRITON_BNLSTM_CACHE_DIR")
    monkeypatch.setattr(contents.importlib.util, "find_spec", lambda name: None)
    assert "platformdirs is missing: install it" in contents.why_no_cache()
    monkeypatch.setattr(contents.importlib.util, "find_spec", lambda name: object())
    assert "set HOME" in contents.why_no_cache()


@pytest.mark.parametrize(("encoding", "unit"), [("utf-8", "µs"), ("latin-1", "µs"), ("ascii", "us")])
def test_the_unit_is_one_that_can_be_written(monkeypatch, encoding, unit):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert screens.micro() == unit
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(encoding="one that nobody knows"))
    assert screens.micro() == "us"


def test_a_bucket_is_told_whatever_its_size():
    """Sizes are a file's, which anybody may have written."""
    assert screens._bucket_words("H", 512) == "H512 for 449 to 512"
    assert screens._bucket_words("H", 16) == "H16 for 16 alone"
    assert screens._bucket_words("B", 16) == "B16 for 1 to 16"
    assert screens._bucket_words("B", 1 << 30) == f"B{1 << 30} for {(1 << 29) + 1} to {1 << 30}"
    assert screens._bucket_words("D", 64) == "D64 for 33 to 64"


def test_an_entry_of_no_use_hides_nothing(capsys, root, monkeypatch):
    """What is shipped is looked at where the cache's own cannot be understood."""
    entry = made()
    ship(monkeypatch, made(how=MODELLED))
    put(root, entry)
    _, told = run_json(capsys, "show", "--shipped")
    assert {each["origin"]: each["shadowed"] for each in told["entries"]} == {"cache": False, "shipped": True}
    broken = {**entry.as_json(), "layout": None}
    Store(Identity.of(H100), root).change("forward", lambda entries: {str(entry.key): broken})
    _, told = run_json(capsys, "show", "--shipped")
    assert {each["origin"]: each["shadowed"] for each in told["entries"]} == {"cache": False, "shipped": False}


def test_clear_leaves_what_a_writer_is_at_work_on(capsys, root):
    """Who writes holds the file's lock: its temporary file is not abandoned."""
    put(root, made())
    path = folder_of(root) / "forward.json"
    path.unlink()
    half = path.with_name(f".{path.name}.1-00.tmp")
    half.write_text("{")
    with locked(path):
        assert run(capsys, "clear", "--all")[0] == 0
        assert half.exists()
    assert run(capsys, "clear", "--all")[0] == 0
    assert not half.exists()


@pytest.mark.parametrize(("disturbed", "state"), [(1, "ok"), (2, "slow")])
def test_a_machine_that_was_busy_for_a_moment_condemns_no_entry(capsys, root, h100, disturbed, state):
    """An entry is slower than the default only if it is so twice, each time in ten rounds of two samples."""
    entry, samples = made(), []
    put(root, entry)

    class Busy(FakeBench):
        def sample(self, layout):
            samples.append(layout)
            return 3e-6 if layout == entry.layout and len(samples) <= 20 * disturbed else 2e-6

    h100(lambda work, device: Busy(work))
    _, told = run_json(capsys, "verify")
    assert [each["state"] for each in told["entries"]] == [state]
    assert len(samples) == 40
