"""Results of the jobs that ranks run, for all test files that ask for them: each number of ranks is started once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from tests.support.ranks import results_of, run_ranks

JOBS = {
    2: [
        *("cases", "ddp", "fsdp", "fsdp_mixed", "losses", "empty_passes", "not_finite", "unequal_weights"),
        *("forgotten", "recomputed", "refused", "estimates", "estimates_refused"),
        *("tests.rank_errors.backwards", "tests.rank_errors.routed", "tests.rank_errors.backwards_together"),
        *("tests.rank_errors.failures", "tests.rank_errors.refused_early", "tests.rank_errors.nothing"),
        *("tests.rank_errors.unlike", "tests.rank_errors.alike"),
    ],
    4: ["cases", "handles", "halves", "estimates", "crash"],
}


def results_in(base: Path) -> Callable[[int, str], list]:
    """Results of a job on a number of ranks, [rank]; started by one of pytest's workers, in a folder that they share.

    None where a rank has ended before.
    """
    found: dict[int, list] = {}
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def results(size: int, job: str) -> list:
        if size not in found:
            folder = base / f"{size}_ranks"
            with FileLock(base / f"{size}_ranks.lock"):
                if not (folder / "done").exists():
                    folder.mkdir()
                    run_ranks("tests.rank_jobs", JOBS[size], size, folder)
                    (folder / "done").touch()
            found[size] = results_of(size, folder)
        mine = [rank.get(job) for rank in found[size]]
        failed = [f"rank {k}: {text}" for k, text in enumerate(mine) if isinstance(text, str)]
        if failed:
            pytest.fail("\n".join(failed))
        return mine

    return results
