"""What several test files need: layers with everything away from its initial value, and their oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.oracle import Oracle, Slot
from triton_bnlstm import BNLSTM
from triton_bnlstm._base import BNLSTMBase


def need_kernels() -> None:
    """Skip what follows, a test or a module, where there is no Triton, or an interpreter that cannot run a loop."""
    triton = pytest.importorskip("triton")
    if torch.cuda.is_available():
        return
    numpy = pytest.importorskip("numpy")
    old, new = (tuple(int(n) for n in module.__version__.split(".")[:2]) for module in (triton, numpy))
    if old < (3, 7) and new >= (2, 4):
        pytest.skip(f"Triton {triton.__version__}'s interpreter needs NumPy < 2.4", allow_module_level=True)


def randomise(layer: BNLSTMBase, seed: int = 0, seen: bool = True) -> None:
    """Parameters of order one, and (seen) a population in which later slots have seen less, the last one nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            scale = 0.5 if name.startswith("weight") else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale)
        if not seen:
            return
        layer.rows.fill_(4)
        for name, buffer in layer.named_buffers():
            if name.startswith("mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator, dtype=torch.float64))
            elif name.startswith("var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=torch.float64) + 0.5)
            elif name.startswith("count"):
                buffer.copy_(torch.linspace(20, 0, buffer.shape[0]) if buffer.shape[0] > 1 else torch.tensor([90.0]))


def make_layer(input_size: int = 3, hidden_size: int = 4, *, seed: int = 0, seen: bool = True, **options) -> BNLSTM:
    options.setdefault("dtype", torch.float64)
    options.setdefault("max_length", 6)
    options.setdefault("input_stats", "time")  # the harder case: every norm has statistics of each step
    options.setdefault("eps", 3e-3)  # not the default: an ε that is lost on the way would show
    layer = BNLSTM(input_size, hidden_size, **options)
    randomise(layer, seed, seen)
    return layer


def oracle_of(layer: BNLSTM, suffix: str = "_l0") -> Oracle:
    """The oracle with this layer's parameters (the very tensors: gradients reach them) and a copy of its slots."""
    names = ("weight_ih", "weight_hh", "bias", "gamma_ih", "gamma_hh", "gamma_c", "beta_c")
    slots: dict[str, list[Slot]] = {}
    for norm in ("ih", "hh", "c"):
        mean = getattr(layer, f"mean_{norm}{suffix}", None)
        if mean is None:
            slots[norm] = [Slot(torch.zeros(()), torch.ones(()), 0.0)]
            continue
        var, count = getattr(layer, f"var_{norm}{suffix}"), getattr(layer, f"count_{norm}{suffix}")
        slots[norm] = [
            Slot(m.double().clone(), v.double().clone(), float(n)) for m, v, n in zip(mean, var, count, strict=True)
        ]
    return Oracle(
        {name: getattr(layer, name + suffix, None) for name in names},
        slots,
        rows=float(layer.rows),
        input_stats=layer.input_stats,
        prior_count=layer.prior_count,
        eps=layer.eps,
    )


def buffers(layer: BNLSTMBase) -> dict[str, Tensor]:
    """A copy of the state that training writes."""
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def assert_same_buffers(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# float64 arithmetic in another order: a few hundred roundings of numbers of order one, and 1/√ε = 316 in front of them
CLOSE = {"rtol": 1e-9, "atol": 1e-11}

# torch.onnx.export's own, of what it imports and how it copies a program
EXPORTER_WARNINGS = (
    r"ignore:`torch\.jit\.script_method` is deprecated:DeprecationWarning",
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",
)
