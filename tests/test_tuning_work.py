"""What tuned layouts are kept under: buckets of sizes, flags, and a hash of the kernels' code."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path

import torch

from tests.support.tuning import WORK, entry
from triton_bnlstm.kernels.config import Config
from triton_bnlstm.tuning import work as work_module
from triton_bnlstm.tuning.entry import Entry
from triton_bnlstm.tuning.work import FLAGS, Key, Work, hidden_bucket, key_of_json, power_bucket, source_hash

OTHER = replace(WORK, hidden=1024)


def test_buckets():
    """As the module's page has them."""
    assert [hidden_bucket(h) for h in (1, 7, 16, 17, 100, 112, 113, 512, 513, 1000, 1024, 2000)] == [
        *(1, 7, 16, 20, 112, 112, 128, 512, 640, 1024, 1024, 2048)
    ]
    assert [power_bucket(b) for b in (1, 16, 17, 64, 100)] == [16, 16, 32, 64, 128]
    assert [hidden_bucket(h) for h in range(1, 17)] == list(range(1, 17))
    for hidden in range(1, 3000):
        assert hidden <= hidden_bucket(hidden) <= max(16, 1.25 * hidden)
        assert hidden_bucket(hidden_bucket(hidden)) == hidden_bucket(hidden)
    assert replace(WORK, hidden=1000).key == replace(WORK, hidden=1024).key != WORK.key
    assert replace(WORK, batch=50).key == WORK.key


def test_keys_tell_apart_what_runs_differently():
    works = [WORK, OTHER, replace(WORK, batch=65), replace(WORK, directions=2), replace(WORK, dtype=torch.float16)]
    works += [replace(WORK, dtype=torch.float32, precision=p) for p in ("ieee", "tf32")]
    works += [replace(WORK, flags=(flag,)) for flag in FLAGS["forward"]] + [replace(WORK, kernel="inference")]
    works += [Work.of_moments(c, 64, 1, torch.bfloat16, centre=x) for c in (16, 64) for x in (True, False)]
    works += [Work.of_moments(16, 64, 1, torch.bfloat16, centre=True, before=True)]
    assert len({work.key for work in works}) == len({str(work.key) for work in works}) == len(works)
    for work in works:
        assert key_of_json(json.loads(json.dumps(work.key.as_json()))) == work.key
        assert Work.of_key(work.key).key == work.key


def test_the_hash_is_of_all_that_is_compiled():
    """Of each kernel's file and of those that it takes functions from, at any distance; one that is not in it would
    let layouts live on that were measured with other code.
    """
    from triton_bnlstm.tuning.work import _FILES

    folder = Path(work_module.__file__).parents[1] / "kernels"

    def reached(name):
        found = {name}
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                found |= reached(node.module)
            assert not (isinstance(node, ast.ImportFrom) and node.level > 1)
        return found

    own = {"forward": "forward", "inference": "inference", "backward": "backward", "moments": "input_side"}
    for kernel, name in own.items():
        assert sorted(_FILES[kernel]) == sorted(reached(name)), kernel
    assert set(_FILES["save"]) == {*_FILES["forward"], *_FILES["backward"], *_FILES["moments"]}


def test_the_hash_is_of_the_code_not_of_its_comments(monkeypatch, tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "tuning").mkdir()
    monkeypatch.setattr(work_module, "__file__", str(tmp_path / "tuning" / "work.py"))

    names = ("forward", "common", "barrier")

    def hashed(text, *changed):
        for name in names:
            (tmp_path / "kernels" / f"{name}.py").write_text("x = 1\n" if changed and name not in changed else text)
        source_hash.cache_clear()
        return source_hash("forward")

    try:
        plain = hashed("def f(x):\n    return x + 1\n")
        assert plain == hashed('"""A page."""\n\n\n# why\ndef f(x):\n    """What."""\n    return x + 1  # how\n')
        assert plain == hashed("def f(x):\n\n    return (x + 1)\n".replace("(x + 1)", "x + 1"))
        assert plain != hashed("def f(x):\n    return x + 2\n")
        each = [hashed("x = 2\n", name) for name in names]
        assert len({*each, hashed("x = 1\n")}) == 4  # of every file
        assert plain != hashed("def f(x):\n  if x:\n    return x + 1\n")
    finally:
        source_hash.cache_clear()
    monkeypatch.undo()
    assert source_hash("forward") != source_hash("backward") != source_hash("inference")


def test_an_old_entry_of_other_code_is_another_key():
    key = WORK.key._replace(source="0" * 12)
    assert str(key) != str(WORK.key)
    assert isinstance(key, Key)


def test_entries_survive_json():
    found = Entry.of_json(json.loads(json.dumps(entry().as_json())))
    assert found == entry()
    assert isinstance(found.layout, Config)
