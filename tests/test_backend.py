"""Which backend runs, and that importing needs neither Triton nor a GPU."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from tests.support import need_kernels
from triton_bnlstm import BNLSTM, __version__, backend, backend_report, dispatch, use_backend

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
    assert report.backend == ("triton" if torch.cuda.is_available() else "reference")
    assert all(value in str(report) for value in (report.version, report.torch, report.triton, report.reason))


def test_report_tells_what_is_asked_for(monkeypatch):
    with use_backend("reference"):
        assert "backend       reference: asked for" in str(backend_report())
    monkeypatch.setenv("TRITON_BNLSTM_BACKEND", "triton")
    assert backend_report().backend == "triton"
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert backend_report().reason.endswith("TRITON_BNLSTM_BACKEND, in Triton's interpreter")
        monkeypatch.delenv("TRITON_INTERPRET")
        assert ", and raises: tensors are on the CPU" in backend_report().reason
    monkeypatch.setenv("TRITON_BNLSTM_BACKEND", "cuda")
    assert "names no backend will raise: TRITON_BNLSTM_BACKEND must be one of" in backend_report().reason


@pytest.fixture
def ran(monkeypatch):
    """Names of the paths that layers took, in order."""
    need_kernels()
    from triton_bnlstm import bptt, fused

    names: list[str] = []
    for name, module in (("triton", fused), ("reference", bptt)):
        layer = module.layer
        monkeypatch.setattr(module, "layer", lambda *call, name=name, layer=layer: names.append(name) or layer(*call))
    monkeypatch.setattr(dispatch, "_told", set())
    monkeypatch.setattr(dispatch, "_failed", set())
    return names


def test_argument_before_context_before_environment_before_auto(ran, monkeypatch):
    x = torch.randn(3, 2, 3)
    unset, reference, triton = (BNLSTM(3, 4, max_length=5, backend=b) for b in (None, "reference", "triton"))
    unset(x)
    assert ran == ["reference"]  # auto, on a CPU
    monkeypatch.setenv("TRITON_BNLSTM_BACKEND", "triton")
    unset(x), reference(x)
    assert ran[1:] == ["triton", "reference"]
    with use_backend("reference"):
        unset(x), triton(x)
        with use_backend("auto"):
            unset(x)
        unset(x)
    unset(x)
    assert ran[3:] == ["reference", "triton", "reference", "reference", "triton"]


@pytest.mark.parametrize("where", ["argument", "context", "environment"])
def test_unknown_backends(where, monkeypatch):
    if where == "argument":
        with pytest.raises(ValueError, match="backend must be one of"):
            BNLSTM(3, 4, max_length=5, backend="cuda")
    elif where == "context":
        with pytest.raises(ValueError, match="backend must be one of"), use_backend("cuda"):
            pass
    else:
        monkeypatch.setenv("TRITON_BNLSTM_BACKEND", "cuda")
        layer = BNLSTM(3, 4, max_length=5)
        with pytest.raises(ValueError, match="TRITON_BNLSTM_BACKEND must be one of"):
            layer(torch.randn(3, 2, 3))
        assert (layer.count_hh_l0 == 0).all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda layer, x, patch: (layer.double(), x.double()), "not in float64"),
        (lambda layer, x, patch: (layer.to("meta"), x.to("meta")), "not on meta"),
        (lambda layer, x, patch: patch.delenv("TRITON_INTERPRET") or (layer, x), "TRITON_INTERPRET=1"),
        (lambda layer, x, patch: patch.setattr(backend, "_triton", lambda: (None, "gone")) or (layer, x), "gone"),
        (lambda layer, x, patch: patch.setattr(backend, "_interpreted", lambda: False) or (layer, x), "after the"),
        (
            lambda layer, x, patch: patch.setattr(backend, "_triton_interpreted", lambda: False) or (layer, x),
            "Python st",
        ),
    ],
    ids=["float64", "device", "no interpreter", "no Triton", "too late", "far too late"],
)
def test_a_backend_that_cannot_run_raises_instead_of_falling_back(change, match, ran, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    layer, x = change(BNLSTM(3, 4, max_length=5, backend="triton"), torch.randn(5, 2, 3), monkeypatch)
    with pytest.raises(RuntimeError, match=match):
        layer(x)
    assert layer.count_hh_l0.is_meta or (layer.count_hh_l0 == 0).all()
    assert ran == []


def pretend_gpu(monkeypatch, reason=None):
    """A CPU that auto takes for a GPU."""
    monkeypatch.setattr(dispatch, "why_no_kernels", lambda device, dtype: reason)
    monkeypatch.setattr(dispatch, "KERNEL_DEVICES", ("cpu",))


def test_a_backend_set_to_nonsense_later():
    layer = BNLSTM(3, 4, max_length=5)
    layer.backend = "Reference"
    with pytest.raises(ValueError, match="backend must be one of"):
        layer(torch.randn(3, 2, 3))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("chosen", ["reference", "triton"])
@pytest.mark.parametrize(
    ("name", "shape"),
    [("gamma_hh_l0", (3,)), ("gamma_hh_l0", (1,)), ("weight_hh_l0", (8, 4)), ("weight_ih_l0", (16, 2))],
)
def test_a_parameter_of_another_shape_is_refused(name, shape, chosen, training, ran):
    """A kernel would read beyond its end."""
    layer = BNLSTM(3, 4, max_length=5, backend=chosen).train(training)
    setattr(layer, name, torch.nn.Parameter(torch.ones(shape)))
    with pytest.raises(ValueError, match=name):
        layer(torch.randn(3, 2, 3))
    assert ran == []
    assert (layer.count_hh_l0 == 0).all()


def test_auto_takes_the_kernels_where_they_run(ran, monkeypatch):
    pretend_gpu(monkeypatch)
    BNLSTM(3, 4, max_length=5)(torch.randn(3, 2, 3))
    assert ran == ["triton"]


def test_auto_says_once_why_it_falls_back(ran, monkeypatch):
    pretend_gpu(monkeypatch, "a good reason")
    layer = BNLSTM(3, 4, 2, max_length=5)
    with pytest.warns(RuntimeWarning, match="reference path: a good reason") as told:
        layer(torch.randn(3, 2, 3))
    layer(torch.randn(3, 2, 3))
    assert len(told) == 1
    assert ran == ["reference"] * 4


@pytest.mark.parametrize("kind", ["does not compile", "too large"])
def test_a_kernel_that_cannot_run_falls_back_under_auto(kind, ran, monkeypatch):
    """One warning, one try for a case, right results, statistics updated once; and with "triton" an error."""
    from triton_bnlstm.kernels import launch

    pretend_gpu(monkeypatch)
    tried = []

    class Broken:
        __name__ = "forward_kernel"

        def __getitem__(self, grid):
            tried.append(grid)
            if kind == "too large":
                import triton

                raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")
            raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(launch, "forward_kernel", Broken())
    layer, x = BNLSTM(3, 4, max_length=5), torch.randn(3, 2, 3)
    twin = copy.deepcopy(layer)
    with pytest.warns(RuntimeWarning, match="a kernel could not run here .forward_kernel: ") as told:
        output = layer(x)[0]
    assert len(told) == 1
    twin.backend = "reference"
    assert torch.equal(output, twin(x)[0])
    assert (layer.count_hh_l0[:3] == 2).all()
    layer(x)
    assert len(tried) == 1
    layer.backend = "triton"
    before = layer.count_hh_l0.clone()
    with pytest.raises(RuntimeError, match="forward_kernel"):
        layer(x)
    assert torch.equal(before, layer.count_hh_l0)


def test_what_an_earlier_kernel_did_wrong_is_not_hidden(ran, monkeypatch):
    from triton_bnlstm.kernels import launch

    pretend_gpu(monkeypatch)

    class Broken:
        __name__ = "forward_kernel"

        def __getitem__(self, grid):
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    monkeypatch.setattr(launch, "forward_kernel", Broken())
    with pytest.raises(RuntimeError, match="illegal memory access"):
        BNLSTM(3, 4, max_length=5)(torch.randn(3, 2, 3))
    assert ran == ["triton"]
