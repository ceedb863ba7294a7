"""Adapters of others' kernels, on stand-ins that keep the same conventions: layouts, gate order, norms, reasons."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
from torch import nn

from bench import peers
from bench.cases import Case
from bench.unavailable import Unavailable

CPU = torch.device("cpu")
CUDA = torch.device("cuda")  # only named here
CASE = Case(5, 16, 4, 3, precision="float32")
EXTRA = ("gamma", "gamma_h", "beta_h")


@dataclass
class StandInConfig:
    """FlashRNN's configuration: each tensor's layout in letters."""

    backend: str
    function: str
    num_heads: int
    head_dim: int
    hidden_dim: int
    batch_size: int
    dtype: str
    input_shape: str
    recurrent_shape: str
    bias_shape: str
    output_shape: str


def stand_in_flashrnn(Wx, R, b, *, config):
    """An LSTM with gates i, f, g, o along G, in heads H, from zero states; takes and gives what the letters say."""
    assert config.function == "lstm"
    assert Wx.dtype == R.dtype == b.dtype == getattr(torch, config.dtype)
    for tensor in (Wx, R, b):
        assert tensor.is_contiguous()  # else the package would copy it
    inputs = torch.einsum(f"{config.input_shape}->TBGHD", Wx)
    recurrent = torch.einsum(f"{config.recurrent_shape}->GHDP", R)
    bias = torch.einsum(f"{config.bias_shape}->GHD", b)
    _, batch, _, heads, units = inputs.shape
    assert (batch, heads, units) == (config.batch_size, config.num_heads, config.head_dim)
    h = c = inputs.new_zeros(batch, heads, units)
    states = []
    for step in inputs:
        pre = step + torch.einsum("GHDP,BHP->BGHD", recurrent, h) + bias
        c = pre[:, 1].sigmoid() * c + pre[:, 0].sigmoid() * pre[:, 2].tanh()
        h = pre[:, 3].sigmoid() * c.tanh()
        states.append(torch.stack((h, c)))
    found = torch.einsum(f"TSBHD->{config.output_shape}", torch.stack(states))
    return found, found[:, -1:]


def normalised(x):
    """Each row less its mean, over its deviation."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


class StandInLayerNormLSTM(nn.Module):
    """Haste's: gates i, g, f, o along the last dimension of everything."""

    def __init__(self, columns, hidden):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(columns, 4 * hidden))
        self.recurrent_kernel = nn.Parameter(torch.randn(hidden, 4 * hidden))
        self.bias = nn.Parameter(torch.zeros(4 * hidden))
        self.gamma = nn.Parameter(torch.ones(2, 4 * hidden))
        self.gamma_h = nn.Parameter(torch.ones(hidden))
        self.beta_h = nn.Parameter(torch.zeros(hidden))

    def forward(self, x):
        assert self.training == torch.is_grad_enabled()  # Haste keeps for a backward what its mode says
        hidden = self.gamma_h.shape[0]
        h = c = x.new_zeros(x.shape[1], hidden)
        found = []
        for step in x @ self.kernel:
            pre = normalised(step) * self.gamma[0] + normalised(h @ self.recurrent_kernel) * self.gamma[1] + self.bias
            i, g, f, o = (pre[:, k * hidden : (k + 1) * hidden] for k in range(4))
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * (normalised(c) * self.gamma_h + self.beta_h).tanh()
            found.append(h)
        return torch.stack(found), (h[None], c[None])


@pytest.fixture
def installed(monkeypatch):
    """Both packages, as stand-ins."""
    flashrnn, haste = ModuleType("flashrnn"), ModuleType("haste_pytorch")
    flashrnn.__dict__.update(FlashRNNConfig=StandInConfig, flashrnn=stand_in_flashrnn)
    haste.__dict__.update(LayerNormLSTM=StandInLayerNormLSTM)
    monkeypatch.setitem(sys.modules, "flashrnn", flashrnn)
    monkeypatch.setitem(sys.modules, "haste_pytorch", haste)
    return flashrnn


def weights_of(case: Case, dtype: torch.dtype = torch.float32) -> peers.Tensors:
    gates = 4 * case.hidden
    shapes = {"weight_ih": (gates, case.columns), "weight_hh": (gates, case.hidden), "bias": (gates,)}
    return {name: torch.randn(shape).to(dtype) / 3 for name, shape in shapes.items()}


def input_of(case: Case) -> torch.Tensor:
    return torch.randn(case.steps, case.batch, case.columns).to(case.dtype)


def plain(case: Case, weights: peers.Tensors) -> nn.LSTM:
    lstm = nn.LSTM(case.columns, case.hidden)
    values = {name.removeprefix("bias_").removesuffix("_l0"): p for name, p in lstm.named_parameters()}
    with torch.no_grad():
        values["weight_ih"].copy_(weights["weight_ih"])
        values["weight_hh"].copy_(weights["weight_hh"])
        values["ih"].copy_(weights["bias"])
        values["hh"].zero_()
    return lstm


def check(model: peers.Model, case: Case) -> None:
    """Outputs and all gradients, by name, against float64."""
    x = input_of(case).requires_grad_()
    output = model.call(x, True)
    assert output.dtype == x.dtype
    assert output.shape == (case.steps, case.batch, case.hidden)
    pull = torch.randn_like(output)
    found = torch.autograd.grad(output, [x, *model.parameters.values()], pull)
    doubled = {name: leaf.detach().double().requires_grad_() for name, leaf in model.parameters.items()}
    x64 = x.detach().double().requires_grad_()
    expected = model.expected(doubled, x64)
    gradients = torch.autograd.grad(expected, [x64, *doubled.values()], pull.double())
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(gradients, found, strict=True):
        torch.testing.assert_close(theirs.double(), ours, rtol=1e-4, atol=1e-5)
    evaluated = model.call(x, False)
    assert not evaluated.requires_grad
    torch.testing.assert_close(evaluated, output)
    torch.testing.assert_close(model.call(x, True), output)


@pytest.mark.parametrize("backend", ["cuda_fused", "cuda", "vanilla"])
def test_flashrnn(backend, installed, monkeypatch):
    """Every layout is nn.LSTM with the same weights, and its gradients are those of the leaves that it shows."""
    monkeypatch.setattr(peers, "_flashrnn_backends", lambda *_: [backend])
    weights = weights_of(CASE)
    model = peers.flashrnn(CASE, weights, CPU)
    assert model.backend == backend
    assert set(model.parameters) == {"weight_ih", "weight_hh", "bias"}
    assert all(leaf.is_leaf and leaf.requires_grad and leaf.grad is None for leaf in model.parameters.values())
    x = input_of(CASE)
    torch.testing.assert_close(model.call(x, False), plain(CASE, weights)(x)[0])
    check(model, CASE)


def test_flashrnn_in_half_precision(installed):
    case = replace(CASE, precision="float16")
    model = peers.flashrnn(case, weights_of(case, torch.float16), CPU)
    assert model.call(input_of(case), False).dtype == torch.float16


def test_expected_flashrnn_is_a_plain_lstm():
    weights, x = weights_of(CASE), input_of(CASE)
    torch.testing.assert_close(peers.expected_flashrnn(CASE, weights, x), plain(CASE, weights)(x)[0])


def test_the_weights_that_were_given_stay(installed):
    """Leaves are copies: an optimiser's step on a peer is nobody else's."""
    for make in (peers.flashrnn, peers.haste):
        weights = weights_of(CASE)
        before = {name: tensor.clone() for name, tensor in weights.items()}
        with torch.no_grad():  # which is also no matter to who sets one up
            for leaf in make(CASE, weights, CPU).parameters.values():
                leaf.add_(1)
        assert all(torch.equal(weights[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("changes", "backends"),
    [
        ({"precision": "bfloat16"}, ["cuda_fused", "cuda"]),
        ({"precision": "float16"}, ["cuda_fused", "cuda"]),
        ({"precision": "tf32"}, ["cuda_fused", "cuda"]),
        ({"precision": "float32"}, ["cuda"]),
        ({"precision": "bfloat16", "hidden": 1000}, ["cuda"]),
    ],
)
def test_which_implementation_is_tried(changes, backends):
    assert peers._flashrnn_backends(replace(CASE, **changes), CUDA) == backends
    assert peers._flashrnn_backends(replace(CASE, **changes), CPU) == ["vanilla"]


def failing(*backends, error):
    def run(Wx, R, b, *, config):
        if config.backend in backends:
            raise error
        return stand_in_flashrnn(Wx, R, b, config=config)

    return run


def test_what_the_fused_kernel_cannot_the_other_does(installed, monkeypatch):
    monkeypatch.setattr(peers, "_flashrnn_backends", lambda *_: ["cuda_fused", "cuda"])
    installed.flashrnn = failing("cuda_fused", error=ValueError("No solution"))
    model = peers.flashrnn(CASE, weights_of(CASE), CPU)
    assert model.backend == "cuda"
    check(model, CASE)


def test_why_none_can(installed, monkeypatch):
    monkeypatch.setattr(peers, "_flashrnn_backends", lambda *_: ["cuda_fused", "cuda"])
    installed.flashrnn = failing("cuda_fused", "cuda", error=OSError("no compiler\nand more"))
    with pytest.raises(Unavailable, match=r"cuda_fused: OSError: no compiler; cuda: OSError: no compiler$"):
        peers.flashrnn(CASE, weights_of(CASE), CPU)


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: an illegal memory access was encountered"), torch.OutOfMemoryError("no room")]
)
def test_a_lost_device_is_no_reason(error, installed):
    installed.flashrnn = failing("vanilla", error=error)
    with pytest.raises(type(error), match=str(error)):
        peers.flashrnn(CASE, weights_of(CASE), CPU)


@pytest.mark.parametrize("cell_norm", [False, True])
def test_haste(cell_norm, installed):
    case = replace(CASE, cell_norm=cell_norm)
    model = peers.haste(case, weights_of(case), CPU)
    assert set(model.parameters) == {"weight_ih", "weight_hh", "bias", *EXTRA}
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in model.parameters.values())
    with torch.no_grad():  # nothing at a value at which it does not show
        for leaf in model.parameters.values():
            leaf.add_(torch.randn_like(leaf) / 4)
    check(model, case)


def test_haste_has_the_weights_that_were_given(installed):
    """As the oracle in nn.LSTM's own layout has it, norms at their initial values."""
    weights, x = weights_of(CASE), input_of(CASE)
    hidden = CASE.hidden
    norms = {"gamma": torch.ones(2, 4 * hidden), "gamma_h": torch.ones(hidden), "beta_h": torch.zeros(hidden)}
    found = peers.haste(CASE, weights, CPU).call(x, False)
    torch.testing.assert_close(found, peers.expected_haste(CASE, {**weights, **norms}, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["flashrnn", "haste"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bidirectional": True}, "two directions"),
        ({"layers": 3}, "no 3 layers"),
        ({"lengths": "uniform"}, "different lengths"),
        ({"layers": 2, "lengths": "vowels"}, "no 2 layers and no sequences of different lengths"),
    ],
)
def test_no_such_layer(name, changes, reason, installed):
    case = replace(CASE, **changes)
    with pytest.raises(Unavailable, match=reason):
        getattr(peers, name)(case, weights_of(case), CPU)


def test_what_only_one_has(installed):
    case = replace(CASE, cell_norm=True)
    with pytest.raises(Unavailable, match="FlashRNN has no cell norm"):
        peers.flashrnn(case, weights_of(case), CPU)
    for precision in ("bfloat16", "float16"):
        half = replace(CASE, precision=precision)
        with pytest.raises(Unavailable, match=f"Haste has no {precision}"):
            peers.haste(half, weights_of(half), CPU)
    tf32 = replace(CASE, precision="tf32")
    peers.haste(tf32, weights_of(tf32), CPU)


@pytest.mark.parametrize(("name", "package"), [("flashrnn", "flashrnn"), ("haste", "haste_pytorch")])
def test_not_installed(name, package, monkeypatch, tmp_path):
    make = getattr(peers, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Unavailable, match=f"{package} is not installed"):
        make(CASE, weights_of(CASE), CPU)
    monkeypatch.delitem(sys.modules, package)
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / f"{package}.py"
    for text, reason in (
        ("import no_such_module_at_all", f"{package} needs no_such_module_at_all, which is not installed"),
        ("raise OSError('libcudart.so.10.2: cannot open')", f"{package} cannot be imported: OSError: libcudart"),
    ):
        file.unlink(missing_ok=True)
        file.write_text(text, encoding="utf-8")
        for compiled in tmp_path.glob("__pycache__/*"):
            compiled.unlink()
        with pytest.raises(Unavailable, match=reason):
            make(CASE, weights_of(CASE), CPU)
