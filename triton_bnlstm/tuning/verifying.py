"""The command `verify`: whether what a cache holds still is right, and still is worth it."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from . import contents, machine, screens, space
from .contents import Found
from .entry import MEASURED, Entry
from .machine import Here
from .screens import DONE, FAILED
from .tuner import Bench, Unfit
from .work import in_words

# An entry that takes so much more than the default's time is not worth having.
_SLOWER = 1.05
_ROUNDS = 9
# FITS: all that can be seen without running it.
GOOD, FITS, WRONG, SLOW, OPEN = "ok", "fits", "wrong", "slow", "not checked"


class Verdict(NamedTuple):
    """On one entry: what it is ("ok", …), why, and its time over the default's if that was taken."""

    state: str
    why: str = ""
    ratio: float | None = None


def verify(arguments: argparse.Namespace) -> int:
    """`verify`: look at every entry of the cache, and run those of this device."""
    here = machine.find_any()
    cache = contents.of_cache(contents.needed_root())
    found = sorted(cache.found, key=contents.by_size)
    others = 0
    if here is not None:
        found = [each for each in found if each.identity.slug == here.identity.slug]
        others = len(cache.found) - len(found)
    until = time.monotonic() + arguments.seconds if arguments.seconds else float("inf")
    verdicts = []
    for k, each in enumerate(found):
        title = f"{k + 1}/{len(found)} {_name(each)}"
        verdict = on_paper(each, here)
        if verdict.state == FITS and here is not None:
            verdict = _on_device(each, here, title, until)
        verdicts.append(verdict)
    unreadable = [each for each in cache.unreadable if here is None or each.slug == here.identity.slug]
    bad = sum(verdict.state in (WRONG, SLOW) for verdict in verdicts) + len(unreadable)
    unchecked = _not_checked(here, found, others)
    if arguments.json:
        screens.write_json(
            {
                "cache": str(cache.root),
                "device": None if here is None else here.identity._asdict(),
                "entries": [_as_json(each, verdict) for each, verdict in zip(found, verdicts, strict=True)],
                "unreadable": [each.as_json() for each in unreadable],
                "not_checked": unchecked,
                "problems": bad,
            }
        )
        return FAILED if bad else DONE
    for text in unchecked:
        screens.print_text(f"Not checked: {text}.")
    for broken in unreadable:
        more = "" if broken.is_foreign else broken.advice  # of the others at the end
        screens.print_text(f"wrong        {broken}{more}", "             ")
    for each, verdict in zip(found, verdicts, strict=True):
        ratio = "" if verdict.ratio is None else f", {verdict.ratio:.2f} of the default's time"
        line = f"{verdict.state:<12} {_name(each)}{': ' + verdict.why if verdict.why else ''}{ratio}"
        screens.print_text(line, "             ")
    left = sum(verdict.state == OPEN for verdict in verdicts)
    print(
        f"{screens.count(len(found), 'entry', 'entries')}, {screens.count(bad, 'problem')}"
        + (f", {left} not checked" if left else "")
        + ("; none was run" if here is None and found else "")
    )
    foreign = [each.path for each in unreadable if each.is_foreign]
    if foreign or any(each.of_other_code or each.entry is None for each in found):
        screens.print_text(f"{contents.remedy(*foreign)}.")
    stale = [each for each in found if each.is_stale and not each.of_other_code]
    if stale:
        were = f"{screens.count(len(stale), 'entry was', 'entries were')} measured with another Triton, and still used"
        screens.print_text(f"{were}. Measured anew by, for instance: {screens.tune_words(stale[0].entry)}")
    slow = [each for each, verdict in zip(found, verdicts, strict=True) if verdict.state == SLOW]
    if slow:
        again = f"{screens.tune_words(slow[0].entry)} --force"
        screens.print_text(f"What is slower than the default is measured again by, for instance: {again}")
    return FAILED if bad else DONE


def _name(each: Found) -> str:
    what = each.text if each.entry is None else screens.key_words(each.entry.key)
    return f"{each.identity.slug} {what}"


def _not_checked(here: Here | None, found: list[Found], others: int) -> list[str]:
    """What this run could not look at. others: entries of devices that are not here."""
    if here is not None:
        left = f"{screens.count(others, 'entry', 'entries')} of other devices than the one that is here"
        return [left] if others else []
    told = ["without a GPU no kernel was compiled or run, so neither results nor times were looked at"]
    unknown = sorted({each.identity.slug for each in found if machine.numbers_of(each.identity) is None})
    if unknown:
        told.append(f"whether layouts fit {screens.listed(unknown)}, whose numbers are not known here")
    return told


def on_paper(each: Found, here: Here | None) -> Verdict:
    """What can be seen without running anything."""
    if each.entry is None:
        return Verdict(WRONG, f"it cannot be used: {each.problem}")
    if each.of_other_code:
        return Verdict(WRONG, "it is for another version of the kernel's code, so no call uses it")
    numbers = machine.numbers_of(each.identity) if here is None else here.numbers
    if numbers is None:
        return Verdict(OPEN, "the numbers of its device are not known")
    reason = space.why_not(numbers, contents.work_of(each.entry), each.entry.layout)
    if reason is not None:
        return Verdict(WRONG, f"{in_words(each.entry.layout)} cannot run: {reason}")
    if each.is_slower:
        return Verdict(SLOW, f"it was slower than the default when it was measured ({each.gain:.2f} x its speed)")
    return Verdict(FITS)


def _on_device(each: Found, here: Here, title: str, until: float) -> Verdict:
    """Compiled, compared with the reference path, and timed against the default."""
    entry = each.entry
    assert entry is not None
    if time.monotonic() > until:
        return Verdict(OPEN, "the time was up")
    work = contents.work_of(entry)
    reason = machine.why_not_measured(here.device, work.dtype)
    if reason is not None:
        return Verdict(OPEN, reason)
    print(title, file=sys.stderr, flush=True)
    try:
        return _measured(entry, machine.make_bench(work, here.device))
    except Unfit as error:
        return Verdict(WRONG, screens.one_line(f"{in_words(entry.layout)}: {error}"))
    except (RuntimeError, ValueError, OSError) as error:  # a broken Triton, or no memory left
        return Verdict(WRONG, screens.one_line(f"it could not be measured: {error}"))


def _measured(entry: Entry, bench: Bench) -> Verdict:
    bench.prepare(entry.layout)
    if entry.layout == bench.default:
        return Verdict(GOOD)
    try:
        bench.prepare(bench.default)
    except Unfit:
        return Verdict(GOOD, "the default does not run here, so times were not compared")
    ratio = _ratio(bench, entry)
    if ratio > _SLOWER:  # a machine that was busy for a moment must not condemn it
        ratio = min(ratio, _ratio(bench, entry))
    return Verdict(SLOW, "it is slower than the default", ratio) if ratio > _SLOWER else Verdict(GOOD, "", ratio)


def _ratio(bench: Bench, entry: Entry) -> float:
    """The time of an entry's layout over the default's, both taken by turns; the first round is not counted."""
    times: tuple[list[float], list[float]] = ([], [])
    sample: Callable[..., float] = bench.sample
    for round_ in range(-1, _ROUNDS):
        for layout, taken in zip((entry.layout, bench.default), times, strict=True):
            seconds = sample(layout)
            if round_ >= 0:
                taken.append(seconds)
    return statistics.median(times[0]) / statistics.median(times[1])


def _as_json(each: Found, verdict: Verdict) -> dict[str, Any]:
    return {
        "device": each.identity._asdict(),
        "key": each.text,
        "measured": each.entry is not None and each.entry.how == MEASURED,
        "state": verdict.state,
        "why": verdict.why or None,
        "ratio": verdict.ratio,
    }
