"""What scripts and administrators rely on: exit codes, JSON of what fails, caches that are not as they should be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
    ship,
    words,
)
from triton_bnlstm.tuning import clearing, contents, machine, shipped, space
from triton_bnlstm.tuning.device import Identity
from triton_bnlstm.tuning.entry import MODELLED
from triton_bnlstm.tuning.screens import DONE, FAILED, NO_DEVICE, USAGE, Failure
from triton_bnlstm.tuning.store import Store

FIND = machine.find
root = pytest.fixture(autouse=True)(tuning_command.cache_without_device)
h100 = pytest.fixture(tuning_command.device_that_is_not_there)


# Failures in JSON


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (["tune"], USAGE, "tune needs --hidden, --batch and --dtype (or --from-model and --batch)"),
        (["tune", "--hidden", "4"], USAGE, "tune needs --batch and --dtype, too"),
        (["tune", "--from-model", "any"], USAGE, "tune needs --batch, too"),
        (["tune", "--batch", "2"], USAGE, "tune needs --hidden and --dtype (or --from-model and --batch)"),
        (["tune", "--batch", "2", "--hidden", "4"], USAGE, "tune needs --dtype, too"),
        (["tune", "--batch", "2", "--dtype", "bf16"], USAGE, "tune needs --hidden (or --from-model and --batch)"),
        (["tune", "--hidden", "x", "--batch", "2"], USAGE, "must be a number"),
        (["nonsense"], USAGE, "invalid choice"),
        (["clear"], USAGE, "clear needs --all, --unused, --stale or --kernel"),
        (["export"], USAGE, "export --json needs --out"),
        ([*SIZES, "--architecture", "sm90"], USAGE, "--architecture is for --dry-run"),
        ([*SIZES, "--dry-run", "--architecture", "sm90", "--device", "cuda:0"], USAGE, "give one"),
        ([*SIZES, "--dry-run", "--architecture", "sm1"], USAGE, "'sm1' is none of gfx942, sm80"),
        (SIZES, NO_DEVICE, "torch sees no accelerator"),
        (["show", "--device", "this"], NO_DEVICE, "torch sees no accelerator"),
        (["import", "/nowhere"], USAGE, "cannot be read (No such file or directory)"),
    ],
)
def test_a_failure_is_a_document_too(capsys, arguments, code, error):
    found, out, err = run(capsys, *arguments, "--json")
    told = json.loads(out)
    assert (found, told["exit_code"]) == (code, code)
    assert error in told["error"]
    assert error in err
    assert run(capsys, *arguments)[0] == code or arguments == ["export"]


@pytest.mark.parametrize(
    "command", ["show", "verify", "export --out {}/file", "clear --all", "import {}/file", "doctor"]
)
def test_without_a_folder_every_command_says_why(capsys, monkeypatch, tmp_path, command):
    (tmp_path / "file").write_text(shipped.text_of({Identity.of(H100): {str(made().key): made().as_json()}}))
    monkeypatch.setenv("TRITON_BNLSTM_CACHE_DIR", "~nobody-of-that-name/cache")
    arguments = command.format(tmp_path).split()
    code, out, err = run(capsys, *arguments)
    assert (code, "TRITON_BNLSTM_CACHE_DIR=~nobody-of-that-name/cache names" in words(out + err)) == (FAILED, True)
    code, told = run_json(capsys, *arguments)
    assert (code, "names a home folder" in json.dumps(told)) == (FAILED, True)


@pytest.mark.parametrize("name", ["full", "closed"])
def test_a_failure_where_nothing_can_be_written(name):
    """No traceback, and the failure's own code."""
    code = "import sys\nif 'closed' in sys.argv: sys.stdout = None\nfrom triton_bnlstm.tuning import commands\n"
    code += "sys.exit(commands.main(['clear', '--json']))"
    with open("/dev/full" if name == "full" else os.devnull, "w") as out:
        command = [sys.executable, "-c", code, name]
        ran = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (ran.returncode, "Traceback" in ran.stderr) == (USAGE, False)


def test_options_are_written_in_full(capsys):
    """Else a script could ask for JSON, and a failure would not know."""
    assert run(capsys, "doctor", "--jso")[0] == USAGE


@pytest.mark.parametrize("name", ["gpu", "cuda:zz", "cpu"])
def test_a_device_that_is_none_is_a_wrong_command_line_anywhere(capsys, monkeypatch, name):
    monkeypatch.setattr(machine, "find", FIND)
    code, _, err = run(capsys, *SIZES, "--device", name)
    assert (code, "write cuda:0" in err) == (USAGE, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_why_there_is_no_device(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(Failure, match=r"is built for CPUs only: install a build for CUDA or ROCm; `.* doctor` tells"):
        FIND()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(Failure, match="CUDA_VISIBLE_DEVICES= hides all GPUs"):
        FIND()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(Failure, match=r"sees none: is there one, with a driver .* on the machine with the GPU"):
        FIND()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "-1")
    with pytest.raises(Failure, match="HIP_VISIBLE_DEVICES=-1 hides all GPUs"):
        FIND()


def test_a_plan_for_another_device(capsys, root):
    """With its numbers, as they are shipped, and what the cache knows of it."""
    code, out, _ = run(capsys, *SIZES, "--lengths", "equal", "--dry-run", "--architecture", "SM80")
    assert (code, out.splitlines()[-1]) == (DONE, "7 kernels, at most 7 min")
    assert not root.exists()
    _, told = run_json(capsys, *SIZES, "--kernel", "forward,backward", "--dry-run", "--architecture", "gfx942")
    assert [text.split()[0] for text in told["would_measure"]] == ["forward", "backward", "forward"]
    assert told["at_most_seconds"] == 180
    code, _, err = run(
        capsys, "tune", "--hidden", "64", "--batch", "8", "--dtype", "tf32", "--dry-run", "--architecture", "gfx942"
    )
    assert (code, "gfx942 has no TF32" in err) == (USAGE, True)


# Files that cannot be used, and caches that cannot be written


def broken(root: Path) -> Path:
    put(root, made(), made(BACKWARD))
    path = folder_of(root) / "forward.json"
    path.write_text("{")
    (folder_of(root) / "moments.json.corrupt-20250101-000000-1").write_text("{")
    return path


def test_clear_of_what_cannot_be_used(capsys, root):
    path = broken(root)
    for command in (["show"], ["verify"], ["doctor"]):
        code, out, _ = run(capsys, *command)
        assert (code, "clear --unused` removes what cannot be used" in words(out)) == (FAILED, True)
    code, told = run_json(capsys, "clear", "--unused", "--dry-run")
    assert (code, told["would_remove"], len(told["files"]), path.exists()) == (DONE, [], 2, True)
    code, out, err = run(capsys, "clear", "--unused")
    assert (code, err) == (DONE, "")
    assert "Removed the file v1/cuda-sm90-132x227KB/forward.json" in words(out)
    assert "Removed 0 entries and 2 other files" in words(out)
    assert sorted(each.name for each in path.parent.glob("*.json*") if each.suffix != ".lock") == ["backward.json"]
    assert run(capsys, "show")[0] == DONE


@pytest.mark.parametrize("arguments", [["--all"], ["--kernel", "forward"]])
def test_nothing_is_renamed_that_is_removed_anyway(capsys, root, arguments):
    path = broken(root)
    code, _, err = run(capsys, "clear", *arguments)
    assert (code, err, path.exists()) == (DONE, "", False)
    assert not list(path.parent.glob("forward.json.corrupt*"))


def test_clear_looks_at_what_others_have_written_meanwhile(capsys, root, monkeypatch):
    """A fresh entry in the place of one that was of no use stays."""
    put(root, made(source="0" * 12), made(BACKWARD))
    real = clearing._carry_out

    def carry_out(plan, cache, arguments):
        put(root, made())
        return real(plan, cache, arguments)

    monkeypatch.setattr(clearing, "_carry_out", carry_out)
    code, told = run_json(capsys, "clear", "--unused")
    assert (code, told["removed"]) == (DONE, 1)
    assert Store(Identity.of(H100), root).get(FORWARD.key) == made()


def test_clear_leaves_what_has_been_mended_meanwhile(capsys, root, monkeypatch):
    path = broken(root)
    real = clearing._carry_out

    def carry_out(plan, cache, arguments):
        path.unlink()
        put(root, made())
        return real(plan, cache, arguments)

    monkeypatch.setattr(clearing, "_carry_out", carry_out)
    code, told = run_json(capsys, "clear", "--unused")
    assert (code, [Path(file).name for file in told["files"]]) == (DONE, ["moments.json.corrupt-20250101-000000-1"])
    assert Store(Identity.of(H100), root).get(FORWARD.key) == made()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read anything")
def test_what_may_be_all_right_is_not_of_no_use(capsys, root):
    """Another user's file, say, in a folder that is everybody's."""
    check_out_of_reach(capsys, root, lambda path: path.chmod(0))


def test_what_is_no_file_is_not_removed_as_of_no_use(capsys, root):
    def make(path):
        path.unlink()
        path.mkdir()

    check_out_of_reach(capsys, root, make)


def check_out_of_reach(capsys, root, make):
    put(root, made(), made(BACKWARD))
    path = folder_of(root) / "forward.json"
    make(path)
    code, out, _ = run(capsys, "show")
    assert (code, "cannot be used: " in words(out), "clear --unused" in words(out)) == (FAILED, True, False)
    for command in (["show"], ["verify"], ["doctor"], [*SIZES, "--dry-run", "--architecture", "sm90"]):
        _, out, err = run(capsys, *command)
        assert "); let it be read, or remove it yourself" in words(out + err)
    assert run(capsys, "clear", "--unused", "--dry-run")[0] == FAILED  # as without it
    code, _, err = run(capsys, "clear", "--unused")
    assert (code, "forward.json could not be changed (it cannot be read" in err, path.exists()) == (FAILED, True, True)
    assert run(capsys, "clear", "--all")[0] == DONE
    assert not path.exists()


def test_a_dry_run_of_clear(capsys, root):
    put(root, made(), made(BACKWARD))
    put(root, made(device=A100), device=A100)
    _, out, _ = run(capsys, "clear", "--kernel", "forward", "--dry-run")
    assert out.splitlines()[:2] == [
        "cuda-sm80-108x163KB forward bf16 H512 B64 x1",
        "cuda-sm90-132x227KB forward bf16 H512 B64 x1",
    ]
    assert f"Would remove 2 entries from {root}" in words(out)
    assert len(contents.of_cache(root).found) == 3


def test_a_cache_that_can_only_be_read(capsys, root, monkeypatch):
    put(root, made(source="0" * 12))
    monkeypatch.setattr(clearing.os, "access", lambda path, mode: False)
    code, out, err = run(capsys, "clear", "--all")
    assert (code, out, err.count("\n"), "the cache can only be read" in err) == (FAILED, "", 1, True)
    assert len(contents.of_cache(root).found) == 1
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_BNLSTM_CACHE_DIR", str(root))
    assert run(capsys, "clear", "--all")[0] == DONE
    put(root, made())
    monkeypatch.setattr(clearing.os, "access", lambda path, mode: False)
    assert run(capsys, "clear", "--unused")[0] == DONE  # nothing to do


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read anything")
def test_a_folder_that_nobody_may_read(capsys, root):
    put(root, made())
    (root / "v1").chmod(0)
    try:
        for command in ("show", "verify", "doctor"):
            code, out, err = run(capsys, command)
            assert (code, "cannot be read (Permission denied)" in words(out + err)) == (FAILED, True)
    finally:
        (root / "v1").chmod(0o700)


def test_a_folder_that_depends_on_where_one_is(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITON_BNLSTM_CACHE_DIR", "relative")
    code, told = run_json(capsys, "doctor")
    assert code == FAILED
    assert "TRITON_BNLSTM_CACHE_DIR=relative depends on the folder" in told["problems"][-1]
    assert told["cache"]["folder"] == str(tmp_path / "relative")
    assert f"Cache: {tmp_path / 'relative'}" in words(run(capsys, "show")[1])


def test_doctor_says_where_a_bad_folder_comes_from_and_whether_anything_can_be_tuned(capsys, root, h100):
    root.write_text("no folder")
    _, out, _ = run(capsys, "doctor")
    assert f"{root} (from TRITON_BNLSTM_CACHE_DIR)" in words(out)
    _, told = run_json(capsys, "doctor")  # `tune` would refuse, as nothing could be kept
    assert (told["can_tune"], "nothing could be kept" in told["why_not_tune"]) == (False, True)
    root.unlink()
    _, told = run_json(capsys, "doctor")
    assert (told["can_tune"], told["why_not_tune"]) == (True, None)
    assert "can be done here" in run(capsys, "doctor")[1]


# What is asked for and not there


def test_show_tells_what_there_is_beside_what_was_asked_for(capsys, root, monkeypatch):
    put(root, made())
    ship(monkeypatch, made(BACKWARD, how=MODELLED, device=A100), device=A100)
    for arguments, asked in (
        (["--architecture", "sm120"], "for sm120"),
        (["--kernel", "save,moments"], "of save and moments"),
        (["--kernel", "save", "--architecture", "SM90"], "of save for SM90"),
    ):
        code, out, _ = run(capsys, "show", *arguments)
        assert code == DONE
        there = "in your cache: forward for sm90; shipped: backward for sm80"
        assert f"There is no entry {asked}; {there}" in words(out)
        assert "To measure some" not in out
    assert "sm90, 132" in run(capsys, "show", "--architecture", "SM90")[1]
    code, _, err = run(capsys, "show", "--architecture", "sm90,sm9")
    assert (code, "nobody knows 'sm9'; known are " in err) == (USAGE, True)


def test_what_all_entries_have_in_common_is_said_once(capsys, root):
    put(root, *(made(work, by=BY._replace(triton="2.0.0")) for work in (FORWARD, BACKWARD, MOMENTS)))
    out = words(run(capsys, "show")[1])
    assert out.count("measured on NVIDIA H100") == out.count("stale: Triton 2.0 then") == 1
    assert "tune --hidden 512 --batch 64 --dtype bf16" in out
    put(root, made(Work64))
    out = words(run(capsys, "show")[1])
    assert out.count("measured on NVIDIA H100") == 4


Work64 = replace(FORWARD, hidden=64)


def test_the_gain_is_that_over_the_default_of_today(capsys, root):
    """Which may have been another layout when the entry was made."""
    default, *others = space.structures(H100, FORWARD)
    entry = made()
    put(root, replace(entry, default=others[3]))  # of then
    _, told = run_json(capsys, "show")
    (found,) = told["entries"]
    assert found["gain"] == pytest.approx(4.1 / 3.2, rel=1e-3)  # today's was tried, too
    assert found["gain_when_measured"] == pytest.approx(4.1 / 3.2, rel=1e-3)
    untried = tuple(each for each in entry.candidates if each.layout != default)
    put(root, replace(entry, at=1.76e9, default=others[3], candidates=untried, by=BY._replace(triton="2.0.0")))
    _, told = run_json(capsys, "show")
    assert told["entries"][0]["gain"] is None
    slower = replace(made(us=5.0), at=1.77e9, default=others[3], by=BY)
    put(root, slower)
    assert [each.is_slower for each in contents.of_cache(root).found] == [True]
    put(root, replace(made(layout=default), at=1.78e9, default=others[3]))
    assert run_json(capsys, "show")[1]["entries"][0]["gain"] == 1.0


# Help


@pytest.mark.parametrize("name", ["", "show", "tune", "verify", "export", "import", "clear", "doctor"])
@pytest.mark.parametrize("columns", [80, 120])
def test_help_has_an_example_and_the_exit_codes_and_fits(capsys, monkeypatch, name, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = run(capsys, *filter(None, [name]), "--help")
    assert code == DONE
    assert "exit codes:" in out
    assert "example" in out
    assert max(map(len, out.splitlines())) <= max(80, min(columns, 100))
