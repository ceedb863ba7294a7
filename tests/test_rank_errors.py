"""Ranks whose calls do not go together: all raise and go on together, or none can go on (gloo, two processes)."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch

from tests.rank_errors import layers
from tests.rank_jobs import ALL, inputs
from tests.support import assert_same_buffers, make_layer

JOB = "tests.rank_errors."

OTHER = r"ValueError: process_group: .* of different calls or layers; rank 0 is at call \d+, .* with weight 0"
BACKWARDS = {
    "layers": OTHER,
    "calls": OTHER,
    "checkpoints": "ValueError: process_group: ranks 0 and 1 call different layers.* A backward .* with weight 0",
    "checkpoints of a layer": OTHER,
    "none": "ValueError: process_group: .* rank 0 is in a backward, rank 1 in a forward.* with weight 0",
    "none of a checkpoint": r"ValueError: .* rank 0 is in a forward that a backward runs .*, rank 1 in a forward\.",
    "reentrant": r"ValueError: .* rank 0 is in a forward that a backward runs .*, rank 1 in a forward\.",
    "directions": "ValueError: process_group: .* rank 0 is in a forward, rank 1 in a backward",
}


@pytest.mark.parametrize("what", BACKWARDS)
def test_backwards_of_different_calls(ranks, what):
    for found in ranks(2, JOB + "backwards"):
        assert re.match(BACKWARDS[what], found[what]), found[what]


def test_losses_of_different_layers_under_ddp(ranks):
    """find_unused_parameters is no help: what a rank leaves out, another needs its part of."""
    for found in ranks(2, JOB + "routed"):
        assert re.match(OTHER, found["left out"])
        assert found["weight 0"] == ""


def assert_sums(found: list[dict], expected: dict) -> None:
    """The ranks' parts of each gradient make the whole."""
    first, second = found
    assert first.keys() == second.keys() == expected.keys()
    for name, value in expected.items():
        say = partial("{}: {}".format, name)
        torch.testing.assert_close(first[name] + second[name], value, rtol=1e-8, atol=1e-9, msg=say)


def test_backwards_that_go_together(ranks):
    """A graph gone through twice, a part of one, and losses that each need one layer and take both."""
    found = ranks(2, JOB + "backwards_together")
    x, lengths = inputs(0, None)
    for k, seed in enumerate((1, 2)):
        layer = make_layer(seed=seed, **ALL)
        output = layer(x, lengths=lengths)[0]
        (output[:, :3] if k == 0 else output[:, 3:]).square().sum().backward()
        assert_sums([each["weight 0"][k] for each in found], {name: p.grad for name, p in layer.named_parameters()})
    layer = make_layer(seed=1, **ALL)
    layer(x, lengths=lengths)[0].square().sum().backward()
    assert_sums([each["twice"] for each in found], {name: 2 * p.grad for name, p in layer.named_parameters()})
    layer.zero_grad()
    layer(x, lengths=lengths)[0].square().sum().backward()
    part = [layer.get_parameter(name).grad for name in ("weight_hh_l1_reverse", "bias_l1")]
    assert_sums([each["part"] for each in found], dict(enumerate(part)))


EARLY = {
    "grad": "RuntimeError: process_group: torch.func's transforms",
    "vmap": "RuntimeError: vmap in training",
    "jvp": "RuntimeError: process_group: torch.func's transforms",
    "grad on one rank": "(PeerError: .* rank 0, so on all; there: )?RuntimeError: process_group: torch.func's",
    "save": "ValueError: save must be one of",
    "autotune": "ValueError: autotune must be one of",
    "destroyed": "RuntimeError: process_group: the ProcessGroup has been destroyed",
}


@pytest.mark.parametrize("what", EARLY)
def test_refused_before_the_ranks_meet(ranks, what):
    """The group is none the worse: what is refused in the midst of a call would be its end."""
    for found in ranks(2, JOB + "refused_early"):
        assert re.match(EARLY[what], found[what]), found[what]
        assert not found["changed"]
        assert found["next"] == ""


FAILURES = {
    "lengths": (
        "PeerError: process_group: .*rank 1, so on all; there: ValueError: lengths",
        "ValueError: lengths must",
    ),
    "input": ("ValueError: input must have 3 features", "TypeError: input must be a tensor"),
    "backward": ("PeerError: process_group: .*rank 1, so on all; there: ValueError: start", "ValueError: start must"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_call_that_fails_on_one_rank_fails_on_all(ranks, what):
    for found, pattern in zip(ranks(2, JOB + "failures"), FAILURES[what], strict=True):
        assert re.match(pattern, found[what]), found[what]
        assert found["changed"] == []


def test_the_next_call_is_of_one_batch(ranks):
    x, lengths = inputs(0, None)
    layer, _ = layers()
    layer.process_group = None
    output = layer(x, lengths=lengths)[0].detach()
    for found, own in zip(ranks(2, JOB + "failures"), (output[:5, :3], output[:, 3:]), strict=True):
        torch.testing.assert_close(found["output"], own, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("lengths", ["list", "floats", "none"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_rank_with_nothing_at_all(ranks, lengths, batch_first):
    layer = make_layer(**ALL)
    x, own_lengths = inputs(0, 0)
    output, (h_n, _) = layer(x, lengths=own_lengths)
    (output.square().sum() + h_n.sum()).backward()
    found = [each[f"{lengths}, {batch_first}"] for each in ranks(2, JOB + "nothing")]
    torch.testing.assert_close(found[0]["output"], output.detach(), rtol=1e-8, atol=1e-9)
    assert found[1]["output"].shape == (0, 0, 8)
    assert found[1]["h_n"].shape == (4, 0, 4)
    assert_sums([each["parameters"] for each in found], {name: p.grad for name, p in layer.named_parameters()})
    assert_same_buffers(found[0]["buffers"], found[1]["buffers"])


def test_no_steps_where_there_are_sequences(ranks):
    first, second = ranks(2, JOB + "nothing")
    assert re.match(r"ValueError: input has no time steps \(T = 0\)", first["no steps"])
    assert re.match("PeerError: process_group: .* rank 0, .* no time steps", second["no steps"])
    for found in (first, second):
        assert re.match("ValueError: input: .* at least 2 sequences over all ranks .* got 0", found["nobody"])


UNLIKE = {
    "layers": "ranks 0 and 1 call different layers, or their weights differ",
    "weights": "ranks 0 and 1 call different layers, or their weights differ",
    "reset": r"running statistics differ \(rows of the last step: 4 on rank 0, 0 on rank 1\)",
    "means": r"running statistics differ \(means: ",
    "twins, later": r"running statistics differ \(",
}


@pytest.mark.parametrize("what", UNLIKE)
def test_other_layers_or_statistics(ranks, what):
    for found in ranks(2, JOB + "unlike"):
        assert re.match(f"ValueError: process_group: {UNLIKE[what]}", found[what]), found[what]
        assert not any(found["changed"])
        assert found["broadcast"] == found["twins"] == ""


def test_what_is_no_difference(ranks):
    for found in ranks(2, JOB + "alike"):
        assert set(found.values()) == {""}
