"""Under torch.distributed: rank 0 decides, the others take its word.

No collective is involved, which would wait for ranks that never ask: the group's key-value store carries the answers,
one for each mode and key. Rank 0 answers whatever becomes of its tuning; it may say, too, that it cannot tune now, and
decide later. A rank that rank 0 leaves without an answer goes on with what it knows itself, after a while and with a
warning; from then on it waits for nothing that rank 0 has not begun. But it goes on looking, each second at most, and
takes the answer when there is one.
"""

from __future__ import annotations

import json
import secrets
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
# Questions of a group that are remembered. Beyond it the oldest is as if it had not been asked.
_MOST = 4096


@dataclass
class _Wait:
    """For one answer. begun_by: the end of it, unless rank 0 has begun; done_by: then. look_at: not before."""

    begun_by: float
    done_by: float | None = None
    look_at: float = 0.0


class Group:
    """A default process group, and what this process knows of its answers. Only itself is equal to it.

    Args:
        store: its store. It is not kept alive, since that would keep its port.
        before: the group that this process was in before.
    """

    def __init__(self, store: Any, before: Group | None = None) -> None:
        self._store = weakref.ref(store)
        # Rank 0's name for this group, and those of earlier ones: a store may have served them, and still have their
        # answers. That of a group in which this process never asked it cannot know.
        self.token = ""
        self.old: frozenset[str] = before.old | {before.token} if before is not None else frozenset()
        self.silent = False  # rank 0 has left a question of this process unanswered
        self.waits: dict[str, _Wait] = {}
        self.put_off: dict[str, None] = {}  # by rank 0

    def is_of(self, store: Any) -> bool:
        """Whether this is its store; what an `id` says of one that is gone may be said of the next one."""
        return self._store() is store


_lock = Lock()
_group: Group | None = None  # the last one


def rank() -> int | None:
    """This process's rank; None where it is alone, or its group has no store (that of MPI), so each is for itself."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return None
    return None if dist.distributed_c10d._get_default_store() is None else dist.get_rank()


def group() -> Group | None:
    """The default process group; None where this process is alone."""
    global _group
    if rank() is None:
        return None
    store = dist.distributed_c10d._get_default_store()
    with _lock:
        if _group is None or not _group.is_of(store):
            _group = Group(store, _group)
        return _group


class Answer(NamedTuple):
    """What rank 0 says. layout: None where there is none. final: whether to ask no more."""

    layout: Layout | None
    final: bool = True


_NOT_YET = Answer(None, final=False)


class Answers:
    """What rank 0 has decided.

    Args:
        store: with `set`, `get` and `check`, as torch.distributed's stores.
        group: whose.
    """

    def __init__(self, store: Any, group: Group) -> None:
        self.store, self.group = store, group

    @classmethod
    def of(cls, group: Group) -> Answers:
        """Of the default process group, which this is."""
        return cls(dist.distributed_c10d._get_default_store(), group)

    def begin(self, name: str) -> None:
        """Rank 0: an answer is on its way."""
        self.group.put_off.pop(name, None)
        self._tell(name, _BEGUN)

    def later(self, name: str) -> None:
        """Rank 0: not now, so nobody needs to wait."""
        if name not in self.group.put_off:
            self._tell(name, _LATER)
            _add(self.group.put_off, name, None)

    def give(self, name: str, identity: Identity, layout: Layout | None) -> None:
        """Rank 0: this is it; None: nothing was found, each takes what it has."""
        self.group.put_off.pop(name, None)
        told = {"device": identity._asdict(), "layout": None if layout is None else layout_as_json(layout)}
        self._tell(name, json.dumps(told))

    def _tell(self, name: str, text: str) -> None:
        if not self.group.token:
            token = secrets.token_hex(8)
            self.store.set(f"{_PREFIX}/group", token)
            self.group.token = token
        self.store.set(f"{_PREFIX}/{self.group.token}/{name}", text)

    def _heard(self, name: str) -> str:
        """What rank 0 has said; nothing, if it has not."""
        token = self._text(f"{_PREFIX}/group")
        if not token or token in self.group.old:
            return ""
        self.group.token = token
        return self._text(f"{_PREFIX}/{token}/{name}")

    def _text(self, name: str) -> str:
        # `check` first: `get` would hold the connection until there is one
        return self.store.get(name).decode() if self.store.check([name]) else ""

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
            seconds: the longest that rank 0's tuning takes.
            clock, sleep: the time that passes.

        Raises:
            Exception: whatever the group's store has to say.
        """
        waits = self.group.waits
        wait = waits.get(name)
        if wait is None:
            wait = _Wait(clock() + (0.0 if self.group.silent else BEGIN_SECONDS))
            _add(waits, name, wait)
        if clock() < wait.look_at:
            return _NOT_YET
        try:
            answer = self._wait(wait, name, work, identity, seconds, clock, sleep)
        except Exception:  # a store that does not answer may have taken long to say so
            wait.look_at = clock() + BEGIN_SECONDS
            raise
        except BaseException:  # interrupted: if the program goes on, it asks anew
            waits.pop(name, None)
            raise
        if answer.final:
            waits.pop(name, None)
        wait.look_at = clock() + LOOK_SECONDS
        return answer

    def _wait(
        self,
        wait: _Wait,
        name: str,
        work: Work,
        identity: Identity,
        seconds: float,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> Answer:
        while True:
            text = self._heard(name)
            if text == _LATER:
                wait.done_by = None  # it will begin anew
                return _NOT_YET
            if text and text != _BEGUN:
                return Answer(_read(text, work, identity))
            if text and wait.done_by is None:
                wait.done_by = clock() + seconds + END_SECONDS
            if clock() > (wait.begun_by if wait.done_by is None else wait.done_by):
                break
            sleep(0.05)
        if not self.group.silent:
            self.group.silent = True
            tell_once(
                f"rank 0 has not decided about {work.key}, whose layout this rank needs: it goes on with what it knows "
                "itself, for this and whatever else rank 0 leaves unanswered, until there is an answer"
            )
        return _NOT_YET


def _add(known: dict[str, Any], name: str, value: Any) -> None:
    """In place of the oldest, if there are too many."""
    with _lock:
        if len(known) >= _MOST:
            known.pop(next(iter(known)), None)
        known[name] = value


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
