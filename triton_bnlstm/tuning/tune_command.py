"""The command `tune`: measure layouts for the layers that are asked for, and keep what is found."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

from ..kernels.config import Device
from . import choice, contents, machine, models, online, screens
from .device import Identity
from .doctor import why_unusable
from .entry import Entry
from .machine import Here
from .models import DTYPES, USUAL_KERNELS, USUAL_LENGTHS, Layer, Wanted
from .screens import DONE, FAILED, INTERRUPTED, NO_DEVICE, USAGE, Failure
from .store import Store
from .tuner import Tell, nobody
from .work import Key, Work, in_words

_FLOAT32 = (
    "hint: float32 parameters compute in float32 without autocast; for training under torch.autocast tune "
    '--dtype bf16 or fp16, with torch.set_float32_matmul_precision("high") --dtype tf32'
)


class _Plan(NamedTuple):
    """Works in their order; those that nothing new can be tried for; and the others' longest time, seconds."""

    works: list[Work]
    settled: set[Work]
    most: float

    @property
    def new(self) -> list[Work]:
        return [work for work in self.works if work not in self.settled]

    def __str__(self) -> str:
        if not self.new:
            return "nothing new to try"
        more = f"; for {len(self.settled)} more there is nothing new to try" if self.settled else ""
        return f"{screens.count(len(self.new), 'kernel')}, at most {screens.duration(self.most)}{more}"


def tune(arguments: argparse.Namespace) -> int:
    """`tune`: measure one kernel after the other."""
    try:
        seconds = arguments.seconds or online.seconds_allowed()
    except ValueError as error:
        raise Failure(str(error), USAGE) from None
    layers = models.layers_asked(arguments)
    if arguments.architecture is not None and not arguments.dry_run:
        raise Failure("--architecture is for --dry-run: layouts are measured on the device that is here", USAGE)
    if arguments.architecture is not None and arguments.device is not None:
        raise Failure("--device is a GPU that is here, --architecture one that need not be: give one", USAGE)
    if any(layer.numbers == "fp32" for layer in layers):
        print(_FLOAT32, file=sys.stderr)
    if arguments.architecture is not None:  # somewhere else
        numbers = machine.numbers_named(arguments.architecture)
        _check_tf32(numbers, arguments.architecture, layers)
        return _tell_plan(_plan(layers, numbers, _known(numbers), seconds, arguments), arguments)
    here = _find(arguments)
    for name in dict.fromkeys(layer.numbers for layer in layers):
        reason = machine.why_not_measured(here.device, DTYPES[name][0])
        if reason is not None:
            raise Failure(f"nothing is measured: {reason}", NO_DEVICE)
    _check_tf32(here.numbers, here.name, layers)
    if arguments.dry_run:
        return _tell_plan(_plan(layers, here.numbers, _known(here.numbers), seconds, arguments), arguments)
    store = _store(here)
    plan = _plan(layers, here.numbers, lambda key: store.get(key, again=True), seconds, arguments)
    print(plan, file=sys.stderr, flush=True)
    return _tune_all(plan, here, store, seconds, arguments)


def _find(arguments: argparse.Namespace) -> Here:
    """The device to measure on.

    Raises:
        Failure: there is none; what can be done without one.
    """
    try:
        return machine.find(arguments.device)
    except Failure as failure:
        if failure.code != NO_DEVICE:
            raise
        again = "`tune --dry-run --architecture sm90` plans for a device that is not here"
        raise Failure(f"{failure}; {again}", NO_DEVICE) from None


def _known(numbers: Device) -> Callable[[Key], Entry | None]:
    """What the cache has for a device, only looked at: a plan sets no file aside, and makes no folder."""
    root = contents.root_of_cache()
    cache, identity = contents.of_cache(root), Identity.of(numbers)
    if root is None:
        screens.complain(contents.why_no_cache())
    for broken in cache.unreadable:
        if broken.slug == identity.slug:
            screens.complain(f"cannot be used: {broken}{broken.advice}")
    return {each.entry.key: each.entry for each in cache.found if each.entry and each.identity == identity}.get


def _check_tf32(numbers: Device, name: str, layers: list[Layer]) -> None:
    has = numbers.backend == "cuda" and numbers.capability >= 80
    if not has and any(DTYPES[layer.numbers][1] == "tf32" for layer in layers):
        raise Failure(f"{name} has no TF32: its products are those of --dtype fp32", USAGE)


def _plan(
    layers: list[Layer],
    numbers: Device,
    known: Callable[[Key], Entry | None],
    seconds: float,
    arguments: argparse.Namespace,
) -> _Plan:
    kernels = tuple(arguments.kernels or USUAL_KERNELS)
    batches = dict.fromkeys(arguments.batch)
    lengths = dict.fromkeys(arguments.lengths or USUAL_LENGTHS)
    wanted = [Wanted(batch, each, kernels) for batch in batches for each in lengths]
    all_works = [work for layer in layers for each in wanted for work in models.works_of(layer, each)]
    works = models.without_doubles(all_works)
    settled = {work for work in works if not arguments.force and machine.is_settled(work, numbers, known(work.key))}
    return _Plan(works, settled, seconds * (len(works) - len(settled)))


def _tell_plan(plan: _Plan, arguments: argparse.Namespace) -> int:
    if arguments.json:
        screens.write_json({"would_measure": [str(work.key) for work in plan.new], "at_most_seconds": plan.most})
        return DONE
    for work in plan.new:
        print(screens.key_words(work.key))
    print(plan)
    return DONE


def _store(here: Here) -> Store:
    """The cache, seen to keep what it is given: nobody should wait for results that are lost."""
    store = choice.store_of(here.numbers) if contents.root_of_cache() is not None else None
    if store is None or store.folder is None:
        raise Failure(f"results could not be kept: {contents.why_no_cache()}")
    reason = why_unusable(store.folder)
    if reason is not None:
        raise Failure(f"results could not be kept: {reason}")
    return store


def _tune_all(plan: _Plan, here: Here, store: Store, seconds: float, arguments: argparse.Namespace) -> int:
    works, settled = plan.works, plan.settled
    root = contents.root_of_cache()
    done: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    interrupted = False
    try:
        for k, work in enumerate(works):
            name = screens.key_words(work.key)
            try:
                title = f"{k + 1}/{len(works)} {name}"
                with nullcontext(nobody) if work in settled else screens.progress(title, seconds) as tell:
                    told = _tune_one(work, here, store, seconds, tell, arguments)
                line = told.pop("line")
                if not arguments.json:
                    print(line, flush=True)
            except BrokenPipeError:  # nobody reads the lines any more
                raise
            except (RuntimeError, ValueError, OSError, Failure) as error:  # TuningError, or what else is in the way
                text = screens.one_line(str(error)).removeprefix(f"{work.key}: ")
                screens.complain(f"{name}: {text}")
                failed.append({"key": str(work.key), "why": text})
            else:
                done.append(told)
    except KeyboardInterrupt:
        interrupted = True
        screens.complain(f"interrupted: {len(done)} of {len(works)} are tuned, and kept in {root}")
    if arguments.json:
        told = {
            "device": here.identity._asdict(),
            "cache": str(root),
            "tuned": done,
            "failed": failed,
        }
        screens.write_json({**told, "interrupted": interrupted})
    return INTERRUPTED if interrupted else FAILED if failed else DONE


def _tune_one(
    work: Work, here: Here, store: Store, seconds: float, tell: Tell, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Measure, and see that it is kept. What `--json` says of it, and its line for the others.

    Raises:
        Failure: it is not kept.
        TuningError: see `online.tune_work`.
    """
    before, began = store.get(work.key, again=True), time.monotonic()
    entry = online.tune_work(
        work,
        here.device,
        here.numbers,
        make=machine.make_bench,
        seconds=seconds,
        force=arguments.force,
        complete=True,
        tell=tell,
        store=store,
    )
    anew = entry != before
    kept = Store(store.identity, store.root).get(work.key)  # as another process sees it
    if kept is None or kept.layout != entry.layout:
        raise Failure(f"its layout could not be kept in {contents.root_of_cache()}")
    return {
        "line": screens.result_line(entry, anew=anew),
        "key": str(work.key),
        "anew": anew,
        "us": screens.time_of(entry),
        "gain": entry.gain,
        "layout_in_words": in_words(entry.layout),
        "tried": len(entry.candidates),
        "failed": sum(bool(each.failed) for each in entry.candidates),
        "seconds": round(time.monotonic() - began, 3),
        "entry": entry.as_json(),
    }
