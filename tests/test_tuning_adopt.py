"""What a campaign has measured becomes part of the package."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bench import adopt
from bench.aot.targets import TARGETS
from bench.defaults import faults
from tests.support.tuning import BY, H100, WORK, entry
from triton_bnlstm.tuning import shipped
from triton_bnlstm.tuning.device import Identity
from triton_bnlstm.tuning.work import layout_as_json

IDENTITY = Identity.of(H100)
PCIE = IDENTITY._replace(multiprocessors=114)


@pytest.fixture
def folder(tmp_path):
    """A copy of what is shipped."""
    place = tmp_path / "defaults"
    place.mkdir()
    text = (adopt.FOLDER / "sm90.json").read_text()
    (place / "sm90.json").write_text(text)
    return place


def record(path, *entries, device=IDENTITY, **fields):
    layouts = [{"case": "a", "device": device._asdict(), "entry": each} for each in entries]
    path.write_text(json.dumps({"schema": 1, "layouts": layouts, **fields}))
    return path


def test_a_campaigns_entries_take_the_place_of_modelled_ones(tmp_path, folder):
    before = shipped.parse((folder / "sm90.json").read_text())[IDENTITY]
    work = replace(WORK, batch=32)  # that is modelled so far
    found = entry(work, by=BY._replace(name="NVIDIA H100"))
    path = record(tmp_path / "campaign.json", found.as_json(), entry(work, at=1.0, faster=1.1).as_json())
    assert adopt.adopt([path], folder) == (1, [])
    after = shipped.parse((folder / "sm90.json").read_text())[IDENTITY]
    assert set(after) == set(before)
    assert before[str(work.key)]["how"] == "modelled"
    assert after[str(work.key)] == json.loads(json.dumps(found.as_json()))
    assert {k: v for k, v in after.items() if k != str(work.key)} == {
        k: v for k, v in before.items() if k != str(work.key)
    }
    assert faults(TARGETS["sm90"], folder) == []
    assert adopt.adopt([path], folder) == (0, [])


def test_another_board_gets_a_part_of_its_own(tmp_path, folder):
    path = record(tmp_path / "campaign.json", entry(by=BY._replace(name="NVIDIA H100 PCIe")).as_json(), device=PCIE)
    assert adopt.adopt([path], folder)[0] == 1
    held = shipped.parse((folder / "sm90.json").read_text())
    assert set(held) == {IDENTITY, PCIE}
    assert len(held[PCIE]) == 1
    assert faults(TARGETS["sm90"], folder) == []


def test_an_exported_file(tmp_path, folder):
    path = tmp_path / "export.json"
    path.write_text(shipped.text_of({IDENTITY: {str(WORK.key): entry().as_json()}}))
    assert adopt.adopt([path], folder)[0] == 1


def test_what_is_left_out(tmp_path, folder):
    old = replace(entry(), key=WORK.key._replace(source="0" * 12)).as_json()
    unknown = entry(by=BY._replace(name="none")).as_json()
    modelled = {**entry().as_json(), "how": "modelled"}
    broken = {**entry().as_json(), "layout": None}
    path = record(tmp_path / "campaign.json", old, unknown, modelled, broken)
    changed, left = adopt.adopt([path], folder)
    assert changed == 0
    assert [line.rpartition(": ")[2] for line in left[:2]] == [
        "its kernel's code is another one by now",
        "it is measured, and does not say on what",
    ]
    assert len(left) == 3
    cpu = record(tmp_path / "cpu.json", entry().as_json(), device=IDENTITY._replace(backend="cpu"))
    assert "it is a CPU's" in adopt.adopt([cpu], folder)[1][0]


def test_only_two_candidates_are_shipped(tmp_path, folder):
    full = entry().as_json()
    more = {"layout": {**layout_as_json(entry().layout), "warps": 16}, "us": 9.0, "default_us": 5.0, "rounds": 3}
    path = record(tmp_path / "campaign.json", {**full, "candidates": [*full["candidates"], more]})
    adopt.adopt([path], folder)
    held = shipped.parse((folder / "sm90.json").read_text())[IDENTITY][str(WORK.key)]
    assert held["candidates"] == full["candidates"]


def test_the_command(tmp_path, folder, monkeypatch, capsys):
    monkeypatch.setattr(adopt, "adopt", lambda paths: _adopt(paths, folder))
    path = record(tmp_path / "campaign.json", entry().as_json())
    assert adopt.main([str(path)]) == 0
    assert "1 entries are new or changed" in capsys.readouterr().out
    assert adopt.main([str(path)]) == 1
    dry = record(tmp_path / "dry.json", entry().as_json(), dry_run=True)
    assert adopt.main([str(dry)]) == 2
    assert "dry run" in capsys.readouterr().err
    (tmp_path / "other.json").write_text("[]")
    assert adopt.main([str(tmp_path / "other.json")]) == 2
    assert adopt.main([str(tmp_path / "nothing.json")]) == 2


_adopt = adopt.adopt
