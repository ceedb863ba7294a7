"""What the command line of tuning advises can be followed, and what it says of files and devices is true of them."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support import tuning_command
from tests.support.tuning_command import (
    A100,
    BACKWARD,
    BY,
    FORWARD,
    H100,
    MOMENTS,
    SIZES,
    folder_of,
    made,
    put,
    run,
    run_json,
    words,
)
from triton_bnlstm.kernels.config import Device
from triton_bnlstm.tuning import clearing, commands, contents, doctor, machine, models, screens, shipped
from triton_bnlstm.tuning.device import Identity
from triton_bnlstm.tuning.entry import Entry
from triton_bnlstm.tuning.machine import Here
from triton_bnlstm.tuning.models import Wanted
from triton_bnlstm.tuning.screens import DONE, FAILED, USAGE
from triton_bnlstm.tuning.store import Busy, Store
from triton_bnlstm.tuning.work import Work

SHIPPED_TEXTS = contents.shipped_texts
root = pytest.fixture(autouse=True)(tuning_command.cache_without_device)
h100 = pytest.fixture(tuning_command.device_that_is_not_there)
UNKNOWN = Device("cuda", 77, 3, 1024, 2048, 65536, 1024)


def file_of(path: Path, *entries: Entry) -> Path:
    """What `export` could have written on an H100."""
    path.write_text(shipped.text_of({Identity.of(H100): {str(each.key): each.as_json() for each in entries}}))
    return path


# Commands that are advised


def test_the_command_for_an_entry_measures_that_entry(monkeypatch):
    """Of every key that is shipped, and of flags that none of them has."""
    monkeypatch.setattr(contents, "shipped_texts", SHIPPED_TEXTS)
    entries = [each.entry for k, each in enumerate(contents.of_package()) if k % 7 == 0 or each.kernel == "save"]
    entries += [made(work) for work in (FORWARD, BACKWARD, MOMENTS, replace(FORWARD, flags=("cell_norm", "seats")))]
    entries += [made(replace(BACKWARD, flags=("cell_norm", "fill"))), made(replace(BACKWARD, flags=("narrow",)))]
    entries.append(made(Work.of_moments(2048, 64, 1, torch.float16, centre=False)))
    entries.append(made(replace(FORWARD, dtype=torch.float32, precision="tf32")))
    asked_of = set()
    for entry in entries:
        assert entry is not None
        arguments = screens.tune_words(entry).removeprefix(screens.program()).split()
        asked = commands.parser().parse_args(arguments)
        kernels, lengths = tuple(asked.kernels or models.USUAL_KERNELS), asked.lengths or models.USUAL_LENGTHS
        keys = {
            work.key._replace(source="")
            for layer in models.layers_asked(asked)
            for each in lengths
            for work in models.works_of(layer, Wanted(asked.batch[0], each, kernels))
        }
        assert entry.key._replace(source="") in keys
        asked_of.add(entry.key.kernel)
    assert asked_of == {"forward", "backward", "inference", "moments", "save"}


def test_each_stale_entry_has_its_command(capsys, root):
    put(root, made(), made(replace(BACKWARD, batch=32), by=BY._replace(triton="2.0.0")))
    out = words(run(capsys, "show")[1])
    again = "tune --hidden 512 --batch 32 --dtype bf16 --directions 2 --cell-norm"
    assert f"! stale: Triton 2.0 then, {'.'.join(BY.triton.split('.')[:2])} now; still used. Measured anew by: " in out
    assert out.count(again) == 1


# Files of no use


def test_a_plan_only_looks(capsys, root):
    put(root, made())
    path = folder_of(root) / "forward.json"
    path.write_text("{")
    code, out, err = run(capsys, *SIZES, "--kernel", "forward", "--dry-run", "--architecture", "sm90")
    assert (code, out.splitlines()[-1]) == (DONE, "2 kernels, at most 2 min")
    assert err.count("\n") == 1
    assert f"cannot be used: {path}: it is not JSON" in err
    assert [each.name for each in path.parent.glob("forward.json*") if each.suffix != ".lock"] == ["forward.json"]


def test_a_plan_knows_what_the_cache_has(capsys, root, h100):
    sizes = [*SIZES, "--kernel", "forward", "--lengths", "equal"]
    assert run(capsys, *sizes)[0] == DONE
    _, told = run_json(capsys, *sizes, "--dry-run", "--architecture", "sm90")
    assert told["would_measure"] == []
    _, told = run_json(capsys, *sizes, "--dry-run", "--architecture", "sm80")
    assert len(told["would_measure"]) == 1


def test_import_says_what_it_set_aside(capsys, root, tmp_path):
    put(root, made())
    (folder_of(root) / "forward.json").write_text("{")
    file = file_of(tmp_path / "tuned.json", made(), made(BACKWARD))
    code, out, err = run(capsys, "import", str(file))
    (aside,) = folder_of(root).glob("forward.json.corrupt-*")
    assert (code, "Took 2 entries" in words(out)) == (DONE, True)
    assert err.count("\n") == 1
    assert f"a file that was of no use is now {aside}; `" in err
    (folder_of(root) / "forward.json").write_text("{")
    aside.unlink()
    _, told = run_json(capsys, "import", str(file))
    assert (told["new"], told["already_there"], len(told["set_aside"])) == (1, 1, 1)


def test_import_waits_for_a_lock_once(capsys, root, tmp_path, monkeypatch):
    """However many entries of the file there are."""
    file = file_of(tmp_path / "tuned.json", *(made(replace(FORWARD, hidden=size)) for size in (64, 128, 512)))
    waited = []

    def busy(self, kernel, how):
        waited.append(kernel)
        raise Busy(errno.EAGAIN, "held by another process for 30 s", "forward.json.lock")

    monkeypatch.setattr(Store, "_write", busy)
    code, told = run_json(capsys, "import", str(file))
    assert (code, told["not_kept"], list(told["failed"].values())) == (FAILED, 3, ["held by another process for 30 s"])
    assert len(waited) == 2
    _, _, err = run(capsys, "import", str(file))
    assert err.endswith("could not be written (held by another process for 30 s): 3 entries are not kept\n")


def test_export_says_what_it_could_not_read_also_where_nothing_is_left(capsys, root, tmp_path):
    put(root, made())
    path = folder_of(root) / "forward.json"
    path.write_text("{")
    code, _, err = run(capsys, "export")
    first, last = err.splitlines()
    assert (code, f"not exported: {path}: it is not JSON" in first, "nothing to export" in last) == (FAILED, True, True)
    put(root, made(BACKWARD))
    put(root, made(device=A100), device=A100)
    path.write_text("{")  # it was set aside
    for asked in (["--kernel", "backward", "--architecture", "sm90"], ["--architecture", "SM80"]):
        code, _, err = run(capsys, "export", *asked)
        assert (code, err) == (DONE, "")  # what is asked for is whole
    assert run(capsys, "export", "--architecture", "sm90")[0] == FAILED


def test_folders_that_are_no_device_s_are_left_alone(capsys, root):
    """No call looks into them, so nothing is said of them, and nothing of them removed."""
    put(root, made())
    path = folder_of(root).parent / "notes" / "forward.json"
    path.parent.mkdir()
    path.write_text("mine")
    for command in ("show", "verify", "doctor"):
        code, out, _ = run(capsys, command)
        assert (code, "notes" in out) == (DONE, False)
    for what in ("--unused", "--all"):
        assert run(capsys, "clear", what)[0] == DONE
    assert path.read_text() == "mine"


def test_doctor_says_what_the_next_use_does(capsys, root, monkeypatch):
    """It sets aside what it can read and cannot use, where it may."""
    put(root, made())
    path, next_use = folder_of(root) / "forward.json", "the next use sets it aside"
    path.write_text("{")
    assert next_use in words(run(capsys, "doctor")[1])
    real = doctor.os.access
    monkeypatch.setattr(doctor.os, "access", lambda file, mode: file != path.parent and real(file, mode))
    out = words(run(capsys, "doctor")[1])
    assert next_use not in out
    assert "clear --unused` removes what cannot be used, by who may write there" in out
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_BNLSTM_CACHE_DIR", str(root))
    path.unlink()
    path.mkdir()
    code, out, _ = run(capsys, "doctor")
    told = words(out)
    assert (code, "cannot be read (" in told, next_use in told, "clear --unused" in told) == (
        FAILED,
        True,
        False,
        False,
    )


def test_paths_are_told_in_full(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITON_BNLSTM_CACHE_DIR", "relative")
    put(Path("relative"), made())
    path = folder_of(tmp_path / "relative") / "inference.json"
    path.write_text("{")
    _, told = run_json(capsys, "verify")
    assert (told["cache"], told["unreadable"][0]["file"]) == (str(tmp_path / "relative"), str(path))
    assert f"cannot be used: {path}: " in words(run(capsys, "show")[1])
    _, told = run_json(capsys, "clear", "--unused")
    assert told["files"] == [str(path)]


def test_clear_leaves_a_folder_with_files_in_the_place_of_one(capsys, root):
    put(root, made(), made(BACKWARD))
    path = folder_of(root) / "forward.json"
    path.unlink()
    (path / "inside").mkdir(parents=True)
    code, _, err = run(capsys, "clear", "--all")
    assert (code, err.count("\n")) == (FAILED, 1)
    assert f"{path} could not be changed (it is a folder with files in it: remove it yourself)" in err
    (path / "inside").rmdir()
    assert run(capsys, "clear", "--all")[0] == DONE
    assert not path.exists()


# What there is, and what it gains


def test_verify_says_that_it_looks_at_this_device_alone(capsys, root, h100):
    put(root, made())
    put(root, made(device=A100), device=A100)
    assert "Not checked: 1 entry of other devices than the one that is here." in words(run(capsys, "verify")[1])
    assert len(run_json(capsys, "verify")[1]["entries"]) == 1


def test_the_default_of_a_device_that_nobody_has_written_down(capsys, root, monkeypatch):
    """What it is today is known only where the device is: elsewhere nothing is compared with it."""
    put(root, made(device=UNKNOWN), device=UNKNOWN)
    (found,) = run_json(capsys, "show")[1]["entries"]
    assert (found["gain"], found["gain_when_measured"]) == (None, pytest.approx(4.1 / 3.2, rel=1e-3))
    assert "1.28 x" not in run(capsys, "show")[1]
    monkeypatch.setattr(machine, "find_all", lambda: [Here(tuning_command.CPU, UNKNOWN, "new")])
    (found,) = run_json(capsys, "show")[1]["entries"]
    assert found["gain"] == pytest.approx(4.1 / 3.2, rel=1e-3)


def test_clear_of_what_is_stale_says_what_it_goes_by(capsys, root, monkeypatch):
    put(root, made())
    here = ".".join(BY.triton.split(".")[:2])
    for more in ([], ["--dry-run"]):
        _, out, _ = run(capsys, "clear", "--stale", "--device", "all", *more)
        assert words(out).endswith(f"stale is what another Triton measured than that of this environment, {here}")
        assert "stale is" not in words(run(capsys, "clear", "--unused", *more)[1])
    monkeypatch.setattr(clearing, "triton_version", lambda: "none")
    assert words(run(capsys, "clear", "--stale", "--device", "all")[1]).endswith("and there is none")


def test_architectures_are_sorted_by_their_numbers():
    names = ["sm100", "sm90", "gfx942", "sm80", "sm120"]
    assert sorted(names, key=screens.in_order) == ["gfx942", "sm80", "sm90", "sm100", "sm120"]
    assert [screens.listed(names[:n]) for n in range(4)] == ["", "sm100", "sm100 and sm90", "sm100, sm90 and gfx942"]


# Why not, and what next


def test_doctor_says_why_nothing_can_be_tuned_and_what_next(capsys, root, h100, monkeypatch):
    monkeypatch.setattr(doctor, "why_unusable", lambda folder: "it cannot be written")
    monkeypatch.setattr(doctor, "_is_read_only", lambda folder: True)
    _, told = run_json(capsys, "doctor")
    assert (told["can_tune"], "name another folder in TRITON_BNLSTM_CACHE_DIR" in told["why_not_tune"]) == (False, True)
    monkeypatch.setattr(machine, "why_not_measured", lambda device, dtype: "it is too old")
    assert run_json(capsys, "doctor")[1]["why_not_tune"] == "nothing can be measured: it is too old"
    monkeypatch.setattr(machine, "find_all", list)
    monkeypatch.setattr(machine, "why_none", lambda: "this torch is built for CPUs only: install another")
    _, out, _ = run(capsys, "doctor")
    assert "not here: there is no GPU of use: this torch is built for CPUs only: install another." in words(out)
    assert "comes here by `export` there and `import` here" in words(out)


def test_only_tune_speaks_of_plans(capsys):
    hint = "`tune --dry-run --architecture sm90` plans for a device that is not here"
    assert hint in run(capsys, *SIZES, "--dry-run")[2]
    assert hint not in run(capsys, "show", "--device", "this")[2]


def test_errors_in_json_are_as_they_are_told(capsys):
    code, out, err = run(capsys, "show", "--kernel", "none", "--json")
    told = json.loads(out)
    assert (code, told["exit_code"]) == (USAGE, USAGE)
    assert told["error"].startswith("argument --kernel: 'none' is none of")
    assert f"error: {told['error']}" in err


def test_errors_of_the_system_have_no_numbers(capsys, monkeypatch):
    def broken(_):
        raise PermissionError(errno.EACCES, "Permission denied", "/some/file")

    monkeypatch.setattr(commands, "show", broken)
    code, _, err = run(capsys, "show")
    assert (code, err) == (FAILED, f"{screens.program()}: /some/file: Permission denied\n")
    monkeypatch.setattr(doctor, "locked", lambda path, seconds: broken(None))
    assert (doctor._why_no_locks(Path("/some/file")) or "").endswith("cannot be locked (Permission denied)")


@pytest.mark.parametrize("kind", [torch.nn.GRU, torch.nn.RNN])
def test_not_every_recurrent_layer_is_an_lstm(capsys, tmp_path, kind):
    torch.save(kind(3, 4).state_dict(), tmp_path / "weights.pt")
    code, _, err = run(capsys, "tune", "--from-model", str(tmp_path / "weights.pt"), "--batch", "20")
    assert (code, "recurrent layer that is no LSTM" in err, "from_lstm" in err) == (USAGE, True, False)
