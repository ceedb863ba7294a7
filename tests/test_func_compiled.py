"""torch.func and forward mode where a compiler or an operator is in the way: refused, never a derivative of zero."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.exc import Unsupported
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacrev, jvp, vjp, vmap

from tests.support import CLOSE, assert_same_buffers, buffers, make_layer
from triton_bnlstm import BNLSTMCell, bn_lstm, ops
from triton_bnlstm.kept import list_of_parameters

# torch's own: where it derives forwards, and where its compiler steps back from jacrev
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


@pytest.fixture(autouse=True)
def _from_the_start():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


TRANSFORMS = {
    "jvp": lambda f: lambda x: jvp(f, (x,), (x,))[1],
    "grad": lambda f: grad(lambda x: f(x).square().sum()),
    "vjp": lambda f: lambda x: vjp(f, x)[1](torch.ones(6, 3, 4).double())[0],
    "jacrev": jacrev,
    "hessian": lambda f: hessian(lambda x: f(x).square().sum()),
    "vmap": lambda f: lambda x: vmap(f)(torch.stack([x, 2 * x])),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_within_what_is_compiled(training, transform):
    """With a whole graph an error that says so; without, the compiler steps back, and numbers are as uncompiled."""
    layer = make_layer().train(training)
    x = torch.randn(6, 3, 3).double()
    before = buffers(layer)
    run = TRANSFORMS[transform](lambda y: layer(y)[0])
    with pytest.raises(Unsupported, match="a compiled BN-LSTM goes through no transform"):
        torch.compile(run, backend="aot_eager", fullgraph=True)(x)
    assert_same_buffers(buffers(layer), before)
    stepped_back = torch.compile(run, backend="aot_eager")
    if training and transform == "vmap":
        with pytest.raises(RuntimeError, match="vmap in training"):
            stepped_back(x)
        assert_same_buffers(buffers(layer), before)
        return
    found = stepped_back(x)
    expected = run(x)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("of", ["cell", "function"])
def test_cell_and_function(of):
    layer = make_layer().eval()
    if of == "cell":
        cell = BNLSTMCell.from_layer(layer)
        x = torch.randn(3, 3).double()
        run = TRANSFORMS["jvp"](lambda y: cell(y)[0])
    else:
        given = layer._parameters_of("_l0"), layer._statistics_of("_l0")
        x = torch.randn(6, 3, 3).double()
        run = TRANSFORMS["jvp"](lambda y: bn_lstm(y, *given, training=False, input_stats="time").output)
    with pytest.raises(Unsupported, match="a compiled BN-LSTM goes through no transform"):
        torch.compile(run, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(torch.compile(run, backend="aot_eager")(x), run(x), **CLOSE)


def test_a_graph_is_not_taken_into_a_transform():
    """What was compiled outside is not what runs inside."""
    layer = make_layer().eval()
    x = torch.randn(6, 3, 3).double()
    run = torch.compile(lambda y: layer(y)[0], backend="aot_eager")
    run(x)
    expected = TRANSFORMS["jvp"](lambda y: layer(y)[0])(x)
    torch.testing.assert_close(TRANSFORMS["jvp"](run)(x), expected, **CLOSE)


def with_tangents(f):
    def run(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x))).tangent

    return run


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_dual_numbers(training, frozen):
    """An operator whose arguments want no gradient is called without its autograd, and would lose the tangent."""
    layer = make_layer().train(training).requires_grad_(not frozen)
    x = torch.randn(6, 3, 3).double()
    expected = with_tangents(lambda y: layer(y)[0])(x)
    whole = with_tangents(lambda y: layer(y)[0])
    with pytest.raises(Unsupported, match="a compiled BN-LSTM goes through no transform"):
        torch.compile(whole, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(torch.compile(whole, backend="aot_eager")(x), expected, **CLOSE)
    torch._dynamo.reset()
    run = torch.compile(lambda y: layer(y)[0], backend="aot_eager")
    torch.testing.assert_close(with_tangents(run)(x), expected, **CLOSE)  # not yet compiled: not in there
    torch._dynamo.reset()
    run(x)
    found = with_tangents(run)(x)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("mode", [*TRANSFORMS, "dual numbers"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_the_operator_itself(frozen, mode):
    layer = make_layer().eval().requires_grad_(not frozen)
    x = torch.randn(6, 3, 3).double()
    h = torch.zeros(1, 3, 4).double()
    parameters = list_of_parameters([layer._parameters_of("_l0")])
    known = ops.list_of_statistics([layer._statistics_of("_l0")])
    population = torch.ops.triton_bnlstm.population(known, None, 6, 3, 0, None, False, False, True, False)
    setting = 6, False, True, False, True, True, False, layer.eps, "reference", "preactivations", None

    def run(y):
        return torch.ops.triton_bnlstm.layer(y, None, h, h, parameters, population, *setting, not frozen)[0]

    torch.testing.assert_close(run(x), layer(x)[0], **CLOSE)
    around = {**TRANSFORMS, "dual numbers": with_tangents}[mode](run)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"do not go through transforms|forward-mode|jvp fun"):
        around(x)


def test_what_is_exported():
    layer = make_layer().eval()
    x = torch.randn(6, 3, 3).double()
    program = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(program(x)[0], layer(x)[0], **CLOSE)
    for transform in TRANSFORMS.values():
        with pytest.raises(RuntimeError, match="do not go through transforms"):
            transform(lambda y: program(y)[0])(x)
