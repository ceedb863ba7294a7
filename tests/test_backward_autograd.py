"""The backward on the kernels as autograd calls it: what is needed, kept, written over, refused."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from itertools import combinations

import pytest
import torch

from tests.kernel_cases import (
    DEVICE,
    FLOAT32,
    close,
    device_lengths,
    kernel_layer,
    launched,
)
from tests.support import need_kernels

pytest.importorskip("triton")

from torch.utils._python_dispatch import TorchDispatchMode

from triton_bnlstm import dispatch, fused_backward
from triton_bnlstm.kernels import launch_backward
from triton_bnlstm.kernels.errors import KernelError

need_kernels()
pytestmark = pytest.mark.usefixtures("bands")

SAVES = ("preactivations", "recompute")


OUTPUTS = ("output", "h_n", "c_n")


@pytest.mark.parametrize("chosen", [s for k in (1, 2, 3) for s in combinations(range(3), k)], ids=str)
@pytest.mark.parametrize("lengths", [None, [4, 1, 3]], ids=["equal", "ragged"])
def test_any_subset_of_the_outputs(chosen, lengths):
    layer = kernel_layer(2, 4, bidirectional=True, cell_norm=True)
    twin = copy.deepcopy(layer)
    twin.backend = "reference"
    given = [torch.randn(4, 3, 2, device=DEVICE), *torch.randn(2, 2, 3, 4, device=DEVICE)]
    found = []
    for model in (layer, twin):
        x, h_0, c_0 = (s.clone().requires_grad_() for s in given)
        output, states = model(x, (h_0, c_0), lengths=lengths)
        results = [(output, *states)[k] for k in chosen]
        torch.manual_seed(3)
        among = [x, h_0, c_0, *model.parameters()]
        found.append(torch.autograd.grad(results, among, [torch.randn_like(r) for r in results]))
    for a, e in zip(*found, strict=True):
        close("", a, e.double().cpu(), 4 * FLOAT32)  # both are float32


def reference_gradients(layer, x, gradient_of):
    """Gradients of x and the parameters, by the reference path, for what `gradient_of` makes of the output."""
    twin = copy.deepcopy(layer)
    twin.backend = "reference"
    given = x.clone().requires_grad_()
    return torch.autograd.grad(gradient_of(twin(given)[0]), [given, *twin.parameters()])


@pytest.mark.parametrize(
    "gradient_of",
    [
        lambda y: y.sum(),  # expanded
        lambda y: y.transpose(0, 2).square().sum(),
        lambda y: y[::2, :, 1:].flip(2).square().sum(),
        lambda y: (y * 0).sum(),
        lambda y: y[-1].sum() + y[0, 0, 0],
    ],
    ids=["expanded", "transposed", "strided", "zero", "two steps"],
)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_gradients_of_any_layout(bidirectional, gradient_of):
    layer = kernel_layer(2, 4, bidirectional=bidirectional)
    x = torch.randn(4, 3, 2, device=DEVICE)
    expected = reference_gradients(layer, x, gradient_of)
    given = x.clone().requires_grad_()
    found = torch.autograd.grad(gradient_of(layer(given)[0]), [given, *layer.parameters()])
    for a, e in zip(found, expected, strict=True):
        close("", a, e.double().cpu(), 4 * FLOAT32)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("where", ["host", "device"])
def test_gradients_of_padding_are_not_read(where, backend, monkeypatch):
    if where == "device":
        device_lengths(monkeypatch)
    layer = kernel_layer(2, 4, cell_norm=True)
    layer.backend = backend
    x = torch.randn(4, 3, 2, device=DEVICE, requires_grad=True)
    lengths = [4, 1, 3]
    found = []
    for filler in (0.0, math.nan):
        output = copy.deepcopy(layer)(x, lengths=lengths)[0]
        gradient = torch.linspace(-1, 1, output.numel(), device=DEVICE).view(output.shape).clone()
        for b, length in enumerate(lengths):
            gradient[length:, b] = filler
        found.append(torch.autograd.grad(output, x, gradient)[0])
    assert torch.equal(*found)


class Operations(TorchDispatchMode):
    """Counts calls of matrix products."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += function in (torch.ops.aten.mm.default, torch.ops.aten.mm.out)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("needed", "columns", "products", "stored", "column"),
    [
        ("bias_l0", 3, 0, False, False),
        ("gamma_ih_l0", 1, 0, False, False),
        ("weight_hh_l0", 3, 1, False, False),
        ("weight_ih_l0", 3, 1, True, False),
        ("weight_ih_l0", 1, 0, False, True),
        ("x", 3, 1, True, False),
        ("x", 1, 1, True, False),
        ("h_0", 3, 1, False, False),
        ("c_0", 3, 0, False, False),
    ],
)
def test_nothing_is_computed_that_nobody_needs(monkeypatch, needed, columns, products, stored, column):
    layer = kernel_layer(columns, 4)
    exact = copy.deepcopy(layer).cpu().double()
    exact.backend = "reference"
    given = {"x": torch.randn(4, 3, columns), "h_0": torch.randn(1, 3, 4), "c_0": torch.randn(1, 3, 4)}
    noted = launched(monkeypatch)
    gradients = []
    for model, device, dtype in ((layer, DEVICE, torch.float32), (exact, "cpu", torch.float64)):
        tensors = {name: s.to(device, dtype) for name, s in given.items()} | dict(model.named_parameters())
        model.requires_grad_(False)
        tensors[needed].requires_grad_()
        output = model(tensors["x"], (tensors["h_0"], tensors["c_0"]))[0]
        with Operations() as done:
            gradients.append(torch.autograd.grad(output.square().sum(), tensors[needed])[0])
        if model is layer:
            assert done.products == products
    # of W_ih's one column batch norm leaves a gradient of ε's size
    close(needed, gradients[0], gradients[1], 2 * FLOAT32 if column is False else 20 * FLOAT32)
    assert noted
    assert all(c["STORE_X"] == stored and c["COLUMN"] == column for c in noted)


@pytest.mark.parametrize("save", SAVES)
def test_a_graph_may_be_kept(save):
    """Then what was saved is left as it is; else its memory takes the gradients."""
    layer = kernel_layer(3, 4, save=save)
    x = torch.randn(5, 3, 3, device=DEVICE, requires_grad=True)
    loss = layer(x)[0].square().sum()
    among = [x, *layer.parameters()]
    first, second = (torch.autograd.grad(loss, among, retain_graph=keep) for keep in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, among)


@pytest.mark.parametrize(("save", "made"), [("preactivations", 0), ("recompute", 1)])
def test_saved_memory_takes_the_gradients(bands, save, made):
    """The backward makes nothing as large as W_hh h but what it makes again."""
    layer = kernel_layer(3, 4, save=save)
    x = torch.randn(5, 4, 3, device=DEVICE, requires_grad=True)
    loss = layer(x)[0].square().sum()
    before = len(bands)
    loss.backward()
    large = [size for _, size in bands[before:] if size >= 5 * 4 * 16]
    assert len(large) == made


@pytest.mark.parametrize("missing", ["_get_current_graph_task_keep_graph", "_top_saved_tensors_default_hooks"])
def test_a_torch_that_cannot_tell_whether_memory_is_free(bands, monkeypatch, missing):
    """What was saved is then left as it is."""
    monkeypatch.delattr(torch._C._autograd, missing, raising=False)
    x = torch.randn(5, 4, 3, device=DEVICE, requires_grad=True)
    loss = kernel_layer(3, 4)(x)[0].square().sum()
    before = len(bands)
    loss.backward()
    assert len([size for _, size in bands[before:] if size >= 5 * 4 * 16]) == 2


def test_what_hooks_have_seen_is_left_as_it_is():
    layer = kernel_layer(3, 4)
    x = torch.randn(5, 3, 3, device=DEVICE, requires_grad=True)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: seen.append(s) or s, lambda s: s):
        loss = layer(x)[0].square().sum()
    before = [s.clone() for s in seen]
    loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(seen, before, strict=True))


@pytest.mark.parametrize("failing", ["the backward", "a hook"])
def test_a_backward_that_did_not_finish_cannot_be_repeated(monkeypatch, failing):
    """Its memory has been written over: no numbers are better than wrong ones."""
    layer = kernel_layer(3, 4)
    x = torch.randn(5, 3, 3, device=DEVICE, requires_grad=True)
    output = layer(x)[0]

    def broken(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        if failing == "the backward":
            patch.setattr(fused_backward, "_input_weight_gradient", broken)
        else:
            node = output.grad_fn
            while type(node).__name__ != "_LayerBackward":
                node = node.next_functions[0][0]
            hook = node.register_hook(broken)
        with pytest.raises(torch.OutOfMemoryError):
            torch.autograd.grad(output.sum(), x)
    if failing == "a hook":
        hook.remove()
    with pytest.raises(RuntimeError, match=r"did not finish.*run the forward again"):
        torch.autograd.grad(output.sum(), x)


def test_one_gradient_at_a_time(auto):
    """A batch of them is refused as such, and not taken for a kernel that cannot run."""
    layer = kernel_layer(3, 4)
    layer.backend = "auto"
    x = torch.randn(2, 3, 3, device=DEVICE, requires_grad=True)
    output = layer(x)[0]
    with pytest.raises(RuntimeError, match="one gradient at a time"):
        torch.autograd.grad(output, x, torch.ones(2, *output.shape, device=DEVICE), is_grads_batched=True)
    assert not dispatch._failed


@pytest.mark.parametrize("needed", ["weight_hh_l0_reverse", "weight_ih_l0", "gamma_hh_l0_reverse"])
def test_what_one_direction_needs(needed):
    """The other one's products are left out."""
    layer = kernel_layer(3, 4, bidirectional=True).requires_grad_(False)
    getattr(layer, needed).requires_grad_()
    twin = copy.deepcopy(layer)
    twin.backend = "reference"
    x = torch.randn(4, 3, 3, device=DEVICE)
    output = layer(x, lengths=[4, 2, 1])[0]
    with Operations() as done:
        (found,) = torch.autograd.grad(output.square().sum(), getattr(layer, needed))
    assert done.products == needed.startswith("weight")
    (expected,) = torch.autograd.grad(twin(x, lengths=[4, 2, 1])[0].square().sum(), getattr(twin, needed))
    close(needed, found, expected.double().cpu(), 4 * FLOAT32)


def test_gradients_of_vectors_are_their_own():
    """Not parts of one storage, which each of them would keep."""
    layer = kernel_layer(3, 4, cell_norm=True)
    layer(torch.randn(4, 3, 3, device=DEVICE))[0].sum().backward()
    for p in layer.parameters():
        assert p.grad.untyped_storage().nbytes() == p.numel() * 4


def test_gradients_with_a_graph_are_refused():
    """By the kernels; "auto" takes the reference path for them."""
    layer = kernel_layer(2, 3)
    x = torch.randn(3, 4, 2, device=DEVICE, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"no second derivatives.*create_graph=True"):
        torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
    torch.autograd.grad(layer(x)[0].square().sum(), x)  # nothing is left behind


@pytest.fixture
def auto(monkeypatch):
    """ "auto" takes the kernels on this device, and nothing has been told yet."""
    monkeypatch.setattr(dispatch, "KERNEL_DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(dispatch, "_told", set())
    monkeypatch.setattr(dispatch, "_failed", set())


def test_second_derivatives_of_auto_are_the_references(auto):
    layer = kernel_layer(2, 3)
    layer.backend = "auto"
    twin = copy.deepcopy(layer)
    twin.backend = "reference"
    x = torch.randn(3, 4, 2, device=DEVICE)
    found = []
    for model in (layer, twin):
        given = x.clone().requires_grad_()
        with (
            pytest.warns(RuntimeWarning, match="create_graph=True.*reference path") if model is layer else nullcontext()
        ):
            (first,) = torch.autograd.grad(model(given)[0].square().sum(), given, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [given, *model.parameters()]))
    for a, e in zip(*found, strict=True):
        close("", a, e.cpu().double(), 1e-4)


@pytest.mark.filterwarnings("ignore:.*create_graph=True:RuntimeWarning")
def test_gradients_with_a_graph_when_one_direction_needs_none(auto):
    layer = kernel_layer(2, 3, bidirectional=True).requires_grad_(False)
    layer.bias_l0_reverse.requires_grad_()
    layer.backend = "auto"
    x = torch.randn(3, 4, 2, device=DEVICE)
    first, second = (
        torch.autograd.grad(layer(x)[0].square().sum(), layer.bias_l0_reverse, create_graph=graph)[0]
        for graph in (True, False)
    )
    close("bias", first, second.cpu().double(), 1e-4)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_backward_kernel_that_cannot_run(auto, monkeypatch, backend):
    """The reference path's gradients and one warning; under "triton" the error itself."""
    layer = kernel_layer(2, 3, bidirectional=True)
    layer.backend = backend
    layer.weight_hh_l0.requires_grad_(False)
    x = torch.randn(3, 4, 2, device=DEVICE, requires_grad=True)
    among = [x, *(p for p in layer.parameters() if p.requires_grad)]
    expected = torch.autograd.grad(copy.deepcopy(layer)(x)[0].square().sum(), x)[0]

    def broken(*_, **__):
        raise KernelError("out of luck")

    monkeypatch.setattr(launch_backward, "recur", broken)
    loss = layer(x)[0].square().sum()
    if backend == "triton":
        with pytest.raises(KernelError, match="out of luck"):
            torch.autograd.grad(loss, among)
        return
    with pytest.warns(RuntimeWarning, match="a kernel could not run here .out of luck"):
        found = torch.autograd.grad(loss, among)
    close("x", found[0], expected.double().cpu(), 4 * FLOAT32)
    assert not any(f.requires_grad for f in found)
    assert dispatch._failed  # from now on this case is the reference path's altogether
