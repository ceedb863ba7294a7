"""What the kernels' tests share: layouts, layers, and a comparison of all that a call gives with the float64 oracle."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from tests.support import assert_same_buffers, buffers, make_layer, oracle_of
from triton_bnlstm import BNLSTM
from triton_bnlstm.kernels.config import BackwardConfig, Config
from triton_bnlstm.packing import Packing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Sums of at most some hundred float32 numbers, a few steps deep: roundings of 2⁻²⁴ = 6e-8, ε = 3e-3 under the root.
FLOAT32 = 1e-5
# float16 keeps 11 bits: h is rounded by 2⁻¹² relative at each step and W_ih x likewise, γ/σ of order one carries each
# on, and a handful of steps add up.
FLOAT16 = 8e-3


def step_mode(units=4, tile=16, inner=16):
    return Config(sequence=False, units=units, batch_tile=tile, inner=inner, resident=False, warps=4, stages=1)


def one_program(units=16, tile=16, inner=16, resident=True):
    """Sequence mode without a barrier, as the interpreter can run it."""
    return Config(sequence=True, units=units, batch_tile=tile, inner=inner, resident=resident, warps=4, stages=1)


def backward(units=4, tile=16, inner=16, splits=1, groups=1, resident=False, sequence=False):
    """The backward kernel's layout."""
    return BackwardConfig(sequence, units, tile, inner, resident, 4, 1, splits, groups)


def device_lengths(monkeypatch):
    """Lengths given to the host take the way of lengths on a device."""
    monkeypatch.setattr(Packing, "of_host_lengths", lambda steps, lengths, _: Packing.of_device_lengths(steps, lengths))


def launched(monkeypatch):
    """Constants of the recurrent backward's launches from now on."""
    from triton_bnlstm.kernels import launch  # not at the top: this file is also imported where there is no Triton

    noted = []
    run = launch._run

    def noting(kernel, grid, tensors, scalars, constants, options):
        if "STORE_X" in constants:
            noted.append(constants)
        run(kernel, grid, tensors, scalars, constants, options)

    monkeypatch.setattr(launch, "_run", noting)
    return noted


def close(name: str, actual: Tensor, expected: Tensor, bound: float) -> None:
    assert actual.shape == expected.shape, name
    error = (actual.detach().cpu().double() - expected).norm() / expected.norm().clamp_min(1e-6)
    assert error <= bound, f"{name}: relative RMS error {error:.2e}"


def kernel_layer(*sizes, dtype=torch.float32, **options) -> BNLSTM:
    """On the kernels, with a population, and of no memory: statistics after a step are that step's moments."""
    return make_layer(*sizes, dtype=dtype, backend="triton", momentum=1.0, **options).to(DEVICE)


def check(layer: BNLSTM, x: Tensor, lengths=None, *, states: bool = True, bound=FLOAT32, start=0) -> None:
    """One layer and direction: all that a call gives and leaves, in training and in evaluation."""
    exact = copy.deepcopy(layer).cpu().double()
    shape = (1, x.shape[1], layer.hidden_size)
    hx = [torch.randn(shape).to(x.dtype) * 0.5 for _ in range(2)] if states else [torch.zeros(shape).to(x.dtype)] * 2
    for training in (False, True):
        layer.train(training)
        oracle = oracle_of(exact)
        before = buffers(layer)
        inputs = [s.to(DEVICE).requires_grad_() for s in (x, *hx)]
        output, (h_n, c_n) = layer(inputs[0], tuple(inputs[1:]) if states else None, lengths=lengths, start=start)
        wides = [s.detach().double().requires_grad_() for s in (x, *hx)]
        held = lengths or [len(x)] * x.shape[1]
        *expected, seen = oracle.run(wides[0], held, wides[1][0], wides[2][0], training, start)
        for name, a, e in zip(("output", "h_n", "c_n"), (output, h_n[0], c_n[0]), expected, strict=True):
            close(f"{name}, training={training}", a, e, bound)

        weights = [torch.randn(e.shape).to(x.dtype) for e in expected]
        among = inputs if states else inputs[:1]
        outputs = (output, h_n[0], c_n[0])
        found = torch.autograd.grad(outputs, [*among, *layer.parameters()], [w.to(DEVICE) for w in weights])
        doubled = [w.double() for w in weights]
        wanted = torch.autograd.grad(expected, [*wides[: len(among)], *exact.parameters()], doubled)
        for k, (a, e) in enumerate(zip(found, wanted, strict=True)):
            close(f"gradient {k}, training={training}", a, e, 2 * bound)

        after = buffers(layer)
        if not training:
            assert_same_buffers(before, after)
            continue
        for norm, slots in seen.items():
            for slot, moments in slots.items() if norm != "c" or layer.cell_norm else ():
                name = f"{norm} of slot {slot}"
                # a mean may be next to nothing beside the deviations
                scale = moments.mean.square() + moments.var
                error = (after[f"mean_{norm}_l0"][slot].cpu() - moments.mean).square() / scale.clamp_min(1e-12)
                assert error.mean().sqrt() <= 2 * bound, name
                close(f"variance, {name}", after[f"var_{norm}_l0"][slot], moments.var, 2 * bound)
