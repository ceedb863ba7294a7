"""Which layers a file of weights has, and that none of its code is run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import tuning_command
from tests.support.tuning_command import (
    run,
    run_json,
)
from triton_bnlstm import BNLSTM, BNLSTMCell
from triton_bnlstm.tuning import models
from triton_bnlstm.tuning.screens import DONE, USAGE

root = pytest.fixture(autouse=True)(tuning_command.cache_without_device)
h100 = pytest.fixture(tuning_command.device_that_is_not_there)


def _layers(path: Path) -> list[tuple[int, int, int, str, bool, bool]]:
    found = models.layers_of_file(path)
    return [(each.hidden, each.columns, each.directions, each.numbers, each.cell_norm, each.cell) for each in found]


def test_layers_of_a_file(tmp_path):
    path = tmp_path / "weights.pt"
    layer = BNLSTM(13, 24, 3, bidirectional=True, cell_norm=True, max_length=4, dtype=torch.bfloat16)
    torch.save(layer.state_dict(), path)
    assert _layers(path) == [(24, 13, 2, "bf16", True, False), (24, 48, 2, "bf16", True, False)]
    cell = BNLSTMCell(7, 5, max_length=3)
    model = torch.nn.ModuleDict({"a": torch.nn.LSTM(3, 4), "module": torch.nn.Sequential(cell)})
    nested = {
        "epoch": 3,
        "all": [{"state": model.state_dict(), "average": ({"x": BNLSTM(1, 8, max_length=2).state_dict()},)}],
    }
    torch.save(nested, path)
    assert sorted(_layers(path)) == [(5, 7, 1, "fp32", False, True), (8, 1, 1, "fp32", False, False)]
    parametrised = BNLSTM(13, 24, max_length=4)
    torch.nn.utils.parametrizations.weight_norm(parametrised, "weight_hh_l0")
    torch.save({"net": parametrised.state_dict()}, path)
    assert _layers(path) == [(24, 13, 1, "fp32", False, False)]


def test_tune_from_a_model(capsys, root, tmp_path, h100):
    path = tmp_path / "weights.pt"
    torch.save(BNLSTM(13, 24, bidirectional=True, max_length=4, dtype=torch.float64).state_dict(), path)
    asked = ["tune", "--from-model", str(path), "--batch", "20", "--kernels", "forward", "--lengths", "equal"]
    code, _, err = run(capsys, *asked)
    assert code == USAGE
    assert "no kernel computes in float64" in err
    code, told = run_json(capsys, *asked, "--dtype", "fp16")
    assert code == DONE
    assert [each["key"].partition(" @")[0] for each in told["tuned"]] == ["forward float16 H24 B32 x2"]
    code, _, err = run(capsys, *asked, "--hidden", "4")
    assert code == USAGE
    torch.save(BNLSTMCell(13, 24, max_length=4).state_dict(), path)
    code, _, err = run(capsys, *asked)
    assert code == DONE
    assert "single steps" in err


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_no_code_of_a_file_is_run(capsys, root, tmp_path, h100):
    sign, path = tmp_path / "executed", tmp_path / "weights.pt"
    for save in (torch.save, lambda held, path: path.write_bytes(pickle.dumps(held))):
        save({"gamma_hh_l0": Hostile(sign)}, path)
        code, out, err = run(capsys, "tune", "--from-model", str(path), "--batch", "20")
        assert (code, out, err.count("\n")) == (USAGE, "", 1)
        assert "state_dict" in err
        assert not sign.exists()
    torch.save(BNLSTM(3, 4, max_length=2), path)
    code, _, err = run(capsys, "tune", "--from-model", str(path), "--batch", "20")
    assert code == USAGE
    assert "would run code" in err
    pickle.loads(pickle.dumps(Hostile(sign)))
    assert sign.exists()  # it would have


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no torch file",
        b"PK\x03\x04 not whole",
        {},
        [1, 2],
        {"bias_hh_l0": torch.zeros(16)},
        {"gamma_hh_l0": torch.zeros(16)},
        {"gamma_hh_l0": 3, "weight_hh_l0": torch.zeros(16, 4), "weight_ih_l0": torch.zeros(16, 4)},
        {"gamma_hh_l0": torch.zeros(16), "weight_hh_l0": torch.zeros(16, 5), "weight_ih_l0": torch.zeros(16, 4)},
        {"gamma_hh_l0": torch.zeros(16), "weight_hh_l0": torch.zeros(16), "weight_ih_l0": torch.zeros(16, 4)},
    ],
)
def test_files_without_layers(capsys, tmp_path, h100, content):
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    code, out, err = run(capsys, "tune", "--from-model", str(path), "--batch", "20")
    assert (code, out, err.count("\n")) == (USAGE, "", 1)
    assert "torch.save(model.state_dict(), FILE)" in err
    assert ("no file that torch.save has written" in err) == isinstance(content, bytes)


@pytest.mark.parametrize("content", [b"# README\n" * 200, bytes(range(256)) * 8, pickle.dumps({"a": 1})])
def test_what_torch_has_not_written_is_not_said_to_hold_code(capsys, tmp_path, content):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    code, _, err = run(capsys, "tune", "--from-model", str(path), "--batch", "20")
    assert (code, "no file that torch.save has written" in err, "run code" in err) == (USAGE, True, False)


@pytest.mark.parametrize("archive", [True, False])
def test_files_of_old_and_new_torch_that_hold_code(capsys, tmp_path, archive):
    path = tmp_path / "weights.pt"
    torch.save(BNLSTM(3, 4, max_length=2), path, _use_new_zipfile_serialization=archive)
    code, _, err = run(capsys, "tune", "--from-model", str(path), "--batch", "20")
    assert (code, "would run code" in err) == (USAGE, True)


def test_an_lstm_is_told_how_to_become_a_layer(capsys, tmp_path):
    torch.save(torch.nn.LSTM(3, 4).state_dict(), tmp_path / "lstm.pt")
    code, _, err = run(capsys, "tune", "--from-model", str(tmp_path / "lstm.pt"), "--batch", "20")
    assert (code, "BNLSTM.from_lstm" in err) == (USAGE, True)


def test_files_that_are_not_there(capsys, tmp_path, h100):
    for path in (tmp_path / "none.pt", tmp_path):
        code, _, err = run(capsys, "tune", "--from-model", str(path), "--batch", "20")
        assert (code, err.count("\n")) == (USAGE, 1)
        assert "cannot be read" in err
