"""Tuning before a call, where that is asked for: once for each kernel, its sizes and its device."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from threading import RLock
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.config import (
    Device,
    device_of,
    explicit_backward_config,
    explicit_config,
    explicit_moments_config,
)
from ..kernels.errors import tell_once
from ..reference import Call
from . import choice, ranks
from .choice import CACHE, RANK_0, Choice
from .device import Identity, provenance_of
from .entry import MEASURED, Entry
from .mode import why_not_now
from .store import Busy, Store, locked
from .tuner import Bench, Tell, nobody, tune
from .work import FLAGS, Key, Work

SECONDS_VARIABLE = "TRITON_BNLSTM_AUTOTUNE_SECONDS"
SECONDS = 60.0  # of each kernel

MakeBench = Callable[[Work, torch.device], Bench]


class _Question(NamedTuple):
    """What is decided once in a process: for all works of a key, be it that nothing was found.

    forgotten: see `choice.times_forgotten`. group: this process's, if any.
    """

    forgotten: int
    group: ranks.Group | None
    mode: str
    numbers: Device
    key: Key

    @property
    def name(self) -> str:
        """The same on all ranks that ask the same."""
        return f"{self.forgotten}/{self.mode}/{self.key}"


_done: set[_Question] = set()
_since = 0  # the latest `times_forgotten` in it
# Threads measure one after the other: side by side they would disturb each other's times, and answer twice.
_measuring = RLock()


def device_bench(work: Work, device: torch.device) -> Bench:
    """Measures on the device itself."""
    from .measure import bench_of  # not at the top: there may be no Triton

    return bench_of(work, device)


def seconds_allowed() -> float:
    """The time cap of one kernel's tuning."""
    text = os.environ.get(SECONDS_VARIABLE)
    try:
        seconds = float(text) if text else SECONDS
    except ValueError:
        raise ValueError(f"{SECONDS_VARIABLE} must be a number of seconds, got {text!r}") from None
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{SECONDS_VARIABLE} must be a positive number of seconds, got {text!r}")
    return seconds


def _recurrent(kernel: str, calls: list[Call], precision: str) -> Work:
    p, problem = calls[0].parameters, calls[0].problem
    given = {
        "cell_norm": p.gamma_c is not None,
        "narrow": p.weight_ih.shape[1] == 1,
        "seats": not problem.frozen and problem.population is not None,
        "fill": problem.packing.mask is not None,
    }
    flags = tuple(name for name in FLAGS[kernel] if given[name])
    hidden, dtype = p.weight_hh.shape[1], p.weight_hh.dtype
    return Work(kernel, hidden, problem.packing.batch, len(calls), dtype, precision, flags)


def work_of_save(calls: list[Call], precision: str) -> Work:
    """What the choice between keeping W_hh h and making it again is looked up by."""
    return _recurrent("save", calls, precision)


def works_of(calls: list[Call], precision: str, *, gradients: bool, save: bool = False) -> list[Work]:
    """The kernels' works of one layer's call.

    Args:
        calls: of each direction.
        precision: of products.
        gradients: a backward may follow.
        save: what it keeps for that is to be chosen, too.
    """
    p, packing = calls[0].parameters, calls[0].problem.packing
    columns, hidden, directions, dtype = p.weight_ih.shape[1], p.weight_hh.shape[1], len(calls), p.weight_hh.dtype
    if calls[0].problem.frozen:
        found = [_recurrent("inference", calls, precision)]
    else:
        found = [_recurrent("forward", calls, precision)]
        if columns > 1:  # moments of one column cost nothing
            found.append(Work.of_moments(columns, packing.batch, directions, dtype, centre=True))
            found.append(Work.of_moments(4 * hidden, packing.batch, directions, dtype, centre=False))
    if gradients:  # moments of h are for the gradient of W_hh, and for making W_hh h again
        found.append(Work.of_moments(hidden, packing.batch, directions, dtype, centre=True, before=True))
        found.append(_recurrent("backward", calls, precision))
    if save:  # last: with the layouts that have been found for both
        found.append(work_of_save(calls, precision))
    return found


def ensure(calls: list[Call], precision: str, mode: str, *, gradients: bool, save: bool = False) -> None:
    """Tune what a layer's call is about to run, as far as the mode asks for it and it can be done now.

    What `use_config` gives a layout of its own is left out.

    Nothing that goes wrong in tuning keeps the call from running: it gets the layouts that are there.
    """
    weight: Tensor = calls[0].parameters.weight_hh
    if mode == "off" or weight.device.type != "cuda":
        return
    asked = {"forward": explicit_config(), "inference": explicit_config(), "moments": explicit_moments_config()}
    asked["backward"] = explicit_backward_config()
    works = works_of(calls, precision, gradients=gradients, save=save)
    works = [work for work in works if asked.get(work.kernel) is None]
    ensure_works(works, weight.device, device_of(weight.device), mode)


def ensure_works(
    works: list[Work], device: torch.device, numbers: Device, mode: str, make: MakeBench = device_bench
) -> None:
    """Tune these works, those that nobody has measured with "on_miss", each key once in this process with "force".

    Args:
        works: which.
        device, numbers: where.
        mode: "on_miss" or "force".
        make: makes the bench that measures.
    """
    try:
        group = ranks.group()
    except Exception as error:  # whatever it is, the call can do without
        tell_once(f"layouts are not tuned: the process group cannot be asked ({type(error).__name__}: {error})")
        return
    for work in works:
        question = _Question(choice.times_forgotten(), group, mode, numbers, work.key)
        try:
            if mode == "on_miss" and group is None and choice.choose(numbers, work).measured:
                continue
            final = question in _done or _decide(question, work, device, make)
        except Exception as error:  # whatever it is, the call can do without
            final = ranks.rank() in (None, 0)  # another rank's question may yet be answered
            tell_once(f"{work.key} could not be tuned ({type(error).__name__}: {error}): its layout stays as it is")
        if final:
            _remember(question)


def _remember(question: _Question) -> None:
    """That it is decided. What was asked before `forget` nobody asks again."""
    global _since
    if question.forgotten > _since:
        _since = question.forgotten
        _done.clear()
    _done.add(question)


def _decide(question: _Question, work: Work, device: torch.device, make: MakeBench) -> bool:
    """Alone, or as rank 0 says. Whether that is final."""
    numbers, group, rank, reason = question.numbers, question.group, ranks.rank(), why_not_now(device)
    if reason is not None:
        origin = choice.choose(numbers, work).origin
        choice.inform_once(f"{work.key} is not tuned now, since {reason}: its layout is that from the {origin}")
        if group is not None and rank == 0:
            ranks.Answers.of(group).later(question.name)
        return False
    if group is not None and rank is not None and rank > 0:
        identity = Identity.of(numbers)
        # rank 0 may first wait for another process that measures the same, see `_alone`
        longest = _lock_seconds(seconds_allowed()) + seconds_allowed()
        answer = ranks.Answers.of(group).wait(question.name, work, identity, longest)
        if answer.layout is not None:
            known = choice.choose(numbers, work)
            entry = known.entry if known.layout == answer.layout else None
            choice.decide(numbers, work.key, Choice(answer.layout, RANK_0, entry))
        return answer.final
    with _measuring:
        if question in _done:  # another thread has
            return True
        try:
            if group is None or rank is None:
                _tune_if_needed(question, work, device, make)
            else:
                _tune_for_all(ranks.Answers.of(group), question, work, device, make)
        except Exception:
            _remember(question)  # other threads are not to try in vain what this one has
            raise
        _remember(question)
    return True


def _tune_for_all(
    answers: ranks.Answers, question: _Question, work: Work, device: torch.device, make: MakeBench
) -> None:
    """Rank 0: what is found is the others' layout, too."""
    answers.begin(question.name)
    try:
        _tune_if_needed(question, work, device, make)
    except Exception:  # nothing was found, and will not be looked for again: what there is has to do for all
        _give(answers, question, work)
        raise
    except BaseException:  # interrupted: if the program goes on, its next call tunes
        answers.later(question.name)
        raise
    _give(answers, question, work)


def _give(answers: ranks.Answers, question: _Question, work: Work) -> None:
    """Tell the others what they have to decide for all works of the key, and decide the same."""
    numbers = question.numbers
    taken = choice.decided(numbers, work.key)
    if taken is None:
        taken = choice.choose(numbers, work)
        if taken.origin == choice.ANALYTIC:  # of this work; others of the key have the same now
            taken = taken._replace(origin=RANK_0)
        choice.decide(numbers, work.key, taken)
    answers.give(question.name, Identity.of(numbers), taken.layout)


def _tune_if_needed(question: _Question, work: Work, device: torch.device, make: MakeBench) -> None:
    numbers, force = question.numbers, question.mode == "force"
    if not force and choice.choose(numbers, work).measured:
        return
    seconds = seconds_allowed()
    choice.inform_once(f"measuring layouts of {work.key} for at most {seconds:g} s")
    began = time.monotonic()
    with _bar(str(work.key), seconds) as tell:
        entry = tune_work(work, device, numbers, make=make, seconds=seconds, force=force, tell=tell)
    gain = f", {entry.gain:.2f} x the default's speed" if entry.gain else ""
    choice.inform_once(f"{work.key}: measured in {time.monotonic() - began:.1f} s{gain}")


def _bar(title: str, seconds: float) -> AbstractContextManager[Tell]:
    """A progress bar where somebody may be looking; a log gets the lines around it."""
    if not sys.stderr.isatty():
        return nullcontext(nobody)
    from .screens import progress  # not at the top: few calls need it

    return progress(title, seconds)


def _alone(store: Store, work: Work, seconds: float) -> AbstractContextManager[None]:
    """One process at a time measures one thing: the others wait, and find its result.

    Raises:
        Busy: the wait was too long.
        OSError: there can be no lock.
    """
    if store.folder is None:
        return nullcontext()
    (store.folder / "measuring").mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(str(work.key).encode()).hexdigest()[:16]
    return locked(store.folder / "measuring" / name, _lock_seconds(seconds))


def _lock_seconds(seconds: float) -> float:
    """How long to wait for another process to measure the same. seconds: its time cap."""
    return 2 * seconds + 30


def tune_work(
    work: Work,
    device: torch.device,
    numbers: Device,
    *,
    make: MakeBench = device_bench,
    seconds: float = SECONDS,
    force: bool = False,
    complete: bool = False,
    tell: Tell = nobody,
    store: Store | None = None,
) -> Entry:
    """Measure layouts of some work, keep what is found, and take it from now on.

    Args:
        work, device, numbers: what and where.
        make: makes the bench that measures.
        seconds: at most so many, with the compiler's.
        force: measure every layout again, also those that are known.
        complete: measure those layouts that are not known yet; without it what is known is all that is wanted.
        tell: is told what is done.
        store: where it is kept; None: the user's cache.

    Raises:
        TuningError: nothing could be measured.
    """
    store = store or choice.store_of(numbers)
    with ExitStack() as held:
        try:
            held.enter_context(_alone(store, work, seconds))
        except Busy as error:
            tell_once(f"{error}: {work.key} is measured anyway")
        except OSError:
            pass  # nothing can be written there, as the store will say
        known = store.get(work.key, again=True)
        if known is None or known.how != MEASURED or force or complete:
            case = {"hidden": work.hidden, "batch": work.batch, "columns": work.columns}
            by = provenance_of(device)
            if force and known is not None:
                known = replace(known, candidates=())  # what is known still is the one to beat
            bench = make(work, device)
            case["steps"] = getattr(bench, "steps", 0)
            entry = tune(work, bench, by=by, case=case, known=known, seconds=seconds, tell=tell)
            if entry is not known:
                if known is not None:
                    entry = entry.later_than(known)
                store.put(entry)
            known = entry
    choice.decide(numbers, work.key, Choice(known.layout, CACHE, known))
    return known
