"""Activation checkpoints run the forward again inside the backward: same gradients, one update of the statistics."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.support import assert_same_buffers, buffers, make_layer

EQUAL, RAGGED = [6, 6, 6, 6], [6, 1, 3, 2]


def step(layer, head, batches, use_reentrant):
    """One backward over all batches; `use_reentrant` None: no checkpoint."""
    losses = []
    for x, lengths in batches:

        def features(x, lengths=lengths):
            return layer(x * 2, lengths=lengths)[0]  # the layer's input is itself computed again

        y = features(x) if use_reentrant is None else checkpoint(features, x, use_reentrant=use_reentrant)
        losses.append(head(y).square().sum())
    sum(losses).backward()
    return [p.grad.clone() for p in (*layer.parameters(), *head.parameters())] + [x.grad for x, _ in batches]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("lengths", [EQUAL, RAGGED], ids=["equal", "ragged"])
@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("seen", [False, True])
def test_same_gradients_and_one_update(use_reentrant, lengths, calls, seen):
    data = [(torch.randn(6, 4, 3).double(), lengths) for _ in range(calls)]
    results = []
    for mode in (None, use_reentrant):
        layer = make_layer(num_layers=2, bidirectional=True, cell_norm=True, dropout=0.3, initial_noise=0.1, seen=seen)
        torch.manual_seed(1)
        head = nn.Linear(8, 2).double()
        batches = [(x.clone().requires_grad_(), lengths) for x, lengths in data]
        results.append((step(layer, head, batches, mode), buffers(layer)))
    for plain, checkpointed in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-12, atol=1e-12)  # the same operations in the same order
    assert_same_buffers(results[0][1], results[1][1])


@pytest.mark.parametrize("which", [0, 1, 2])
def test_whichever_output_goes_on(which):
    """The call is remembered with each of output, h_n and c_n: the others may be dropped at once."""
    x, gradients = torch.randn(6, 4, 3).double().requires_grad_(), []
    for checkpointed in (False, True):
        layer = make_layer(cell_norm=True, num_layers=2)

        def one(x, layer=layer):
            output, (h_n, c_n) = layer(x, lengths=RAGGED)
            return (output, h_n, c_n)[which]

        y = checkpoint(one, x, use_reentrant=False) if checkpointed else one(x)
        gc.collect()
        gradients.append(torch.autograd.grad(y.square().sum(), x)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_what_a_call_took_lives_as_long_as_its_graph(use_reentrant):
    layer = make_layer()

    def one(x):
        return layer(x, lengths=RAGGED)[0]

    x = torch.randn(6, 4, 3).double().requires_grad_()
    output = one(x) if use_reentrant is None else checkpoint(one, x, use_reentrant=use_reentrant)
    assert len(list(layer._calls._all())) == (use_reentrant is not None)
    output.sum().backward()
    del output
    gc.collect()
    assert not list(layer._calls._all())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_same_batch_again_and_again(use_reentrant):
    """Calls on equal inputs: two in one backward, then again in the next step."""
    x, results = torch.randn(6, 4, 3).double(), []
    for mode in (None, use_reentrant):
        layer, gradients = make_layer(seen=False, cell_norm=True), []
        for _ in range(3):
            leaf, loss = x.clone().requires_grad_(), 0.0
            for weight in (1.0, 2.0):

                def one(z, layer=layer):
                    return layer(z, lengths=RAGGED)[0]

                y = one(leaf) if mode is None else checkpoint(one, leaf, use_reentrant=mode)
                loss = loss + weight * y.square().sum()
            gradients.append(torch.autograd.grad(loss, [leaf])[0] if mode is not True else backward_of(loss, leaf))
        results.append((gradients, buffers(layer)))
    for plain, checkpointed in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-12, atol=1e-12)
    assert_same_buffers(results[0][1], results[1][1])


def backward_of(loss, leaf):
    loss.backward()  # reentrant checkpoints do not know torch.autograd.grad
    return leaf.grad


def standardised(x):
    """Each sequence over its own steps, as speech often is: sums over the rows are nought for all."""
    done = torch.zeros_like(x)
    for b, length in enumerate(RAGGED):
        own = x[:length, b]
        done[:length, b] = own - own.mean(0) if length > 1 else 0.0
    return done


PAIRS = {
    "far from nought": lambda: [torch.randn(6, 4, 3).double() + 100 for _ in range(2)],
    "standardised": lambda: [standardised(torch.randn(6, 4, 3).double()) for _ in range(2)],
    "the same": lambda: [torch.randn(6, 4, 3).double()] * 2,
    "in another order": lambda: [(x := torch.randn(6, 4, 3).double()), x.flip(2).roll(1, 1)],
    "at another position": lambda: [torch.randn(6, 4, 3).double()] * 2,
}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("pair", PAIRS)
def test_two_batches_wait_for_backwards_of_their_own(pair, first, use_reentrant):
    """Gradients are accumulated, or a pipeline runs: each is run again with what itself took from the population."""
    batches, results = PAIRS[pair](), []
    starts = [0, 3] if pair == "at another position" else [0, 0]
    for mode in (None, use_reentrant):
        layer = make_layer(seen=False, cell_norm=True)
        leaves, losses = [x.clone().requires_grad_() for x in batches], []
        for leaf, start in zip(leaves, starts, strict=True):

            def one(z, start=start, layer=layer):
                return layer(z, lengths=RAGGED, start=start)[0]

            y = one(leaf) if mode is None else checkpoint(one, leaf, use_reentrant=mode)
            losses.append(y.square().sum())
        for k in (first, 1 - first):
            losses[k].backward()
        results.append([leaf.grad for leaf in leaves])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_one_checkpoint_around_two_calls_on_the_same_batch(separate, use_reentrant):
    """It runs them again in their order, and two of such come in any."""
    x, results = torch.randn(6, 4, 3).double(), []
    for mode in (None, use_reentrant):
        layer = make_layer(seen=False, cell_norm=True)
        leaves, losses = [x.clone().requires_grad_() for _ in range(2)], []
        for leaf in leaves:

            def both(z, layer=layer):
                return layer(z, lengths=RAGGED)[0] + 3 * layer(z, lengths=RAGGED)[0].sin()

            y = both(leaf) if mode is None else checkpoint(both, leaf, use_reentrant=mode)
            losses.append(y.square().sum())
        for loss in losses if separate else [losses[0] + 2 * losses[1]]:
            loss.backward()
        results.append([leaf.grad for leaf in leaves])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-12, atol=1e-12)


def test_an_input_that_is_not_quite_the_same_again():
    """What comes before the layer may be rounded otherwise the second time, or summed in another order."""
    layer, noise = make_layer(seen=False), [0.0, 1e-4, 0.0, 1e-4]
    leaves = [torch.randn(6, 4, 3).double().requires_grad_() for _ in range(2)]
    twin = make_layer(seen=False)
    wanted = [torch.autograd.grad(twin(leaf, lengths=RAGGED)[0].square().sum(), leaf)[0] for leaf in leaves]
    runs = []

    def one(z):
        runs.append(z)
        return layer(z + noise[len(runs) % 4], lengths=RAGGED)[0]

    losses = [checkpoint(one, leaf, use_reentrant=False).square().sum() for leaf in leaves]
    for loss, leaf, expected in zip(losses, leaves, wanted, strict=True):
        loss.backward()
        # noise of 1e-4, times a slope of order one; another call's population is 1e-1 away
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-2, atol=5e-3)


def test_too_many_reentrant_calls_at_a_time_are_refused():
    layer = make_layer()
    total = sum(
        checkpoint(
            lambda z: layer(z, lengths=RAGGED)[0], torch.randn(6, 4, 3).double().requires_grad_(), use_reentrant=True
        ).sum()
        for _ in range(17)
    )
    with pytest.raises(RuntimeError, match="no more than 16 calls"):
        total.backward()


def test_a_recomputation_without_its_forward_is_refused():
    layer = make_layer()

    class Rerun(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            layer(torch.randn(6, 4, 3).double(), lengths=RAGGED)
            return gradient

    other = layer(torch.randn(6, 4, 3).double(), lengths=RAGGED)[0]  # another call's population will not do
    before = buffers(layer)
    with pytest.raises(RuntimeError, match="inside a backward pass"):
        (Rerun.apply(torch.ones(1, requires_grad=True)).sum() + 0 * other.sum()).backward()
    assert_same_buffers(before, buffers(layer))
