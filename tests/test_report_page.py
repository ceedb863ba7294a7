"""Parts of a device's page that come from more than one place of the record."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.cases import HOT
from tests.report_cases import README, invented, page_of, spoil


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "results").mkdir()
    return tmp_path


def test_what_compiling_the_whole_loop_took_is_told_or_that_it_did_not_end(place: Path) -> None:
    record = invented(HOT, ("sequence", "compiled loop"))
    for fields in record["results"]:
        fields["first_call_s"] = 41.7
    spoil(record, HOT[1].key, "compiled loop", "failed", "no first training step within 60 s")
    lines = page_of(place, record).partition("compiled loop over all steps:")[2].splitlines()[2:4]
    assert lines[0].startswith("- 64 × 512, ")
    assert lines[0].endswith(": 41.7 s")
    assert lines[1].endswith(": no first training step within 60 s")


def test_lengths_on_the_device_have_a_column_of_their_own(place: Path) -> None:
    assert "ours, sequence mode, lengths on the device" in page_of(
        place, invented(HOT, ("sequence", "sequence, device lengths", "nn.LSTM"))
    )
