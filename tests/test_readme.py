"""What README and docstrings show is run as it stands there."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import triton_bnlstm.module

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_every_python_example_runs():
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})


def test_the_layers_docstring_example_runs():
    assert doctest.testmod(triton_bnlstm.module).attempted == 3
    assert doctest.testmod(triton_bnlstm.module).failed == 0


def test_ci_finds_the_test_command():
    """`.ci/run` takes the line from README, so it has to be where it looks."""
    assert re.search(r"<!-- test command -->\n```sh\npip install -e '\.\[test\]' && pytest[^\n]*\n```", README)
