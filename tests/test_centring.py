"""Inputs whose mean is large against their deviation: training rounds W_ih x relative to the deviation."""

from __future__ import annotations

import pytest
import torch

from tests.oracle import learnt
from tests.support import CLOSE, make_layer, need_kernels, oracle_of
from triton_bnlstm import reference
from triton_bnlstm.packing import Packing
from triton_bnlstm.reference import Problem
from triton_bnlstm.statistics import training_population

LENGTHS = {"equal": [6] * 32, "host": [6] * 20 + [5] * 6 + [3] * 4 + [1] * 2, "device": [6] * 20 + [5, 3, 1] * 4}


def twins(dtype, input_stats, x):
    """The same layer in `dtype` and in float64, with a population that lies within a few deviations of x's rows.

    All slots have seen the same, so that none inherits: mixing means in float32 rounds them relative to what they are.
    For the same reason the running statistics keep nothing of what they were.
    """
    rounded, exact = (
        make_layer(8, 16, dtype=kind, input_stats=input_stats, momentum=1.0) for kind in (dtype, torch.float64)
    )
    with torch.no_grad():
        for name, buffer in rounded.named_buffers():
            if name.startswith("count"):
                buffer.fill_(40)
        rounded.mean_ih_l0.add_((x.double() @ rounded.weight_ih_l0.double().T).mean((0, 1)))
    exact.load_state_dict(rounded.state_dict())
    return rounded, exact


@pytest.mark.parametrize("way", ["by hand", "by autograd", "kernels"])
@pytest.mark.parametrize("input_stats", ["time", "sequence"])
@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize(
    ("dtype", "offset", "bound"), [(torch.float32, 1e4, 5e-6), (torch.bfloat16, 100, 0.03), (torch.float16, 100, 0.004)]
)
def test_a_large_input_mean_costs_no_accuracy(dtype, offset, bound, kind, input_stats, way, monkeypatch):
    """Relative RMS against float64, with bounds as if the mean were 0: some fifteen roundings of 2⁻⁹ and 2⁻¹²; in
    float32, where sums are rounded too, some hundred and fifty of 2⁻²⁵. With W_ih x rounded where it stands every case
    is off by three times its bound or more, float32 by a hundred times.
    """
    if kind == "device":
        monkeypatch.setattr(
            Packing, "of_host_lengths", lambda steps, lengths, device: Packing.of_device_lengths(steps, lengths)
        )
    if way == "kernels":
        need_kernels()
        if dtype == torch.bfloat16 and not torch.cuda.is_available():
            pytest.skip("the interpreter truncates to bfloat16")
    lengths = LENGTHS[kind]
    batch = len(lengths)
    # the mean moves from step to step too: over sequences that is part of the variance
    x = (torch.randn(6, batch, 8) + torch.randn(6, 1, 8) + offset * torch.randn(8).sign()).to(dtype)
    rounded, exact = twins(dtype, input_stats, x)
    oracle = oracle_of(exact)
    weight = torch.randn(6, batch, 16).to(dtype)

    rounded.backend = "triton" if way == "kernels" else "reference"
    given = x.clone().requires_grad_()
    output = rounded(given, lengths=lengths)[0]
    graph = way == "by autograd"
    actual = [output, *torch.autograd.grad(output, [given, *rounded.parameters()], weight, create_graph=graph)]

    x = x.double().requires_grad_()
    zeros = torch.zeros(batch, 16, dtype=torch.float64)
    output, _, _, seen = oracle.run(x, lengths, zeros, zeros, True)
    expected = [output, *torch.autograd.grad(output, [x, *exact.parameters()], weight.double())]

    names = ["output", "x", *(name for name, _ in rounded.named_parameters())]
    for name, a, e in zip(names, actual, expected, strict=True):
        assert (a.double() - e).norm() <= bound * e.norm(), name
    slots = learnt(oracle.slots["ih"], seen["ih"], batch, 1.0)
    mean, var = torch.stack([slot.mean for slot in slots]), torch.stack([slot.var for slot in slots])
    assert (rounded.var_ih_l0 - var).norm() <= bound * var.norm()
    stored = 2**-24 * mean.norm()  # a float32 buffer cannot hold the mean any better
    assert (rounded.mean_ih_l0 - mean).norm() <= bound * var.sqrt().norm() + stored


@pytest.mark.parametrize("input_stats", ["time", "sequence"])
def test_rows_that_the_mask_leaves_out_do_not_move_the_mean(input_stats):
    """Nor do they become −x̄: in float16 W_ih x̄ may be infinite where W_ih (x − x̄) is not."""
    layer = make_layer(dtype=torch.float16, input_stats=input_stats)
    packing = Packing.of_device_lengths(4, torch.tensor([4, 1, 3, 4, 2]))
    over_time = input_stats == "time"
    population = training_population(layer._statistics_of("_l0"), packing, 0, None, over_time)
    problem = Problem(packing, population, over_time, 1e-3)
    parameters = layer._parameters_of("_l0")._replace(weight_ih=torch.full((16, 3), 2.0, dtype=torch.float16))
    state = torch.zeros(5, 4)
    x = (torch.randn(20, 3) + 3e4).half()
    results = []
    for left_out in (0.0, -6e4):
        rows = torch.where(packing.mask, x, left_out)
        *outputs, moments, z_x, used = reference.forward(rows, state.half(), state, parameters, problem)
        results.append([*outputs, moments.ih.mean, moments.ih.var, z_x, used.mean, used.rstd, used.x_mean])
    for clean, dirty in zip(*results, strict=True):
        assert torch.isfinite(clean).all()
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("input_stats", ["time", "sequence"])
def test_only_training_looks_at_the_mean_of_the_batch(training, input_stats):
    """In evaluation a row's result is bit for bit its own, whatever stands beside it."""
    layer = make_layer(dtype=torch.bfloat16, input_stats=input_stats).train(training)
    x = (torch.randn(5, 4, 3) + 10).bfloat16()
    other = x.clone()
    other[:, 1:] += 50
    (first, _), (second, _) = layer(x), layer(other)
    assert torch.equal(first[:, 0], second[:, 0]) is not training


def test_autocast_does_not_round_what_the_population_is_held_against():
    """W_ih x̄ in bfloat16 would be off by deviations, for the running mean and for phantom rows."""
    x, lengths = torch.randn(6, 8, 3) + 1e3, [6, 6, 6, 6, 4, 4, 2, 1]
    layer = make_layer(dtype=torch.float32, momentum=1.0, seen=False)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x, lengths=lengths)
    expected = x[0].double().mean(0) @ layer.weight_ih_l0.double().T
    # deviations of order one, rounded to 2⁻⁹ and averaged over eight rows; the mean itself is rounded to 2⁻²⁴ of 1e3
    torch.testing.assert_close(layer.mean_ih_l0[0].double(), expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("input_stats", ["time", "sequence"])
def test_a_shift_of_the_input_changes_nothing_without_a_population(input_stats):
    """Batch norm does not see shifts: equal lengths give the same outputs and gradients wherever the input stands."""
    x, results = torch.randn(4, 5, 3, dtype=torch.float64), []
    for shift in (0.0, 100.0):
        layer = make_layer(input_stats=input_stats)
        given = (x + shift).requires_grad_()
        output, _ = layer(given)
        results.append([output, *torch.autograd.grad(output.square().sum(), [given, *layer.parameters()])])
    for still, shifted in zip(*results, strict=True):
        torch.testing.assert_close(shifted, still, **CLOSE)


@pytest.mark.parametrize("input_stats", ["time", "sequence"])
@pytest.mark.parametrize("offset", [0, 30, 1e3, 1e5])
def test_one_column_with_a_large_mean_on_the_kernels(offset, input_stats):
    """W_ih x is never made there: its moments come from x, and so does what rounding x's mean leaves of it."""
    need_kernels()
    layer = make_layer(1, 5, dtype=torch.float32, input_stats=input_stats, backend="triton")
    exact = make_layer(1, 5, input_stats=input_stats)
    exact.load_state_dict(layer.state_dict())
    x = torch.rand(6, 32, 1) + offset
    with torch.no_grad():
        output, expected = layer(x)[0], exact(x.double())[0]
    assert (output - expected).norm() <= 5e-6 * expected.norm()
