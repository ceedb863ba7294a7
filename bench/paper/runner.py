"""Runs an experiment's jobs, several at a time, with one progress bar for all of them."""

from __future__ import annotations

import multiprocessing
import queue
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import suppress
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from .experiment import Job, load
from .record import Record

POLL = 0.2  # seconds between two looks at what the jobs report

_reports: Any = None  # in a job's process: where it tells how far it is


def _start(reports: Any) -> None:
    """Once in each process."""
    global _reports
    _reports = reports
    torch.set_num_threads(1)  # steps this small are slower on more, and jobs run side by side


def _run(name: str, job: Job, settings: dict[str, Any], device: str) -> tuple[Any, float]:
    """A job, in its process: its result and the seconds that it took."""
    began = time.perf_counter()
    try:
        value = load(name).run(job.arguments, settings, device, _reports.put)
    except Exception as error:  # some exceptions do not survive the way to the other process
        raise RuntimeError(f"{job.key}: {error}\n{traceback.format_exc()}") from None
    return value, time.perf_counter() - began


def run(name: str, record: Record, device: str, processes: int, console: Console) -> None:
    """All jobs whose results the record lacks. Each result is written as it comes.

    Raises:
        RuntimeError: a job failed; the results of others are kept.
    """
    experiment, settings = load(name), record.settings
    context = multiprocessing.get_context("spawn")  # a fork would inherit locks of torch's threads
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[jobs]}"),
        TimeRemainingColumn(),
    )
    with context.Manager() as manager, Progress(*columns, console=console) as bar:
        reports = manager.Queue()
        with ProcessPoolExecutor(processes, context, _start, (reports,)) as pool:
            try:
                while pending := _pending(experiment.jobs(settings, record.results), record):
                    _run_all(name, pending, record, device, pool, reports, bar)
            except BaseException:
                at_work = list((pool._processes or {}).values())  # shutdown forgets them
                pool.shutdown(wait=False, cancel_futures=True)
                for process in at_work:
                    process.terminate()  # what it was at will be done anew
                raise


def _pending(jobs: list[Job], record: Record) -> list[Job]:
    return [job for job in jobs if job.key not in record.results]


def _run_all(
    name: str, jobs: list[Job], record: Record, device: str, pool: ProcessPoolExecutor, reports: Any, bar: Progress
) -> None:
    total = sum(job.work for job in jobs)
    task = bar.add_task(name.replace("_", " "), total=total, jobs=f"0 of {len(jobs)} runs")
    settings = record.settings
    futures: dict[Future[Any], Job] = {pool.submit(_run, name, job, settings, device): job for job in jobs}
    waiting, done = set(futures), 0
    while waiting:
        ended, waiting = wait(waiting, POLL, FIRST_COMPLETED)
        for future in ended:
            value, seconds = future.result()
            record.add(futures[future].key, value, seconds)
            done += 1
        bar.advance(task, _reported(reports))
        bar.update(task, jobs=f"{done} of {len(jobs)} runs")
    bar.update(task, completed=total)


def _reported(reports: Any) -> float:
    amount = 0.0
    with suppress(queue.Empty):
        while True:
            amount += reports.get_nowait()
    return amount
