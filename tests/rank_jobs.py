"""What the processes of tests/test_distributed.py do; each function is one job, run by every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.rank_cases import CASES, run_case


def cases(rank: int, size: int, folder: Path) -> dict[str, Any]:
    return {name: run_case(case, rank) for name, case in CASES[size].items()}
