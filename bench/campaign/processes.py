"""Worker processes: started, fed, listened to, and killed when they fall silent."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "bench.campaign.worker"]


class Gone(RuntimeError):
    """The worker has ended; the message says how."""


class Silent(RuntimeError):
    """The worker has not said anything for too long."""


def kill(process: subprocess.Popen[Any]) -> None:
    """The process and all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # one that the driver holds does not die
        process.wait(10)


def clean(log: Path, out: Path) -> None:
    """Take out of the log where things are on this machine: it is to be kept beside the record."""
    text = log.read_text(encoding="utf-8", errors="replace")
    places = {out.absolute(): "DIR", out.resolve(): "DIR", ROOT: ".", sys.prefix: "<python>"}
    for where, name in ((str(place), name) for place, name in [*places.items(), (Path.home(), "~")]):
        if len(where) > 1:
            text = text.replace(where, name)
    log.write_text(text, encoding="utf-8")


def ending(code: int) -> str:
    """What an exit status means, in words."""
    if code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    return f"ended with status {code}"


class Worker:
    """One `python -m bench.campaign.worker`.

    Args:
        log: takes what it prints.
        environment: beside the campaign's own.
    """

    def __init__(self, log: IO[str], environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            COMMAND,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            errors="replace",
            bufsize=1,
            start_new_session=True,  # so that compilers which it starts go with it
        )
        self.answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        try:
            for line in self.process.stdout:
                self.answers.put(line)
        except (OSError, ValueError):
            pass  # closed
        finally:
            self.answers.put(None)

    def send(self, item: dict[str, Any]) -> None:
        """Give it something to do.

        Raises:
            Gone: it does not listen any more.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(item) + "\n")
            self.process.stdin.flush()
        except (BrokenPipeError, OSError) as error:
            raise Gone(ending(self.process.wait())) from error

    def receive(self, seconds: float) -> dict[str, Any]:
        """Its next answer.

        Raises:
            Silent: none came in time.
            Gone: it has ended.
        """
        until = time.monotonic() + max(seconds, 0.01)
        while True:
            try:
                line = self.answers.get(timeout=max(until - time.monotonic(), 0.01))
            except queue.Empty:
                raise Silent(f"no answer within {seconds:.0f} s") from None
            if line is None:
                raise Gone(ending(self.process.wait()))
            try:
                message = json.loads(line)
            except json.JSONDecodeError:
                continue  # somebody else's words
            if isinstance(message, dict):
                return message

    def stop(self) -> None:
        """End it, whatever it is at."""
        kill(self.process)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError, ValueError):  # an item that it never read
                    stream.close()
