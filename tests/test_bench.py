"""The benchmark's parts, and short runs of all of it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from bench import data, output, training
from bench.__main__ import main
from tests.support import need_kernels

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="the package that holds the spoken digits has no release for Python 3.10"
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other in steps this small crawl when another process keeps a core busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> data.Task:
    return data.load_digits()


@pytest.fixture(scope="module")
def spoken() -> data.Task:
    return data.load_spoken()


def unpacked(input: data.Input) -> torch.Tensor:
    """Copy of a model's input as one tensor, batch dimension second."""
    return (pad_packed_sequence(input)[0] if isinstance(input, PackedSequence) else input).clone()


@pytest.mark.parametrize(
    ("name", "count", "features", "shortest", "longest"),
    [
        ("digits", 1797, 1, 64, 64),
        ("spoken", 3000, 13, 6, 92),
    ],
)
def test_data_shapes(request: Any, name: str, count: int, features: int, shortest: int, longest: int) -> None:
    task = request.getfixturevalue(name)
    assert task.name == name
    assert len(task.sequences) == len(task.labels) == len(task.lengths) == count
    assert {s.shape[1] for s in task.sequences} == {features}
    assert all(s.dtype == torch.float32 for s in task.sequences)
    assert task.lengths.tolist() == [len(s) for s in task.sequences]
    assert (int(task.lengths.min()), int(task.lengths.max())) == (shortest, longest)
    assert task.labels.unique().tolist() == list(range(task.classes))


@pytest.mark.parametrize("name", ["digits", "spoken"])
def test_splits_are_disjoint_and_stratified(request: Any, name: str) -> None:
    task = request.getfixturevalue(name)
    assert sorted(task.train.tolist() + task.test.tolist()) == list(range(len(task.labels)))
    for label in range(task.classes):
        share = (task.labels[task.test] == label).sum() / (task.labels == label).sum()
        assert share == pytest.approx(data.TEST_SHARE, abs=0.005)


def test_digits_are_pixels_in_reading_order(digits: data.Task) -> None:
    from sklearn.datasets import load_digits

    images = load_digits().images
    assert digits.sequences[5][:, 0].reshape(8, 8).tolist() == (images[5] / 16).tolist()
    assert max(float(s.max()) for s in digits.sequences) == 1
    assert min(float(s.min()) for s in digits.sequences) == 0


def test_standardised_by_the_training_split_only(spoken: data.Task) -> None:
    def moments(split: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        std, mean = torch.std_mean(torch.cat([spoken.sequences[k] for k in split.tolist()]).double(), 0)
        return mean, std

    mean, std = moments(spoken.train)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, torch.ones_like(std), atol=1e-5, rtol=0)
    assert moments(torch.arange(3000))[0].abs().max() > 1e-4

    train = torch.tensor([0, 2])
    sequences = [torch.randn(5, 3) + 7, torch.randn(4, 3), 3 * torch.randn(6, 3)]
    before = data.standardise(sequences, train)
    after = data.standardise([sequences[0], 1000 * sequences[1], sequences[2]], train)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert not torch.equal(before[1], after[1])


def test_batches(spoken: data.Task, digits: data.Task) -> None:
    positions = spoken.test[[3, 0, 7]]
    input, labels = spoken.batch(positions)
    assert isinstance(input, PackedSequence)
    padded, lengths = pad_packed_sequence(input)
    assert lengths.tolist() == spoken.lengths[positions].tolist()
    for k, position in enumerate(positions.tolist()):
        assert torch.equal(padded[: lengths[k], k], spoken.sequences[position])
    assert labels.tolist() == spoken.labels[positions].tolist()
    assert unpacked(digits.batch(positions)[0]).shape == (64, 3, 1)


def test_an_epoch_is_the_training_split_without_a_single_left_over() -> None:
    sequences = [torch.full((2, 1), float(k)) for k in range(12)]
    task = data.Task("t", "T", sequences, torch.arange(12), torch.arange(9), torch.arange(9, 12), classes=12)
    labels = [batch[1] for batch in task.epoch(4, torch.Generator().manual_seed(0))]
    assert [len(each) for each in labels] == [4, 4]
    labels = [batch[1] for batch in task.epoch(3, torch.Generator().manual_seed(0))]
    assert sorted(torch.cat(labels).tolist()) == list(range(9))
    assert torch.cat(labels).tolist() != list(range(9))


@pytest.mark.parametrize("name", ["digits", "spoken"])
def test_both_models_see_the_same_batches(request: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    task = request.getfixturevalue(name)
    seen: list[torch.Tensor] = []
    forward = training.Classifier.forward

    def recorded(self: training.Classifier, input: data.Input) -> torch.Tensor:
        if self.training and torch.is_grad_enabled():
            seen.append(unpacked(input))
        return forward(self, input)

    monkeypatch.setattr(training.Classifier, "forward", recorded)
    settings = training.Settings(steps=3, batch_size=4, hidden_size=8, initial_noise=0.1)
    by_model = {}
    for model in training.MODELS:
        seen.clear()
        training.train(task, model, settings, CPU, seed=3)
        by_model[model] = list(seen)
    assert [len(batches) for batches in by_model.values()] == [3, 3]
    for one, other in zip(*by_model.values(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(by_model["BN-LSTM"][0], by_model["BN-LSTM"][1])


def test_training_lowers_the_loss_and_reports(spoken: data.Task) -> None:
    reports: list[tuple[int, float]] = []
    settings = training.Settings(steps=45, batch_size=16, hidden_size=16, learning_rate=0.03)
    run = training.train(spoken, "BN-LSTM", settings, CPU, 0, lambda step, loss: reports.append((step, loss)))
    assert len(run.losses) == 45
    assert sum(run.losses[-5:]) < 0.8 * sum(run.losses[:5])
    assert [step for step, _ in run.curve] == list(range(3, 46, 3))
    assert reports == [(step, run.losses[step - 1]) for step in range(3, 46, 3)]
    assert run.curve[-1][1] == run.scores["running"].accuracy
    assert run.scores["estimated"] != run.scores["running"]
    assert run.scores["running"].accuracy > 0.2
    assert run.steps_per_second is not None
    assert run.steps_per_second > 0


def test_scores(spoken: data.Task) -> None:
    """Of a model whose answer is known: it gives the length of a sequence, less 6, as its class."""
    lengths = torch.tensor([6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 15])
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 9])
    everything = torch.arange(11)
    task = data.Task("t", "T", [torch.ones(n, 1) for n in lengths.tolist()], labels, everything, everything, 10)

    class ByLength(training.Classifier):
        def forward(self, input: data.Input) -> torch.Tensor:
            assert isinstance(input, PackedSequence)
            return 100.0 * torch.nn.functional.one_hot(pad_packed_sequence(input)[1] - 6, 10)

    model = ByLength("nn.LSTM", task, training.Settings(steps=1, hidden_size=2))
    scores = training.evaluate(model, task, CPU)
    assert scores.accuracy == pytest.approx(10 / 11)
    assert scores.loss == pytest.approx(100 / 11)
    assert (scores.longest_accuracy, scores.longest_sequences) == (0.5, 2)
    assert output.with_error(0.5, 100) == "50.0 ± 5.0"


def test_evaluation_uses_population_statistics_and_leaves_them(spoken: data.Task) -> None:
    model = training.Classifier("BN-LSTM", spoken, training.Settings(steps=1, hidden_size=4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = training.evaluate(model, spoken, CPU)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    alone = [training.evaluate(model, dataclasses.replace(spoken, test=part), CPU) for part in spoken.test.split(100)]
    assert sum(each.loss for each in alone) / len(alone) == pytest.approx(scores.loss, rel=1e-6)


def run_main(out: Path, *arguments: str) -> dict[str, Any]:
    assert main(["--device", "cpu", "--out", str(out), *arguments]) == 0
    (plot,) = out.glob("*.png")
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert plot.stat().st_size > 10_000
    (figures,) = out.glob("*.json")
    found: dict[str, Any] = json.loads(figures.read_text(encoding="utf-8"))
    return found


def test_main_writes_what_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_main(tmp_path / "new", "--steps", "3", "--seed", "5")
    printed = capsys.readouterr().out
    for text in ("Pixel digits", "Spoken digits", "running", "estimated", "not the library's performance", ".json"):
        assert text in " ".join(printed.split())
    assert "\x1b" not in printed
    assert "\r" not in printed

    assert set(found) == {"command", "utc", "device", "device_name", "versions", "seeds", "notes", "tasks"}
    assert found["command"].startswith("python -m bench --device cpu --out")
    assert set(found["versions"]) >= {"python", "torch", "triton", "triton_bnlstm", "numpy"}
    assert found["seeds"]["weights_noise_and_batches"] == 5
    assert "CPU" in found["device_name"]
    assert any("not the library's performance" in note for note in found["notes"])
    assert [task["name"] for task in found["tasks"]] == ["digits", "spoken"]
    for task in found["tasks"]:
        assert task["settings"]["steps"] == 3
        lstm, bn = task["runs"]
        assert (lstm["model"], bn["model"]) == ("nn.LSTM", "BN-LSTM")
        assert (set(lstm["scores"]), set(bn["scores"])) == ({"none"}, {"running", "estimated"})
        for run in task["runs"]:
            assert len(run["losses"]) == 3
            assert all(math.isfinite(loss) for loss in run["losses"])
            assert [step for step, _ in run["curve"]] == [1, 2, 3]
            for scores in run["scores"].values():
                assert scores["sequences"] == task["test_sequences"]
                assert (scores["longest_accuracy"] is None) == (task["name"] == "digits")


def test_same_seed_same_numbers(tmp_path: Path) -> None:
    def numbers(folder: str, seed: str) -> list[Any]:
        (task,) = run_main(tmp_path / folder, "--task", "digits", "--steps", "2", "--seed", seed)["tasks"]
        return [(run["losses"], run["curve"], run["scores"]) for run in task["runs"]]

    first = numbers("a", "1")
    assert numbers("b", "1") == first
    assert all(one[0] != other[0] for one, other in zip(numbers("c", "2"), first, strict=True))


def test_a_loss_that_is_not_finite_is_null(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    output.write_json(path, {"losses": [1.0, math.nan, math.inf]})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"losses": [1.0, None, None]}


def test_no_bars_in_a_pipe_even_with_forced_colour(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with output.Bars(Console()) as bars:
        move, _ = bars.start("task", 10)
        move(5, 0.25)
    assert capsys.readouterr().out == ""


def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with output.Bars(Console(force_terminal=True, width=80, _environ={"TERM": "xterm"})) as bars:
        move, _ = bars.start("task", 10)
        move(5, 0.25)
    printed = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    for text in ("task", "5/10", "loss 0.2500"):
        assert text in printed


def test_help_needs_no_package() -> None:
    """-S: an interpreter without site-packages."""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-S", "-m", "bench", "--help"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for text in ("--quick", "--device", "--seed", "--task", "--out", "default", "examples"):
        assert text in done.stdout
    done = subprocess.run([sys.executable, "-S", "-m", "bench"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "bench: the package 'torch' is missing; run: pip install -e '.[bench]'\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "must be an integer of 1 or more"),
        (["--quick", "--steps", "5"], "not allowed with"),
        (["--device", "nonsense"], "--device nonsense"),
        (["--device", "meta"], "only cpu and cuda"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_out_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(SystemExit):
        main(["--device", "cpu", "--out", str(tmp_path / "taken")])
    assert "--out" in capsys.readouterr().err


def test_the_host_time_of_a_call():
    """Every row is there, and what a call costs is more than what stands around it."""
    need_kernels()
    from bench import call_overhead

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kernels that are not launched leave memory as it is, which may be NaN
        found = call_overhead.measure(1, "cuda" if torch.cuda.is_available() else "cpu")
    assert len(found) == 7
    parts = found["checks and packing of an eager call"], found["learning, of a training forward"]
    assert min(parts) > 0
    assert sum(parts) < found["layer, training forward"]
