"""`python -m bench.report`: README's tables and plots say what the records say. All figures here are invented."""

from __future__ import annotations

import builtins
import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import bench.report
from bench import records
from bench.cases import CASES, HOT, PTB, SMNIST, Case
from bench.report.__main__ import main
from bench.report.campaign import Campaign
from bench.report.tables import block, put
from tests.report_cases import invented, retime, save, spoil

FEW = CASES[:3]
README = "# Title\n\n<!-- results -->\nold words\n<!-- /results -->\n\nlast words\n"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "results").mkdir()
    return tmp_path


def run(place: Path, *options: str) -> int:
    return main(["--results", str(place / "results"), "--readme", str(place / "README.md"), *options])


def text_of(place: Path) -> str:
    return (place / "README.md").read_text()


def report(place: Path, record: dict[str, Any]) -> str:
    """README with this record's tables, without drawing plots."""
    campaign = Campaign(save(record, place / "results"))
    (place / "README.md").write_text(put(README, block([campaign], place / "README.md")))
    return text_of(place)


def written(place: Path, record: dict[str, Any]) -> str:
    """README after the command itself, plots and all."""
    save(record, place / "results")
    assert run(place) == 0
    return text_of(place)


def rows_of(text: str, start: str) -> list[list[str]]:
    """Cells of all rows that begin so."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [[cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_readme_is_what_the_committed_results_give():
    assert main(["--check"]) == 0


def test_without_results_it_says_so_and_how_to_get_them(place: Path) -> None:
    assert run(place) == 0
    text = text_of(place)
    assert "No kernel has run on a GPU yet" in text
    assert "nothing in this README is a claim about their speed" in " ".join(text.split())
    assert "python -m bench.campaign --minutes 9 --out DIR --resume" in text
    assert text.startswith("# Title\n")
    assert text.endswith("<!-- /results -->\n\nlast words\n")
    assert "old words" not in text


def test_with_results_the_words_of_none_are_gone(place: Path) -> None:
    text = report(place, invented(FEW))
    assert "No kernel has run" not in text
    assert "no results" not in text.lower()
    assert "### Test GPU" in text
    for word in ("torch 2.99.0", "CUDA 13.0", "Triton 3.99.0", "driver 580.65.06", "2001-02-03", "170 passed"):
        assert word in text


def test_table_has_the_figures_of_the_record(place: Path) -> None:
    record = invented(FEW)
    times = {"sequence": 1234.0, "step": 1500.0, "compiled step": 2000.0, "reference": 9100.0}
    times |= {"F.batch_norm loop": 8200.0, "nn.LSTM": 1000.0}
    for provider, us in times.items():
        retime(record, PTB.key, provider, "training", us)
        retime(record, PTB.key, provider, "inference", us / 4)
    retime(record, PTB.key, "step", "inference", 150.0)
    for fields in record["results"]:
        for timing in fields["modes"].values():
            timing["floor_us"] = 500.0
    row = rows_of(report(place, record), "64 × 1000, T 100, D 50<br>**PTB characters**, bfloat16")[0]
    assert row[1:] == [
        "training<br>inference",
        "12.3 sequence<br>1.50 step",
        "20.0<br>5.00",
        "91.0<br>22.8",
        "82.0<br>20.5",
        "10.0<br>2.50",
        "**1.23**<br>0.60",
        "0.62<br>0.30",
        "2.47<br>0.3",
    ]


def test_cases_of_the_paper_come_first_and_tables_are_not_wide(place: Path) -> None:
    text = report(place, invented(CASES[:14]))
    sizes = [row[0] for row in rows_of(text, "") if row[1] == "training<br>inference"]
    names = [cell.split("**")[1] if "**" in cell else "" for cell in sizes]
    assert names[:5] == ["PTB characters", "sMNIST", "text8", "", ""]
    assert len(sizes) == 2 * 14  # once against those that matter, once for everybody else
    assert max(len(row) for row in rows_of(text, "")) <= 11
    for lines in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(row) for row in rows_of(lines, "")}) == 1


def test_losing_cases_are_listed_worst_first(place: Path) -> None:
    record = invented(FEW)
    for case in FEW:
        for mode in ("training", "inference"):
            retime(record, case.key, "sequence", mode, 100.0)
            retime(record, case.key, "step", mode, 200.0)
            retime(record, case.key, "nn.LSTM", mode, 400.0)
            retime(record, case.key, "compiled step", mode, 900.0)
    assert "In none of the 12 comparisons." in report(place, record)
    retime(record, HOT[0].key, "nn.LSTM", "inference", 50.0)
    retime(record, HOT[1].key, "compiled step", "training", 80.0)
    text = report(place, record)
    assert "In none of" not in text
    listed = [row for row in rows_of(text, "64 × ") if row[2].startswith(("cuDNN", "compiled"))]
    assert [(row[0][:9], row[1], row[-1]) for row in listed] == [
        ("64 × 512,", "inference", "**2.00**"),
        ("64 × 1024", "training", "**1.25**"),
    ]
    assert "slower in 1 of 3 cases" in text


def test_a_case_that_only_others_ran_is_told(place: Path) -> None:
    record = invented(FEW)
    spoil(record, PTB.key, "sequence", records.FAILED, "illegal memory access")
    spoil(record, PTB.key, "step", records.WITHHELD, "its tests failed")
    text = report(place, record)
    assert "No time of ours in training where one of them has one: PTB characters: 64 × 1000" in text
    assert rows_of(text, "64 × 1000")[0][2] == "–<sup>1,2</sup><br>–<sup>1,2</sup>"


@pytest.mark.parametrize("status", [records.WRONG, records.FAILED, records.WITHHELD, records.CANNOT])
def test_reasons_are_told_once_and_harmless(place: Path, status: str) -> None:
    record = invented(FEW)
    why = "RuntimeError: a|b\n<!-- /results --> </details> *bold* [link](x) `code` " + "long " * 60
    for case in FEW:
        spoil(record, case.key, "compiled step", status, why)
    text = report(place, record)
    told = [line for line in text.splitlines() if "RuntimeError" in line]
    assert len(told) == 1
    start = f"- <sup>1</sup> {status}: compiled step, CUDA graph (all cases): RuntimeError: a\\|b &lt;!-- "
    assert told[0].startswith(start)
    assert told[0].endswith("…")
    assert text.count("<!-- /results -->") == 1
    assert text.count("<details>") == text.count("</details>")
    assert rows_of(text, "64 × 1000")[0][3] == "–<sup>1</sup><br>–<sup>1</sup>"
    opened = text[: text.index(told[0])]
    folded = opened.count("<details>") > opened.count("</details>")
    assert folded == (status == records.CANNOT)  # what went wrong is there to see without a click


def test_failed_tests_troubles_and_other_kernels_are_told(place: Path) -> None:
    record = invented(FEW)
    record["tests"] |= {
        "failed": {"tests/test_gpu.py::test_x[a|b]": "AssertionError\nwas off"},
        "unfinished": ["test_y"],
    }
    record["troubles"] = [{"item": "profile B64", "why": "no|profiler", "source": ""}]
    record["results"][0]["source"] = "bbbbbbbbbbbb"
    text = report(place, record)
    assert "170 passed, 1 failed, 1 unfinished, 3 skipped" in text
    assert "- failed: `tests/test_gpu.py::test_x[a|b]`: AssertionError was off" in text
    assert "- `test_y`" in text
    assert "- `profile B64`: no\\|profiler" in text
    assert "**Not all figures are of the same kernels.**" in text
    assert "`aaaaaaaaaaaa` (29 results), `bbbbbbbbbbbb` (1 results)" in text


def test_folded_parts_have_the_record_s_figures(place: Path) -> None:
    text = report(place, invented(FEW))
    assert ["device memory, bytes read and written by a copy", "3.00 TB/s"] in rows_of(text, "device memory")
    assert ["matrix products, bfloat16", "790 Tflop/s"] in rows_of(text, "matrix")
    assert not rows_of(text, "matrix products, tf32")
    stages = next(row for row in rows_of(text, "64 × 512, T 100, D 512, bfloat16") if row[1] == "backward")
    assert stages[2:] == ["barrier 1.60 (52%); product 1.10 (35%); gates: did not compile", "3.10"]
    layouts = [row for row in rows_of(text, "64 × 512, T 100, D 512, bfloat16") if len(row) == 7]
    assert layouts[0][1:] == ["forward", "rows 64 → 32", "3.10", "2.90", "1.07", "12"]
    kernel = rows_of(text, "64 × 512, T 100, D 512, bfloat16 | `kernel_0")[0]
    assert kernel[1:] == ["`kernel_0|with_a_pipe`", "1", "300", "35%"]
    assert rows_of(text, " | 3 others")
    first = [row for row in rows_of(text, "64 × 512, T 100, D 512, bfloat16") if row[1] == "compiled loop"]
    assert first[0][2:] == ["too slow", "–", "–"]


def test_check_is_red_until_it_is_written(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    save(invented(FEW), place / "results")
    assert run(place, "--check") == 1
    assert "is not what the records give" in capsys.readouterr().err
    assert text_of(place) == README
    assert run(place) == 0
    assert run(place, "--check") == 0
    written = text_of(place)
    assert run(place) == 0
    assert text_of(place) == written
    (place / "README.md").write_text(written.replace("170 passed", "171 passed"))
    assert run(place, "--check") == 1
    (place / "README.md").write_text(written)
    (place / "results" / "test-gpu" / "ratios.png").unlink()
    assert run(place, "--check") == 1
    assert "ratios.png is missing" in capsys.readouterr().err


def test_kernels_that_changed_are_told_on_the_terminal_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = invented(FEW)
    save(record, place / "results")
    run(place, "--check")
    assert "measured before the kernels' last change (aaaaaaaaaaaa" in capsys.readouterr().err
    assert records.source() not in report(place, record)
    record["runs"][0]["source"] = records.source()
    save(record, place / "results")
    run(place, "--check")
    assert "last change" not in capsys.readouterr().err


def test_dry_runs_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(invented(FEW, dry_run=True), place / "results")
    assert run(place) == 1
    assert "dry run" in capsys.readouterr().err
    assert text_of(place) == README
    with pytest.raises(SystemExit):
        main(["--results", str(place / "results"), "--allow-dry-run"])  # never into the project's own README
    run(place, "--allow-dry-run")
    text = text_of(place)
    tables = len(re.findall(r"^\|:--", text, re.MULTILINE))
    assert text.count("**dry run: toy sizes on a CPU, no measurement**\n\n|") == tables > 5
    assert "#### dry run: toy sizes on a CPU, no measurement" in text


@pytest.mark.parametrize("text", ["no marks", "<!-- /results -->\n<!-- results -->", README + README])
def test_readme_without_marks_is_left_alone(place: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "README.md").write_text(text)
    assert run(place) == 1
    assert "README.md: must have <!-- results -->" in capsys.readouterr().err
    assert text_of(place) == text


def test_broken_records_are_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(invented(FEW), place / "results")
    record = json.loads(path.read_text())
    record["results"][0]["surprise"] = 1
    for content in ("{", json.dumps({"schema": 99}), json.dumps(record)):
        path.write_text(content)
        assert run(place) == 1
        assert "campaign.json" in capsys.readouterr().err
    assert main(["--results", str(place / "nowhere")]) == 1


def test_missing_data_is_no_crash(place: Path) -> None:
    full = invented(FEW)
    for name in ("runs", "layouts", "stages", "kernels", "first_calls", "results"):
        report(place, full | {name: []})
    for name in ("device", "versions", "tests", "ceilings", "cases"):
        report(place, full | {name: {}})
    report(place, records.empty())
    assert "No times have been taken." in text_of(place)
    nulls = copy.deepcopy(full)
    for fields in nulls["results"]:
        fields["modes"]["training"] |= {"us": [None, None, None]}
        fields["modes"]["inference"] |= {"floor_us": None, "wall_us": None}
        fields |= {"saved_bytes": None, "peak_bytes": None, "errors": {"outputs": None}}
    nulls["results"][0] |= {"case": "B1-H1-T1-D1-bfloat16"}
    nulls["stages"][0] |= {"whole_us": None}
    nulls["layouts"][0] = {"case": FEW[0].key, "way": "forward", "tried": 3, "default_us": None, "failed": {"x": "y"}}
    nulls["ceilings"] = {"copy_bytes_per_second": None, "why": {"copy_bytes_per_second": "no memory"}}
    text = report(place, nulls)
    assert "`B1-H1-T1-D1-bfloat16`, ours, sequence mode: ok, a case that the record does not describe" in text
    assert "`copy_bytes_per_second`: no memory" in text
    assert "- 64 × 512, T 100, D 512, bfloat16, forward, x: y" in text
    assert "None" not in text
    assert "nan" not in text.split()


def test_plots_are_written_and_stale_ones_removed(place: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = place / "results" / "test-gpu"
    text = written(place, invented(CASES[:10], ("sequence", "compiled step", "nn.LSTM")))
    (folder / "campaign.log").write_text("")
    plots = {"step_time_hidden.png", "step_time_length.png", "memory.png", "ratios.png"}
    assert {path.name for path in folder.iterdir()} == plots | {"campaign.json", "campaign.log"}
    assert len(list(folder.iterdir())) <= 8
    linked = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    assert {(place / link).resolve() for link in linked} == {(folder / name).resolve() for name in plots}
    for name in plots:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    before = (folder / "ratios.png").read_bytes()
    run(place)
    assert (folder / "ratios.png").read_bytes() == before

    text = written(place, invented([SMNIST], ("sequence",)))  # nothing to compare with, nothing to draw a line through
    assert {path.name for path in folder.glob("*.png")} == {"memory.png"}
    assert re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text) == ["results/test-gpu/memory.png"]


def test_plots_of_a_dry_run_say_so(place: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench.report import plots

    drawn = []
    record = invented(FEW, ("sequence", "nn.LSTM"))
    for dry_run in (False, True):  # the same figures
        campaign = Campaign(save(record | {"dry_run": dry_run}, place / "results", f"dry-{dry_run}"))
        plots.write(campaign)
        drawn.append((campaign.path.parent / "ratios.png").read_bytes())
    assert drawn[0] != drawn[1]
    figure = plots.ratios(campaign)
    plots.stamp(figure)
    assert "dry run: toy sizes on a CPU, no measurement" in {each.get_text() for each in figure.texts}


def test_ratios_on_the_plot_are_those_of_the_record(place: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.patches import Rectangle

    from bench.report import plots

    record = invented(FEW, ("sequence", "nn.LSTM"))
    for case, us in zip(FEW, (100.0, 200.0, 300.0), strict=True):
        retime(record, case.key, "sequence", "training", us)
        retime(record, case.key, "nn.LSTM", "training", 160.0)
    axes = plots.ratios(Campaign(save(record, place / "results"))).axes[0]
    ends = [bar.get_x() + bar.get_width() for bar in axes.patches if isinstance(bar, Rectangle)]
    assert ends == pytest.approx([300 / 160, 200 / 160, 100 / 160])
    labels = [tick.get_text() for tick in axes.get_yticklabels()]
    assert [label.split(",")[0] for label in labels] == ["PTB characters", "64×1024", "64×512"]
    colours = [tick.get_color() for tick in axes.get_yticklabels()]
    assert colours[0] == colours[1] == plots.SLOWER != colours[2]


def test_points_of_the_plot_against_hidden_size(place: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench.report import plots

    cases = [Case(64, hidden, 100, hidden) for hidden in (1024, 128, 512)] + [PTB, Case(64, 512, 200, 512)]
    record = invented(cases, ("sequence",))
    for case in cases:
        retime(record, case.key, "sequence", "training", case.hidden * case.steps)
    axes = plots.hidden(Campaign(save(record, place / "results"))).axes[0]
    assert axes.get_title() == "training"
    points = axes.get_lines()[0].get_xydata().tolist()  # type: ignore[union-attr]
    assert points == [pytest.approx([hidden, hidden]) for hidden in (128, 512, 1024)]


def test_tables_do_without_matplotlib(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *rest, **named)

    monkeypatch.delitem(sys.modules, "bench.report.plots", raising=False)
    monkeypatch.delattr(bench.report, "plots", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    save(invented(FEW), place / "results")
    assert run(place) == 1
    assert "'matplotlib' is missing; run: pip install -e '.[bench]'" in capsys.readouterr().err
    assert "### Test GPU" in text_of(place)
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
