"""Models that communicate in their forward, in passes over unequal numbers of items: on two ranks over gloo."""

from __future__ import annotations

import re

import torch

from tests.rank_jobs import Stack, items_of
from tests.support import assert_same_buffers, buffers
from tests.support.ranks import run_ranks
from tests.wrapped_jobs import MODES, even_items
from triton_bnlstm import estimate_statistics

CLOSE = {"rtol": 1e-8, "atol": 1e-9}  # float64 in another order, behind 1/√ε


def estimated(items, mode):
    model = Stack()
    estimate_statistics(model, items, mode)
    return buffers(model)


def test_ddp_sends_nothing_around(tmp_path):
    found = run_ranks("tests.wrapped_jobs", ["ddp"], 2, tmp_path)
    first, second = (of_rank["ddp"] for of_rank in found)
    assert not isinstance(first, str), first
    assert not isinstance(second, str), second
    for mode in MODES:
        torch.testing.assert_close(first[mode], estimated(items_of(None, 2), mode), **CLOSE)
        assert_same_buffers(first[mode], second[mode])
    assert_same_buffers(second["alone"], second["whole"])
    assert not first["alone"]["first.mean_hh_l0"].equal(second["alone"]["first.mean_hh_l0"])
    assert_same_buffers(first["sent"], second["sent"])


def test_ranks_that_share_parameters_need_as_many_items(tmp_path):
    found = [of_rank["sharded"] for of_rank in run_ranks("tests.wrapped_jobs", ["sharded"], 2, tmp_path)]
    for rank, of_rank in enumerate(found):
        assert not isinstance(of_rank, str), of_rank
        for mode in MODES:
            torch.testing.assert_close(of_rank[mode], estimated(even_items(None), mode), **CLOSE)
            uneven = r"ValueError: batches: the model's parameters are divided among ranks.* after {} item\(s\)"
            assert re.match(uneven.format(1), of_rank[f"uneven, {mode}"])
            assert re.match(uneven.format(0), of_rank[f"none, {mode}"])
            assert of_rank[f"changed, {mode}"] == []
        for mode in ("batches", "paper"):
            other = "PeerError: process_group: estimate_statistics failed on another rank"
            assert of_rank[f"loader, {mode}"].startswith((other, "OSError: the disk is gone")[rank])
            assert of_rank[f"call, {mode}"].startswith((other, "OverflowError: a large loss")[rank])
