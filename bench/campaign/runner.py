"""The campaign: what is left to do, in which time, and where its findings go."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from .. import records
from ..cases import Case
from . import gpu_tests
from .plan import SILENCE_S, Item, items, toy_items, warm_items
from .processes import Gone, Silent, Worker

# Shares of the time: tests that are left after theirs go on in the next campaign, and so does what is not warm.
TESTS_SHARE, WARM_SHARE = 0.4, 0.25
# What is kept for writing the record and ending processes.
RESERVE_S = 5.0
WARM_ITEMS = 28


class NoDevice(RuntimeError):
    """There is no GPU."""


@dataclass
class Campaign:
    """One run of the command.

    Attributes:
        out: where record and log go.
        minutes: to be done in.
        resume: files and records of earlier campaigns, to go on from the first one of this device.
        dry_run: toy sizes on a CPU.
        command: as it was given.
        show: takes lines for the user.
    """

    out: Path
    minutes: float
    resume: list[tuple[Path, dict[str, Any]]]
    dry_run: bool
    command: str
    show: Callable[[str], None]
    began: float = field(default_factory=time.monotonic)
    record: dict[str, Any] = field(default_factory=records.empty)
    worker: Worker | None = None

    def __post_init__(self) -> None:
        self.source = records.source()
        self.lock = threading.Lock()
        self.environment = {}
        if self.dry_run:
            # toy tensors: more threads would only wait for each other
            self.environment = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

    # Time and words

    @property
    def left(self) -> float:
        """Seconds until everything has to be written."""
        return self.began + 60 * self.minutes - RESERVE_S - time.monotonic()

    def say(self, text: str) -> None:
        """To the user and the log, with the time."""
        gone = int(time.monotonic() - self.began)
        minutes, seconds = divmod(round(60 * self.minutes), 60)
        line = f"[{gone // 60:2}:{gone % 60:02} of {minutes}:{seconds:02}] {text}"
        self.show(line)
        self.log.write(line + "\n")
        self.log.flush()

    # The whole

    def run(self) -> int:
        """Do what can be done in the time. 0, or 1 if a GPU test failed.

        Raises:
            NoDevice: there is no GPU, or it does not answer.
            ValueError: the record in `out` is of another machine; it stays as it is.
            OSError: nothing can be written to `out`.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            self.log: IO[str] = stack.enter_context((self.out / "campaign.log").open("a", encoding="utf-8"))
            stack.callback(self._end)
            self.say(self.command)
            self._identify()
            self._take_up()
            todo = toy_items() if self.dry_run else items()
            done = {entry["item"] for entry in self.record["done"] if entry["source"] == self.source}
            self._tests()
            waiting = [item for item in todo if item.key not in done]
            self._warm(waiting)
            if len(waiting) < len(todo):
                self.say(f"{len(todo) - len(waiting)} of {len(todo)} items were done before")
            for number, item in enumerate(waiting, len(todo) - len(waiting) + 1):
                if self.left < item.estimate_s:
                    continue  # a shorter one may fit
                self.say(f"{number} of {len(todo)}: {item.title}")
                if self._do(item):
                    self.record["done"].append({"item": item.key, "source": self.source})
                self.write()
            undone = len(todo) - sum(entry["source"] == self.source for entry in self.record["done"])
            again = "the same command with --resume goes on"
            self.say(f"{undone} of {len(todo)} items are left: {again}" if undone else "all items are done")
            return int(bool(self.record["tests"].get("failed")))

    def _end(self) -> None:
        if self.worker is not None:
            self.worker.stop()
        if self.record["runs"]:
            self.record["runs"][-1]["seconds"] = round(time.monotonic() - self.began, 1)
            self.write()

    def write(self) -> None:
        """The record, in one file."""
        with self.lock:
            records.add_floors(self.record)
            records.write(self.out / records.FILE, self.record)

    def _identify(self) -> None:
        found: dict[str, Any] = {}
        self._ask(Item("identity"), lambda payload, _: found.update(payload))
        if not found:
            raise NoDevice("the device could not be asked what it is; see campaign.log")
        if found["device"]["type"] != "cuda" and not self.dry_run:
            raise NoDevice("no GPU: torch.cuda.is_available() is False; --dry-run walks through the plan without one")
        self.record |= {"dry_run": self.dry_run, **found}
        self.say(f"{found['device']['name']}, torch {found['versions']['torch']}, Triton {found['versions']['triton']}")

    def _take_up(self) -> None:
        """What an earlier campaign left, if it was on the same device and with the same versions."""
        now = {key: self.record[key] for key in ("device", "versions", "dry_run")}
        for path, before in self.resume:
            differing = records.differences(before, now)
            if not differing:
                self.say(f"going on with {path}")
                self.record |= before | now
                self.record["done"] = [entry for entry in before["done"] if entry["source"] == self.source]
                break
            if path.parent.resolve() == self.out.resolve():
                raise ValueError(
                    f"{path} is of another machine ({', '.join(differing)}): move it away, or give another --out"
                )
            if before["device"].get("name") == now["device"]["name"]:
                self.say(f"not going on with {path}: {', '.join(differing)}")
        utc = datetime.now(timezone.utc).isoformat(timespec="seconds")
        load = [round(value, 1) for value in os.getloadavg()]
        run = {"command": self.command, "utc": utc, "seconds": 0.0, "source": self.source, "load": load}
        run |= {name: now["device"][name] for name in ("driver", "limits", "cpu") if name in now["device"]}
        run |= {name: now["versions"][name] for name in ("python", "numpy") if name in now["versions"]}
        self.record["runs"] = [*self.record["runs"], run]

    # Many processes at once: nothing here is timed

    @property
    def _processes(self) -> int:
        return 2 if self.dry_run else max(2, min(14, (os.cpu_count() or 4) - 2))

    def _tests(self) -> None:
        before = self.record["tests"]
        again = before.get("source") == self.source
        deadline = time.monotonic() + min(self.left, 60 * self.minutes * TESTS_SHARE)
        try:
            tests = before["unfinished"] if again else gpu_tests.collect(max(10.0, min(120.0, self.left)))
        except Exception as error:
            self.say(f"GPU tests: {error}")
            self.record["tests"] = {"passed": 0, "skipped": 0, "failed": {"collection": str(error)[:300]}}
            self.record["tests"] |= {"unfinished": [], "source": ""}
            return
        if self.dry_run:
            tests = tests[:2]
        if not tests:
            return
        self.say(f"GPU tests: {len(tests)}, {self._processes} processes at a time")
        pool = gpu_tests.Pool(self.say, self.out / "campaign.log", self._processes, deadline)
        try:
            pool.run(tests)
        finally:  # what an interrupted run has found counts too
            found = pool.outcome
            earlier: dict[str, Any] = before if again else {"passed": 0, "skipped": 0, "failed": {}}
            self.record["tests"] = {
                "passed": earlier["passed"] + found.passed,
                "skipped": earlier["skipped"] + found.skipped,
                "failed": earlier["failed"] | found.failed,
                "unfinished": [test for test in tests if test not in pool.seen],
                "source": self.source,
            }
            for test, message in found.failed.items():
                self.say(f"  failed: {test}: {message}")
            if found.skipped and not found.passed and not found.failed:
                self.say("  no test ran: all were skipped")
            self.write()

    def _warm(self, waiting: list[Item]) -> None:
        """Compile what will be timed, in many processes; what goes wrong here will show where it is timed."""
        tasks = warm_items(waiting, 1 if self.dry_run else WARM_ITEMS)
        until = time.monotonic() + min(self.left, 60 * self.minutes * WARM_SHARE)
        if not tasks or self.left < 60:
            return
        self.say(f"compiling for {len(tasks)} items, {self._processes} processes at a time")
        # or each of the processes would start as many compilers as there are cores
        environment = {**self.environment, "TORCHINDUCTOR_COMPILE_THREADS": "1"}

        def serve() -> None:
            while tasks and time.monotonic() < until:
                try:
                    item = tasks.pop(0)
                except IndexError:
                    return
                worker = Worker(self.log, environment)
                try:
                    worker.send(self._message(item, {}))
                    while "at" in worker.receive(until - time.monotonic()):
                        pass
                except (Gone, Silent):
                    pass
                finally:
                    worker.stop()

        threads = [threading.Thread(target=serve, daemon=True) for _ in range(self._processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    # One process: everything that is timed

    def _message(self, item: Item, skip: dict[str, str]) -> dict[str, Any]:
        message = item.as_json()
        if item.case is not None:
            failed = self.record["tests"].get("failed", {})
            message |= {"skip": skip, "withheld": gpu_tests.withheld(failed).get(item.case.precision, {})}
        return message

    def _do(self, item: Item) -> bool:
        """Whether the item need not be done again."""
        if item.kind == "first_call":
            return self._first_calls(item)
        finished = self._ask(item, self.merge)
        if item.fresh:
            self._drop()
        return finished

    def _ask(
        self, item: Item, take: Callable[[dict[str, Any], Case | None], Any], environment: dict[str, str] | None = None
    ) -> bool:
        """Have a worker do it, as often as it takes until nobody in it crashes or hangs."""
        skip: dict[str, str] = {}
        if item.fresh:
            self._drop()
        for _ in range(12):
            at, why = ["", ""], ""
            try:
                if self.worker is None:
                    self.worker = Worker(self.log, {**self.environment, **(environment or {})})
                self.worker.send(self._message(item, skip))
                while True:
                    answer = self.worker.receive(min(SILENCE_S, self.left))
                    if "at" in answer:
                        at = answer["at"]
                        continue
                    if "done" in answer:
                        take(answer["done"], item.case)
                        return True
                    if "failed" in answer:
                        return self._trouble(item, answer["failed"])
                    at, why = [answer["lost"][0], ""], answer["lost"][1]
                    break
            except (Gone, Silent) as error:
                if self.left < 1:
                    self._drop()
                    return False  # not its fault
                why = f"{error}, at: {at[1]}" if at[1] else str(error)
            self._drop()
            self.say(f"  {at[0] or item.key}: {why}")
            if not at[0] or at[0] in skip:
                return self._trouble(item, why)
            skip[at[0]] = why
        return self._trouble(item, why)

    def _drop(self) -> None:
        if self.worker is not None:
            self.worker.stop()
        self.worker = None

    def _trouble(self, item: Item, why: str) -> bool:
        self.say(f"  {item.key} failed: {why}")
        kept = [entry for entry in self.record["troubles"] if entry["item"] != item.key]
        self.record["troubles"] = [*kept, {"item": item.key, "why": why, "source": self.source}]
        return True

    def _first_calls(self, item: Item) -> bool:
        """Once with empty caches of compiled code, and once with what that left."""
        assert item.case is not None
        (provider,) = item.options["providers"]
        entry: dict[str, Any] = {"case": item.case.key, "provider": provider, "source": self.source}
        with tempfile.TemporaryDirectory() as folder:
            caches = {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
            for name in ("cold_s", "warm_s"):
                answers: list[dict[str, Any]] = []
                self._ask(item, lambda found, _, to=answers: to.append(found), caches)  # type: ignore[misc]
                self._drop()  # its caches go away
                if not answers and self.left < 1:
                    return False
                entry[name] = answers[0]["first_calls"][0]["seconds"] if answers else None
        if None in entry.values():
            entry["why"] = "see the campaign's log"
        self.merge({"first_calls": [entry]}, item.case)
        return True

    def merge(self, found: dict[str, Any], case: Case | None) -> None:
        """Findings into the record, in the place of older ones of the same thing."""
        if case is not None:
            self.record["cases"][case.key] = case.as_json()
        for name, entries in found.items():
            if isinstance(entries, dict):
                self.record[name] = entries
                continue
            for entry in entries:
                if name == "counters":  # stand beside the profile
                    for kernels in self.record["kernels"]:
                        if kernels["case"] == entry["case"]:
                            kernels["counters"] = {k: v for k, v in entry.items() if k not in ("case", "source")}
                    continue
                kept = [old for old in self.record[name] if records.identity(old) != records.identity(entry)]
                self.record[name] = [*kept, entry]
        self._tell(found)

    def _tell(self, found: dict[str, Any]) -> None:
        parts = []
        for result in map(records.Result.of_json, found.get("results", [])):
            training = result.modes.get("training")
            steps = self.record["cases"][result.case]["steps"]
            if training:
                parts.append(f"{result.provider} {training.us[0] / steps:.2f}")
            elif result.status != records.CANNOT:  # the report says who has no such thing
                parts.append(f"{result.provider} {result.status}: {result.why[:80]}")
        if parts:
            what = "dry run, no measurement" if self.dry_run else "training, µs a step"
            self.say(f"  {what}: " + " | ".join(parts))
