"""Which backend runs, and that importing needs neither Triton nor a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from triton_bnlstm import BNLSTM, __version__, backend_report

WITHOUT_TRITON = """
import sys, warnings
warnings.simplefilter("error")
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "rich", "sequentia", "matplotlib", "sklearn"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
import torch, triton_bnlstm
print(triton_bnlstm.backend_report())
layer = triton_bnlstm.BNLSTM(3, 4, max_length=5)
layer(torch.randn(5, 2, 3))[0].sum().backward()
"""


def test_imports_and_runs_without_triton():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "triton        not importable (ImportError: triton is blocked)" in done.stdout
    assert "backend       reference: " in done.stdout


def test_importing_does_not_import_triton():
    """Import time is the user's; Triton is for when a kernel runs."""
    code = "import sys, torch; print('triton' in sys.modules); import triton_bnlstm; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    before, after = done.stdout.split()
    assert before == after


def test_report_tells_versions():
    report = backend_report()
    assert report.version == __version__
    assert report.torch == torch.__version__
    assert report.backend == "reference"
    assert all(value in str(report) for value in (report.version, report.torch, report.triton, report.reason))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_backends_that_run(backend):
    assert BNLSTM(3, 4, max_length=5, backend=backend)(torch.randn(5, 2, 3))[0].shape == (5, 2, 4)


def test_a_backend_that_cannot_run_raises_instead_of_falling_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    layer = BNLSTM(3, 4, max_length=5, backend="triton")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        layer(torch.randn(5, 2, 3))
    assert (layer.count_hh_l0 == 0).all()
