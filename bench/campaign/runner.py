"""The campaign: what is left to do, in which time, and where its findings go."""

from __future__ import annotations

import os
import statistics
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
from ..environment import asked, state
from ..problem import Problem
from ..providers import PROVIDERS
from . import gpu_tests
from .plan import SILENCE_S, Item, items, toy_items, warm_items
from .processes import Gone, Silent, Worker, clean

# Shares of the time: tests that are left after theirs go on in the next campaign, and so does what is not warm.
TESTS_SHARE, WARM_SHARE = 0.4, 0.25
# What is kept for writing the record and ending processes.
RESERVE_S = 5.0
# What is measured of sequence mode only where it was right.
BAD = (records.WRONG, records.FAILED, records.WITHHELD)
# How often an item is begun, each time without who has ended its worker; where nobody can be left out, once.
ATTEMPTS = {"tune": 4, "stages": 4, "profile": 1, "counters": 1, "first_call": 1}
CHECKED_BY_BENCH = ("tune", "stages", "profile", "counters")
WARM_ITEMS = 28


class NoDevice(RuntimeError):
    """There is no GPU."""


def _silence(at: list[str]) -> float:
    """Seconds in which a worker that was last at this has to say something."""
    provider = PROVIDERS.get(at[0])
    if provider is None or provider.limit_s is None or at[1] != "prepare":
        return SILENCE_S
    # A compiler that works in another thread, as for a backward, does not hear the alarm of its own process.
    return provider.limit_s + 5


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
        self.source, self.code = records.source(), records.code()
        self.took: dict[str, list[float]] = {}
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
            done = {entry["item"] for entry in self.record["done"]}
            self._tests()
            waiting = [item for item in todo if item.key not in done]
            self._warm(waiting)
            if len(waiting) < len(todo):
                self.say(f"{len(todo) - len(waiting)} of {len(todo)} items were done before")
            for number, item in enumerate(waiting, len(todo) - len(waiting) + 1):
                if self.left < self._estimate(item):
                    continue  # a shorter one may fit
                self.say(f"{number} of {len(todo)}: {item.title}")
                try:
                    finished = self._do(item)
                except (KeyError, TypeError, ValueError, ArithmeticError, AssertionError) as error:
                    # what it found is not what it should be; the rest may be
                    finished = self._trouble(item, f"its findings cannot be kept: {type(error).__name__}: {error}")
                if finished:
                    entry = {"item": item.key, "source": self.source, "code": self.code, "ok": self._is_clean(item)}
                    self.record["done"].append(entry)
                self.write()
            kept = {entry["item"] for entry in self.record["done"]}
            undone = sum(item.key not in kept for item in todo)
            again = "the same command with --resume goes on"
            self.say(f"{undone} of {len(todo)} items are left: {again}" if undone else "all items are done")
            return int(bool(self.record["tests"].get("failed")))

    def _end(self) -> None:
        if self.worker is not None:
            self.worker.stop()
        if self.record["runs"]:
            self.record["runs"][-1]["seconds"] = round(time.monotonic() - self.began, 1)
            self.record["runs"][-1]["state"] = state()
            self.write()
        clean(self.out / "campaign.log", self.out)

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
                # what ended badly is tried again once anything has changed that may have been the reason
                self.record["done"] = [
                    entry
                    for entry in before["done"]
                    if entry["source"] == self.source and (entry.get("ok") or entry.get("code") == self.code)
                ]
                break
            if path.parent.resolve() == self.out.resolve():
                raise ValueError(
                    f"{path} is of another machine ({', '.join(differing)}): move it away, or give another --out"
                )
            if before["device"].get("name") == now["device"]["name"]:
                self.say(f"not going on with {path}: {', '.join(differing)}")
        utc = datetime.now(timezone.utc).isoformat(timespec="seconds")
        load = [round(value, 1) for value in os.getloadavg()]
        run = {
            "command": self.command,
            "utc": utc,
            "seconds": 0.0,
            "source": self.source,
            "code": self.code,
            "load": load,
            "seed": Problem.seed,
            "commit": asked("git", "rev-parse", "HEAD"),
        }
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
        changed = before.get("code") != self.code
        deadline = time.monotonic() + min(self.left, 60 * self.minutes * TESTS_SHARE)
        try:
            tests = before["unfinished"] if again else []
            if not again or changed:
                passed = set(before.get("seen", ())) if again else set()
                tests = [t for t in gpu_tests.collect(max(10.0, min(120.0, self.left))) if t not in passed]
        except Exception as error:
            self.say(f"GPU tests: {error}")
            self.record["tests"] = {"passed": 0, "skipped": 0, "failed": {"collection": str(error)[:300]}}
            self.record["tests"] |= {"unfinished": [], "source": "", "code": ""}
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
                "failed": {t: why for t, why in earlier["failed"].items() if t not in tests} | found.failed,
                # those that took too long come last the next time
                "unfinished": sorted((t for t in tests if t not in pool.seen), key=lambda t: t in found.slow),
                "seen": sorted({*earlier.get("seen", ()), *pool.seen} - set(found.failed)),
                "source": self.source,
                "code": self.code,
            }
            for test, why in found.slow.items():
                self.say(f"  {why}: {test}")
            for test, message in found.failed.items():
                self.say(f"  failed: {test}: {message}")
            if found.skipped and not found.passed and not found.failed:
                self.say("  no test ran: all were skipped")
            self.write()

    def _warm(self, waiting: list[Item]) -> None:
        """Compile what will be timed, in many processes; what goes wrong here will show where it is timed."""
        tasks = warm_items(waiting, WARM_ITEMS)
        if self.dry_run:
            tasks = tasks[-1:]  # the quickest shows that it works; tuning comes later anyway
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
                    worker.send(self._message(item, {}, {}))
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

    def _message(self, item: Item, skip: dict[str, str], plain: dict[str, str]) -> dict[str, Any]:
        message = item.as_json()
        if item.case is not None:
            failed = self.record["tests"].get("failed", {})
            message |= {"skip": skip, "plain": plain, "withheld": gpu_tests.withheld(failed, item.case)}
        return message

    def _do(self, item: Item) -> bool:
        """Whether the item came to an end; if it ended badly, it is tried again when some code has changed."""
        began = time.monotonic()
        if item.kind in CHECKED_BY_BENCH and (why := self._why_not(item)):
            return self._trouble(item, why)
        finished = self._first_calls(item) if item.kind == "first_call" else self._ask(item, self.merge)
        if item.fresh:
            self._drop()
        if finished:
            self.took.setdefault(item.kind, []).append(time.monotonic() - began)
        return finished

    def _why_not(self, item: Item) -> str:
        """What was found wrong where this case was checked against float64."""
        assert item.case is not None
        for result in records.results_of(self.record):
            about = (result.case, result.provider, result.source) == (item.case.key, "sequence", self.source)
            if about and result.status in BAD:
                return f"not done: sequence mode is {result.status} here: {result.why}"
        return ""

    def _estimate(self, item: Item) -> float:
        """Seconds that it will take, by the plan and by what others of its kind took."""
        if self.dry_run:
            return 0.0
        return max(item.estimate_s, statistics.median(self.took.get(item.kind, [0.0])))

    def _is_clean(self, item: Item) -> bool:
        """Whether nothing in it failed."""
        if any(entry["item"] == item.key for entry in self.record["troubles"]):
            return False
        named = item.options.get("providers", [])
        own = [r for r in records.results_of(self.record) if item.case and r.case == item.case.key]
        return item.kind != "bench" or not any(r.status in BAD for r in own if r.provider in named)

    def _ask(
        self, item: Item, take: Callable[[dict[str, Any], Case | None], Any], environment: dict[str, str] | None = None
    ) -> bool:
        """Have a worker do it, as often as it takes until nobody in it crashes, hangs or cannot be captured."""
        skip: dict[str, str] = {}
        plain: dict[str, str] = {}
        if item.fresh:
            self._drop()
        attempts, restarted, why = ATTEMPTS.get(item.kind, 20), False, ""
        while attempts:
            at, captured = ["", ""], True
            try:
                if self.worker is None:
                    self.worker = Worker(self.log, {**self.environment, **(environment or {})})
                self.worker.send(self._message(item, skip, plain))
                while True:
                    answer = self.worker.receive(min(_silence(at), self.left))
                    if "at" in answer:
                        at = answer["at"]
                        continue
                    if "done" in answer:
                        self._clear_trouble(item)
                        take(answer["done"], item.case)
                        return True
                    if "failed" in answer:
                        return self._trouble(item, answer["failed"])
                    captured = "uncaptured" not in answer
                    who, why = answer["lost"] if captured else answer["uncaptured"]
                    at = [who or at[0], ""]
                    break
            except (Gone, Silent) as error:
                if self.left < 1:
                    self._drop()
                    return False  # not its fault
                why = f"{error}, at: {at[1]}" if at[1] else str(error)
            self._drop()
            if not at[0] and not restarted:
                restarted = True  # it may have died of the item before, which is no attempt
                continue
            attempts -= 1
            self.say(f"  {at[0] or item.key}: {why}")
            if not captured and at[0] not in plain:
                plain[at[0]] = why
                if item.kind == "tune":
                    skip[at[0]] = f"cannot be captured: {why}"
            elif not at[0] or at[0] in skip:
                return self._trouble(item, why)
            else:
                skip[at[0]] = why
        return self._trouble(item, why)

    def _drop(self) -> None:
        if self.worker is not None:
            self.worker.stop()
        self.worker = None

    def _clear_trouble(self, item: Item) -> None:
        self.record["troubles"] = [entry for entry in self.record["troubles"] if entry["item"] != item.key]

    def _trouble(self, item: Item, why: str) -> bool:
        self.say(f"  {item.title}: {why}")
        self._clear_trouble(item)
        self.record["troubles"].append({"item": item.key, "why": why, "source": self.source})
        return True

    def _first_calls(self, item: Item) -> bool:
        """Once with empty caches of compiled code, and once with what that left."""
        assert item.case is not None
        (provider,) = item.options["providers"]
        entry: dict[str, Any] = {"case": item.case.key, "provider": provider, "source": self.source}
        entry |= {"cold_s": None, "warm_s": None}
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            caches = {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
            for name in ("cold_s", "warm_s"):
                answers: list[dict[str, Any]] = []
                self._ask(item, lambda found, _, to=answers: to.append(found), caches)  # type: ignore[misc]
                self._drop()  # its caches go away
                if not answers and self.left < 1:
                    return False
                entry[name] = answers[0]["first_calls"][0]["seconds"] if answers else None
                if not answers:
                    break  # caches that are filled in part tell nothing
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
                    beside = [kernels for kernels in self.record["kernels"] if kernels["case"] == entry["case"]]
                    if not beside:
                        beside = [{"case": entry["case"], "kernels": [], "source": self.source}]
                        self.record["kernels"] += beside
                    beside[0]["counters"] = entry["counters"]
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
