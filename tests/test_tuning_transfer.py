"""The commands `export` and `import`: where they write, what they leave out, and entries that cannot be of any use."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest

from tests.support import tuning_command
from tests.support.tuning_command import BACKWARD, FORWARD, H100, folder_of, made, put, run, run_json, words
from triton_bnlstm.tuning import contents, machine, shipped
from triton_bnlstm.tuning.device import Identity
from triton_bnlstm.tuning.screens import DONE, FAILED, USAGE

root = pytest.fixture(autouse=True)(tuning_command.cache_without_device)


def exported(capsys, tmp_path, *entries):
    folder = tmp_path / "from"
    put(folder, *entries)
    found = contents.of_cache(folder).found
    told = {each.text: each.raw for each in found}
    file = tmp_path / "tuned.json"
    file.write_text(shipped.text_of({Identity.of(H100): told}))
    return file


def test_import_fails_where_something_could_not_be_kept(capsys, root, tmp_path):
    file = exported(capsys, tmp_path, made(), made(BACKWARD))
    (folder_of(root) / "forward.json").mkdir(parents=True)
    code, out, err = run(capsys, "import", str(file))
    assert (code, "Took 1 entry for 1 device" in words(out)) == (FAILED, True)
    (line,) = err.splitlines()
    assert line.endswith("1 entry is not kept")
    assert "forward.json could not be written" in line
    code, told = run_json(capsys, "import", str(file))
    assert (code, told["new"], told["already_there"], len(told["failed"])) == (FAILED, 0, 1, 1)


def test_import_says_what_was_there_already(capsys, root, tmp_path):
    file = exported(capsys, tmp_path, made(), made(BACKWARD))
    assert run_json(capsys, "import", str(file))[1]["new"] == 2
    code, out, _ = run(capsys, "import", str(file))
    assert (code, "Took 0 entries for 1 device" in words(out), "2 already there" in words(out)) == (DONE, True, True)


def test_import_says_what_nobody_believes(capsys, root, tmp_path):
    put(root, made())
    file = exported(capsys, tmp_path, replace(made(us=3.0), at=1e11))
    _, out, _ = run(capsys, "import", str(file))
    assert "1 dated in the future, which nobody believes" in words(out)
    assert contents.of_cache(root).found[0].entry == made()


def test_import_takes_all_files_of_a_folder(capsys, root, tmp_path):
    folder = tmp_path / "several"
    folder.mkdir()
    for k, entry in enumerate((made(), made(BACKWARD))):
        told = {str(entry.key): entry.as_json()}
        (folder / f"{k}.json").write_text(shipped.text_of({Identity.of(H100): told}))
    assert run_json(capsys, "import", str(folder))[1]["new"] == 2
    (tmp_path / "empty").mkdir()
    assert run(capsys, "import", str(tmp_path / "empty"))[0] == USAGE


def test_what_was_exported_is_there_already(capsys, root, tmp_path):
    """It lacks candidates."""
    put(root, made())
    file = tmp_path / "tuned.json"
    assert run(capsys, "export", "--out", str(file))[0] == DONE
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # as some editors save it
    code, told = run_json(capsys, "import", str(file))
    assert (code, told["new"], told["already_there"]) == (DONE, 0, 1)


def test_import_of_a_device_that_shares_a_folders_name(capsys, root, tmp_path):
    """Nothing of one's own is set aside for it."""
    put(root, made())
    nearly = Identity.of(H100)._replace(shared=Identity.of(H100).shared + 1)
    file = tmp_path / "tuned.json"
    file.write_text(shipped.text_of({nearly: {str(made().key): made(us=2.0).as_json()}}))
    code, _, err = run(capsys, "import", str(file))
    assert (code, "the name of no device" in err) == (FAILED, True)
    assert contents.of_cache(root).found[0].entry == made()


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_export_writes_where_it_is_sent(capsys, root, tmp_path, kind):
    """Not in the place of what is there: a device such as /dev/null above all."""
    put(root, made())
    there, target = tmp_path / "there", tmp_path / "target"
    if kind == "link":
        target.write_text("old")
        there.symlink_to(target)
        assert run(capsys, "export", "--out", str(there))[0] == DONE
        assert there.is_symlink()
        assert shipped.parse(target.read_text())
        return
    os.mkfifo(there)
    reader = os.open(there, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert run(capsys, "export", "--out", str(there))[0] == DONE
        assert not there.is_file()
        assert shipped.parse(os.read(reader, 1 << 20).decode())
    finally:
        os.close(reader)


@pytest.mark.parametrize("change", [{"hidden": 0}, {"batch": 0}, {"directions": 3}])
def test_a_key_of_no_size_is_of_no_use(capsys, root, change):
    put(root, made(BACKWARD))
    path = folder_of(root) / "backward.json"
    held = json.loads(path.read_text())
    (entry,) = held["entries"].values()
    entry["key"] |= change
    path.write_text(json.dumps(held))
    (name,) = change
    assert f"! not used: {name}: {change[name]} is no size" in words(run(capsys, "show")[1])
    assert run(capsys, "verify", "--json")[0] == FAILED


def test_numbers_of_devices_that_cannot_be():
    assert machine.numbers_of(Identity("cuda", "gfx942", 304, 65536)) is None
    assert machine.numbers_of(Identity("hip", "sm90", 132, 232448)) is None


def test_a_measured_entry_without_a_time_is_of_no_use(capsys, root, tmp_path):
    put(root, made())
    path = folder_of(root) / "forward.json"
    held = json.loads(path.read_text())
    held["entries"][str(FORWARD.key)]["candidates"] = []
    path.write_text(json.dumps(held))
    why = "it is measured, and does not say how long it took"
    assert f"! not used: {why}" in words(run(capsys, "show")[1])
    code, out, _ = run(capsys, "verify")
    assert (code, why in words(out)) == (FAILED, True)
    file = tmp_path / "tuned.json"
    file.write_text(shipped.text_of({Identity.of(H100): held["entries"]}))
    code, _, err = run(capsys, "import", str(file))
    assert (code, why in err) == (FAILED, True)


def test_export_tells_what_it_left_out(capsys, root, tmp_path):
    put(root, made(), made(BACKWARD))
    (folder_of(root) / "forward.json").write_text("{")
    file = tmp_path / "tuned.json"
    code, told = run_json(capsys, "export", "--out", str(file))
    assert (code, told["entries"], told["file"], len(told["unreadable"])) == (FAILED, 1, str(file), 1)
    assert len(shipped.parse(file.read_text())[Identity.of(H100)]) == 1
    code, _, err = run(capsys, "export", "--out", str(file))
    assert (code, "not exported: " in err, "clear --unused" in err) == (FAILED, True, True)
