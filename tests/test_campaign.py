"""The campaign: how it survives crashes and hangs, what it writes; and a dry run of all of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import records
from bench.campaign import gpu_tests, plan, processes, runner
from bench.campaign.__main__ import main
from bench.cases import CASES, HOT, Case
from bench.records import Result, Timing
from tests.support import need_kernels

ROOT = Path(__file__).parents[1]


# The campaign with a worker that does as it is told

FAILING = "tests/test_gpu.py::test_x[float16-(64, 512, 64)]"
FAKE_WORKER = """
import json, os, sys, time

def answer(**message):
    print(json.dumps(message), flush=True)

print("words of somebody else", flush=True)
for line in sys.stdin:
    item = json.loads(line)
    if item["kind"] == "identity":
        device = {"name": "Fake", "slug": "fake", "type": "cuda", "multiprocessors": 4}
        answer(done={"device": device, "versions": {"torch": "1", "triton": "2"}})
        continue
    if item["kind"] == "counters":
        answer(done={"counters": [{"case": "c", "counters": {"why": "not here"}}]})
        continue
    if item["kind"] == "first_call":
        answer(done={"first_calls": [{"seconds": float(os.getpid())}]})
        continue
    if item["kind"] == "ceilings":
        answer(done={})
        sys.exit()  # of no use for the next item
    if item["kind"] == "stages":
        if os.path.exists(sys.argv[1] + "/mended"):
            answer(done={"stages": [{"case": "c", "way": way, "whole_us": 1.0} for way in ("forward", "backward")]})
        else:
            answer(failed="no such stage")
        continue
    case, results = item["case"], []
    key = f"B{case['batch']}-H{case['hidden']}-T{case['steps']}-D{case['columns']}-{case['precision']}"
    for name in item["providers"]:
        if name in item["skip"]:
            results.append({"case": key, "provider": name, "status": "failed", "why": item["skip"][name]})
            continue
        if name in item["withheld"]:
            results.append({"case": key, "provider": name, "status": "withheld", "why": item["withheld"][name]})
            continue
        answer(at=[name, "prepare"])
        if name == "compiled step" and name not in item["plain"]:
            answer(uncaptured=[name, "no capture"])
            sys.exit()
        if name == "compiled step":
            results.append({"case": key, "provider": name, "status": "failed", "why": item["plain"][name]})
            continue
        if name == "step":
            os.kill(os.getpid(), 11)
        if name == "reference":
            time.sleep(600)
        if name == "nn.LSTM":
            answer(lost=[name, "illegal memory access"])
            sys.exit()
        times = {"us": [10.0, 9.0, 11.0], "rounds": 3, "how": "graph"}
        results.append({"case": key, "provider": name, "status": "ok", "modes": {"training": times}})
    answer(done={"results": results})
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A campaign of two cases and one stage, on FAKE_WORKER, without GPU tests."""
    script = tmp_path / "fake_worker.py"
    script.write_text(FAKE_WORKER)
    monkeypatch.setattr(processes, "COMMAND", [sys.executable, str(script), str(tmp_path)])
    # only who hangs for certain is not waited for: others' processes may take long to start
    monkeypatch.setattr(runner, "_silence", lambda at: 1.0 if at[0] == "reference" else 60.0)
    monkeypatch.setattr(runner, "WARM_SHARE", 0.0)
    monkeypatch.setattr(gpu_tests, "collect", lambda limit: [FAILING])

    class Pool(gpu_tests.Pool):
        def run(self, tests):
            self.outcome = gpu_tests.Outcome(3, 1, {tests[0]: "step mode, off"}, [])
            self.seen = set(tests)
            return self.outcome

    monkeypatch.setattr(gpu_tests, "Pool", Pool)
    names = ["sequence", "step", "compiled step", "reference", "nn.LSTM"]
    cases = [HOT[0], Case(64, 512, 100, 512, "float16")]
    items = [plan.Item("bench", case, 1.0, {"providers": names}) for case in cases]
    first, last = plan.Item("ceilings", estimate_s=1.0), plan.Item("stages", Case(64, 128, 100, 128), 1.0)
    monkeypatch.setattr(runner, "items", lambda: [first, *items, last])
    said: list[str] = []

    def campaign(resume=(), minutes=3.0):
        before = [(Path(tmp_path, "kept", "fake", records.FILE), record) for record in resume]
        return runner.Campaign(tmp_path / "out", minutes, before, False, "command", said.append)

    campaign.said = said
    campaign.file = tmp_path / "out" / records.FILE
    return campaign


def test_crashes_and_hangs_are_noted_and_the_rest_goes_on(fake):
    assert fake().run() == 1  # a GPU test failed
    record = records.read(fake.file)
    found = {(r.case, r.provider): r for r in records.results_of(record)}
    half, whole = HOT[0].key, Case(64, 512, 100, 512, "float16").key
    assert found[half, "sequence"].modes["training"].us == (10, 9, 11)
    assert (found[half, "step"].status, found[half, "step"].why) == ("failed", "killed by SIGSEGV, at: prepare")
    assert found[half, "reference"].why == "no answer within 1 s, at: prepare"
    assert found[half, "nn.LSTM"].why == "illegal memory access"
    assert found[whole, "step"].status == "withheld"
    assert "test_x[float16-(64, 512, 64)]" in found[whole, "step"].why
    assert (found[half, "compiled step"].status, found[half, "compiled step"].why) == ("failed", "no capture")
    assert found[whole, "sequence"].status == "ok"
    assert [(t["item"].split()[0], t["why"]) for t in record["troubles"]] == [("stages", "no such stage")]
    assert [entry["ok"] for entry in record["done"]] == [True, False, False, False]
    assert record["tests"] == {
        "passed": 3,
        "skipped": 1,
        "failed": {FAILING: "step mode, off"},
        "unfinished": [],
        "seen": [],
        "source": records.source(),
        "code": records.code(),
    }
    assert any("all items are done" in line for line in fake.said)


def test_another_run_does_only_what_is_left(fake, monkeypatch):
    fake().run()
    before = records.read(fake.file)
    before["done"] = [before["done"][0], *before["done"][2:]]
    fake.said.clear()
    fake([before]).run()
    record = records.read(fake.file)
    begun = [line for line in fake.said if " of 4: " in line]
    assert len(begun) == 1
    assert HOT[0].key in begun[0]
    assert len(record["runs"]) == 2
    assert len(record["results"]) == len(before["results"])
    assert record["tests"]["passed"] == 3  # not run again

    monkeypatch.setattr(records, "source", lambda: "other kernels")
    fake.said.clear()
    fake([record]).run()
    assert len([line for line in fake.said if " of 4: " in line]) == 4


def test_what_failed_is_tried_again_when_any_code_has_changed(fake, monkeypatch, tmp_path):
    fake().run()
    before = records.read(fake.file)
    (tmp_path / "mended").touch()
    fake.said.clear()
    fake([before]).run()  # the same code: it would fail again
    assert not [line for line in fake.said if " of 4: " in line]

    ran = []
    real = gpu_tests.Pool.run
    monkeypatch.setattr(gpu_tests.Pool, "run", lambda self, tests: (ran.append(list(tests)), real(self, tests))[1])
    monkeypatch.setattr(records, "code", lambda: "mended")
    fake([before]).run()
    begun = [line for line in fake.said if " of 4: " in line]
    assert len(begun) == 3
    assert ran == [[FAILING]]
    record = records.read(fake.file)
    assert record["troubles"] == []
    assert [(entry["way"]) for entry in record["stages"]] == ["forward", "backward"]
    assert len(record["done"]) == 4


def test_what_is_wrong_is_not_looked_into_further(fake, monkeypatch):
    campaign = fake()
    monkeypatch.setattr(runner, "items", lambda: [plan.Item("tune", HOT[0]), plan.Item("tune", HOT[1])])
    wrong = Result(HOT[0].key, "sequence", records.WRONG, "outputs off", source=records.source())
    before = records.empty() | {
        "device": {"name": "Fake", "type": "cuda", "multiprocessors": 4},
        "versions": {"torch": "1", "triton": "2"},
        "results": [wrong.as_json()],
        "cases": {HOT[0].key: HOT[0].as_json()},
    }
    campaign.resume = [(Path("kept"), before)]
    monkeypatch.setattr(campaign, "_ask", ask := Asked(campaign._ask))
    campaign.run()
    assert [item.case for item in ask.items if item.kind == "tune"] == [HOT[1]]
    assert "sequence mode is wrong here: outputs off" in records.read(fake.file)["troubles"][0]["why"]


class Asked:
    """Notes items that are given to workers, and does nothing but ask who it is."""

    def __init__(self, ask):
        self.ask, self.items = ask, []

    def __call__(self, item, take, environment=None):
        self.items.append(item)
        return self.ask(item, take) if item.kind == "identity" else True


def test_findings_that_cannot_be_kept_end_their_item_only(fake, monkeypatch):
    real = runner.Campaign.merge

    def merge(self, found, case):
        if "results" in found:
            raise KeyError("no such thing")
        real(self, found, case)

    monkeypatch.setattr(runner.Campaign, "merge", merge)
    fake().run()
    record = records.read(fake.file)
    assert len(record["done"]) == 4
    assert sum("cannot be kept" in entry["why"] for entry in record["troubles"]) == 2


def test_what_takes_longer_than_the_time_that_is_left_is_not_begun(fake, monkeypatch):
    items = [plan.Item("ceilings", estimate_s=1e6), plan.Item("stages", Case(64, 128, 100, 128), 1.0)]
    monkeypatch.setattr(runner, "items", lambda: items)
    campaign = fake()
    campaign.run()
    assert [entry["item"].split()[0] for entry in records.read(fake.file)["done"]] == ["stages"]
    campaign.took = {"stages": [2e6]}  # as others of its kind have shown
    assert campaign._estimate(items[1]) == 2e6


def test_first_calls_have_processes_and_caches_of_their_own(fake, monkeypatch):
    environments = []

    class Worker(processes.Worker):
        def __init__(self, log, environment=None):
            environments.append(environment)
            super().__init__(log, environment)

    monkeypatch.setattr(runner, "Worker", Worker)
    items = [plan.Item("first_call", HOT[0], 1.0, {"providers": ["sequence"]}, fresh=True), plan.Item("ceilings")]
    monkeypatch.setattr(runner, "items", lambda: items)
    fake().run()
    (entry,) = records.read(fake.file)["first_calls"]
    assert entry["cold_s"] != entry["warm_s"]  # here they are process numbers
    names = {"TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"}
    assert [set(environment) & names for environment in environments] == [set(), names, names, set()]
    assert environments[1] == environments[2]
    assert not Path(environments[1]["TRITON_CACHE_DIR"]).parent.exists()


def test_a_worker_that_the_item_before_has_ended_costs_no_attempt(fake, monkeypatch):
    assert runner.ATTEMPTS["counters"] == 1
    items = [plan.Item("ceilings", estimate_s=1.0), plan.Item("counters", Case(64, 128, 100, 128), 1.0)]
    monkeypatch.setattr(runner, "items", lambda: items)
    fake().run()  # the worker ends behind the ceilings
    record = records.read(fake.file)
    assert record["troubles"] == []
    assert record["kernels"][0]["counters"] == {"why": "not here"}


def test_a_compilers_limit_is_the_campaigns_too():
    assert runner._silence(["compiled loop", "prepare"]) == 65
    assert runner._silence(["compiled loop", "time"]) == runner.SILENCE_S
    assert runner._silence(["sequence", "prepare"]) == runner.SILENCE_S


def test_the_log_does_not_tell_where_it_was_written(fake):
    fake().run()
    log = fake.file.with_name("campaign.log")
    with log.open("a") as file:
        file.write(f"rootdir: {ROOT}/tests, {fake.file}\n")
    fake([records.read(fake.file)]).run()
    assert str(ROOT) not in log.read_text()
    assert "rootdir: ./tests, DIR/campaign.json" in log.read_text()


def test_a_record_of_another_machine_is_neither_gone_on_with_nor_lost(fake):
    fake().run()
    before = records.read(fake.file)
    before["versions"]["torch"] = "0.9"
    fake.said.clear()
    fake([before]).run()
    assert len(records.read(fake.file)["runs"]) == 1
    assert any("not going on with" in line and "torch 0.9 → 1" in line for line in fake.said)

    records.write(fake.file, before)
    campaign = fake()
    campaign.resume = [(fake.file, before)]
    with pytest.raises(ValueError, match=r"torch 0.9 → 1\): move it away"):
        campaign.run()
    assert records.read(fake.file) == before


def test_another_driver_is_noted_and_gone_on_with(fake):
    fake().run()
    before = records.read(fake.file)
    before["device"]["driver"] = "older"
    before["versions"]["numpy"] = "1"
    fake([before]).run()
    record = records.read(fake.file)
    assert len(record["runs"]) == 2
    assert "driver" not in record["device"]  # as the present one has it


def test_interrupted_tests_keep_their_verdicts(fake, monkeypatch):
    class Pool(gpu_tests.Pool):
        def run(self, tests):
            self.outcome.passed = 1
            self.seen = {tests[0]}
            raise KeyboardInterrupt

    monkeypatch.setattr(gpu_tests, "Pool", Pool)
    monkeypatch.setattr(gpu_tests, "collect", lambda limit: ["a", "b"])
    campaign = fake()
    campaign.began -= 5
    with pytest.raises(KeyboardInterrupt):
        campaign.run()
    record = records.read(fake.file)
    assert (record["tests"]["passed"], record["tests"]["unfinished"]) == (1, ["b"])
    assert record["runs"][0]["seconds"] >= 5


def test_what_the_end_of_the_time_cuts_off_is_left_for_another_run(fake, monkeypatch):
    campaign, silence = fake(), runner._silence

    def until_the_end(at):
        if at[0] == "reference":  # when it hangs, not before, there is little time left
            campaign.began = time.monotonic() - 60 * campaign.minutes + runner.RESERVE_S + 1.5
        return 100.0

    monkeypatch.setattr(runner, "_silence", until_the_end)
    campaign.run()
    record = records.read(fake.file)
    assert record["results"] == record["troubles"] == []
    assert [entry["item"] for entry in record["done"]] == ["ceilings"]
    assert "3 of 4 items are left: the same command" in fake.said[-1]
    monkeypatch.setattr(runner, "_silence", silence)
    fake([record]).run()
    assert len(records.read(fake.file)["done"]) == 4


# Records


def test_a_record_survives_a_round_trip_and_bad_files_are_refused(tmp_path):
    timing = Timing((3.0, 2.0, 4.0), 5, "graph", floor_us=1.5, samples_us=[1.0, 2.0])
    result = Result("key", "sequence", modes={"training": timing}, errors={"outputs": 1e-3}, saved_bytes=5)
    record = records.empty() | {"results": [result.as_json()], "ceilings": {"x": float("nan")}}
    path = tmp_path / records.FILE
    records.write(path, record)
    again = records.read(path)
    (found,) = records.results_of(again)
    assert found.modes["training"].us == (3, 2, 4)
    assert found.modes["training"].of_floor == 2
    assert found.modes["training"].samples_us == []
    assert again["ceilings"] == {"x": None}
    for text in ("{", "[]", '{"schema": 99}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"campaign\.json"):
            records.read(path)


def test_writing_over_a_record_leaves_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / records.FILE
    records.write(path, records.empty())
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        records.write(path, records.empty() | {"dry_run": True})
    assert records.read(path)["dry_run"] is False


# The command


def test_the_command_says_what_is_wrong(tmp_path, capsys, monkeypatch):
    (tmp_path / records.FILE).write_text("{}")
    assert main(["--out", str(tmp_path)]) == 2
    assert "--resume goes on" in capsys.readouterr().err
    assert main(["--out", str(tmp_path), "--resume"]) == 2
    assert "not a campaign's record" in capsys.readouterr().err
    assert main(["--out", str(tmp_path / records.FILE), "--dry-run"]) == 2
    assert "File exists" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--out", str(tmp_path / "new")]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--minutes", "-1"])
    assert "must be a number above 0" in capsys.readouterr().err


def dry_run(out, minutes, *more):
    command = [sys.executable, "-m", "bench.campaign", "--dry-run", "--minutes", str(minutes), "--out", str(out), *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_dry_run_walks_the_whole_plan(tmp_path):
    """As on a GPU but for the clock and the sizes: a first run there must not die of a typo."""
    need_kernels()
    pytest.importorskip("pytest_benchmark")
    process = dry_run(tmp_path, 20)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    assert "all items are done" in output
    record = records.read(tmp_path / records.FILE)
    assert record["dry_run"]
    assert record["troubles"] == []
    assert len(record["done"]) == len(plan.toy_items())
    results = records.results_of(record)
    assert {r.status for r in results} <= {"ok", "cannot"}
    assert {c.toy().key for c in CASES} == {r.case for r in results}
    for result in results:
        if result.status == "ok":
            assert set(result.modes) == {"inference", "forward", "backward", "training"}
            assert result.modes["training"].floor_us
            assert result.saved_bytes
    for name in ("layouts", "stages", "kernels", "first_calls"):
        assert record[name], name
    assert record["ceilings"]["flops"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["campaign.json", "campaign.log"]


def workers_of(process):
    found = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "campaign.worker"], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def test_a_killed_campaign_leaves_a_readable_record_and_no_process(tmp_path):
    need_kernels()
    process = dry_run(tmp_path, 20)
    path = tmp_path / records.FILE
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if path.exists() and records.read(path)["done"]:
            break
        time.sleep(0.2)
    (worker,) = workers_of(process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not Path(f"/proc/{worker}").exists()
    done = records.read(path)["done"]
    assert done
    process = dry_run(tmp_path, 0.25, "--resume")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert f"{len(done)} of {len(plan.toy_items())} items were done before" in output
    assert json.loads(path.read_text())["runs"][-1]["seconds"] > 0
