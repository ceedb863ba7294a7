"""Checkpoints in checkpoints, selective ones, and calls that only their place in the graph tells apart."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.support import make_layer
from triton_bnlstm.recompute import Mark

# reentrant ones say so inside of others, which do run without a graph at first
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")

LENGTHS = [6, 1, 3, 2]
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # the same operations in the same order
KINDS = [False, True]


def batch():
    return torch.randn(6, 4, 3).double()


def gradients(build, x, seed=0, backward=None):
    """Of x and of the parameters, for `build(layer, leaf)`, which gives losses that are derived one by one."""
    layer = make_layer(seen=False, cell_norm=True, seed=seed)
    leaf = x.clone().requires_grad_()
    losses = build(layer, leaf)
    for loss in losses:
        (loss.backward if backward is None else partial(backward, loss))()
    return [leaf.grad, *(p.grad for p in layer.parameters())]


def plain(function, *args, **_):
    return function(*args)


def same(build, x=None, backward=None):
    """`build(run, layer, leaf)`: under checkpoints as without."""
    x = batch() if x is None else x
    found = gradients(partial(build, checkpoint), x, backward=backward)
    for mine, expected in zip(found, gradients(partial(build, plain), x, backward=backward), strict=True):
        torch.testing.assert_close(mine, expected, **EXACT)


def one(layer, z, weight=1.0):
    return weight * layer(z, lengths=LENGTHS)[0]


@pytest.mark.parametrize("outer", KINDS)
@pytest.mark.parametrize("inner", KINDS)
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("beside", ["nothing", "a plain call", "itself", "without a graph"])
def test_a_checkpoint_in_a_checkpoint(outer, inner, calls, beside):
    """Whatever else is called on the same input: populations differ from call to call."""

    def build(run, layer, x):
        def block(z):
            return sum(one(layer, z, k + 1).sin() for k in range(calls))

        def stage(z):
            return run(block, z * 1.0, use_reentrant=inner).tanh() @ torch.ones(4, 3).double()

        losses = [run(stage, x, use_reentrant=outer).square().sum()]
        if beside == "a plain call":
            losses.insert(0, one(layer, x).sin().sum())
        elif beside == "itself":
            losses.append(run(stage, x, use_reentrant=outer).cos().sum())
        elif beside == "without a graph":
            with torch.no_grad():
                one(layer, x)
        return losses

    same(build)
    same(lambda *args: [sum(build(*args))])


@pytest.mark.parametrize("outer", KINDS)
@pytest.mark.parametrize("inner", KINDS)
def test_a_chain_of_blocks_of_blocks(outer, inner):
    def build(run, layer, x):
        def block(z):
            return one(layer, z) @ torch.eye(4, 3).double()

        def stage(z):
            for _ in range(3):
                z = run(block, z, use_reentrant=inner)
            return z

        for _ in range(2):
            x = run(stage, x, use_reentrant=outer)
        return [x.square().sum()]

    same(build)


def test_inputs_whose_sums_are_the_same():
    """Symbols one-hot: what tells them apart is only where the checkpoint stands."""
    symbols = torch.stack([torch.eye(3)[torch.tensor(order)] for order in ((0, 1, 2, 0), (1, 0, 2, 0))])
    first, second = (s[None].expand(6, 4, 3).double() for s in symbols)

    def build(run, layer, x):
        ys = [run(partial(one, layer), x * z, use_reentrant=False) for z in (first, second, second)]
        return [y.square().sum() for y in ys]

    same(build, torch.ones(6, 4, 3).double())


@pytest.mark.parametrize("use_reentrant", KINDS)
def test_a_graph_that_is_kept(use_reentrant):
    def build(run, layer, x):
        return [run(partial(one, layer), x, use_reentrant=use_reentrant).square().sum() for _ in range(2)]

    def twice(loss):
        loss.backward(retain_graph=True)
        loss.backward()

    same(build, backward=twice)


@pytest.mark.parametrize("use_reentrant", KINDS)
def test_a_backward_in_another_thread(use_reentrant):
    def build(run, layer, x):
        def stage(z):
            return run(partial(one, layer), z * 1.0, use_reentrant=use_reentrant).tanh()

        return [run(stage, x, use_reentrant=use_reentrant).square().sum() for _ in range(2)]

    def elsewhere(loss):
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()

    same(build, backward=elsewhere)


def test_forwards_in_threads():
    """Each counts its nodes by itself."""

    def build(run, layer, x):
        losses = []
        for _ in range(2):
            thread = threading.Thread(
                target=lambda: losses.append(run(partial(one, layer), x, use_reentrant=False).square().sum())
            )
            thread.start()
            thread.join()
        return losses

    same(build)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_other_hooks(where):
    def build(run, layer, x):
        def both(z):
            y = one(layer, z)
            if where == "inside":
                with save_on_cpu(), saved_tensors_hooks(lambda s: s, lambda s: s):
                    return y + one(layer, z, 3.0).sin()
            return y + one(layer, z, 3.0).sin()

        def run_both():
            return run(both, x, use_reentrant=False).square().sum()

        if where == "inside":
            return [run_both(), run_both()]
        with saved_tensors_hooks(lambda s: s, lambda s: s):
            return [run_both(), run_both()]

    same(build)


class _Hook:
    """Takes no weak reference."""

    __slots__ = ()

    def __call__(self, tensor):
        return tensor


def test_hooks_of_any_kind():
    layer = make_layer()
    with saved_tensors_hooks(_Hook(), _Hook()):
        one(layer, batch()).sum().backward()


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["equal", "ragged"])
@pytest.mark.parametrize("kept", ["mm", "add", "div", "sub", "stack"])
def test_selective_checkpoints(kept, lengths):
    """They count the operations of the first run; what a rerun leaves out, learning, is not among them."""
    wanted = getattr(torch.ops.aten, kept)

    def policy(context, operation, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if operation in vars(wanted).values() else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)

    def build(run, layer, x):
        options = {"context_fn": contexts} if run is checkpoint else {}

        def call(z):
            return layer(z, lengths=lengths)[0]

        return [run(call, x, use_reentrant=False, **options).square().sum() for _ in range(2)]

    same(build)


def test_a_call_that_was_forgotten_is_no_others():
    layer, x = make_layer(seen=False), batch().requires_grad_()
    output = checkpoint(partial(one, layer), x, use_reentrant=True)
    with torch.no_grad():
        for _ in range(17):
            one(layer, x)
    with pytest.raises(RuntimeError, match="no more than 16 calls"):
        output.sum().backward()


def test_what_another_thread_forgot_is_no_hindrance():
    """Numbers of nodes begin anew in each thread."""
    layer, x, failed = make_layer(seen=False), batch().requires_grad_(), []
    for k in range(30):
        (x * k).sum()  # numbers of this thread, beyond those of a new one
    with torch.no_grad():
        for _ in range(17):
            one(layer, batch())

    def elsewhere():
        try:
            checkpoint(partial(one, layer), x, use_reentrant=True).sum().backward()
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert not failed


def test_calls_that_cannot_be_told_apart_are_refused():
    """A function of somebody's own that computes again, on what two calls were made on."""
    layer, x = make_layer(seen=False), batch()

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z.clone()

        @staticmethod
        def backward(ctx, gradient):
            one(layer, x)
            return gradient

    with torch.no_grad():
        one(layer, x), one(layer, x)
    with pytest.raises(RuntimeError, match="cannot be told"):
        Again.apply(torch.ones(1, requires_grad=True)).sum().backward()


def test_each_rerun_looks_at_its_own_call(monkeypatch):
    """And not at all that there were, which would make a backward's time grow with their square."""
    asked, real = [], Mark.distance
    layer, x = make_layer(), batch().requires_grad_()
    total = sum(checkpoint(partial(one, layer), x + k, use_reentrant=k % 2 == 0).sum() for k in range(10))
    monkeypatch.setattr(Mark, "distance", lambda self, other: asked.append(1) or real(self, other))
    total.backward()
    assert len(asked) == 10
