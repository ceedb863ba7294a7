"""Under torch.distributed: rank 0 decides, the others take its word.

No collective is involved, which would wait for ranks that never ask: the group's key-value store carries the answers,
one for each mode and key. Rank 0 answers whatever becomes of its tuning; it may say, too, that it cannot tune now, and
decide later. A rank that rank 0 leaves without an answer goes on with what it knows itself, after a while and with a
warning; from then on it waits for nothing that rank 0 has not begun. But it goes on looking, each second at most, and
takes the answer when there is one.
"""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple

import torch.distributed as dist

from ..kernels.errors import tell_once
from .device import Identity
from .work import Layout, Work, layout_as_json, layout_of_json

# How long a rank waits for rank 0 to begin with what it needs; and, once it has, for the end of it beyond the time cap.
BEGIN_SECONDS, END_SECONDS = 60.0, 120.0
# What rank 0 has left unanswered is looked for no more often: a look is a message to another host, before a call.
LOOK_SECONDS = 1.0
_BEGUN, _LATER = "begun", "not now"
_PREFIX = "triton_bnlstm/tuning"
# Questions that are remembered here: these start anew beyond it, which costs a look or a message, and no more.
_MOST = 4096


class Group(NamedTuple):
    """A default process group. Equal ones are one group.

    number: how many this process has met before. met: how many this process's rank has met in the group's store.
    """

    number: int
    met: int


@dataclass
class _Wait:
    """For one answer. begun_by, done_by: how long. look_at: not before."""

    begun_by: float
    done_by: float
    look_at: float = 0.0


_lock = Lock()
# The last group's store, not kept alive, since that would keep the port; what an `id` says of one that is gone may be
# said of the next one.
_store: weakref.ref[Any] | None = None
_group = Group(-1, 0)
_silent: set[Group] = set()  # where rank 0 has left a question of this process unanswered
_waits: dict[tuple[Group, str], _Wait] = {}
_put_off: set[tuple[Group, str]] = set()  # by rank 0


def rank() -> int | None:
    """This process's rank; None where it is alone, or its group has no store (that of MPI), so each is for itself."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return None
    return None if dist.distributed_c10d._get_default_store() is None else dist.get_rank()


def group() -> Group | None:
    """The default process group; None where this process is alone.

    Raises:
        Exception: whatever the group's store has to say.
    """
    global _store, _group
    number = rank()
    if number is None:
        return None
    store = dist.distributed_c10d._get_default_store()
    with _lock:
        if _store is None or _store() is not store:
            # A store may have served another group before, whose answers it still has. Ranks of one program meet the
            # same groups, so they count the same.
            met = store.add(f"{_PREFIX}/met by {number}", 1)
            _store, _group = weakref.ref(store), Group(_group.number + 1, met)
        return _group


class Answer(NamedTuple):
    """What rank 0 says. layout: None where there is none. final: whether to ask no more."""

    layout: Layout | None
    final: bool = True


class Answers:
    """What rank 0 has decided.

    Args:
        store: with `set`, `get` and `check`, as torch.distributed's stores.
        group: which.
    """

    def __init__(self, store: Any, group: Group) -> None:
        self.store, self.group = store, group

    @classmethod
    def of(cls, group: Group) -> Answers:
        """Of the default process group, which this is."""
        store = dist.distributed_c10d._get_default_store()
        return cls(dist.distributed_c10d.PrefixStore(f"{_PREFIX}/{group.met}", store), group)

    def begin(self, name: str) -> None:
        """Rank 0: an answer is on its way."""
        _put_off.discard((self.group, name))
        self.store.set(name, _BEGUN)

    def later(self, name: str) -> None:
        """Rank 0: not now, so nobody needs to wait."""
        if (self.group, name) not in _put_off:
            if len(_put_off) >= _MOST:
                _put_off.clear()
            _put_off.add((self.group, name))
            self.store.set(name, _LATER)

    def give(self, name: str, identity: Identity, layout: Layout | None) -> None:
        """Rank 0: this is it; None: nothing was found, each takes what it has."""
        _put_off.discard((self.group, name))
        told = {"device": identity._asdict(), "layout": None if layout is None else layout_as_json(layout)}
        self.store.set(name, json.dumps(told))

    def wait(
        self,
        name: str,
        work: Work,
        identity: Identity,
        seconds: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> Answer:
        """Another rank: what rank 0 has decided; nothing, where it is for another kind of device, or not in time.

        What has not come in time is not waited for again, but it may be there when it is next asked for.

        Args:
            name: of the question.
            work: what it is about.
            identity: of this rank's device.
            seconds: the time cap of rank 0's tuning.
            clock, sleep: the time that passes.
        """
        wait = self._wait(name, seconds, clock())
        if clock() < wait.look_at:
            return Answer(None, final=False)
        while True:
            # `check` first: `get` would hold the connection until there is an answer
            text = self.store.get(name).decode() if self.store.check([name]) else ""
            if text and text != _BEGUN:
                _waits.pop((self.group, name), None)
                return Answer(None, final=False) if text == _LATER else Answer(_read(text, work, identity))
            if clock() > (wait.done_by if text else wait.begun_by):
                break
            sleep(0.05)
        wait.look_at = clock() + LOOK_SECONDS
        if self.group not in _silent:
            _silent.add(self.group)
            tell_once(
                f"rank 0 has not decided about {work.key}, whose layout this rank needs: it goes on with what it knows "
                "itself, for this and whatever else rank 0 leaves unanswered, until there is an answer"
            )
        return Answer(None, final=False)

    def _wait(self, name: str, seconds: float, now: float) -> _Wait:
        """For this answer, from when it was asked for first."""
        question = self.group, name
        if question not in _waits:
            if len(_waits) >= _MOST:
                _waits.clear()
            patience = 0.0 if self.group in _silent else BEGIN_SECONDS
            _waits[question] = _Wait(now + patience, now + BEGIN_SECONDS + seconds + END_SECONDS)
        return _waits[question]


def _read(text: str, work: Work, identity: Identity) -> Layout | None:
    try:
        told = json.loads(text)
        theirs, layout = Identity.of_json(told["device"]), told["layout"]
        found = None if layout is None else layout_of_json(work.kernel, layout)
    except (ValueError, TypeError, KeyError) as error:
        tell_once(f"rank 0's layout of {work.key} cannot be read ({error}): another version of this package?")
        return None
    if theirs != identity:
        tell_once(f"rank 0 has another kind of device: its layout of {work.key} is not for this rank's {identity}")
        return None
    return found
