"""torch.compile: one graph without a break, the eager layer's numbers, and no second compilation for other lengths."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.checkpoint import checkpoint

from tests.kernel_cases import DEVICE, device_lengths, launched
from tests.support import CLOSE, assert_same_buffers, buffers, make_layer, need_kernels
from triton_bnlstm import BNLSTMCell, bn_lstm, estimate_statistics, update_statistics, use_backend

# dynamo's and inductor's own, of many kinds and versions
pytestmark = pytest.mark.filterwarnings("ignore")

RAGGED = torch.tensor([6, 2, 4])
SEQUENCE = {"input_stats": "sequence", "bias": False}
DEEP = {"num_layers": 2, "bidirectional": True, "cell_norm": True}
# The same operations in the same order, but for what a compiler fuses around the operators. Kernels compute in float32:
# 2⁻²⁴ of numbers of order one, with 1/√ε = 18 before some of them.
BOUNDS = {"reference": CLOSE, "triton": {"rtol": 1e-4, "atol": 1e-5}}


@pytest.fixture(autouse=True)
def _from_the_start():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    if request.param == "triton":
        need_kernels()
    return request.param


def layer_of(backend, **options):
    dtype = torch.float64 if backend == "reference" else torch.float32
    return make_layer(backend=backend, dtype=dtype, **options).to(DEVICE)


def data(layer, *shape):
    return torch.randn(*shape, 3, dtype=layer.weight_hh_l0.dtype, device=DEVICE)


def compiled(module, backend="aot_eager"):
    return torch.compile(module, fullgraph=True, backend=backend)


def compilations():
    return counters["stats"]["unique_graphs"]


def tensors_of(result):
    output, (h_n, c_n) = result
    return (output.data if isinstance(output, PackedSequence) else output), h_n, c_n


def same_step(eager, twin, run, given, bounds):
    """One call and its backward: values, gradients of inputs."""
    ours, theirs = ({k: leaf(v) for k, v in given.items()} for _ in range(2))
    expected, found = tensors_of(eager(**theirs)), tensors_of(run(**ours))
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, **bounds)
    for results in (expected, found):
        sum(
            (s * torch.linspace(-1, 2, s.numel(), dtype=s.dtype, device=s.device).view_as(s)).sum() for s in results
        ).backward()
    for name, value in ours.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            torch.testing.assert_close(value.grad, theirs[name].grad, **bounds)


def leaf(value):
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.clone().requires_grad_() if floating else value


def same(eager, twin, bounds):
    """Gradients of parameters, and running statistics."""
    for (name, mine), theirs in zip(eager.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, mine.grad, **bounds, msg=name)
    for name, buffer in buffers(eager).items():
        torch.testing.assert_close(buffers(twin)[name], buffer, **bounds, msg=name)


def compare(backend, calls, *, training=True, compiler="aot_eager", **options):
    """Calls of a compiled layer against those of an eager one; gives the compilations after each."""
    eager = layer_of(backend, **options).train(training)
    twin = copy.deepcopy(eager)
    run, counted = compiled(twin, compiler), []
    for given in calls(eager):
        same_step(eager, twin, run, given, BOUNDS[backend])
        counted.append(compilations())
    same(eager, twin, BOUNDS[backend])
    return counted


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("lengths", [None, RAGGED], ids=["equal", "ragged"])
@pytest.mark.parametrize("options", [{}, DEEP, SEQUENCE], ids=["", "deep", "sequence"])
def test_compiled_is_eager(backend, options, lengths, training):
    if backend == "triton" and (options is SEQUENCE or (options is DEEP and not (training and lengths is not None))):
        pytest.skip("the kernels' ops are traced alike for all options: the reference path's row shows this one")
    given = {} if lengths is None else {"lengths": lengths}
    calls = compare(
        backend, lambda n: [{"input": data(n, 6, 3), **given} for _ in range(2)], training=training, **options
    )
    assert calls == [1, 1]


def test_with_inductor(backend):
    lengths = torch.tensor([[6, 2, 4], [5, 5, 1]])
    assert compare(
        backend,
        lambda layer: [{"input": data(layer, 6, 3), "lengths": held} for held in lengths],
        compiler="inductor",
        **DEEP,
    ) == [1, 1]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_other_lengths_are_no_other_graph(backend, training):
    lengths = ([6, 2, 4], [3, 3, 2], [6, 6, 6], [5, 1, 1], [1, 1, 1])

    def calls(layer):
        return [{"input": data(layer, 6, 3), "lengths": torch.tensor(held)} for held in lengths]

    assert compare(backend, calls, training=training) == [1] * 5


@pytest.mark.parametrize("changes", ["T", "B", "T past max_length", "start"])
def test_at_most_one_more_for_other_sizes(changes):
    sizes = {
        "T": [(6, 3), (5, 3), (4, 3), (3, 3)],
        "B": [(6, 3), (6, 4), (6, 2), (6, 5)],
        "T past max_length": [(4, 3), (6, 3), (9, 3), (12, 3)],
        "start": [(4, 3)] * 4,
    }[changes]

    def calls(layer):
        starts = (2, 3, 5, 9) if changes == "start" else (0,) * 4
        lengths = [torch.randint(1, t + 1, (b,)) for t, b in sizes]
        return [
            {"input": data(layer, t, b), "lengths": held, "start": start}
            for (t, b), held, start in zip(sizes, lengths, starts, strict=True)
        ]

    assert compare("reference", calls)[-1] <= 2


def test_lengths_on_a_device(backend, monkeypatch):
    if DEVICE == "cpu":
        device_lengths(monkeypatch)
    calls = [torch.tensor(held, device=DEVICE) for held in ([6, 2, 4], [3, 3, 2])]
    assert compare(backend, lambda n: [{"input": data(n, 6, 3), "lengths": held} for held in calls], **DEEP) == [1, 1]


def test_a_list_of_lengths():
    """It is a constant to the compiler, unlike a tensor: right, and compiled anew."""
    assert compare("reference", lambda n: [{"input": data(n, 6, 3), "lengths": [6, 2, 4]} for _ in range(2)]) == [1, 1]


def test_packed_sequences(backend):
    def packed(layer, *lengths):
        return pack_sequence([data(layer, n) for n in lengths], enforce_sorted=False)

    def calls(layer):
        return [{"input": packed(layer, *held)} for held in ([6, 2, 4], [3, 3, 2], [6, 5, 6])]

    assert compare(backend, calls, **DEEP)[-1] <= 2


def test_a_packed_sequence_that_does_not_say_how_many():
    layer = layer_of("reference")
    packed = pack_sequence([data(layer, n) for n in (4, 2)])
    with pytest.raises(Exception, match=r"enforce_sorted=False, or give hx"):
        compiled(layer)(packed)
    with_breaks = torch.compile(copy.deepcopy(layer), backend="aot_eager")
    torch.testing.assert_close(with_breaks(packed)[0].data, copy.deepcopy(layer)(packed)[0].data, **CLOSE)
    hx = tuple(torch.randn(1, 2, 4).double() for _ in range(2))
    torch.testing.assert_close(compiled(copy.deepcopy(layer))(packed, hx)[0].data, layer(packed, hx)[0].data, **CLOSE)


def test_states_and_shapes(backend):
    def states(layer, places, *batch):
        return tuple(torch.randn(places, *batch, 4, dtype=layer.weight_hh_l0.dtype, device=DEVICE) for _ in range(2))

    compare(
        backend,
        lambda n: [{"input": data(n, 3, 6), "hx": states(n, 4, 3), "lengths": RAGGED}],
        batch_first=True,
        **DEEP,
    )
    compare(backend, lambda n: [{"input": data(n, 6), "hx": states(n, 1)}], training=False)


def test_the_cell(backend):
    layer = layer_of(backend, cell_norm=True)
    eager = BNLSTMCell.from_layer(layer)
    twin = copy.deepcopy(eager)
    run, x = compiled(twin), data(layer, 5, 3)
    hx = ours = None
    for t in range(5):
        hx, ours = eager(x[t], hx, t), run(x[t], ours, t)
        torch.testing.assert_close(ours, hx, **BOUNDS[backend])
    hx[0].sum().backward(), ours[0].sum().backward()
    same(eager, twin, BOUNDS[backend])


@pytest.mark.parametrize("reverse", [False, True])
def test_the_pure_function(backend, reverse):
    layer = layer_of(backend)
    x = data(layer, 6, 3)

    def run(x, lengths):
        parameters, statistics = layer._parameters_of("_l0"), layer._statistics_of("_l0")
        options = {"reverse": reverse, "input_stats": "time", "backend": backend}
        result = bn_lstm(x, parameters, statistics, lengths=lengths, training=True, **options)
        return result.output, result.h_n, result.moments

    found, expected = torch.compile(run, fullgraph=True, backend="aot_eager")(x, RAGGED), run(x, RAGGED)
    torch.testing.assert_close(found[:2], expected[:2], **BOUNDS[backend])
    statistics = layer._statistics_of("_l0")
    learnt = [update_statistics(statistics, moments) for moments in (found[2], expected[2])]
    for mine, theirs in zip(learnt[0][:2], learnt[1][:2], strict=True):
        torch.testing.assert_close(tuple(mine), tuple(theirs), **BOUNDS[backend])


class Model(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.below, self.layer, self.head = nn.Linear(3, 3), layer, nn.Linear(8, 2)

    def forward(self, x, lengths):
        output, (h_n, _) = self.layer(self.below(x).relu(), lengths=lengths)
        return self.head(output.float()).square().mean() + h_n.float().square().sum()


def test_a_model_under_autocast(backend):
    eager = Model(make_layer(dtype=torch.float32, backend=backend, **DEEP)).to(DEVICE)
    twin = copy.deepcopy(eager)
    run = compiled(twin)
    x = torch.randn(6, 8, 3, device=DEVICE)
    lengths = torch.tensor([6, 2, 4, 3, 6, 6, 5, 1])
    with torch.autocast(DEVICE, torch.float16):
        expected, found = eager(x, lengths), run(x, lengths)
    expected.backward(), found.backward()
    # the same products in float16; a fused addition may round its input once less: 2⁻¹¹ of numbers of order one
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    same(eager, twin, {"rtol": 2e-2, "atol": 2e-3})


def test_training_goes_on_in_the_same_graph(backend):
    """Steps of an optimiser, evaluation in between, and a state_dict from one to the other."""
    eager = layer_of(backend)
    twin = copy.deepcopy(eager)
    run = compiled(twin)
    optimisers = [torch.optim.SGD(layer.parameters(), 0.1) for layer in (eager, twin)]
    for k in range(6):
        x, lengths = data(eager, 6, 3), torch.randint(1, 7, (3,))
        results = [layer(x, lengths=lengths)[0] for layer in (eager, run)]
        torch.testing.assert_close(results[1], results[0], **BOUNDS[backend])
        for optimiser, result in zip(optimisers, results, strict=True):
            optimiser.zero_grad()
            result.square().mean().backward()
            optimiser.step()
        if k % 3 == 2:
            with torch.no_grad():
                evaluated = [layer(x, lengths=lengths)[0] for layer in (eager.eval(), run.eval())]
            torch.testing.assert_close(evaluated[1], evaluated[0], **BOUNDS[backend])
            eager.train(), run.train()
    assert compilations() == 2  # training and evaluation
    same(eager, twin, BOUNDS[backend])


def test_gradients_in_evaluation_follow_the_buffers(backend):
    """What the operators remember of a population is forgotten when that changes."""
    eager = layer_of(backend).eval()
    twin = copy.deepcopy(eager)
    run, x = compiled(twin), data(eager, 6, 3)
    for layer in (eager, twin):
        layer(x)
        with torch.no_grad():
            layer.mean_hh_l0.add_(1)
    same_step(eager, twin, run, {"input": x}, BOUNDS[backend])
    with torch.inference_mode():
        torch.testing.assert_close(run(x)[0], eager(x)[0], **BOUNDS[backend])


def test_noise_and_dropout_are_there():
    layer = layer_of("reference", num_layers=2, dropout=0.5, initial_noise=1.0)
    run, x = compiled(layer), data(layer, 6, 3)
    first, second = run(x)[0], run(x)[0]
    assert not torch.equal(first, second)
    assert torch.isfinite(layer.mean_hh_l1).all()
    layer.eval()
    assert torch.equal(run(x)[0], run(x)[0])


def test_the_backend_is_the_one_that_is_asked_for(monkeypatch):
    """By a context, too: another one is another graph, and not what was compiled before."""
    need_kernels()
    layer = make_layer(dtype=torch.float32).to(DEVICE)
    run, x = compiled(layer), torch.randn(6, 3, 3, device=DEVICE)
    noted = launched(monkeypatch)
    with use_backend("reference"):
        run(x)[0].sum().backward()
    assert not noted
    with use_backend("triton"):
        run(x)[0].sum().backward()
    assert noted
    noted.clear()
    with use_backend("reference"):
        run(x)[0].sum().backward()
    assert not noted
    assert compilations() == 2
    layer.backend = "triton"
    run(x)[0].sum().backward()
    assert noted


def test_another_thread_that_leaves_its_context_takes_nothing_away(monkeypatch):
    need_kernels()
    run, x = compiled(make_layer(dtype=torch.float32).to(DEVICE)), torch.randn(6, 3, 3, device=DEVICE)
    noted = launched(monkeypatch)
    entered, leave = threading.Event(), threading.Event()

    def other():
        with use_backend("reference"):
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(60)
    with use_backend("triton"):
        leave.set()
        thread.join()
        run(x)[0].sum().backward()
    assert noted


def test_a_step_that_is_not_finite(backend):
    layer = layer_of(backend)
    before = buffers(layer)
    x = data(layer, 6, 3)
    x[3, 1] = float("nan")
    compiled(layer)(x)
    after = buffers(layer)
    assert after.pop("_skipped_steps") == 1
    before.pop("_skipped_steps")
    assert_same_buffers(after, before)
    with pytest.warns(RuntimeWarning, match="1 training step"):
        layer.eval()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"lengths": torch.tensor([7, 2, 4])}, "lengths must be at most T = 6"),
        ({"lengths": torch.tensor([0, 2, 4])}, "lengths must be at least 1"),
        ({"lengths": torch.tensor([6, 2])}, r"lengths must have shape \(3,\)"),
        ({"lengths": torch.tensor([6.0, 2, 4])}, "lengths must be integers"),
        ({"input": torch.randn(6, 1, 3).double()}, "at least 2 sequences"),
        ({"input": torch.randn(6, 3, 2).double()}, "3 features"),
        ({"hx": (torch.zeros(1, 3, 5).double(),) * 2}, "h_0"),
        ({"start": -1}, "start must be at least 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_input(change, match):
    layer = layer_of("reference")
    before = buffers(layer)
    with pytest.raises(Exception, match=match):  # dynamo wraps what it meets while it traces
        compiled(layer)(**{"input": data(layer, 6, 3), **change})
    assert_same_buffers(buffers(layer), before)


def test_estimates_of_a_compiled_model():
    """It runs as it was written for them, and compiled again afterwards."""
    layer = layer_of("reference")
    run, x = compiled(layer), data(layer, 6, 4)
    run(x)
    twin = copy.deepcopy(layer)
    for mode in ("batches", "whole", "paper"):
        estimate_statistics(run, [{"input": x, "lengths": [6, 2, 4, 4]}], mode)
        estimate_statistics(twin, [{"input": x, "lengths": [6, 2, 4, 4]}], mode)
        assert_same_buffers(buffers(layer), buffers(twin))
    before = compilations()
    run(x)
    assert compilations() == before


@pytest.mark.parametrize("around", ["inside", "outside"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(around, reentrant):
    """Equal lengths as without one, and learnt from once; unequal ones take a population that is gone by then."""
    eager = layer_of("reference")
    twin = copy.deepcopy(eager)
    if around == "inside" and reentrant:
        pytest.skip("dynamo does not take reentrant checkpoints")

    def recomputed(layer):
        return lambda x, lengths: checkpoint(lambda y: layer(y, lengths=lengths)[0], x, use_reentrant=reentrant)

    if around == "inside":
        run = torch.compile(recomputed(twin), fullgraph=True, backend="aot_eager")
    else:
        run = recomputed(compiled(twin))
    x = data(eager, 6, 3).requires_grad_()
    (expected,) = torch.autograd.grad(eager(x)[0].square().sum(), x)
    (output,) = (run(x, None),)
    output.square().sum().backward()
    torch.testing.assert_close(x.grad, expected, **CLOSE)
    assert_same_buffers(buffers(twin), buffers(eager))
    output = run(x, RAGGED)
    with pytest.raises(RuntimeError, match="a backward runs a compiled BN-LSTM again"):
        output.square().sum().backward()
    eager(x, lengths=RAGGED)
    assert_same_buffers(buffers(twin), buffers(eager))
    for layer in (eager, twin):
        layer.prior_count = 0  # nothing is taken from the population
    x.grad = None
    (expected,) = torch.autograd.grad(eager(x, lengths=RAGGED)[0].square().sum(), x)
    run(x, RAGGED).square().sum().backward()
    torch.testing.assert_close(x.grad, expected, **CLOSE)


@pytest.mark.parametrize(("compiler", "match"), [("aot_eager", "double backward"), ("eager", "first derivatives only")])
def test_second_derivatives_are_refused(compiler, match):
    layer = layer_of("reference")
    x = data(layer, 6, 3).requires_grad_()
    run = compiled(layer, compiler)
    with pytest.raises(RuntimeError, match=match):
        torch.autograd.grad(run(x)[0].square().sum(), x, create_graph=True)[0].sum().backward()
