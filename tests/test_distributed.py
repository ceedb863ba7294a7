"""Several processes over gloo that share a batch, held against one process that has all of it."""

from __future__ import annotations

import copy
import pickle
import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from tests.rank_jobs import ALL, Model, Stack, inputs, items_of
from tests.support import assert_same_buffers, buffers, make_layer, oracle_of
from tests.support.rank_cases import CASES, run_case
from tests.support.ranks import GROUP_SECONDS
from triton_bnlstm import BNLSTM, BNLSTMCell, convert_sync, estimate_statistics

# float64 in another order, behind 1/√ε and a few steps of a gradient
CLOSE: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-9}


def padded(parts: list[torch.Tensor]) -> torch.Tensor:
    """Each rank's [T_r, B_r, ·] → [T, B, ·]."""
    steps = max(part.shape[0] for part in parts)
    return torch.cat([torch.cat([p, p.new_zeros(steps - p.shape[0], *p.shape[1:])]) for p in parts], 1)


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, cases in CASES.items() for name in cases])
def test_ranks_are_one_batch(ranks, size, name):
    case, mine = CASES[size][name], [found[name] for found in ranks(size, "cases")]
    whole = run_case(case, None)
    # float32 rounds 5e8 times as coarsely as float64: 1e-5 of the largest number
    exact = (
        {"rtol": 1e-8, "atol": 1e-9} if case.options.get("dtype") is not torch.float32 else {"rtol": 0, "atol": 1e-5}
    )

    def close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
        bound = dict(exact)
        if expected.dtype == torch.float32:
            bound["atol"] *= max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(found, expected, **bound, msg=partial("{}: {}".format, what))

    for k, expected in enumerate(whole["steps"]):
        for what, value in expected.items():
            close(padded([found["steps"][k][what] for found in mine]), value, f"{what} of step {k}")
    for what, value in whole["parameters"].items():
        close(sum(found["parameters"][what] for found in mine), value, what)
    for what, value in whole["buffers"].items():
        close(mine[0]["buffers"][what], value, what)
    for other in mine[1:]:
        assert_same_buffers(mine[0]["buffers"], other["buffers"])  # to the bit


def test_ranks_are_the_oracle(ranks):
    """The single process is judged elsewhere; one case against the equations themselves."""
    case, mine = CASES[2]["different steps"], [found["different steps"] for found in ranks(2, "cases")]
    layer = make_layer(max_length=5)
    x = 3 + torch.randn(9, 6, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    zeros = torch.zeros(6, 4, dtype=torch.float64)
    expected = oracle_of(layer).run(x[:7], list(case.lengths), zeros, zeros, True)[0]
    torch.testing.assert_close(padded([found["steps"][0]["output"] for found in mine]), expected.detach(), **CLOSE)


def assert_close(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **CLOSE, msg=partial("{}: {}".format, name))


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_ddp_together_is_one_process(ranks):
    model = Model(**ALL)
    for seed in range(3):
        model.zero_grad()
        (model(*inputs(seed, None)).sum() / 2).backward()  # DistributedDataParallel averages over the ranks
    evaluated = model.eval()(*inputs(9, None))
    for found in ranks(2, "ddp"):
        assert_close(found["together"]["gradients"], gradients_of(model))
        assert_close(found["together"]["buffers"], buffers(model.layer))
        torch.testing.assert_close(found["together"]["evaluated"], evaluated, **CLOSE)
    assert_same_buffers(*(found["together"]["buffers"] for found in ranks(2, "ddp")))


def test_ddp_alone_has_the_first_rank_s_statistics(ranks):
    """Without a process group each rank normalises by itself, and at each call takes over rank 0's statistics."""
    model, results = Model(**ALL), []
    for seed in range(3):
        of_ranks = [copy.deepcopy(model) for _ in range(2)]
        for rank, each in enumerate(of_ranks):
            each.zero_grad()
            each(*inputs(seed, rank)).sum().backward()
        model, results = of_ranks[0], of_ranks
    grads = [gradients_of(each) for each in results]
    for rank, found in enumerate(ranks(2, "ddp")):
        assert_close(found["alone"]["gradients"], {name: (grads[0][name] + grads[1][name]) / 2 for name in grads[0]})
        assert_close(found["alone"]["buffers"], buffers(results[rank].layer))


def test_fsdp_is_one_process(ranks):
    model = Model(**ALL)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(*inputs(0, None)).sum().backward()
    optimiser.step()
    found = ranks(2, "fsdp")
    for each in found:
        assert_close(each["parameters"], {name: p.detach() for name, p in model.named_parameters()})
        assert_close(each["buffers"], buffers(model.layer))
    total = sum(p.numel() for p in model.parameters())
    assert all(each["sharded"] < 0.6 * total for each in found)  # half, but for what two ranks cannot divide


def test_fsdp_in_another_precision(ranks):
    """Nearly float64's numbers, in statistics that are float64."""
    layer = make_layer(**ALL)
    x, lengths = inputs(0, None)
    output = layer(x, lengths=lengths)[0]
    output.square().sum().backward()
    found = ranks(2, "fsdp_mixed")
    torch.testing.assert_close(padded([each["output"] for each in found]), output.detach(), rtol=0, atol=0.05)
    for name, value in gradients_of(layer).items():
        far = 0.1 * float(value.abs().max())
        torch.testing.assert_close(
            found[0]["gradients"][name], value, rtol=0, atol=far, msg=partial("{}: {}".format, name)
        )
    for name, value in buffers(layer).items():
        torch.testing.assert_close(found[0]["buffers"][name], value, rtol=0.05, atol=0.05)  # dtypes, too
    assert_same_buffers(*(each["buffers"] for each in found))


def test_losses_of_other_parts(ranks):
    layer = make_layer(**ALL)
    x, lengths = inputs(0, None)
    x.requires_grad_()
    output, (h_n, _) = layer(x, lengths=lengths)
    (h_n[2, :3].square().sum() + output[:, 3:, 4:].square().sum()).backward()
    found = ranks(2, "losses")
    torch.testing.assert_close(padded([each["x"] for each in found]), x.grad, **CLOSE)
    first, second = (each["parameters"] for each in found)
    assert_close({name: first[name] + second[name] for name in first}, gradients_of(layer))


def test_nobody_is_asked_in_evaluation_or_alone(ranks):
    found = ranks(2, "empty_passes")[0]
    x, lengths = inputs(0, None)
    assert torch.equal(found["evaluated"], make_layer(**ALL).eval()(x, lengths=lengths)[0])
    assert torch.equal(found["trained"], make_layer(**ALL)(x, lengths=lengths)[0])
    assert "at least 2 sequences, got 1" in found["B = 1"]
    assert "an empty batch (B = 0)" in found["B = 0"]


def test_no_rank_learns_what_is_not_finite_on_one(ranks):
    for found in ranks(2, "not_finite"):
        assert found["changed"] == ["_skipped_steps"]
        assert len(found["told"]) == 1
        assert found["told"][0].startswith("1 training step(s) had batch statistics that are not finite")


def test_statistics_are_the_same_bits_whatever_the_weights(ranks):
    assert_same_buffers(*(found["buffers"] for found in ranks(2, "unequal_weights")))


def test_nothing_outlives_its_graph(ranks):
    assert [found["kept"] for found in ranks(2, "forgotten")] == [[1, 0], [1, 0]]


def test_one_order_of_all_backwards(ranks):
    """Two layers, two directions: each but the first directly waits for its successor."""
    assert [found["chained"] for found in ranks(2, "forgotten")] == [3, 3]


@pytest.mark.parametrize("kind", ["checkpoint", "reentrant", "compiled"])
def test_run_again_or_compiled(ranks, kind):
    for found in ranks(2, "recomputed"):
        assert_close(found[kind], found["plain"])


REFUSED = {
    "start": r"ValueError: process_group: .* start: 0 on rank 0, 3 on rank 1",
    "options": r"ValueError: process_group: .* prior_count: None on rank 0, 2.0 on rank 1",
    "gradients": r"ValueError: process_group: .* gradients are recorded: False on rank 0, True on rank 1",
    "frozen": r"ValueError: process_group: .* input or hx require gradients: True on rank 0, False on rank 1",
    "one sequence": r"ValueError: input: .* at least 2 sequences over all ranks of process_group together, got 1",
    "triton": r'RuntimeError: backend="triton": process_group: .* reference path only',
    "double": r"RuntimeError: process_group: .* neither gradients of gradients",
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_on_all_ranks(ranks, what):
    for found in ranks(2, "refused"):
        assert re.match(REFUSED[what], found[what]), found[what]


def test_after_refusals_all_is_as_before(ranks):
    whole = make_layer(cell_norm=True)
    x, lengths = inputs(0, None)
    whole(x, lengths=lengths)
    found = ranks(2, "refused")
    assert [each["changed"] for each in found] == [[], []]
    output = padded([each["output"] for each in found])  # of a second step, which stands on the first
    torch.testing.assert_close(output, whole(x, lengths=lengths)[0].detach(), **CLOSE)


def test_a_gpu_is_told_once_of_the_reference_path(ranks):
    for found in ranks(2, "refused"):
        (told,) = found["told"]
        assert re.match("triton_bnlstm runs on the reference path: process_group: .*reference path only", told)


def test_groups_of_a_layer(ranks):
    for found in ranks(4, "handles"):
        assert found["shared"] == [True] * 4
        assert all("process_group=<ProcessGroup of 4 ranks>" in text for text in found["repr"])
        assert re.match('TypeError: process_group: .* cannot be pickled .* "world" .* or None', found["saved"])
        assert found["state_dict"] == ""
        assert re.match("TypeError: process_group must be None, .*not in the group", found["no member"])
        assert found["loaded"] == "world"
        assert torch.equal(found["output True"], found["output False"])


def test_two_groups_at_a_time(ranks):
    found = ranks(4, "halves")
    for k in range(2):
        layer = make_layer(**ALL)
        x, lengths = inputs(k, None)
        layer(x, lengths=lengths)[0].square().sum().backward()
        first, second = (found[2 * k + j]["parameters"] for j in range(2))
        assert_close({name: first[name] + second[name] for name in first}, gradients_of(layer))
        assert_close(found[2 * k]["buffers"], buffers(layer))
    assert not torch.equal(found[0]["buffers"]["mean_hh_l0"], found[2]["buffers"]["mean_hh_l0"])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("mode", ["batches", "paper", "whole"])
@pytest.mark.parametrize("own_group", [False, True])
def test_estimates_of_all_items(ranks, size, mode, own_group):
    model = Stack()
    estimate_statistics(model, items_of(None, size), mode)
    found = [each[f"{mode}, {own_group}"] for each in ranks(size, "estimates")]
    assert_close(found[0], buffers(model))
    for other in found[1:]:
        assert_same_buffers(found[0], other)


REFUSED_ESTIMATES = {
    "pass, batches": ("PeerError: process_group: .*rank 1.*OverflowError: an infinite", "OverflowError: an infinite"),
    "pass, whole": ("PeerError: process_group: .*rank 1.*OverflowError: an infinite", "OverflowError: an infinite"),
    "lockstep": ("PeerError: process_group: estimate_statistics failed on rank 1", "MemoryError: no memory is left"),
    "modes": ("ValueError: process_group: .* mode: 'batches' on rank 0, 'paper' on rank 1",) * 2,
    "empty": ("ValueError: batches is empty",) * 2,
    "NaN": (
        "PeerError: process_group: .*rank 1.*ValueError: batches: .*not finite",
        "ValueError: batches: .*not finite",
    ),
    "groups": ("ValueError: process_group: .* different groups",) * 2,
}


@pytest.mark.parametrize("what", REFUSED_ESTIMATES)
def test_an_estimate_that_fails_on_one_rank_fails_on_all(ranks, what):
    for found, expected in zip(ranks(2, "estimates_refused"), REFUSED_ESTIMATES[what], strict=True):
        assert re.match(expected, found[what]), found[what]
        assert found["changed"] == []


def test_a_rank_that_fails_in_the_midst_and_ends(ranks):
    """It has left the others, so it says nothing more that they would take for the rest of what they are at."""
    results = ranks(4, "crash")
    assert results[1] is results[3] is None
    for found, where in ((results[0], "forward"), (results[2], "backward")):
        assert re.match(f"CollectiveError: process_group: the {where}, .* failed on rank 0 of 2", found["error"])
        # all is learnt at the end of a forward: of one that failed nothing, while a backward stands on one that did not
        assert (found["changed"] == []) == (where == "forward")
        assert found["seconds"] < GROUP_SECONDS  # gloo sees at once that a process has gone
        error, later = found["other"].split("\n")
        assert error == "MemoryError: no memory is left"
        for own, then in ((error, later), (found["error"], found["later"])):
            assert re.match("CollectiveError: process_group: this group cannot be used any more, ", then)
            assert then.endswith(own)


# Without a group


def test_a_group_that_is_not_there():
    layer = make_layer(process_group="world")
    before = buffers(layer)
    for call in (lambda: layer(torch.zeros(6, 5, 3).double()), lambda: estimate_statistics(layer, [])):
        with pytest.raises(RuntimeError, match=r"process_group='world': torch\.distributed is not initialised"):
            call()
    with pytest.raises(RuntimeError, match="process_group='world'"):
        estimate_statistics(make_layer(), [], process_group="world")
    assert_same_buffers(before, buffers(layer))
    layer.eval()(torch.zeros(6, 1, 3).double())  # nobody to be asked


def test_a_torch_that_has_no_distributed(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    monkeypatch.delattr(torch.distributed, "ProcessGroup")
    monkeypatch.delattr(torch.distributed, "is_initialized")
    layer = make_layer(process_group="world")
    with pytest.raises(RuntimeError, match="process_group='world'"):
        layer(torch.zeros(6, 5, 3).double())
    with pytest.raises(TypeError, match="process_group must be"):
        convert_sync(layer, object())
    convert_sync(layer, None)(torch.zeros(6, 5, 3).double())


@pytest.mark.parametrize("group", ["World", 0, True, [0, 1], object()])
def test_what_is_no_group(group):
    layer = BNLSTM(3, 4, max_length=5)
    calls = [
        lambda: BNLSTM(3, 4, max_length=5, process_group=group),
        lambda: BNLSTMCell(3, 4, max_length=5, process_group=group),
        lambda: convert_sync(layer, group),
        lambda: estimate_statistics(layer, [], process_group=group),
        lambda: setattr(layer, "process_group", group),
    ]
    for call in calls:
        with pytest.raises(TypeError, match='process_group must be None, "world" or a'):
            call()
    assert layer.process_group is None


def test_convert_sync():
    model = nn.Sequential(nn.Linear(3, 3), BNLSTM(3, 4, max_length=5), nn.ModuleList([BNLSTMCell(4, 4, max_length=5)]))
    layer, cell = model[1], model[2][0]
    assert convert_sync(model) is model
    assert layer.process_group == cell.process_group == "world"
    assert "process_group='world'" in repr(layer)
    assert "process_group='world'" in repr(cell)
    assert pickle.loads(pickle.dumps(model))[1].process_group == "world"
    convert_sync(model, None)
    assert layer.process_group is None
    assert cell.process_group is None
    assert "process_group" not in repr(model)
    assert convert_sync(layer) is layer  # a layer is a model, too
    with pytest.raises(ValueError, match="model holds no BNLSTM"):
        convert_sync(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="model must be"):
        convert_sync([layer])


def test_the_group_is_handed_on():
    layer = BNLSTM.from_lstm(nn.LSTM(3, 4), max_length=5, process_group="world")
    assert layer.process_group == BNLSTMCell.from_layer(layer).process_group == "world"
    state = BNLSTM(3, 4, max_length=5).__getstate__()
    del state["_group"]
    older = BNLSTM.__new__(BNLSTM)
    older.__setstate__(state)  # as pickled by a version that had no groups
    assert older.process_group is None
