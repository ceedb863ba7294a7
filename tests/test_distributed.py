"""Several processes over gloo that share a batch, held against one process that has all of it."""

from __future__ import annotations

import pytest
import torch

from tests.support import assert_same_buffers
from tests.support.rank_cases import CASES, run_case
from tests.support.ranks import run_ranks

JOBS = {2: ["cases"], 4: ["cases"]}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of all jobs, [rank][job], of a number of ranks; each number is started once."""
    found: dict[int, list] = {}

    def results(size: int, job: str) -> list:
        if size not in found:
            found[size] = run_ranks("tests.rank_jobs", JOBS[size], size, tmp_path_factory.mktemp("ranks"))
        mine = [rank[job] for rank in found[size]]
        failed = [f"rank {k}: {text}" for k, text in enumerate(mine) if isinstance(text, str)]
        if failed:
            pytest.fail("\n".join(failed))
        return mine

    return results


def padded(parts: list[torch.Tensor]) -> torch.Tensor:
    """Each rank's [T_r, B_r, ·] → [T, B, ·]."""
    steps = max(part.shape[0] for part in parts)
    return torch.cat([torch.cat([p, p.new_zeros(steps - p.shape[0], *p.shape[1:])]) for p in parts], 1)


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, cases in CASES.items() for name in cases])
def test_ranks_are_one_batch(ranks, size, name):
    case, mine = CASES[size][name], [found[name] for found in ranks(size, "cases")]
    whole = run_case(case, None)
    # The merge adds in another order: roundings of numbers of order one behind 1/√ε, of which the gradient through
    # seven steps has a few in a row. In float32 that is 1e-5 of the largest.
    exact = (
        {"rtol": 1e-8, "atol": 1e-9} if case.options.get("dtype") is not torch.float32 else {"rtol": 0, "atol": 1e-5}
    )

    def close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
        bound = dict(exact)
        if expected.dtype == torch.float32:
            bound["atol"] *= max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(found, expected, **bound, msg=lambda text: f"{what}: {text}")

    for k, expected in enumerate(whole["steps"]):
        for what, value in expected.items():
            close(padded([found["steps"][k][what] for found in mine]), value, f"{what} of step {k}")
    for what, value in whole["parameters"].items():
        close(sum(found["parameters"][what] for found in mine), value, what)
    for what, value in whole["buffers"].items():
        close(mine[0]["buffers"][what], value, what)
    for other in mine[1:]:
        assert_same_buffers(mine[0]["buffers"], other["buffers"])  # to the bit
