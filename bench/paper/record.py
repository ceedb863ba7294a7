"""One experiment's results at one size: a JSON file that is written after each job, so that a run can go on later.

experiment, size, settings
runs       one per command: command, utc, device, versions, processes
results    by the job's key: value, seconds, run (which of the above)
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .experiment import Results, Settings

OUT = Path(__file__).parents[1] / "results" / "paper"


class Record:
    """Results so far.

    Raises:
        ValueError: the file is of other settings, or none of these.
    """

    def __init__(self, path: Path, experiment: str, size: str, settings: Settings) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "experiment": experiment,
            "size": size,
            "settings": json.loads(json.dumps(settings)),  # as it will be read again: tuples are lists
            "runs": [],
            "results": {},
        }
        if path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                kept = found["settings"]
                found["results"], found["runs"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is not a record of this program ({error}); move it away") from error
            if kept != self.content["settings"]:
                differing = sorted(
                    name for name in {*kept, *settings} if kept.get(name) != self.content["settings"].get(name)
                )
                raise ValueError(
                    f"{path} was made with other settings ({', '.join(differing)}); give --fresh to start anew, or "
                    "another --out"
                )
            self.content = found

    @property
    def settings(self) -> Settings:
        """What the size is made of."""
        return dict(self.content["settings"])

    @property
    def results(self) -> Results:
        """What jobs returned, by key."""
        return {key: entry["value"] for key, entry in self.content["results"].items()}

    @property
    def seconds(self) -> float:
        """Of all jobs together."""
        return float(sum(entry["seconds"] for entry in self.content["results"].values()))

    def begin(self, run: dict[str, Any]) -> None:
        """A command that adds results begins."""
        self.content["runs"].append(run)

    def add(self, key: str, value: Any, seconds: float) -> None:
        """Keep one job's result, on disk too."""
        run = len(self.content["runs"]) - 1
        self.content["results"][key] = {"value": value, "seconds": round(seconds, 2), "run": run}
        self.write()

    def write(self) -> None:
        """Write the file as a whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self.content, separators=(",", ":"), sort_keys=True) + "\n", encoding="utf-8")
        temporary.replace(self.path)


def path_of(out: Path, experiment: str, size: str) -> Path:
    """Where a record is; plots lie beside it."""
    return out / f"{experiment}-{size}.json"
