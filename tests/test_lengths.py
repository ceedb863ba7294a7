"""Sequences of unequal lengths: padding, packing, order, tails."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

from tests.support import CLOSE, assert_same_buffers, buffers, make_layer
from triton_bnlstm.packing import Packing

LENGTHS = [3, 6, 1, 4, 6]


def rectangle(steps=6):
    return torch.randn(steps, 5, 3, dtype=torch.float64)


def two_of(**options):
    """Twice the same layer."""
    return make_layer(**options), make_layer(**options)


def fill_padding(x, lengths, value):
    filled = x.clone()
    for b, length in enumerate(lengths):
        filled[length:, b] = value
    return filled


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("input_stats", ["time", "sequence"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_padding_changes_nothing(value, input_stats, training):
    options = {"num_layers": 2, "bidirectional": True, "cell_norm": True, "input_stats": input_stats}
    results = []
    x = rectangle()
    for filling in (0.0, value):
        layer = make_layer(**options).train(training)
        padded = fill_padding(x, LENGTHS, filling).requires_grad_()
        output, (h_n, c_n) = layer(padded, lengths=LENGTHS)
        (output.sum() + h_n.square().sum() + c_n.square().sum()).backward()
        results.append([output, h_n, c_n, padded.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
    output, gradient = results[1][0], results[1][3]
    for b, length in enumerate(LENGTHS):
        assert (output[length:, b] == 0).all()
        assert (gradient[length:, b] == 0).all()
        assert (gradient[:length, b] != 0).all()


@pytest.mark.parametrize("enforce_sorted", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_packed_is_padded(enforce_sorted, batch_first, bidirectional, training):
    lengths = sorted(LENGTHS, reverse=True) if enforce_sorted else LENGTHS
    a, b = two_of(num_layers=2, bidirectional=bidirectional, batch_first=batch_first, cell_norm=True)
    a.train(training), b.train(training)
    x = rectangle()
    hx = tuple(torch.randn(4 if bidirectional else 2, 5, 4, dtype=torch.float64) for _ in range(2))
    given = x.transpose(0, 1) if batch_first else x
    output, (h_n, c_n) = a(given, hx, lengths)
    packed = pack_padded_sequence(given, torch.tensor(lengths), batch_first, enforce_sorted)
    packed_output, (packed_h, packed_c) = b(packed, hx)
    assert isinstance(packed_output, PackedSequence)
    expected = pack_padded_sequence(output, torch.tensor(lengths), batch_first, enforce_sorted)
    assert torch.equal(packed_output.batch_sizes, expected.batch_sizes)
    for indices in ("sorted_indices", "unsorted_indices"):
        mine, theirs = getattr(packed_output, indices), getattr(packed, indices)
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)
    torch.testing.assert_close(packed_output.data, expected.data, **CLOSE)
    torch.testing.assert_close(packed_h, h_n, **CLOSE)
    torch.testing.assert_close(packed_c, c_n, **CLOSE)
    for name, buffer in a.named_buffers():
        torch.testing.assert_close(dict(b.named_buffers())[name], buffer, **CLOSE)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_padded_is_row_by_row_with_population_statistics(bidirectional):
    layer = make_layer(num_layers=2, bidirectional=bidirectional, cell_norm=True).eval()
    x = rectangle()
    output, (h_n, c_n) = layer(x, lengths=LENGTHS)
    for b, length in enumerate(LENGTHS):
        alone, (h, c) = layer(x[:length, b])  # unbatched
        torch.testing.assert_close(output[:length, b], alone, **CLOSE)
        torch.testing.assert_close(h_n[:, b], h, **CLOSE)
        torch.testing.assert_close(c_n[:, b], c, **CLOSE)
    packed, _ = layer(pack_sequence([x[:length, b] for b, length in enumerate(LENGTHS)], enforce_sorted=False))
    torch.testing.assert_close(
        packed.data, pack_padded_sequence(output, torch.tensor(LENGTHS), enforce_sorted=False).data, **CLOSE
    )


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_order_of_the_batch_does_not_matter(training):
    a, b = two_of(bidirectional=True, cell_norm=True)
    a.train(training), b.train(training)
    x, order = rectangle(), torch.tensor([4, 2, 0, 3, 1])
    output, (h_n, c_n) = a(x, lengths=LENGTHS)
    turned, (h, c) = b(x[:, order], lengths=[LENGTHS[k] for k in order])
    torch.testing.assert_close(turned, output[:, order], **CLOSE)
    torch.testing.assert_close(h, h_n[:, order], **CLOSE)
    torch.testing.assert_close(c, c_n[:, order], **CLOSE)
    for name, buffer in a.named_buffers():
        torch.testing.assert_close(dict(b.named_buffers())[name], buffer, **CLOSE)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_longer_padding_does_not_matter(training):
    a, b = two_of(bidirectional=True, cell_norm=True)
    a.train(training), b.train(training)
    x = rectangle(11)
    output, (h_n, _) = a(x[:6], lengths=LENGTHS)
    extended, (h, _) = b(x, lengths=LENGTHS)
    assert extended.shape == (11, 5, 8)
    assert torch.equal(extended[:6], output)
    assert (extended[6:] == 0).all()
    assert torch.equal(h, h_n)
    assert_same_buffers(buffers(a), buffers(b))


@pytest.mark.parametrize("prior_count", [0, 3.5, None])
def test_equal_lengths_are_the_papers_whatever_the_prior(prior_count):
    """Bit for bit, with lengths given or not, and whatever the population holds."""
    x = rectangle()
    plain = make_layer(seen=False)
    expected = plain(x)[0]
    for lengths in (None, [6] * 5, torch.full((5,), 6)):
        assert torch.equal(make_layer(seen=True, prior_count=prior_count)(x, lengths=lengths)[0], expected)


@pytest.mark.parametrize("input_stats", ["time", "sequence"])
@pytest.mark.parametrize("cell_norm", [False, True])
def test_tails_of_one_sequence_are_finite_and_alive(input_stats, cell_norm):
    """n = 1 from the second step on. The first training step has no population: what the recurrence then gives is
    constant. From the second on phantom rows make it depend on the input, with a gradient."""
    layer = make_layer(seen=False, input_stats=input_stats, cell_norm=cell_norm)
    lengths = [6, 1, 1, 1, 1]
    for number in range(3):
        x = rectangle().requires_grad_()
        other = x.detach().clone()
        other[4, 0] += 1
        changed, _ = copy.deepcopy(layer)(other, lengths=lengths)
        output, _ = layer(x, lengths=lengths)
        (gradient,) = torch.autograd.grad(output[5, 0].sum(), x)
        assert torch.isfinite(output).all()
        assert torch.isfinite(gradient).all()
        if number > 0:
            assert (gradient[1:6, 0].abs() > 1e-9).all()  # in every step of the tail and every feature
            assert (changed[5, 0] - output[5, 0]).abs().max() > 1e-6
    assert all(torch.isfinite(buffer).all() for buffer in layer.buffers())


def test_plain_masking_is_the_trap():
    """prior_count=0: one row is its own mean, so the tail's hidden state carries nothing of its input."""
    layer = make_layer(prior_count=0)
    x = rectangle().requires_grad_()
    output, _ = layer(x, lengths=[6, 1, 1, 1, 1])
    (gradient,) = torch.autograd.grad(output[5, 0].sum(), x)
    assert (gradient[1:6, 0].abs() < 1e-9).all()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("input_stats", ["time", "sequence"])
@pytest.mark.parametrize("cell_norm", [False, True])
def test_lengths_on_a_device_are_lengths_on_the_host(training, input_stats, cell_norm, monkeypatch):
    """The path for lengths that the host may not look at, taken on the CPU."""
    options = {"num_layers": 2, "bidirectional": True, "cell_norm": cell_norm, "input_stats": input_stats}
    results = []
    x = fill_padding(rectangle(8), LENGTHS, float("nan"))
    for on_device in (False, True):
        if on_device:
            monkeypatch.setattr(
                Packing, "of_host_lengths", lambda steps, lengths, device: Packing.of_device_lengths(steps, lengths)
            )
        layer = make_layer(**options).train(training)
        padded = x.clone().requires_grad_()
        output, (h_n, c_n) = layer(padded, lengths=LENGTHS)
        (output.square().sum() + h_n.sum() + c_n.square().sum()).backward()
        results.append([output, h_n, c_n, padded.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
    for host, device in zip(*results, strict=True):
        torch.testing.assert_close(device, host, rtol=1e-8, atol=1e-9)


def test_a_default_device_does_not_move_lengths():
    """They belong to the host whatever device new tensors go to by default."""
    x, expected = rectangle(), make_layer()(rectangle(), lengths=LENGTHS)[0].shape
    layer = make_layer()
    torch.set_default_device("meta")
    try:
        outputs = [
            layer(x, lengths=LENGTHS)[0],
            layer(x, lengths=torch.tensor(LENGTHS, device="cpu"))[0],
        ]
    finally:
        torch.set_default_device(None)
    assert all(output.shape == expected and output.device.type == "cpu" for output in outputs)


def test_lengths_on_a_device_are_clamped():
    packing = Packing.of_device_lengths(4, torch.tensor([-3, 0, 2, 9]))
    assert packing.lengths.tolist() == [4, 2, 1, 1]
    assert packing.order.tolist() == [3, 2, 0, 1]


def test_lengths_on_a_device_are_never_looked_at():
    """Meta tensors have no data: anything that needs some on the host raises."""
    layer = make_layer(num_layers=2, bidirectional=True, cell_norm=True).to("meta")
    lengths = torch.ones(5, dtype=torch.int64, device="meta")
    x = torch.randn(6, 5, 3, dtype=torch.float64, device="meta")
    layer(x, lengths=lengths)[0].sum().backward()
    assert layer.weight_hh_l1.grad.is_meta
    assert layer.eval()(x, lengths=lengths)[0].shape == (6, 5, 8)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        lengths.tolist()  # what this test relies on
