"""The commands of tuning that look after a cache: verify, export, clear, doctor; times are made up."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from bench.aot.targets import TARGETS
from tests.support import tuning_command
from tests.support.tuning_command import (
    A100,
    BACKWARD,
    BY,
    CPU,
    FORWARD,
    H100,
    MOMENTS,
    FakeBench,
    folder_of,
    made,
    no_device,
    put,
    run,
    run_json,
    ship,
    words,
)
from triton_bnlstm.kernels.config import Device
from triton_bnlstm.tuning import contents, doctor, machine, shipped, space
from triton_bnlstm.tuning.device import Identity
from triton_bnlstm.tuning.entry import MODELLED, Entry
from triton_bnlstm.tuning.screens import DONE, FAILED, NO_DEVICE, USAGE
from triton_bnlstm.tuning.store import Store, locked
from triton_bnlstm.tuning.tuner import TuningError
from triton_bnlstm.tuning.work import Work

root = pytest.fixture(autouse=True)(tuning_command.cache_without_device)
h100 = pytest.fixture(tuning_command.device_that_is_not_there)


# verify


def test_verify_without_a_device_says_what_it_did_not_look_at(capsys, root):
    put(root, made(), made(MOMENTS))
    code, out, _ = run(capsys, "verify")
    assert code == DONE
    assert "2 entries, 0 problems; none was run" in out
    assert "Not checked: without a GPU" in out
    unknown = Device("cuda", 77, 3, 1024, 2048, 65536, 1024)
    put(root, made(device=unknown), device=unknown)
    code, told = run_json(capsys, "verify")
    assert code == DONE
    assert [each["state"] for each in told["entries"]].count("not checked") == 1
    assert len(told["not_checked"]) == 2


def test_verify_finds_what_cannot_be_used(capsys, root):
    far = next(each for each in space.structures(H100, FORWARD) if getattr(each, "sequence", False))
    too_wide = type(far)(**{**vars(far), "warps": 64})
    put(root, made(layout=too_wide), made(BACKWARD, source="0" * 12), made(MOMENTS))
    code, told = run_json(capsys, "verify")
    assert code == FAILED
    assert [each["state"] for each in told["entries"]] == ["wrong", "wrong", "fits"]
    assert "64 warps" in told["entries"][0]["why"]
    (folder_of(root) / "inference.json").write_text("[]")
    code, out, _ = run(capsys, "verify")
    assert code == FAILED
    assert "3 problems" in out
    assert "clear --unused" in out


def test_verify_measures_on_a_device(capsys, root, h100, monkeypatch):
    entry, other = made(), made(MOMENTS)
    put(root, entry, other, made(BACKWARD, layout=space.analytic(H100, BACKWARD)))
    put(root, made(device=A100), device=A100)
    fast = FakeBench(FORWARD)
    monkeypatch.setattr(fast, "sample", lambda layout: 1e-6 if layout == entry.layout else 2e-6)

    def make(work: Work, device: torch.device) -> FakeBench:
        return fast if work == FORWARD else FakeBench(work, slow=[other.layout], times=3)

    h100(make)
    code, told = run_json(capsys, "verify")
    assert code == FAILED
    assert [(each["state"], each["ratio"] and each["ratio"] > 1) for each in told["entries"]] == [
        ("ok", False),
        ("ok", None),
        ("slow", True),
    ]
    assert told["entries"][0]["ratio"] == pytest.approx(0.5)
    fast.unfit = {entry.layout: "output 0 off by 3.0e-01\n(at most 6e-02)"}
    code, out, _ = run(capsys, "verify")
    assert code == FAILED
    assert "off by 3.0e-01 (at most 6e-02)" in words(out)
    fast.unfit = {fast.default: "too much"}
    _, told = run_json(capsys, "verify")
    assert told["entries"][0]["state"] == "ok"
    h100(lambda work, device: (_ for _ in ()).throw(TuningError("there is too little memory")))
    code, told = run_json(capsys, "verify")
    assert {each["state"] for each in told["entries"]} == {"wrong"}


def test_verify_begins_nothing_after_its_time(capsys, root, h100):
    put(root, made())
    code, told = run_json(capsys, "verify", "--seconds", "1e-9")
    assert code == DONE
    assert told["entries"][0]["state"] == "not checked"


# export


def test_export_writes_what_the_package_reads(capsys, root, tmp_path):
    entry = made()
    put(root, entry, made(BACKWARD, source="0" * 12), made(MOMENTS, how=MODELLED))
    code, out, _ = run(capsys, "export")
    assert code == DONE
    held = shipped.parse(out)
    assert list(held) == [Identity.of(H100)]
    read = Entry.of_json(held[Identity.of(H100)][str(entry.key)])
    assert (read.layout, read.gain) == (entry.layout, pytest.approx(entry.gain))
    assert len(read.candidates) == 2
    file = tmp_path / "sm90.json"
    code, out, _ = run(capsys, "export", "--out", str(file), "--with-candidates")
    assert code == DONE
    assert "1 entry of 1 device" in out
    text = next(iter(shipped.parse(file.read_text())[Identity.of(H100)].values()))
    assert len(text["candidates"]) == 3
    assert [each.name for each in tmp_path.iterdir()].count("sm90.json") == 1


def test_export_of_several_architectures(capsys, root, tmp_path):
    assert run(capsys, "export")[0] == FAILED
    put(root, made())
    put(root, made(device=A100), device=A100)
    code, out, err = run(capsys, "export")
    assert (code, out) == (USAGE, "")
    assert "sm80, sm90" in err
    code, out, _ = run(capsys, "export", "--architecture", "sm80")
    assert list(shipped.parse(out)) == [Identity.of(A100)]
    code, out, _ = run(capsys, "export", "--architecture", "SM80,sm90")
    assert set(shipped.parse(out)) == {Identity.of(A100), Identity.of(H100)}
    code, _, err = run(capsys, "export", "--architecture", "sm9")
    assert (code, "nobody knows 'sm9'; known are gfx942, gfx90a, sm75, sm80" in err) == (USAGE, True)
    code, _, err = run(capsys, "export", "--architecture", "sm120")
    assert (code, "no measured layouts for sm120; in your cache: forward for sm80, sm90" in err) == (FAILED, True)
    assert run(capsys, "export", "--kernel", "moments")[0] == FAILED
    code, _, err = run(capsys, "export", "--architecture", "sm80", "--out", str(tmp_path / "none" / "file"))
    assert (code, err.count("\n"), "there is no folder" in err) == (USAGE, 1, True)


# clear


def test_clear_of_a_kernel_or_of_everything(capsys, root):
    put(root, made(), made(BACKWARD))
    put(root, made(device=A100), device=A100)
    code, out, _ = run(capsys, "clear", "--kernel", "forward")
    assert code == DONE
    assert "Removed 2 entries" in out
    assert [each.kernel for each in contents.of_cache(root).found] == ["backward"]
    folder = folder_of(root)
    (folder / "forward.json.corrupt-20250101-000000-1").write_text("{")
    (folder / "moments.json").write_text("{")
    (folder / ".backward.json.1-00.tmp").write_text("{")
    (folder / "measuring").mkdir()
    (folder / "measuring" / "0123.lock").touch()
    code, out, _ = run(capsys, "clear", "--all")
    assert code == DONE
    assert "Removed 1 entry and 3 other files" in out
    left = {path.suffix for path in root.rglob("*") if path.is_file()}
    assert left == {".lock"}  # whoever waits for one must not be alone with it
    assert run(capsys, "clear", "--all")[0] == DONE


def test_clear_leaves_what_another_process_is_at_work_on(capsys, root):
    put(root, made())
    measuring = folder_of(root) / "measuring"
    measuring.mkdir()
    with locked(measuring / "0123"):
        assert run(capsys, "clear", "--all")[0] == DONE
        assert [path.name for path in measuring.iterdir()] == ["0123.lock"]


def test_clear_of_what_is_stale(capsys, root):
    put(root, made(by=BY._replace(triton="2.0.0")), made(BACKWARD, source="0" * 12), made(MOMENTS))
    path = folder_of(root) / "inference.json"
    put(root, made(Work("inference", 64, 64, 1, torch.float16)))
    path.write_text(path.read_text().replace("float16", "float12"))
    code, out, _ = run(capsys, "clear", "--unused")  # what another Triton measured is used, and stays
    assert (code, "Removed 2 entries" in out) == (DONE, True)
    code, _, err = run(capsys, "clear", "--stale")  # by the Triton of a machine that cannot use them
    assert (code, "say --device all" in err) == (USAGE, True)
    code, out, _ = run(capsys, "clear", "--stale", "--kernel", "moments", "--device", "all")
    assert (code, "Removed 0 entries" in out) == (DONE, True)
    code, out, _ = run(capsys, "clear", "--stale", "--device", "all")
    assert (code, "Removed 1 entry" in out) == (DONE, True)
    assert [each.kernel for each in contents.of_cache(root).found] == ["moments"]


def test_without_triton_nothing_is_stale(root, monkeypatch):
    put(root, made())
    monkeypatch.setattr(contents, "triton_version", lambda: "none")
    assert [each.is_stale for each in contents.of_cache(root).found] == [False]


def test_clear_of_this_device(capsys, root, h100, monkeypatch):
    put(root, made())
    put(root, made(device=A100), device=A100)
    assert run(capsys, "clear", "--all", "--device", "this")[0] == DONE
    assert [each.identity for each in contents.of_cache(root).found] == [Identity.of(A100)]
    monkeypatch.setattr(machine, "find", no_device)
    assert run(capsys, "clear", "--all", "--device", "this")[0] == NO_DEVICE


def test_clear_tells_what_it_could_not_change(capsys, root, monkeypatch):
    put(root, made())

    def full(self, kernel, how):
        raise OSError("No space left on device")

    monkeypatch.setattr(Store, "change", full)
    code, out, err = run(capsys, "clear", "--kernel", "forward")
    assert code == FAILED
    assert "Removed 0 entries" in out
    assert "forward.json could not be changed (No space left on device)" in err


# doctor


def test_doctor_finds_nothing_wrong(capsys, root, monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: "1.0")
    code, out, _ = run(capsys, "doctor")
    assert (code, out.splitlines()[-1]) == (DONE, "no problems found")
    assert not root.exists()
    root.mkdir()
    assert run(capsys, "doctor")[0] == DONE
    assert list(root.iterdir()) == []


def test_doctor_with_a_device(capsys, root, h100, monkeypatch):
    put(root, made(), made(MOMENTS, by=BY._replace(triton="2.0.0")))
    put(root, made(device=A100), device=A100)
    ship(monkeypatch, made(), made(BACKWARD, how=MODELLED))
    code, told = run_json(capsys, "doctor")
    assert code == DONE
    assert told["devices"][0]["identity"] == "cuda-sm90-132x227KB"
    assert (told["cache"]["entries_here"], told["cache"]["entries_elsewhere"], told["cache"]["stale"]) == (2, 1, 1)
    assert told["shipped"] == {"measured": 1, "modelled": 1}
    assert told["problems"] == []
    _, out, _ = run(capsys, "doctor")
    assert "cuda-sm90-132x227KB" in out
    assert "1 measured, 1 modelled" in out
    assert "1 measured with another Triton" in out


def test_doctor_tells_problems(capsys, root, h100, monkeypatch):
    put(root, made())
    (folder_of(root) / "forward.json").write_text("{")
    monkeypatch.setenv("TRITON_BNLSTM_AUTOTUNE", "sometimes")
    monkeypatch.setenv("TRITON_BNLSTM_AUTOTUNE_SECONDS", "soon")
    monkeypatch.setenv("TRITON_BNLSTM_BACKEND", "magic")
    monkeypatch.setattr(machine, "why_not_measured", lambda device, dtype: "TRITON_INTERPRET=1 is set")
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    code, out, _ = run(capsys, "doctor")
    assert code == FAILED
    for text in ("sometimes", "soon", "magic", "TRITON_INTERPRET", "filelock is missing", "cannot be used: it is not"):
        assert text in words(out)
    assert "6 problems:" in out


def test_doctor_on_a_cache_that_is_a_file(capsys, root):
    root.write_text("no folder")
    code, told = run_json(capsys, "doctor")
    assert code == FAILED
    assert told["cache"]["usable"] is False


def test_doctor_looks_whether_locks_lock(tmp_path, monkeypatch):
    assert doctor.why_unusable(tmp_path / "a" / "b") is None
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(doctor, "locked", lambda path, seconds: nullcontext())
    assert "do not keep others out" in (doctor.why_unusable(tmp_path) or "")


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_numbers_of_devices_that_are_not_here(target):
    assert machine.numbers_of(Identity.of(target.device)) == target.device


def test_numbers_that_nobody_has_written_down():
    assert machine.numbers_of(Identity("cuda", "sm77", 1, 1024)) is None
    assert machine.numbers_of(Identity("cpu", "cpu", 1, 1024)) is None


def test_this_machine_has_a_device_or_says_so(monkeypatch):
    monkeypatch.undo()
    if not torch.cuda.is_available():
        assert machine.find_any() is None
        assert machine.find_all() == []
        assert machine.why_not_measured(CPU, torch.float32) is not None


# import, and what is slower


def test_import_takes_what_was_exported(capsys, root, tmp_path, monkeypatch):
    put(root, made(), made(BACKWARD))
    file = tmp_path / "tuned.json"
    assert run(capsys, "export", "--out", str(file))[0] == DONE
    monkeypatch.setenv("TRITON_BNLSTM_CACHE_DIR", str(tmp_path / "other"))
    code, out, _ = run(capsys, "import", str(file))
    assert (code, "Took 2 entries for 1 device" in out) == (DONE, True)
    assert len(contents.of_cache(tmp_path / "other").found) == 2
    told = {str(each.key): each.as_json() for each in (made(how=MODELLED), made(BACKWARD, source="0" * 12))}
    file.write_text(shipped.text_of({Identity.of(H100): told, Identity("../x", "sm90", 1, 1024): told}))
    code, _, err = run(capsys, "import", str(file))
    lines = err.splitlines()  # one for each reason, however many entries have it
    assert (code, len(lines)) == (FAILED, 3)
    assert any("skipped 1 entry modelled, not measured" in line for line in lines)
    file.write_text("{}")
    assert run(capsys, "import", str(file))[0] == USAGE
    assert run(capsys, "import", str(tmp_path / "none"))[0] == USAGE


@pytest.mark.parametrize("ahead", [0, 5])
def test_import_tells_what_was_there_and_is_newer(capsys, root, tmp_path, ahead):
    """Whoever's clock is a little ahead."""
    file = tmp_path / "tuned.json"
    put(root, made())
    assert run(capsys, "export", "--out", str(file))[0] == DONE
    put(root, replace(made(us=3.0), at=time.time() + ahead))
    _, out, _ = run(capsys, "import", str(file))
    assert "Took 0 entries for 1 device" in words(out)
    assert "for 1 what was there is newer, and stays" in words(out)
    ((found,),) = [contents.of_cache(root).found]
    assert found.entry.candidate(found.entry.layout).microseconds == 3.0
    assert run(capsys, "clear", "--all")[0] == DONE
    put(root, replace(made(us=3.0), at=1.0))
    assert "newer" not in run(capsys, "import", str(file))[1]


def test_what_is_slower_than_the_default(capsys, root):
    put(root, made(us=5.0), made(MOMENTS, by=BY._replace(triton="2.0.0")))
    assert "! slower than the default" in run(capsys, "show")[1]
    code, out, _ = run(capsys, "verify")
    assert (code, "1 problem" in out, "1 entry was measured with another Triton" in out) == (FAILED, True, True)
    code, out, err = run(capsys, "export")
    assert code == DONE
    assert [key.split()[0] for key in shipped.parse(out)[Identity.of(H100)]] == ["moments"]
    assert ("left out: 1 entry" in err, "another Triton" in err) == (True, True)
    code, told = run_json(capsys, "clear", "--all")
    assert (code, told["removed"]) == (DONE, 2)


def test_doctor_on_a_cache_that_can_only_be_read(capsys, root, monkeypatch):
    root.mkdir()
    monkeypatch.setattr(doctor, "_version", lambda name: "1.0")
    monkeypatch.setattr(doctor, "why_unusable", lambda folder: "it cannot be written")
    monkeypatch.setattr(doctor, "_is_read_only", lambda folder: True)
    code, out, _ = run(capsys, "doctor")
    assert code == DONE
    assert "can be read, not written" in out


def test_doctor_when_triton_is_asked_for_and_missing(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "triton_version", lambda: "none")
    monkeypatch.setenv("TRITON_BNLSTM_BACKEND", "triton")
    code, out, _ = run(capsys, "doctor")
    assert (code, "asked for, and Triton is" in out) == (FAILED, True)


def test_doctor_names_what_keeps_it_from_a_cache(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_BNLSTM_CACHE_DIR", "~nobody-of-that-name/cache")
    code, out, _ = run(capsys, "doctor")
    assert (code, "TRITON_BNLSTM_CACHE_DIR=~nobody" in out) == (FAILED, True)
