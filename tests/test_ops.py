"""The operators that compilers see: what torch itself checks of them, and that they are the eager layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from tests.kernel_cases import DEVICE
from tests.support import make_layer, need_kernels
from triton_bnlstm import BNLSTM, dispatch, kept, ops
from triton_bnlstm.kernels.errors import KernelError

RAGGED = torch.tensor([5, 2, 4])  # of six steps, so that there is room that nothing takes
CASES: dict[str, tuple[dict[str, Any], torch.Tensor | None, int, bool]] = {
    # options of the layer, lengths, input columns, training
    "equal": ({}, None, 3, True),
    "ragged": ({}, RAGGED, 3, True),
    "both directions": ({"bidirectional": True, "cell_norm": True}, RAGGED, 3, True),
    "sequence": ({"input_stats": "sequence", "bias": False}, RAGGED, 3, True),
    "one column": ({}, RAGGED, 1, True),
    "recompute": ({"save": "recompute"}, RAGGED, 3, True),
    "frozen": ({}, RAGGED, 3, False),
    "frozen, both directions": ({"bidirectional": True, "cell_norm": True}, None, 3, False),
    "frozen, sequence": ({"input_stats": "sequence"}, None, 3, False),
}
# what decides about shapes on the kernels; the reference path has them all
ON_KERNELS = ["equal", "both directions", "one column", "recompute", "frozen"]
# they differ from others in shapes alone
EVERY = ["ragged", "both directions", "frozen"]
BOTH = [("reference", name) for name in CASES] + [("triton", name) for name in ON_KERNELS]


class Case:
    """Arguments of each operator, for one layer of a module."""

    def __init__(self, backend, name, where="host", rows=False):
        if backend == "triton":
            need_kernels()
        options, lengths, columns, training = CASES[name]
        dtype = torch.float64 if backend == "reference" else torch.float32
        self.layer = layer = make_layer(columns, 4, dtype=dtype, backend=backend, **options).to(DEVICE).train(training)
        suffixes = layer._suffixes[0]
        if lengths is not None and where == "device":
            lengths = lengths.to(DEVICE)
        self.x = torch.randn(6, 3, columns, dtype=dtype, device=DEVICE)
        if rows:
            lengths = RAGGED.sort(descending=True).values
            self.x = self.x.flatten(0, 1)[: int(lengths.sum())]
        states = [torch.randn(len(suffixes), 3, 4, dtype=dtype, device=DEVICE) for _ in range(2)]
        parameters = kept.list_of_parameters([layer._parameters_of(suffix) for suffix in suffixes])
        self.statistics = ops.list_of_statistics([layer._statistics_of(suffix) for suffix in suffixes])
        over_time = layer.input_stats == "time"
        sizes = lengths, 5 if rows else 6, 3
        norms = layer.cell_norm, over_time, training
        self.population = self.statistics, *sizes, 1, layer.prior_count, rows, *norms
        taken = torch.ops.triton_bnlstm.population(*self.population) if not training or lengths is not None else []
        setting = sizes[1], rows, "bias" not in options, layer.cell_norm, over_time, not training, False, layer.eps
        inputs = self.x, lengths, *states, parameters, taken, *setting, backend, layer.save, None
        self.inputs = inputs
        self.needed = [True] * (3 + len(parameters))

    def forward(self):
        """With tensors that require gradients."""
        x, lengths, h, c, parameters, *rest = self.inputs
        x, h, c, *parameters = (s.detach().requires_grad_() for s in (x, h, c, *parameters))
        return x, lengths, h, c, parameters, *rest, True

    def backward(self, results):
        x, lengths, h, c, parameters, *rest = self.inputs
        given = torch.randn_like(results[0]), torch.randn_like(results[1]), None
        return *given, x, lengths, h, c, [p.detach() for p in parameters], *rest, results[4], self.needed

    def learn(self, results):
        layer = self.layer
        return (
            self.statistics,
            layer._skipped_steps,
            results[3],
            3,
            1,
            0.1,
            layer.cell_norm,
            layer.input_stats == "time",
        )


QUICK = "test_schema", "test_faketensor"


def checked(case, every=True):
    """By all of torch's checks, or those that do not compile."""
    call = torch.ops.triton_bnlstm
    options: dict[str, Any] = {} if every else {"test_utils": QUICK}
    results = call.layer(*case.inputs, True)
    if case.population[1] is not None or not case.layer.training:
        opcheck(call.population.default, case.population, **options)
    opcheck(call.layer.default, case.forward(), **options)
    opcheck(call.layer.default, (*case.inputs, False), test_utils=QUICK)
    opcheck(call.layer_backward.default, case.backward(results), **options)
    if case.layer.training:
        opcheck(call.learn.default, case.learn(results), **options)


@pytest.mark.filterwarnings("ignore")  # of the checks themselves
@pytest.mark.parametrize(("backend", "name"), BOTH)
def test_what_torch_checks(backend, name):
    """Schema, autograd registration, fake tensors, and dispatch with symbolic sizes, of every operator."""
    checked(Case(backend, name), every=name in EVERY)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["both directions", "frozen"])
def test_rows_of_a_packed_sequence(name):
    checked(Case("reference", name, rows=True), every=name == "frozen")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", ["both directions", "frozen"])
def test_lengths_on_the_device(backend, name, monkeypatch):
    if DEVICE == "cpu":
        from triton_bnlstm.packing import Packing

        def as_on_a_device(steps, lengths, _):
            return Packing.of_device_lengths(steps, lengths)

        monkeypatch.setattr(Packing, "of_host_lengths", as_on_a_device)
    checked(Case(backend, name, where="device"), every=backend == "reference" and name == "both directions")


def test_nothing_is_kept_for_nobody():
    case = Case("reference", "both directions")
    assert torch.ops.triton_bnlstm.layer(*case.inputs, False)[4] == []
    output = torch.ops.triton_bnlstm.layer(*case.forward()[:-1], False)[0]
    with pytest.raises(RuntimeError, match="keep=False"):
        output.sum().backward()


def test_gradients_of_gradients_are_refused():
    case = Case("reference", "equal")
    inputs = case.forward()
    output = torch.ops.triton_bnlstm.layer(*inputs)[0]
    (gradient,) = torch.autograd.grad(output.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"first derivatives.*backend=\"reference\""):
        gradient.sum().backward()


def test_lengths_are_checked_where_they_can_be_read():
    case = Case("reference", "ragged")
    x, _, *rest = case.inputs
    with pytest.raises(ValueError, match="lengths must be at most T = 6"):
        torch.ops.triton_bnlstm.layer(x, torch.tensor([7, 2, 4]), *rest, False)


@pytest.mark.parametrize("fails", ["forward", "backward"])
def test_a_kernel_that_cannot_run(fails, monkeypatch):
    """What was kept is of the size of the kernels' all the same; the reference path's numbers, and one warning."""
    need_kernels()
    from triton_bnlstm.kernels import launch, launch_backward

    monkeypatch.setattr(dispatch, "KERNEL_DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(dispatch, "_failed", set())
    monkeypatch.setattr(dispatch, "_told", set())
    case = Case("triton", "both directions")
    call = torch.ops.triton_bnlstm
    expected = call.layer(*case.inputs, True)
    asked = case.backward(expected)
    wanted = call.layer_backward(*asked)
    index = case.inputs.index("triton")
    inputs = (*case.inputs[:index], "auto", *case.inputs[index + 1 :])

    def broken(*_, **__):
        raise KernelError("out of luck")

    def both():
        results = call.layer(*inputs, True)
        return results, call.layer_backward(*asked[:3], *inputs, results[4], case.needed)

    monkeypatch.setattr(launch if fails == "forward" else launch_backward, "recur", broken)
    with pytest.warns(RuntimeWarning, match="out of luck") as told:
        results, found = both()
    assert len(told) == 1
    assert [k.shape for k in results[4]] == [k.shape for k in expected[4]]
    for a, e in zip((*results[:3], *found), (*expected[:3], *wanted), strict=True):
        # two implementations in float32: roundings of 2⁻²⁴ of numbers of order one, 1/√ε = 18 before some of them
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    with pytest.raises(KernelError, match="out of luck"):
        call.layer(*case.inputs, True) if fails == "forward" else call.layer_backward(*asked)


def test_fake_tensors_take_the_operators():
    """A model can be looked at without memory: shapes as they will be, on both backends."""
    from torch._subclasses import FakeTensorMode

    for backend in ("reference", "triton"):
        with FakeTensorMode():
            layer = BNLSTM(3, 4, 2, max_length=6, bidirectional=True, backend=backend)
            lengths = torch.ones(5, dtype=torch.int64)
            output, (h_n, _) = layer(torch.randn(9, 5, 3), lengths=lengths)
            assert output.shape == (9, 5, 8)
            assert h_n.shape == (4, 5, 4)
            output.sum().backward()
            assert layer.weight_hh_l1.grad is not None
            assert layer.eval()(torch.randn(9, 5, 3))[0].shape == (9, 5, 8)


def test_flop_counting_does_not_trip_over_them():
    case = Case("reference", "equal")
    with FlopCounterMode(display=False):
        torch.ops.triton_bnlstm.layer(*case.inputs, False)
