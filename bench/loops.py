"""Batch-normalised LSTMs without kernels of their own: loops over steps, as people write them and for compilers.

    BatchNormLoop    two F.batch_norm a step, and one more with cell norm, on slices of running statistics
    StepLoop         a step written for a compiler: W_ih x and its norm for all steps at once, then one function per
                     step, in which statistics are float32 and centred. Compiled, and replayed from a CUDA graph, it is
                     the honest baseline: what one gets today without writing a kernel.

Both take sequences of equal lengths only, in any number of layers and directions, with the parameters of a BNLSTM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_bnlstm import BNLSTM

MOMENTUM = 0.1


def _through_layers(layer: BNLSTM, x: Tensor, run: Callable[[Tensor, int, bool], Tensor]) -> Tensor:
    """Layers and directions around `run`, which takes x [T, B, ·], the layer's number and whether it is reversed."""
    for number in range(layer.num_layers):
        outputs = [run(x, number, False)]
        if layer.bidirectional:
            outputs.append(run(x.flip(0), number, True).flip(0))
        x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    return x


def _suffix(number: int, reverse: bool) -> str:
    return f"_l{number}" + ("_reverse" if reverse else "")


def _running(layer: BNLSTM) -> dict[str, Tensor]:
    """Running means and variances per slot, "mean_ih_l0" and so on: what the layer uses in evaluation."""
    found = {}
    for number in range(layer.num_layers):
        for reverse in (False, True)[: 1 + layer.bidirectional]:
            for norm, moments in layer.statistics(number, reverse, resolved=True).items():
                found[f"mean_{norm}{_suffix(number, reverse)}"] = moments.mean
                found[f"var_{norm}{_suffix(number, reverse)}"] = moments.var
    return found


def _cell(a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Pre-activations [B, 4H] and cell state → new cell state and output gate [B, H]."""
    i, f, g, o = a.chunk(4, 1)
    return f.sigmoid() * c + i.sigmoid() * g.tanh(), o.sigmoid()


class BatchNormLoop:
    """As it is commonly written: F.linear and F.batch_norm for input and state in every step."""

    def __init__(self, layer: BNLSTM) -> None:
        self.layer = layer
        self.running = {name: list(s.unbind()) for name, s in _running(layer).items()}

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        """X [T, B, D] → output [T, B, directions·H]."""
        return _through_layers(self.layer, x, lambda x, k, reverse: self._run(x, _suffix(k, reverse), training))

    def _run(self, x: Tensor, suffix: str, training: bool) -> Tensor:
        names = ("weight_ih", "weight_hh", "gamma_c", "beta_c")
        p: dict[str, Any] = {name: getattr(self.layer, name + suffix, None) for name in names}
        # float32, as F.batch_norm wants them beside running statistics whatever the input's dtype
        gamma_ih, gamma_hh, bias = (getattr(self.layer, n + suffix).float() for n in ("gamma_ih", "gamma_hh", "bias"))

        def norm(name: str, t: int, z: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> Tensor:
            mean, var = (self.running[f"{kind}_{name}{suffix}"][t] for kind in ("mean", "var"))
            return F.batch_norm(z, mean, var, weight, bias, training, MOMENTUM, self.layer.eps)

        h = x.new_zeros(x.shape[1], self.layer.hidden_size)
        c = h.float()
        outputs = []
        for t, x_t in enumerate(x.unbind()):
            a = norm("ih", t, F.linear(x_t, p["weight_ih"]), gamma_ih)
            a = a + norm("hh", t, F.linear(h, p["weight_hh"]), gamma_hh, bias)
            c, o = _cell(a, c)
            shown = c
            if p["gamma_c"] is not None:
                shown = norm("c", t, c, p["gamma_c"].float(), p["beta_c"].float())
            h = (o * shown.tanh()).to(x.dtype)
            outputs.append(h)
        return torch.stack(outputs)


def input_term(x: Tensor, weight: Tensor, gamma: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised W_ih x of all steps [T, B, 4H] in x's dtype, bias included, and its moments [T, 4H]."""
    z = (x @ weight.t()).float()
    mean = z.mean(1)
    deviation = z - mean[:, None]
    var = (deviation * deviation).mean(1)
    a = deviation * (gamma.float() * (var + eps).rsqrt()[:, None]) + bias.float()
    return a.to(x.dtype), mean, var


def _centred(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = z.mean(0)
    deviation = z - mean
    return deviation, mean, (deviation * deviation).mean(0)


def training_step(
    a: Tensor, h: Tensor, c: Tensor, weight: Tensor, gamma: Tensor, cell: tuple[Tensor, Tensor] | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One step: input term [B, 4H], h and float32 c [B, H] → h, c and the batch's moments [2, C], C = 4H or 5H."""
    deviation, mean, var = _centred((h @ weight.t()).float())
    c, o = _cell(a.float() + deviation * (gamma.float() * (var + eps).rsqrt()), c)
    moments = torch.stack([mean, var])
    shown = c
    if cell is not None:
        deviation, mean, var = _centred(c)
        shown = deviation * (cell[0].float() * (var + eps).rsqrt()) + cell[1].float()
        moments = torch.cat([moments, torch.stack([mean, var])], 1)
    return (o * shown.tanh()).to(h.dtype), c, moments


def evaluation_step(
    a: Tensor, h: Tensor, c: Tensor, weight: Tensor, scale: Tensor, cell: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """The same with constant statistics, folded: scale [4H] of W_hh h, scale and shift [H] of the cell norm."""
    c, o = _cell(a.float() + (h @ weight.t()).float() * scale, c)
    shown = c if cell is None else c * cell[0] + cell[1]
    return (o * shown.tanh()).to(h.dtype), c


class StepLoop:
    """One function per step, to be compiled.

    Args:
        layer: parameters and population.
        compiler: wraps each of the functions, as torch.compile does.
    """

    def __init__(self, layer: BNLSTM, compiler: Callable[[Any], Any]) -> None:
        self.layer = layer
        self.running = _running(layer)
        self.input_term, self.training_step, self.evaluation_step = (
            compiler(function) for function in (input_term, training_step, evaluation_step)
        )

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        """X [T, B, D] → output [T, B, directions·H]."""
        run = self._train if training else self._evaluate
        return _through_layers(self.layer, x, lambda x, k, reverse: run(x, _suffix(k, reverse)))

    def _parameters(self, suffix: str) -> list[Tensor]:
        return [getattr(self.layer, n + suffix) for n in ("weight_ih", "weight_hh", "gamma_ih", "gamma_hh", "bias")]

    def _cell_affine(self, suffix: str) -> tuple[Tensor, Tensor] | None:
        if not self.layer.cell_norm:
            return None
        return getattr(self.layer, "gamma_c" + suffix), getattr(self.layer, "beta_c" + suffix)

    def _start(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x.new_zeros(x.shape[1], self.layer.hidden_size)
        return h, h.float()

    def _train(self, x: Tensor, suffix: str) -> Tensor:
        weight_ih, weight_hh, gamma_ih, gamma_hh, bias = self._parameters(suffix)
        eps, cell, hidden = self.layer.eps, self._cell_affine(suffix), self.layer.hidden_size
        a, mean, var = self.input_term(x, weight_ih, gamma_ih, bias, eps)
        h, c = self._start(x)
        outputs, moments = [], []
        for a_t in a.unbind():
            h, c, own = self.training_step(a_t, h, c, weight_hh, gamma_hh, cell, eps)
            outputs.append(h)
            moments.append(own)
        with torch.no_grad():
            own = torch.stack(moments, 1)  # [2, T, C]
            seen = {"ih": torch.stack([mean, var]), "hh": own[..., : 4 * hidden]}
            if cell is not None:
                seen["c"] = own[..., 4 * hidden :]
            for norm, new in seen.items():
                for k, kind in enumerate(("mean", "var")):
                    self.running[f"{kind}_{norm}{suffix}"].lerp_(new[k], MOMENTUM)
        return torch.stack(outputs)

    def _evaluate(self, x: Tensor, suffix: str) -> Tensor:
        weight_ih, weight_hh, gamma_ih, gamma_hh, bias = self._parameters(suffix)
        eps, affine = self.layer.eps, self._cell_affine(suffix)

        def folded(norm: str, gamma: Tensor) -> tuple[Tensor, Tensor]:
            mean, var = (self.running[f"{kind}_{norm}{suffix}"] for kind in ("mean", "var"))
            scale = gamma.float() * (var + eps).rsqrt()
            return scale, -mean * scale

        scale_ih, shift_ih = folded("ih", gamma_ih)
        scale_hh, shift_hh = folded("hh", gamma_hh)
        a = (x @ weight_ih.t()).float() * scale_ih[:, None] + (shift_ih + shift_hh + bias.float())[:, None]
        cells: list[Any] = [None] * len(x)
        if affine is not None:
            scale_c, shift_c = folded("c", affine[0])
            cells = list(zip(scale_c.unbind(), (shift_c + affine[1].float()).unbind(), strict=True))
        h, c = self._start(x)
        outputs = []
        for a_t, scale, cell in zip(a.to(x.dtype).unbind(), scale_hh.unbind(), cells, strict=True):
            h, c = self.evaluation_step(a_t, h, c, weight_hh, scale, cell)
            outputs.append(h)
        return torch.stack(outputs)
