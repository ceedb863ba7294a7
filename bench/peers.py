"""Others' recurrent kernels, where they are installed: FlashRNN's LSTM, and Haste's LSTM with layer norm.

Neither knows batch norm. FlashRNN (package `flashrnn`, Pöppel, Beck, Hochreiter 2024, arXiv 2412.07752) is a plain LSTM
in fused kernels, what a recurrence costs without any norm; Haste (package `haste_pytorch`, LMNT 2020) normalises each
row over its columns where we normalise each column over the rows, the nearest relative. One layer, one direction, equal
lengths, states that begin at zero.

Parameters are leaves in the layout that a peer's kernels read, so that nothing is permuted while it is timed; gradients
come back in that layout. `Model.expected` computes the same in plain operations from tensors in the same layout, so
that outputs and all gradients can be compared by name. `expected_flashrnn` and `expected_haste` do so from nn.LSTM's
layout: weights [4H, ·], gates in the order i, f, g, o.

Both overwrite in their backward what their forward kept, so each forward can be run backward once; FlashRNN waits for
the device inside its calls, and Haste uses streams of its own: neither can be captured in a CUDA graph.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from .cases import Case
from .ceilings import device_is_lost
from .unavailable import Unavailable

Tensors = dict[str, Tensor]


@dataclass
class Model:
    """A peer set up for one case.

    Attributes:
        call: x [T, B, D] and whether to train → output [T, B, H] in x's dtype. Without training no gradients are kept.
        parameters: leaves that get gradients, in the peer's layout: weight_ih, weight_hh, bias, and what else it has.
        expected: from tensors named and shaped like `parameters`, and x, of any dtype → output [T, B, H],
            differentiable.
        backend: which of the peer's implementations it is, where it has several.
    """

    call: Callable[[Tensor, bool], Tensor]
    parameters: Tensors
    expected: Callable[[Tensors, Tensor], Tensor]
    backend: str = ""


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise Unavailable(f"{name} is not installed") from None
        raise Unavailable(f"{name} needs {error.name}, which is not installed") from error
    except Exception as error:  # a package with compiled parts may fail in any way where those do not fit
        if device_is_lost(error):
            raise
        raise Unavailable(f"{name} cannot be imported: {_said(error)}") from error


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _check_kind(case: Case, name: str) -> None:
    """Raises Unavailable for what neither peer has."""
    kinds = {
        "two directions": case.bidirectional,
        f"{case.layers} layers": case.layers > 1,
        "sequences of different lengths": case.lengths != "equal",
    }
    asked = [kind for kind, is_asked in kinds.items() if is_asked]
    if asked:
        raise Unavailable(f"{name} has no {' and no '.join(asked)}")


def _leaf(tensor: Tensor, case: Case, device: torch.device) -> Tensor:
    return tensor.detach().to(device, case.dtype, copy=True).contiguous().requires_grad_()


# FlashRNN's implementations: the layout that its kernels take without a copy, as letters of its configuration: gates G,
# heads H (one), units D, units of the previous state P; time T and batch B of the input.
_FLASHRNN_LAYOUTS = {
    "cuda_fused": {"input_shape": "TBHDG", "recurrent_shape": "HDGP", "bias_shape": "HDG"},
    "cuda": {"input_shape": "TBHGD", "recurrent_shape": "HPGD", "bias_shape": "HGD"},
    "vanilla": {"input_shape": "TBGHD", "recurrent_shape": "HPGD", "bias_shape": "GHD"},
}


def _flashrnn_backends(case: Case, device: torch.device) -> list[str]:
    """Which implementations can run a case, the one that should be fastest first."""
    if device.type != "cuda":
        return ["vanilla"]  # plain PyTorch
    # The fused kernels' tiles are multiples of 16 units, and their float32 products are rounded to TF32.
    fused = case.hidden % 16 == 0 and case.precision != "float32"
    return ["cuda_fused", "cuda"] if fused else ["cuda"]


def _units_first(tensor: Tensor) -> Tensor:
    """[4H, ...] with gates outermost → the same with units outermost."""
    return tensor.unflatten(0, (4, -1)).transpose(0, 1).flatten(0, 1)


def _gates_first(tensor: Tensor) -> Tensor:
    """The way back."""
    return tensor.unflatten(0, (-1, 4)).transpose(0, 1).flatten(0, 1)


def _to_flashrnn(backend: str, weights: Tensors) -> Tensors:
    """From nn.LSTM's layout. weight_ih [4H, D], weight_hh [4H, H] or, where P is ahead, [H, 4H], bias [4H]."""
    if backend == "cuda_fused":
        return {name: _units_first(tensor) for name, tensor in weights.items()}
    return {**weights, "weight_hh": weights["weight_hh"].t()}


def _of_flashrnn(backend: str, weights: Tensors) -> Tensors:
    """To nn.LSTM's layout."""
    if backend == "cuda_fused":
        return {name: _gates_first(tensor) for name, tensor in weights.items()}
    return {**weights, "weight_hh": weights["weight_hh"].t()}


def flashrnn(case: Case, weights: Tensors, device: torch.device) -> Model:
    """FlashRNN's LSTM, with one head of H units: its fused kernel where that takes the case, else the one that
    alternates products and gates. W_ih x is torch's, as the package leaves it to its user.

    Compiles the kernels, which takes minutes the first time, and runs one step of them.

    Args:
        case: the layer.
        weights: weight_ih [4H, D], weight_hh [4H, H], bias [4H], as nn.LSTM has them.
        device: CUDA; on a CPU the package's own plain PyTorch runs.

    Raises:
        Unavailable: it is not installed, has no such layer, or none of its implementations can be compiled for it.
    """
    # Gate order, bias and layouts were tried against nn.LSTM with version 1.0.5 (d73fb52), its plain PyTorch, in all
    # three layouts; its two kernels by reading them only.
    _check_kind(case, "FlashRNN")
    if case.cell_norm:
        raise Unavailable("FlashRNN has no cell norm")
    package = _module("flashrnn")
    problems = []
    for backend in _flashrnn_backends(case, device):
        model = _flashrnn(package, backend, case, weights, device)
        x = torch.zeros(1, case.batch, case.columns, dtype=case.dtype, device=device)
        try:
            with torch.enable_grad():
                model.call(x, True).sum().backward()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of a compiler, its absence, or the package's own search for a layout
            if device_is_lost(error):
                raise
            problems.append(f"{backend}: {_said(error)}")
            continue
        for parameter in model.parameters.values():
            parameter.grad = None
        return model
    raise Unavailable(f"FlashRNN cannot be run here: {'; '.join(problems)}")


def _flashrnn(package: Any, backend: str, case: Case, weights: Tensors, device: torch.device) -> Model:
    config = package.FlashRNNConfig(
        backend=backend,
        function="lstm",
        num_heads=1,
        head_dim=case.hidden,
        hidden_dim=case.hidden,
        batch_size=case.batch,
        dtype=str(case.dtype).removeprefix("torch."),
        output_shape="STBHD",
        **_FLASHRNN_LAYOUTS[backend],
    )
    sizes = {"B": case.batch, "G": 4, "H": 1, "D": case.hidden, "P": case.hidden}
    recurrent, bias = ([sizes[letter] for letter in getattr(config, f"{name}_shape")] for name in ("recurrent", "bias"))
    names = ("weight_ih", "weight_hh", "bias")
    converted = _to_flashrnn(backend, {name: weights[name] for name in names})
    leaves = {name: _leaf(converted[name], case, device) for name in names}
    rest = [sizes[letter] for letter in config.input_shape[1:]]

    def call(x: Tensor, training: bool) -> Tensor:
        with nullcontext() if training else torch.no_grad():
            inputs = linear(x, leaves["weight_ih"]).view(-1, *rest)
            states, _ = package.flashrnn(
                inputs, leaves["weight_hh"].view(recurrent), leaves["bias"].view(bias), config=config
            )
            return states[0].reshape(-1, case.batch, case.hidden)  # states: [h and c, T, B, 1, H]

    def expected(tensors: Tensors, x: Tensor) -> Tensor:
        return expected_flashrnn(case, _of_flashrnn(backend, tensors), x)

    return Model(call, leaves, expected, backend)


def expected_flashrnn(case: Case, weights: Tensors, x: Tensor) -> Tensor:
    """A plain LSTM from zero states, in single operations.

    Args:
        case: the layer.
        weights: weight_ih [4H, D], weight_hh [4H, H], bias [4H]; gates i, f, g, o.
        x: [T, B, D] of the same dtype.

    Returns:
        output [T, B, H].
    """
    h = c = x.new_zeros(case.batch, case.hidden)
    outputs = []
    for z in linear(x, weights["weight_ih"], weights["bias"]):
        i, f, g, o = (z + h @ weights["weight_hh"].t()).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        outputs.append(h)
    return torch.stack(outputs)


def _swap_gates(tensor: Tensor, dim: int) -> Tensor:
    """Gates i, f, g, o ↔ Haste's i, g, f, o."""
    i, second, third, o = tensor.chunk(4, dim)
    return torch.cat((i, third, second, o), dim)


# What Haste calls what has another name here.
_HASTE_NAMES = {"weight_ih": "kernel", "weight_hh": "recurrent_kernel"}


def _of_haste(tensors: Tensors) -> Tensors:
    """Haste's kernel [D, 4H], recurrent_kernel [H, 4H], bias [4H], gamma [2, 4H] → nn.LSTM's layout and gate order."""
    swapped = {name: _swap_gates(tensors[name], -1) for name in ("weight_ih", "weight_hh", "bias", "gamma")}
    return {**tensors, **swapped, "weight_ih": swapped["weight_ih"].t(), "weight_hh": swapped["weight_hh"].t()}


def haste(case: Case, weights: Tensors, device: torch.device) -> Model:
    """Haste's LayerNormLSTM: layer norm over all 4H columns of W_ih x and of W_hh h, and over the H of c.

    The norm of c it always has, whether the case asks for a cell norm or not. Its further parameters are gamma [2, 4H],
    of W_ih x and W_hh h, and gamma_h and beta_h [H], of c; they start at 1, 1 and 0, as Haste has them.

    Args:
        case: the layer, in float32; products are rounded to TF32 where torch's own are.
        weights: weight_ih [4H, D], weight_hh [4H, H], bias [4H], as nn.LSTM has them.
        device: CUDA; on a CPU the package's own plain PyTorch runs.

    Raises:
        Unavailable: it is not installed, or has no such layer.
    """
    # Gates, norms and layouts were read from version 0.5.0-rc0 (ceba32e), and its plain PyTorch was tried against
    # `expected_haste`; its kernels were only read.
    _check_kind(case, "Haste")
    if case.dtype != torch.float32:
        raise Unavailable(f"Haste has no {case.precision}")
    package = _module("haste_pytorch")
    layer = package.LayerNormLSTM(case.columns, case.hidden).to(device)
    names = ("weight_ih", "weight_hh", "bias", "gamma", "gamma_h", "beta_h")
    leaves: Tensors = {name: getattr(layer, _HASTE_NAMES.get(name, name)) for name in names}
    with torch.no_grad():
        for name in ("weight_ih", "weight_hh", "bias"):
            swapped = _swap_gates(weights[name], 0)
            leaves[name].copy_(swapped.t() if swapped.dim() == 2 else swapped)

    def call(x: Tensor, training: bool) -> Tensor:
        if layer.training != training:
            layer.train(training)
        with nullcontext() if training else torch.no_grad():
            return layer(x)[0]

    def expected(tensors: Tensors, x: Tensor) -> Tensor:
        return expected_haste(case, _of_haste(tensors), x)

    return Model(call, leaves, expected)


def expected_haste(case: Case, weights: Tensors, x: Tensor) -> Tensor:
    """An LSTM with layer norm from zero states, in single operations.

    Args:
        case: the layer.
        weights: weight_ih [4H, D], weight_hh [4H, H], bias [4H], gamma [2, 4H]; gates i, f, g, o. gamma_h, beta_h [H].
        x: [T, B, D] of the same dtype.

    Returns:
        output [T, B, H].
    """
    h = c = x.new_zeros(case.batch, case.hidden)
    gamma_ih, gamma_hh = weights["gamma"]
    columns, units = (4 * case.hidden,), (case.hidden,)
    outputs = []
    for z in layer_norm(linear(x, weights["weight_ih"]), columns, gamma_ih, weights["bias"]):
        i, f, g, o = (z + layer_norm(h @ weights["weight_hh"].t(), columns, gamma_hh)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(layer_norm(c, units, weights["gamma_h"], weights["beta_h"]))
        outputs.append(h)
    return torch.stack(outputs)
