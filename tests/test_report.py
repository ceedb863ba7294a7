"""`python -m bench.report`: README's tables and plots say what the records say. All figures here are invented."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import bench.report
from bench import records
from bench.cases import CASES, HOT, PTB, SMNIST, Case
from bench.report.__main__ import main
from bench.report.campaign import Campaign
from bench.report.machine import cudnn
from bench.report.text import decimals, fixed, rate, seconds, significant
from tests import report_cases as made
from tests.report_cases import README, gaps, invented, page_of, report, retime, rows, run, save, spoil, text_of, written

FEW = CASES[:3]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "results").mkdir()
    return tmp_path


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
    retime(record, PTB.key, "step", "inference", 150.0)  # quicker, but not what users get
    for fields in record["results"]:
        for timing in fields["modes"].values():
            timing["floor_us"] = 500.0
    text = report(place, record)
    row = rows(text, "64 × 1000, T 100, D 50<br>**PTB characters**, bfloat16")[0]
    figures = ["12.3<br>3.08", "20.0<br>5.00", "91.0<br>22.8", "82.0<br>20.5", "10.0<br>2.50"]
    assert row[1:] == ["training<br>inference", *figures, "**1.23**<br>**1.23**", "0.62<br>0.62", "2.47<br>0.62"]


def test_cases_of_the_paper_come_first_and_tables_are_not_wide(place: Path) -> None:
    report(place, invented(CASES[:14]))
    text = page_of(place)
    sizes = [row[0] for row in rows(text, "") if row[1] == "training<br>inference"]
    names = [cell.split("**")[1] if "**" in cell else "" for cell in sizes]
    assert names[:5] == ["PTB characters", "sMNIST", "text8", "", ""]
    assert len(sizes) == 2 * 14  # on the device's page, once against those that matter, once for everybody else
    assert max(len(row) for row in rows(text, "")) <= 11
    for lines in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(row) for row in rows(lines, "")}) == 1


def test_ours_is_what_the_library_chooses(place: Path) -> None:
    record = gaps([*CASES[:8], CASES[4]])
    retime(record, PTB.key, "sequence", "training", 3000.0)
    retime(record, PTB.key, "step", "training", 2000.0)
    text = report(place, record)
    cells = {row[0].split("<br>")[0]: row for row in rows(text, "") if row[1] == "training<br>inference"}
    assert cells["64 × 1000, T 100, D 50"][2].startswith("30.0<br>")
    assert re.fullmatch(r"[\d.]+ step<sup>1</sup><br>[\d.]+ step<sup>1</sup>", cells["128 × 2000, T 180, D 27"][2])
    assert cells["64 × 512, T 100, D 512"][2] == "–<sup>2</sup><br>–<sup>2</sup>"  # step mode has a time there
    assert cells["64 × 512, T 100, D 512"][6] == "–<sup>3</sup><br>–<sup>3</sup>"
    assert "- <sup>1</sup> cannot: ours, sequence mode (text8" in text
    assert "more than 2 % faster than it in training in 1 of 5 cases (at most 1.50 times as fast with PTB" in text
    assert "FlashRNN, Haste: not installed." in text
    for each in (text, page_of(place)):  # no columns of dashes, and numbers in the order in which they are met
        assert "FlashRNN (" not in each
        marks = [int(n) for found in re.findall(r"\|.*<sup>.*", each) for n in re.findall(r"<sup>(\d+)<", found)]
        assert list(dict.fromkeys(marks)) == sorted(set(marks))
    assert "No counters: there is no program ncu (64 × 512, T 100, D 512, bfloat16; 64 × 1024" in page_of(place)
    assert "gates about 0; loads −0.200 (−6%)" in page_of(place)


def test_clocks_machines_and_versions_are_told(place: Path) -> None:
    text = report(place, gaps())
    heads = ["ours<br>(some inference: host calls)", "compiled step, CUDA graph", "reference, eager<br>(host calls)"]
    assert rows(text, "B × H")[0][2:5] == heads
    record = gaps(FEW)
    wall = next(row for row in rows(text, "64 × 1000, T 100, D 50") if len(row) == 5)
    times = {fields["provider"]: fields for fields in gaps()["results"] if fields["case"] == PTB.key}
    assert float(wall[1]) == pytest.approx(times["sequence"]["modes"]["training"]["wall_us"] / 1e3, rel=0.01)
    assert "GPU: 132 multiprocessors, 80 GiB, 50 MiB of L2, at most 1980 MHz (memory 2619 MHz) and 700 W" in text
    assert "driver 580.65.06 or 590.1 (not the same in all runs)." in text
    for words in ("Host: Invented CPU, 16 cores.", "cuDNN 9.13.0, Triton 3.99.0, NumPy 2.9.9, Python 3.11.7"):
        assert words in text
    assert len(text.splitlines()) < 120  # the rest is on the device's page
    assert re.search(r"^and \d+ more in \[results/test-gpu/README.md\]", text, re.MULTILINE)
    record["device"] |= {"multiprocessors": 1, "limits": None}
    assert "GPU: 1 multiprocessor, " in report(place, record)


def test_figures_are_short_and_alike() -> None:
    assert [fixed(value, decimals([0.3, 12.34])) for value in (0.3, 12.34, 0.01)] == ["0.3", "12.3", "&lt; 0.1"]
    assert [rate(value, "B/s") for value in (3e12, 9.8e11, 12.0)] == ["3.00 TB/s", "980 GB/s", "12.0 B/s"]
    assert [seconds(value) for value in (2.0, 1.1e-6, 4e-8)] == ["2.00 s", "1.10 µs", "40.0 ns"]
    assert [significant(value) for value in (12345.0, 123.4, 9.876, 0.5)] == ["12300", "123", "9.88", "0.500"]
    assert [cudnn(value) for value in (91300, 8907, 90100, "x")] == ["9.13.0", "8.9.7", "9.1.0", "x"]


def test_losing_cases_are_listed_worst_first(place: Path) -> None:
    record = invented(FEW)
    for case in FEW:
        for mode in ("training", "inference"):
            retime(record, case.key, "sequence", mode, 100.0)
            retime(record, case.key, "step", mode, 200.0)
            retime(record, case.key, "nn.LSTM", mode, 400.0)
            retime(record, case.key, "compiled step", mode, 900.0)
    assert "In none of 12 comparisons." in report(place, record)
    retime(record, HOT[0].key, "nn.LSTM", "inference", 50.0)
    retime(record, HOT[1].key, "compiled step", "training", 80.0)
    text = report(place, record)
    assert "In none of" not in text
    listed = [row for row in rows(text, "64 × ") if row[2].startswith(("cuDNN", "compiled"))]
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
    assert "No time of ours in training and inference where one of them has one: PTB characters: 64 × 1000" in text
    assert rows(text, "64 × 1000")[0][2] == "–<sup>1</sup><br>–<sup>1</sup>"
    assert "- <sup>1</sup> failed: ours, sequence mode (PTB characters: 64 × 1000, T 100, D 50, bfloat16): ill" in text


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
    assert rows(text, "64 × 1000")[0][3] == "–<sup>1</sup><br>–<sup>1</sup>"
    assert (text.index(told[0]) > text.index("**Not timed because")) == (status != records.CANNOT)


def test_failed_tests_troubles_and_other_kernels_are_told(place: Path) -> None:
    record = invented(FEW)
    record["tests"] |= {
        "failed": {"tests/test_gpu.py::test_x[a|b]": "AssertionError\nwas off"},
        "unfinished": ["test_y"],
    }
    record["troubles"] = [{"item": "profile B64", "why": "no|profiler", "source": ""}]
    record["results"][0]["source"] = "bbbbbbbbbbbb"
    text, rest = report(place, record), page_of(place)
    assert "170 passed, 1 failed, 1 unfinished, 3 skipped" in text
    assert "- failed: `tests/test_gpu.py::test_x[a|b]`: AssertionError was off" in text
    assert "- `test_y`" in rest
    for each in (text, rest):
        assert "**Failed as a whole: 1 item of the campaign**\n\n- profile B64: no\\|profiler" in each
    assert "0 passed:" not in text
    record["tests"]["passed"] = 0
    assert "**0 passed: nothing here says that the kernels are right on this device.**" in report(place, record)
    assert "**Not all figures are of the same kernels.**" in text
    assert "`aaaaaaaaaaaa` (29 results), `bbbbbbbbbbbb` (1 result)" in text


def test_folded_parts_have_the_record_s_figures(place: Path) -> None:
    text = page_of(place, invented(FEW))
    assert ["device memory, bytes read and written by a copy", "3.00 TB/s"] in rows(text, "device memory")
    assert ["matrix products, bfloat16", "790 Tflop/s"] in rows(text, "matrix")
    assert not rows(text, "matrix products, tf32")
    stages = next(row for row in rows(text, "64 × 512, T 100, D 512, bfloat16") if row[1] == "backward")
    assert stages[2:] == ["barrier 1.60 (52%); product 1.10 (35%); gates: did not compile", "3.10"]
    layouts = [row for row in rows(text, "64 × 512, T 100, D 512, bfloat16") if len(row) == 7]
    assert layouts[0][1:] == ["forward", "rows 64 → 32", "3.10", "2.90", "1.07", "12"]
    kernel = rows(text, "64 × 512, T 100, D 512, bfloat16 | `kernel_0")[0]
    assert kernel[1:] == ["`kernel_0|with_a_pipe`", "1", "300", "35%"]
    assert rows(text, " | 3 others")
    assert "Not timed:\n\n- 64 × 512, T 100, D 512, bfloat16, compiled loop: too slow\n" in text
    assert not re.search(r"^\|.*\|  \|.*\n\|:", text, re.MULTILINE)  # every column has a head


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
    assert run(place) == 0
    (place / "results" / "test-gpu" / "README.md").unlink()
    assert run(place, "--check") == 1
    assert "README.md is not what the records give" in capsys.readouterr().err


def test_plots_of_another_record_are_found_out(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("PIL.Image")
    record = invented(FEW, ("sequence", "nn.LSTM"))
    written(place, record)
    path = place / "results" / "test-gpu" / "ratios.png"
    with image.open(path) as opened:
        assert opened.info["Description"].startswith("ratios.png of the record ")
    old = path.read_bytes()
    retime(record, PTB.key, "nn.LSTM", "training", 77.0)
    written(place, record)
    assert run(place, "--check") == 0
    path.write_bytes(old)
    assert run(place, "--check") == 1
    assert "ratios.png is not of this record" in capsys.readouterr().err


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


def test_dry_runs_are_refused(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    save(invented(FEW, dry_run=True), place / "results")
    assert run(place) == 1
    assert "dry run" in capsys.readouterr().err
    assert text_of(place) == README
    with pytest.raises(SystemExit):
        main(["--results", str(place / "results"), "--allow-dry-run"])  # never into the project's own README
    with monkeypatch.context() as patch:
        patch.setattr(bench.report.__main__, "ROOT", place)
        (place / "link.md").symlink_to("README.md")
        for name in ("README.md", "results/../README.md", "link.md"):
            with pytest.raises(SystemExit):
                main(["--results", str(place / "results"), "--readme", str(place / name), "--allow-dry-run"])
    assert text_of(place) == README
    run(place, "--allow-dry-run")
    text = page_of(place)
    tables = len(re.findall(r"^\|:--", text, re.MULTILINE))
    assert text.count("**dry run: toy sizes on a CPU, no measurement**\n\n|") == tables > 5
    assert "## dry run: toy sizes on a CPU, no measurement" in text
    assert "#### dry run: toy sizes on a CPU, no measurement" in text_of(place)


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
    nulls = made.without_figures(full)
    text = report(place, nulls) + page_of(place)
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
    plots = {"step_time_hidden.png", "step_time_length.png", "memory.png", "ratios.png", "ratios_all.png"}
    assert {path.name for path in folder.iterdir()} == plots | {"campaign.json", "campaign.log", "README.md"}
    assert len(list(folder.iterdir())) <= 8
    image = re.compile(r"!\[[^\]]*\]\(([^)]*)\)")
    assert image.findall(text) == [f"results/test-gpu/{name}" for name in ("step_time_hidden.png", "ratios.png")]
    assert set(image.findall(page_of(place))) == plots - {"ratios.png"}
    assert "(results/test-gpu/README.md)" in text
    for name in plots:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    before = (folder / "ratios.png").read_bytes()
    run(place)
    assert (folder / "ratios.png").read_bytes() == before

    text = written(place, invented([SMNIST], ("sequence",)))  # nothing to compare with, nothing to draw a line through
    assert {path.name for path in folder.glob("*.png")} == {"memory.png"}
    assert image.findall(text) == []
    assert image.findall(page_of(place)) == ["memory.png"]
    written(place, records.empty())
    assert not list(folder.glob("*.png")) + list(folder.glob("README.md"))


def test_plots_of_a_dry_run_say_so(place: Path) -> None:
    plots = made.plots()
    drawn = []
    record = invented(FEW, ("sequence", "nn.LSTM"))
    for dry_run in (False, True):  # the same figures
        campaign = Campaign(save(record | {"dry_run": dry_run}, place / "results", f"dry-{dry_run}"))
        plots.write(campaign)
        drawn.append((campaign.path.parent / "ratios.png").read_bytes())
    assert drawn[0] != drawn[1]
    figure = plots.ratios(campaign)
    plots.stamp(figure)
    assert figure.get_suptitle().startswith("dry run: toy sizes on a CPU, no measurement\n")
    for axes in figure.axes:  # behind the bars, and hardly there
        stamp = next(text for text in axes.texts if text.get_text().startswith("dry run"))
        assert stamp.get_alpha() == 0.15
        assert stamp.get_zorder() < min(bar.get_zorder() for bar in axes.patches)
    for fields in record["results"]:
        del fields["peak_bytes"]
    figure = plots.memory(Campaign(save(record | {"dry_run": True}, place / "results")))
    assert "numbers: kept for the backward" in figure.get_suptitle()
    assert "peak" not in figure.get_suptitle()


def test_ratios_on_the_plot_are_those_of_the_record(place: Path) -> None:
    plots = made.plots()
    record = invented(FEW, ("sequence", "nn.LSTM"))
    for case, us in zip(FEW, (100.0, 200.0, 300.0), strict=True):
        retime(record, case.key, "sequence", "training", us)
        retime(record, case.key, "nn.LSTM", "training", 160.0)
    axes = plots.ratios(Campaign(save(record, place / "results"))).axes[0]
    ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
    assert ends == pytest.approx([300 / 160, 200 / 160, 100 / 160])
    labels = [tick.get_text() for tick in axes.get_yticklabels()]
    assert [label.split(",")[0] for label in labels] == ["PTB characters", "64 × 1024", "64 × 512"]
    colours = [tick.get_color() for tick in axes.get_yticklabels()]
    assert colours[0] == colours[1] == plots.SLOWER != colours[2]


def test_points_of_the_plot_against_hidden_size(place: Path) -> None:
    plots = made.plots()
    cases = [Case(64, hidden, 100, hidden) for hidden in (1024, 128, 512)] + [PTB, Case(64, 512, 200, 512)]
    record = invented(cases, ("sequence",))
    for case in cases:
        retime(record, case.key, "sequence", "training", case.hidden * case.steps)
    axes = plots.hidden(Campaign(save(record, place / "results"))).axes[0]
    assert axes.get_title() == "training"
    points = axes.get_lines()[0].get_xydata().tolist()
    assert points == [pytest.approx([hidden, hidden]) for hidden in (128, 512, 1024)]


def test_gaps_crosses_and_floor_of_the_plot_against_hidden_size(place: Path) -> None:
    plots = made.plots()
    axes = plots.hidden(Campaign(save(gaps(), place / "results"))).axes[0]
    missing = made.missing_places(axes)
    assert not {"ours, sequence mode", "ours, sequence mode, recompute", "compiled loop"} & set(missing)
    assert missing["ours, as the library chooses"] == [512]
    assert missing["compiled step, CUDA graph"] == [256]
    assert missing["ours, step mode"] == []
    crosses = made.places(axes, lambda line: line.get_gid() is not None)
    assert crosses == {"cross ours": [512], "cross nn.LSTM": [512], "cross compiled step": [256]}
    assert made.places(axes, lambda line: line.get_linestyle() == "--") == {plots.FLOOR: [128, 256, 512, 1024, 2048]}
    assert made.places(axes)[plots.STEPWISE] == [2048]


def test_plots_for_a_readme_are_legible_and_speak_as_the_tables(place: Path) -> None:
    plots = made.plots()
    record = invented()
    for case in CASES:
        retime(record, case.key, "nn.LSTM", "training", 1.0)
    campaign = Campaign(save(record, place / "results"))
    figure = plots.ratios(campaign)
    for axes in figure.axes:
        labels = axes.get_yticklabels()
        assert len(labels) <= 25
        assert axes.xaxis.get_tick_params()["labeltop"]
        # pixels, where the figure is shown 900 wide
        assert min(float(each.get_fontsize()) for each in labels) / 72 * 900 / figure.get_figwidth() > 10.9
    words = [each.get_text() for axes in figure.axes for each in axes.get_yticklabels()]
    assert len(plots.all_ratios(campaign).axes[0].get_yticklabels()) == len(CASES)
    assert not [word for word in words if "fp" in word or re.search(r"\d×|×\d", word)]
    assert "Triton 3.99.0" in figure.get_suptitle()
    memory = plots.memory(campaign)
    assert {axes.get_xlabel() for axes in memory.axes} == {"MiB"}
    shown = {each.get_text() for axes in memory.axes for each in axes.texts}
    assert shown <= set(re.findall(r"[\d.]+", page_of(place, record)))


def test_tables_do_without_matplotlib(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made.hide_matplotlib(monkeypatch)
    assert run(place) == 0
    assert "no records in " in capsys.readouterr().out
    save(invented(FEW), place / "results")
    assert run(place) == 1
    assert "'matplotlib' is missing; run: pip install -e '.[bench]'" in capsys.readouterr().err
    assert "### Test GPU" in text_of(place)
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
