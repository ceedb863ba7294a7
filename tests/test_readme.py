"""What README and docstrings show is run as it stands there."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

from tests.support import EXPORTER_WARNINGS

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.filterwarnings(*EXPORTER_WARNINGS)
def test_every_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one of them writes a file
    # an example that torchrun would start is one process here
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})


@pytest.mark.parametrize(("name", "examples"), [("module", 3), ("estimate", 6)])
def test_docstring_examples_run(name, examples):
    done = doctest.testmod(importlib.import_module(f"triton_bnlstm.{name}"))
    assert (done.attempted, done.failed) == (examples, 0)


def test_ci_finds_the_test_command():
    """`.ci/run` takes the line from README, so it has to be where it looks."""
    assert re.search(r"<!-- test command -->\n```sh\npip install -e '\.\[test\]' && pytest[^\n]*\n```", README)
