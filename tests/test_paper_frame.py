"""Records that are resumed, runs in processes of their own, blocks of pages, and the arithmetic of comparisons."""

import json
import math
import sys

import pytest

from bench.paper import figures, numbers, report
from bench.paper.__main__ import main
from bench.paper.experiment import NAMES, SIZES, load
from bench.paper.record import Record, path_of

pytestmark = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="the package that holds the spoken digits has no release for Python 3.10"
)

SETTINGS = {"about": "small", "seeds": (0, 1)}


def record(tmp_path, settings=SETTINGS):
    return Record(path_of(tmp_path, "lengths", "quick"), "lengths", "quick", settings)


def test_a_record_goes_on_where_it_was(tmp_path):
    first = record(tmp_path)
    first.begin({"command": "first"})
    first.add("a", {"loss": 1.5}, 2.0)
    second = record(tmp_path)
    second.begin({"command": "second"})
    second.add("b", 2, 0.5)
    third = record(tmp_path)
    assert third.results == {"a": {"loss": 1.5}, "b": 2}
    assert [entry["run"] for entry in third.content["results"].values()] == [0, 1]
    assert third.seconds == 2.5
    assert [path.name for path in tmp_path.iterdir()] == ["lengths-quick.json"]


def test_a_record_of_other_settings_is_not_gone_on_with(tmp_path):
    record(tmp_path).add("a", 1, 0.0)
    with pytest.raises(ValueError, match=r"other settings \(seeds\); give --fresh"):
        record(tmp_path, SETTINGS | {"seeds": [0, 2]})
    assert record(tmp_path).results == {"a": 1}


@pytest.mark.parametrize("text", ["{", "[]", '{"settings": {}}'])
def test_a_file_that_is_no_record(tmp_path, text):
    path_of(tmp_path, "lengths", "quick").write_text(text)
    with pytest.raises(ValueError, match="is not a record of this program"):
        record(tmp_path)
    assert path_of(tmp_path, "lengths", "quick").read_text() == text


def test_a_command_runs_and_then_has_nothing_to_do(tmp_path, capsys):
    """The smallest experiment in its processes, with its tables and its figure; then again, and after a lost result."""
    command = ["lengths", "--size", "quick", "--device", "cpu", "--processes", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    path = path_of(tmp_path, "lengths", "quick")
    content = json.loads(path.read_text())
    assert "both rules" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert figures.is_drawn(Record(path, "lengths", "quick", load("lengths").SIZES["quick"]))

    lost = next(key for key in content["results"] if key.endswith("final"))
    shown = capsys.readouterr().out
    assert f"{len(content['results'])} results" not in shown
    value = content["results"].pop(lost)["value"]
    path.write_text(json.dumps(content))
    assert main(command) == 0
    assert f"{len(content['results'])} results are there already" in capsys.readouterr().out
    again = json.loads(path.read_text())["results"]
    assert again[lost]["value"] == value  # the same seeds, so the same figures to the last digit
    assert {entry["run"] for entry in again.values()} == {0, 1}


def test_wrong_arguments(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["lengths", "--device", "no such device", "--out", str(tmp_path)])
    assert "--device no such device" in capsys.readouterr().err
    path_of(tmp_path, "lengths", "quick").write_text("{")
    assert main(["lengths", "--size", "quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "is not a record of this program" in capsys.readouterr().err
    assert main(["report", "--out", str(tmp_path / "nothing")]) == 1
    assert "no complete records" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_has_all_sizes(name):
    experiment = load(name)
    assert set(experiment.SIZES) == set(SIZES)
    for settings in experiment.SIZES.values():
        assert settings["about"]
        jobs = experiment.jobs(settings, {})
        assert len({job.key for job in jobs}) == len(jobs) > 0
        json.dumps([job.arguments for job in jobs])


def test_pages_are_what_the_records_give():
    """README, the page, tables and figures that are committed."""
    from bench.paper.record import OUT

    assert report.main(OUT, check=True) == 0


def test_put():
    text = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n"
    assert report.put(text, "x", "new") == "a\n<!-- x -->\n\nnew\n\n<!-- /x -->\nb\n"
    for wrong in ("a", text + text, "<!-- /x --> <!-- x -->"):
        with pytest.raises(ValueError, match="once each"):
            report.put(wrong, "x", "new")


def test_paired():
    found = numbers.paired([1.0, 2.0, 3.0, 5.0], [2.0, 2.5, 3.5, 5.5])
    assert found.difference == pytest.approx(-0.625)
    assert (found.lower, found.pairs) == (4, 4)
    assert found.p == pytest.approx(0.015392, rel=1e-3)  # t = −5 with 3 degrees of freedom
    assert numbers.paired([1.0, 1.0], [1.0, 1.0]).p == 1
    assert math.isnan(numbers.paired([1.0], [2.0]).p)
    with pytest.raises(ValueError, match="same seeds"):
        numbers.paired([1.0], [1.0, 2.0])


def test_holm():
    """The example of three: 0.01 · 3, then 0.03 · 2, and what follows is never below it."""
    assert numbers.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert numbers.holm([0.9, 0.8]) == pytest.approx([1, 1])


def test_shown():
    assert numbers.spread([1.0, 2.0, 3.0], 1) == "2.0 ± 1.0"
    assert numbers.spread([0.5]) == "0.500"
    assert [numbers.shown(p) for p in (0.0004, 0.0312, 0.31, math.nan)] == ["< 0.001", "0.031", "0.31", "–"]
