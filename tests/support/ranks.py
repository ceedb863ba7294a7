"""Processes of one group: `run_ranks` starts them, each runs the same jobs in the same order and hands back results."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

# A collective waits so long for another rank. Jobs take well under a second; what waits this long hangs.
GROUP_SECONDS = 30
# Importing torch in all processes at once, on a busy machine, comes on top.
ALL_SECONDS = 240
EXIT = 77  # of a rank that a job has made end
ROOT = Path(__file__).parents[2]


def run_ranks(module: str, jobs: list[str], size: int, folder: Path) -> list[dict[str, Any]]:
    """Functions `jobs` of `module`, or of the one they name, called with (rank, size, folder), on `size` processes.

    Returns:
        for each rank {job: result}; what a job raised stands there as text. A rank that a job has made end (EXIT) has
        the results of those before.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_BNLSTM_BACKEND": ""}
    if any(name == "lo" for _, name in socket.if_nameindex()):  # not by the host's name, which may lead nowhere
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    command = [sys.executable, "-m", "tests.support.ranks", module, ",".join(jobs), str(size), str(folder)]
    processes = []
    for rank in range(size):
        with (folder / f"{rank}.txt").open("w") as said:
            own = [*command, str(rank)]
            processes.append(subprocess.Popen(own, env=environment, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT))
    end = time.monotonic() + ALL_SECONDS
    try:
        for process in processes:
            process.wait(max(1.0, end - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank, process in enumerate(processes):
        if process.returncode not in (0, EXIT):
            text = (folder / f"{rank}.txt").read_text()
            raise AssertionError(f"rank {rank} ended with {process.returncode}:\n{text}")
    return results_of(size, folder)


def results_of(size: int, folder: Path) -> list[dict[str, Any]]:
    """What `run_ranks` has left."""
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _main() -> None:
    module, jobs, size, folder, rank = sys.argv[1:]
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=int(rank),
        world_size=int(size),
        timeout=timedelta(seconds=GROUP_SECONDS),
    )
    results: dict[str, Any] = {}
    for job in jobs.split(","):
        torch.save(results, Path(folder) / f"{rank}.pt")  # it may be this one in which the process ends
        torch.manual_seed(0)
        try:
            where, _, name = job.rpartition(".")
            results[job] = getattr(import_module(where or module), name)(int(rank), int(size), Path(folder))
        except Exception:
            results[job] = traceback.format_exc()
            break  # the other ranks are elsewhere now
    for job in jobs.split(","):
        results.setdefault(job, "not begun, since an earlier job has failed")
    torch.save(results, Path(folder) / f"{rank}.pt")
    os._exit(0)  # nothing is left to be said, and a broken group may wait at its end


if __name__ == "__main__":
    _main()
