"""The command line of tuning: what it shows and measures, and how it ends; times are made up."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from bench.aot.targets import TARGETS
from tests.support import tuning_command
from tests.support.tuning_command import (
    A100,
    BACKWARD,
    BY,
    CPU,
    H100,
    MOMENTS,
    SIZES,
    TUNE,
    FakeBench,
    folder_of,
    made,
    put,
    run,
    run_json,
    ship,
    words,
)
from triton_bnlstm.tuning import choice, commands, contents, machine, models
from triton_bnlstm.tuning.device import Identity
from triton_bnlstm.tuning.entry import MODELLED
from triton_bnlstm.tuning.machine import Here
from triton_bnlstm.tuning.models import Layer, Wanted
from triton_bnlstm.tuning.screens import DONE, FAILED, INTERRUPTED, NO_DEVICE, USAGE
from triton_bnlstm.tuning.store import Store
from triton_bnlstm.tuning.tuner import TuningError
from triton_bnlstm.tuning.work import Work

root = pytest.fixture(autouse=True)(tuning_command.cache_without_device)
h100 = pytest.fixture(tuning_command.device_that_is_not_there)


# The command line itself


def test_help_of_the_module_tells_the_exit_codes():
    ran = subprocess.run(
        [sys.executable, "-m", "triton_bnlstm.tuning", "--help"], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0
    assert "exit codes:" in ran.stdout
    assert all(name in ran.stdout for name in ("show", "tune", "verify", "export", "clear", "doctor"))


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["unknown"],
        ["clear"],
        ["clear", "--all", "--stale"],
        ["show", "--kernel", "none"],
        ["tune", "--hidden", "64"],
        [*TUNE, "--seconds", "0"],
        [*TUNE, "--seconds", "nan"],
        [*TUNE, "--directions", "3"],
        [*TUNE, "--kernels", "forward,sideways"],
        ["tune", "--hidden", "64,x", "--batch", "32", "--dtype", "bf16"],
        ["tune", "--hidden", "0", "--batch", "32", "--dtype", "bf16"],
        ["tune", "--hidden", "64", "--batch", "32", "--dtype", "fp64"],
        ["tune", "--hidden", "64", "--batch", "32"],
        ["tune", "--batch", "32", "--dtype", "bf16"],
    ],
)
def test_a_wrong_command_line(capsys, arguments):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (USAGE, "")
    assert err


@pytest.mark.parametrize("name", ["show", "tune", "verify", "export", "clear", "doctor"])
def test_each_command_has_help(capsys, name):
    code, out, _ = run(capsys, name, "--help")
    assert code == DONE
    assert name in out


def test_a_closed_pipe_ends_quietly(capsys, monkeypatch):
    def broken(_: Any) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(commands, "show", broken)
    assert run(capsys, "show") == (DONE, "", "")


# show


def test_show_says_where_an_empty_cache_is(capsys, root):
    code, out, _ = run(capsys, "show")
    assert code == DONE
    assert str(root) in out
    assert "tune --hidden" in out
    assert not root.exists()


def test_show_lists_what_is_known(capsys, root):
    put(root, made(), made(BACKWARD), made(MOMENTS))
    put(root, made(device=A100), device=A100)
    code, out, err = run(capsys, "show")
    assert (code, err) == (DONE, "")
    assert "sm90, 132 multiprocessors, 227 KB (NVIDIA H100 80GB HBM3)" in out
    assert "sm80" in out
    assert "1.28 x" in out
    assert "cell_norm" in out
    assert "D512" in out
    assert "your cache: measured on NVIDIA H100 80GB HBM3, 2025-06-15, torch 2.9.0" in out
    assert "failed" not in out
    assert max(len(line) for line in out.splitlines()) <= 120
    _, out, _ = run(capsys, "show", "--candidates", "--kernel", "forward")
    assert "300000 bytes of shared memory, 232448" in words(out)
    assert "default: " in out
    assert "moments  " not in out


def test_show_marks_what_is_stale_of_other_code_or_broken(capsys, root):
    put(root, made(by=BY._replace(triton="2.0.0")), made(BACKWARD, source="0" * 12))
    path = folder_of(root) / "moments.json"
    put(root, made(MOMENTS))
    path.write_text(path.read_text().replace('"us": 3.2', '"us": -1'))
    (folder_of(root) / "forward.json.corrupt-20250101-000000-1").write_text("{")
    (folder_of(root) / "inference.json").write_text("{")
    code, screen, _ = run(capsys, "show")
    out = words(screen)
    assert code == FAILED  # a file cannot be used, and is told first, with what gets rid of it
    assert out.startswith("cannot be used: ")
    assert "inference.json: it is not JSON" in out.partition("sm90,")[0]
    assert "clear --unused` removes" in out.partition("sm90,")[0]
    assert "! stale: Triton 2.0 then" in out
    assert "! not used: measured for another version of the kernel's code" in out
    assert "! not used: us: -1 is no time" in out
    assert "set aside as unreadable: v1/cuda-sm90-132x227KB/forward.json.corrupt" in out
    assert (folder_of(root) / "inference.json").exists()  # looking changes nothing
    _, told = run_json(capsys, "show")
    assert [each["problem"] is None for each in told["entries"]] == [True, True, False]
    assert [each.get("stale") for each in told["entries"]] == [True, False, None]
    assert len(told["set_aside"]) == len(told["unreadable"]) == 1


def test_show_knows_what_is_shipped(capsys, root, monkeypatch, h100):
    put(root, made())
    ship(monkeypatch, made(), made(BACKWARD, how=MODELLED))
    _, told = run_json(capsys, "show", "--device", "this")
    assert [each["origin"] for each in told["entries"]] == ["cache"]  # one's own, and what else there is in a line
    told = "2 layouts are shipped for this device (1 modelled, not measured): `show --shipped` lists them"
    assert told in words(run(capsys, "show")[1])
    _, told = run_json(capsys, "show", "--device", "this", "--shipped", "--candidates")
    assert [(each["origin"], each["shadowed"]) for each in told["entries"]] == [
        ("cache", False),
        ("shipped", True),
        ("shipped", False),
    ]
    assert told["entries"][0]["entry"]["candidates"]
    _, out, _ = run(capsys, "show", "--device", "this", "--shipped")
    assert "not measured" in out
    assert out.count("modelled") == 1
    assert "shipped, modelled, not measured" in out
    assert "shipped, modelled" not in run(capsys, "show", "--shipped", "--architecture", "sm80,gfx942")[1]
    assert "! not used: your cache has its own" in out


def test_show_of_this_device_needs_one(capsys, root, monkeypatch):
    put(root, made(device=A100), device=A100)
    ship(monkeypatch, made())
    code, out, err = run(capsys, "show", "--device", "this")
    assert (code, out) == (NO_DEVICE, "")
    assert err.count("\n") == 1
    _, told = run_json(capsys, "show")
    assert [each["origin"] for each in told["entries"]] == ["cache"]
    _, told = run_json(capsys, "show", "--shipped")
    assert [each["origin"] for each in told["entries"]] == ["cache", "shipped"]


def test_a_table_on_a_terminal(capsys, root, monkeypatch):
    text = pytest.importorskip("rich.text")
    put(root, made(), made(BACKWARD))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for columns in ("80", "120"):
        monkeypatch.setenv("COLUMNS", columns)
        _, out, _ = run(capsys, "show")
        assert "kernel and sizes" in out
        assert "1.28 x" in out
        lines = text.Text.from_ansi(out).plain.splitlines()
        assert max(len(line) for line in lines if "Cache: " not in line) <= int(columns)


# tune


def test_tune_measures_keeps_and_tells(capsys, root, h100):
    code, out, err = run(capsys, *TUNE, "--seconds", "20")
    assert code == DONE
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == ["forward", "backward", "inference", *3 * ["moments"]]
    assert all("µs" in line and "tried" in line for line in lines)
    assert err.startswith("6 kernels, at most 2 min\n1/6 forward bf16 H64 B32 x1: at most 20 s\n")
    assert len(err.splitlines()) == 7
    work = Work("forward", 64, 32, 1, torch.bfloat16)
    entry = Store(Identity.of(H100), root).get(work.key)
    assert entry is not None
    assert choice.choose(H100, work).layout == entry.layout
    forward = [*SIZES, "--lengths", "equal", "--kernels", "forward"]
    code, told = run_json(capsys, *forward)
    assert code == DONE
    assert [each["anew"] for each in told["tuned"]] == [False]
    code, told = run_json(capsys, *forward, "--force")
    assert [each["anew"] for each in told["tuned"]] == [True]
    code, told = run_json(capsys, *forward, "--kernel", "backward")
    assert [each["key"].split()[0] for each in told["tuned"]] == ["forward", "backward"]


def test_one_failure_does_not_stop_the_others(capsys, root, h100):
    def make(work: Work, device: torch.device) -> FakeBench:
        if work.kernel == "backward":
            raise TuningError(f"{work.key}: there is too little\nmemory")
        return FakeBench(work)

    h100(make)
    code, told = run_json(capsys, *TUNE)
    assert code == FAILED
    assert len(told["tuned"]) == 5
    assert [each["why"] for each in told["failed"]] == ["there is too little memory"]


def test_what_is_tuned_before_an_interruption_is_kept(capsys, root, h100):
    def make(work: Work, device: torch.device) -> FakeBench:
        if work.kernel == "inference":
            raise KeyboardInterrupt
        return FakeBench(work)

    h100(make)
    code, out, err = run(capsys, *TUNE)
    assert code == INTERRUPTED
    assert len(out.splitlines()) == 2
    assert "2 of 6 are tuned, and kept" in err
    code, told = run_json(capsys, *TUNE)
    assert (code, told["interrupted"]) == (INTERRUPTED, True)
    assert len(contents.of_cache(root).found) == 2


def test_nothing_is_tuned_without_a_device(capsys, root):
    code, out, err = run(capsys, *TUNE)
    assert (code, out, err.count("\n")) == (NO_DEVICE, "", 1)


def test_nothing_is_tuned_in_the_interpreter(capsys, monkeypatch):
    monkeypatch.setattr(machine, "find", lambda name=None: Here(CPU, H100, "H100"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code, _, err = run(capsys, *TUNE)
    assert code == NO_DEVICE
    assert "TRITON_INTERPRET=1" in err
    monkeypatch.delenv("TRITON_INTERPRET")
    code, _, err = run(capsys, *TUNE)
    assert code == NO_DEVICE


def test_tf32_needs_a_device_that_has_it(capsys, monkeypatch, h100):
    monkeypatch.setattr(machine, "find", lambda name=None: Here(CPU, TARGETS["sm75"].device, "T4"))
    code, _, err = run(capsys, "tune", "--hidden", "64", "--batch", "32", "--dtype", "tf32")
    assert code == USAGE
    assert "no TF32" in err


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_told_before_measuring(capsys, root, h100):
    root.mkdir()
    root.chmod(0o500)
    code, _, err = run(capsys, *TUNE)
    assert code == FAILED
    assert "cannot be written" in err


def test_a_cache_that_is_a_file_is_told_before_measuring(capsys, root, h100):
    root.write_text("no folder")
    code, out, err = run(capsys, *TUNE)
    assert (code, out) == (FAILED, "")
    assert "results could not be kept" in err


def test_a_layout_that_could_not_be_kept_is_a_failure(capsys, root, h100, monkeypatch):
    monkeypatch.setattr(Store, "put", lambda self, entry: False)
    code, told = run_json(capsys, *TUNE, "--kernels", "forward")
    assert code == FAILED
    assert "could not be kept" in told["failed"][0]["why"]


def test_works_are_those_of_a_call():
    layer = Layer(100, 24, 2, "tf32", True)
    every = models.USUAL_KERNELS
    works = list(models.works_of(layer, Wanted(48, "device", every)))
    assert [(work.kernel, work.flags) for work in works] == [
        ("forward", ("cell_norm", "seats")),
        ("backward", ("cell_norm", "fill")),
        ("inference", ("cell_norm",)),
        ("moments", ("centre",)),
        ("moments", ()),
        ("moments", ("before", "centre")),
        ("save", ("cell_norm", "fill", "seats")),
    ]
    assert [work.columns for work in works] == [0, 0, 0, 24, 400, 100, 0]
    assert [work.precision for work in works] == ["tf32"] * 3 + ["ieee"] * 3 + ["tf32"]
    narrow = list(models.works_of(Layer(100, 1, 1, "fp32", False), Wanted(48, "unequal", every)))
    assert [work.flags for work in narrow] == [
        ("narrow", "seats"),
        ("narrow",),
        ("narrow",),
        ("before", "centre"),
        ("narrow", "seats"),
    ]


def test_of_one_bucket_the_largest_is_measured():
    works = [Work("forward", 64, batch, 1, torch.bfloat16) for batch in (48, 64, 33, 96)]
    assert [work.batch for work in models.without_doubles(works)] == [64, 96]


def test_what_would_be_measured(capsys, root, h100):
    code, out, err = run(capsys, *SIZES, "--dry-run")
    assert (code, err) == (DONE, "")
    lines = out.splitlines()
    assert lines[-1] == "9 kernels, at most 9 min"
    assert len([line for line in lines if line.endswith("seats")]) == 2
    assert not root.exists()
    run(capsys, *SIZES, "--kernels", "forward")
    _, out, err = run(capsys, *SIZES, "--kernels", "forward,backward")
    plan, line = err.splitlines()
    assert plan == "1 kernel, at most 60 s; for 2 more there is nothing new to try"
    assert line == "2/3 backward bf16 H64 B32 x1: at most 60 s"
    assert out.count("nothing new to try") == 2


def test_names_of_dtypes_and_the_hint_for_float32(capsys, h100):
    asked = ["tune", "--hidden", "64", "--batch", "32", "--dry-run", "--dtype"]
    _, out, err = run(capsys, *asked, "float32")
    assert "forward fp32" in out
    assert "tf32" in err
    _, out, err = run(capsys, *asked, "tf32,bfloat16")
    assert ("forward tf32" in out, "forward bf16" in out, err) == (True, True, "")


def test_wrong_seconds_are_told_first(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_BNLSTM_AUTOTUNE_SECONDS", "soon")
    code, out, err = run(capsys, *TUNE)
    assert (code, out, err.count("\n")) == (USAGE, "", 1)
    assert "TRITON_BNLSTM_AUTOTUNE_SECONDS" in err


@pytest.mark.parametrize("command", ["show", "verify", "doctor", "export"])
def test_a_cache_that_is_a_file(capsys, root, command):
    root.write_text("no folder")
    code, out, err = run(capsys, command)
    assert code == FAILED
    assert f"{root} is not a folder" in words(out + err)


def test_the_program_is_called_as_it_was_started(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/triton-bnlstm-tuning"])
    assert run(capsys, "--help")[1].startswith("usage: triton-bnlstm-tuning ")
    monkeypatch.setattr(sys, "argv", ["/lib/triton_bnlstm/tuning/__main__.py"])
    assert run(capsys, "--help")[1].startswith("usage: python -m triton_bnlstm.tuning ")


def test_the_legend(capsys, root):
    put(
        root, made(), made(BACKWARD), made(MOMENTS), made(Work("forward", 64, 32, 1, torch.float16, "ieee", ("seats",)))
    )
    _, out, _ = run(capsys, "show")
    out = " ".join(out.split())  # lines are as wide as the terminal
    assert "seats: unequal lengths; centre: of the input x" in out
    assert "narrow:" not in out
    assert "H512 is used for 449 to 512, B64 for 33 to 64" in out
    assert "how many times as fast as the default" in out
