"""Which layout a kernel gets: what this process knows, the user's cache, what is shipped; else the analytic one.

An explicit layout (`use_config`) comes before all of these, and is no affair of this file. Looking up never measures
anything and never waits for a device, so it may happen anywhere, during the capture of a CUDA graph too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import RLock
from typing import NamedTuple

from ..kernels.config import Device
from ..kernels.errors import tell_once
from . import shipped, space
from .device import Identity, is_stale
from .entry import MEASURED, Entry
from .store import Store, cache_directory
from .work import Key, Layout, Work

logger = logging.getLogger("triton_bnlstm.tuning")

CACHE, SHIPPED, ANALYTIC, RANK_0 = "cache", "shipped", "analytic", "rank 0"
# Different works, and lines told, of one process before these start anew: batches of all sizes must not fill memory.
_MOST_KNOWN = 4096


class Choice(NamedTuple):
    """A layout and where it comes from: "cache", "shipped", "analytic" or "rank 0".

    entry: what is known of it, if anything.
    """

    layout: Layout
    origin: str
    entry: Entry | None = None

    @property
    def measured(self) -> bool:
        """Whether somebody has measured it on such a device."""
        return self.entry is not None and self.entry.how == MEASURED


_lock = RLock()
_memo: dict[tuple[Device, Work], Choice] = {}
_decided: dict[tuple[Device, Key], Choice] = {}  # by this process's tuning, or by rank 0: for all works of a key
_rejected: set[tuple[Device, Work, Layout]] = set()  # did not run, whoever recommends them
_stores: dict[tuple[str, Identity], Store] = {}
_forgotten = 0  # how often
_told: set[str] = set()
_analytic_only: ContextVar[bool] = ContextVar("triton_bnlstm_analytic_only", default=False)


def inform_once(message: str) -> None:
    """One line at level INFO, the first time."""
    with _lock:
        if message in _told:
            return
        if len(_told) >= _MOST_KNOWN:
            _told.clear()
        _told.add(message)
    logger.info(message)


@contextmanager
def analytic_only() -> Iterator[None]:
    """Within it kernels take their analytic layouts, whatever has been tuned."""
    token = _analytic_only.set(True)
    try:
        yield
    finally:
        _analytic_only.reset(token)


def store_of(device: Device) -> Store:
    """The user's cache of a device."""
    root, identity = cache_directory(), Identity.of(device)
    with _lock:
        place = str(root), identity
        if place not in _stores:
            _stores[place] = Store(identity, root)
        return _stores[place]


def choose(device: Device, work: Work) -> Choice:
    """The layout for this work on this device, for more than one step; remembered for this process."""
    if _analytic_only.get() or device.backend == "cpu":  # the interpreter's programs cannot meet
        return Choice(space.analytic(device, work), ANALYTIC)
    known = _memo.get((device, work))
    if known is None:
        with _lock:
            known = _look_up(device, work)
            _remember(device, work, known)
    return known


def _remember(device: Device, work: Work, choice: Choice) -> None:
    with _lock:
        if len(_memo) >= _MOST_KNOWN:
            _memo.clear()
        _memo[device, work] = choice


def decided(device: Device, key: Key) -> Choice | None:
    """What `decide` has said of a key."""
    return _decided.get((device, key))


def decide(device: Device, key: Key, choice: Choice) -> None:
    """What this process takes for all works of a key, where it can run: instead of the cache's, until `forget`.

    Where it cannot, the next one is what all processes have: the shipped one, or the analytic one.
    """
    with _lock:
        _decided[device, key] = choice
        for known in [each for each in _memo if each[0] == device and each[1].key == key]:
            del _memo[known]


def _look_up(device: Device, work: Work) -> Choice:
    key = work.key
    said = _decided.get((device, key))
    if said is not None and _fits(device, work, said.layout, said.origin):
        return said
    for origin in (CACHE, SHIPPED) if said is None else (SHIPPED,):
        entry = store_of(device).get(key) if origin == CACHE else shipped.get(Identity.of(device), key)
        if entry is None or not _fits(device, work, entry.layout, origin):
            continue
        if entry.how == MEASURED and is_stale(entry.by):
            inform_once(
                f"{key}: the layout was measured with Triton {entry.by.triton}; it is used, and "
                "`python -m triton_bnlstm.tuning tune` measures again"
            )
        return Choice(entry.layout, origin, entry)
    return Choice(space.analytic(device, work), ANALYTIC)


def _fits(device: Device, work: Work, layout: Layout, origin: str) -> bool:
    """Whether a key's layout can run for this work; says so if not."""
    if (device, work, layout) in _rejected:
        return False
    reason = space.why_not(device, work, layout)
    if reason is not None:
        size = f"D={work.columns}" if work.kernel == "moments" else f"H={work.hidden}"
        inform_once(f"{work.key}: the layout from the {origin} is not used for {size}, B={work.batch}: {reason}")
    return reason is None


def tuned(device: Device, work: Work) -> Layout | None:
    """The layout that was tuned or shipped for this work; None: nobody has one, take the analytic one."""
    found = choose(device, work)
    return None if found.origin == ANALYTIC else found.layout


def reject(device: Device, work: Work, layout: Layout, reason: str) -> None:
    """A layout does not run after all: this process does not take it for this work until `forget`, and says so once.

    Unless it has another one by now, which other threads or `forget` may have brought: then nothing is said.
    """
    with _lock:
        found = choose(device, work)
        if len(_rejected) >= _MOST_KNOWN:
            _rejected.clear()
        _rejected.add((device, work, layout))
        _memo.pop((device, work), None)
    if found.layout == layout and found.origin != ANALYTIC:
        layout_of_origin = f"the layout of {work.key} from the {found.origin}"
        tell_once(f"{layout_of_origin} does not run here ({reason}): the default is taken")


def times_forgotten() -> int:
    """How often this process has called `forget`."""
    return _forgotten


def forget() -> None:
    """Look everything up anew: what other processes have tuned since, or another cache.

    With `autotune="on_miss"` or "force" each key is a new question, too. Ranks that are to agree forget together.
    """
    global _forgotten
    with _lock:
        _forgotten += 1
        _memo.clear()
        _decided.clear()
        _rejected.clear()
        for store in _stores.values():
            store.forget()
        _told.clear()
        shipped.of_device.cache_clear()
