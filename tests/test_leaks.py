"""Nothing grows while a layer works, and nothing of it is left when it goes."""

from __future__ import annotations

import copy
import gc
import pickle
import pkgutil
import sys
import weakref
from contextlib import nullcontext
from importlib import import_module
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakIdKeyDictionary

import triton_bnlstm
from tests.kernel_cases import DEVICE
from tests.support import make_layer, need_kernels
from tests.support.held import Held
from triton_bnlstm import BNLSTM, BNLSTMCell, _base, dispatch, estimate_statistics
from triton_bnlstm.kernels.errors import KernelError

RAGGED = [3, 1, 2]
BACKENDS = {"reference": torch.float64, "triton": torch.float32}


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "triton":
        need_kernels()
    return request.param


# Nothing grows


def containers() -> dict[str, int]:
    """Sizes of all sets, lists and dicts of the package's modules, and of its caches."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "triton_bnlstm" or module is None:
            continue
        for attribute, value in list(vars(module).items()):
            if isinstance(value, (set, list, dict, WeakIdKeyDictionary)) and not attribute.startswith("__"):
                found[f"{name}.{attribute}"] = len(value)
            elif hasattr(value, "cache_info"):
                found[f"{name}.{attribute}"] = value.cache_info().currsize
    return found


def of_the_layer(layer: BNLSTM) -> dict[str, int]:
    """Entries that a layer keeps from call to call."""
    calls = layer._calls
    attributes = len(vars(layer)) + len(layer._parameters) + len(layer._buffers)
    hooks = len(layer._forward_hooks) + len(layer._forward_pre_hooks)
    return {
        "calls of frames": len(calls.of_frames),
        "calls of nodes": len(calls.of_nodes),
        "calls without graph": len(calls.without_graph),
        "attributes": attributes,
        "hooks": hooks,
    }


def live_tensors() -> tuple[int, int]:
    """Tensors that Python knows, and bytes behind them."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]  # asks no proxy what it is
    storages = {s.untyped_storage()._cdata: s.untyped_storage().nbytes() for s in tensors}
    return len(tensors), sum(storages.values())


def work(layer: BNLSTM, optimiser: torch.optim.Optimizer, step: int) -> None:
    """A training step on a batch of other sizes than the last one, and now and then an evaluation."""
    steps, batch = 2 + step % 3, 2 + step % 4
    lengths = None if step % 5 == 0 else [steps, *(1 + (step + k) % steps for k in range(1, batch))]
    x = torch.randn(steps, batch, 3).to(layer.rows.device, next(layer.parameters()).dtype)
    optimiser.zero_grad()
    layer(x, lengths=lengths)[0].square().sum().backward()
    optimiser.step()
    if step % 6 == 1:
        with torch.no_grad():
            layer(x, lengths=lengths)  # in training: a call without a graph
            layer.eval()(x, lengths=lengths)
        layer.train()


@pytest.fixture
def no_launches(backend, monkeypatch):
    """Kernels up to their launches: in place of what these would write there are zeros."""
    if backend != "triton":
        yield
        return
    from triton_bnlstm.kernels import launch
    from triton_bnlstm.kernels.run import only_loaded

    def zeros(*shape, dtype, device):
        return torch.zeros(shape, dtype=dtype, device=device)

    monkeypatch.setattr(launch, "empty", zeros)
    with only_loaded():
        yield


@pytest.mark.usefixtures("no_launches")
def test_a_thousand_steps_of_changing_sizes(backend):
    layer = make_layer(3, 2, max_length=4, dtype=torch.float32, backend=backend).to(DEVICE)
    optimiser = torch.optim.SGD(layer.parameters(), lr=1e-3)
    seen = []
    for step in range(1000):
        # everything comes again after 60 steps; at 400 there are the 16 calls without a graph that are kept
        if step in (400, 700):
            seen.append((live_tensors(), containers(), of_the_layer(layer)))
        work(layer, optimiser, step)
    seen.append((live_tensors(), containers(), of_the_layer(layer)))
    assert seen[0][2]["calls without graph"] == 16
    for (tensors, *others), (later, *others_later) in pairwise(seen):
        assert others_later == others
        # what earlier tests of this process have left may go meanwhile
        assert all(new <= old for new, old in zip(later, tensors, strict=True))


@pytest.mark.parametrize(
    ("backend", "save"), [("reference", "preactivations"), ("triton", "preactivations"), ("triton", "recompute")]
)
def test_no_memory_grows_that_only_a_graph_knows(backend, save):
    """Bytes after each round of the same four batches: what C++ holds is among them."""
    if backend == "triton":
        need_kernels()
    layer = make_layer(3, 2, max_length=4, dtype=BACKENDS[backend], backend=backend, save=save).to(DEVICE)
    optimiser = torch.optim.SGD(layer.parameters(), lr=1e-3, momentum=0.9)
    rounds = []
    with Held() as held:
        for _ in range(3):
            for step in (2, 3, 5, 6):
                work(layer, optimiser, step)
            gc.collect()
            rounds.append(held.bytes)
    assert held.made > 20 * rounds[-1]  # or nothing would have been let go
    assert rounds[2] == rounds[1]


def test_caches_are_bounded():
    """Every cache of the package has a largest size, or few arguments to be asked for."""
    few = {
        "triton_bnlstm.kernels.config._accelerator",  # devices
    }
    for found in pkgutil.walk_packages(triton_bnlstm.__path__, "triton_bnlstm."):
        if found.name.endswith("__main__"):
            continue
        module = import_module(found.name)
        for attribute, value in vars(module).items():
            if hasattr(value, "cache_parameters") and f"{found.name}.{attribute}" not in few:
                assert value.cache_parameters()["maxsize"] is not None, f"{found.name}.{attribute}"


def test_failed_kernels_are_known_in_a_bounded_number(monkeypatch):
    """A kernel that cannot run is tried once for each size; sizes may have no end."""
    need_kernels()
    from triton_bnlstm import fused

    monkeypatch.setattr(dispatch, "KERNEL_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(dispatch, "_MOST_KNOWN", 5)
    monkeypatch.setattr(dispatch, "_failed", set())
    monkeypatch.setattr(dispatch, "_told", set())
    tried = []

    def fails(calls, options):
        batch = calls[0].problem.packing.batch
        tried.append(batch)
        raise KernelError(f"nothing of {batch} rows")

    monkeypatch.setattr(fused, "layer", fails)
    layer = BNLSTM(3, 2, max_length=2, backend="auto", device=DEVICE)
    for batch in [*range(2, 14), 13, 12]:
        known = tried.count(batch)
        with nullcontext() if known else pytest.warns(RuntimeWarning, match=f"nothing of {batch} rows"):
            layer(torch.randn(2, batch, 3, device=DEVICE))
        assert len(dispatch._failed) <= 5
        assert len(dispatch._told) <= 5
    assert tried == list(range(2, 14))


# Nothing is left


def train(layer, x):
    layer(x, lengths=RAGGED)[0].sum().backward()


def train_equal(layer, x):
    layer(x)[0].sum().backward()


def evaluate(layer, x):
    layer.eval()(x)[0].sum().backward()


def infer(layer, x):
    with torch.inference_mode():
        layer.eval()(x)


def no_grad_in_training(layer, x):
    with torch.no_grad():
        layer(x, lengths=RAGGED)


def graph_that_nobody_runs(layer, x):
    layer(x, lengths=RAGGED)
    layer.eval()(x)


def graph_that_is_kept(layer, x):
    output = layer(x, lengths=RAGGED)[0]
    output.sum().backward(retain_graph=True)
    output.sum().backward()


def gradients_of_gradients(layer, x):
    if layer.backend == "triton":
        layer.backend = "reference"
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(layer(x, lengths=RAGGED)[0].sum(), x, create_graph=True)
    first.square().sum().backward()


def checkpointed(layer, x, use_reentrant=False):
    x = x.clone().requires_grad_()
    checkpoint(lambda z: layer(z, lengths=RAGGED)[0], x, use_reentrant=use_reentrant).sum().backward()


def checkpointed_reentrant(layer, x):
    checkpointed(layer, x, True)


def checkpoint_that_nobody_runs(layer, x):
    for use_reentrant in (False, True):
        checkpoint(lambda z: layer(z, lengths=RAGGED)[0], x.clone().requires_grad_(), use_reentrant=use_reentrant)


def exception_before_anything(layer, x):
    with pytest.raises(ValueError, match="features"):
        layer(x[..., :2])


def exception_in_the_second_layer(layer, x):
    done = []

    def fails(calls, *how):
        if done:
            raise KeyError("no more")
        done.append(real(calls, *how))
        return done[-1]

    real = _base.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_base, "run", fails)
        with pytest.raises(KeyError):
            layer(x, lengths=RAGGED)


def backward_that_ends_early(layer, x):
    def fails(gradient):
        raise KeyError("no further")

    x = x.clone().requires_grad_()
    x.register_hook(fails)
    with pytest.raises(KeyError):
        layer(x, lengths=RAGGED)[0].sum().backward()


def step_that_is_skipped(layer, x):
    with pytest.warns(RuntimeWarning, match="not finite"):
        layer(x * float("nan"), lengths=RAGGED)


def estimates(layer, x):
    for mode in ("batches", "whole", "paper"):
        estimate_statistics(layer, [(x,)], mode=mode)
    with pytest.raises(ValueError, match="batch of one"):
        estimate_statistics(layer, [(x[:, :1],)])


def copies(layer, x):
    train(layer, x)
    layer.eval()(x)
    twin = copy.deepcopy(layer)
    twin.load_state_dict(layer.state_dict())
    pickle.loads(pickle.dumps(twin)).to_lstm()(x)
    BNLSTMCell.from_layer(twin)(x[0])
    twin.set_max_length(9)


SCENARIOS = [
    *(train, train_equal, evaluate, infer, no_grad_in_training, graph_that_nobody_runs, graph_that_is_kept),
    *(gradients_of_gradients, checkpointed, checkpointed_reentrant, checkpoint_that_nobody_runs),
    *(exception_before_anything, exception_in_the_second_layer, backward_that_ends_early, step_that_is_skipped),
    *(estimates, copies),
]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_nothing_is_left_of_a_layer(scenario, backend):
    options = {"num_layers": 2, "cell_norm": scenario is not copies, "backend": backend, "dtype": BACKENDS[backend]}
    x = torch.randn(3, 3, 3, dtype=BACKENDS[backend], device=DEVICE)
    gc.collect()
    with Held(x) as held:
        layer = make_layer(3, 2, max_length=4, **options).to(DEVICE)
        scenario(layer, x)
        left = [weakref.ref(each) for each in (layer, *layer.parameters(), *layer.buffers())]
        del layer
        gc.collect()
    assert held.made > 1000
    assert [ref() for ref in left if ref() is not None] == []
    assert held.bytes == 0


@pytest.mark.usefixtures("no_launches")
@pytest.mark.parametrize("scenario", [train, evaluate, no_grad_in_training, checkpointed, graph_that_nobody_runs])
def test_nothing_waits_for_the_garbage_collector(scenario, backend):
    """No circle of references: on a GPU memory would stay until Python comes to look."""
    options = {"num_layers": 2, "cell_norm": True, "backend": backend, "dtype": BACKENDS[backend]}
    x = torch.randn(3, 3, 3, dtype=BACKENDS[backend], device=DEVICE)
    layer = make_layer(3, 2, max_length=4, **options).to(DEVICE)
    with Held():  # imports and the like, also the mode's own
        scenario(layer, x)
    layer.zero_grad()
    layer.train()._forget_the_moment()
    gc.collect()
    gc.disable()
    try:
        with Held(x, *layer.parameters(), *layer.buffers()) as held:
            scenario(layer, x)
            layer.zero_grad()
            layer.train()._forget_the_moment()
        assert held.made > 1000
        assert held.bytes == 0
        left = weakref.ref(layer)
        del layer
        assert left() is None
    finally:
        gc.enable()


def test_a_model_is_not_held_by_its_estimate():
    model, x = nn.Sequential(make_layer(3, 2, max_length=4)), torch.randn(3, 3, 3).double()
    with pytest.raises(KeyError):
        estimate_statistics(model, [x], forward=lambda model, item: {}["nothing"])
    estimate_statistics(model, [x], mode="whole")
    left = weakref.ref(model), weakref.ref(model[0])
    assert model[0]._intercept is None
    del model
    gc.collect()
    assert [ref() for ref in left] == [None, None]
