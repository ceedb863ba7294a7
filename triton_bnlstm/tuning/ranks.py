"""Under torch.distributed: rank 0 decides, the others take its word.

No collective is involved, which would wait for ranks that never ask: the group's key-value store carries the answers,
one for each mode and key. Rank 0 answers whatever becomes of its tuning; it may say, too, that it cannot tune now, and
decide later. A rank that rank 0 leaves without an answer goes on with what it knows itself, after a while and with a
warning; from then on it takes the answers that are there, and waits for none.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist

from ..kernels.errors import tell_once
from .device import Identity
from .work import Layout, Work, layout_as_json, layout_of_json

# How long a rank waits for rank 0 to begin with what it needs; and, once it has, for the end of it beyond the time cap.
BEGIN_SECONDS, END_SECONDS = 60.0, 120.0
_BEGUN, _LATER = "begun", "not now"
# Groups in which rank 0 has left a question of this process unanswered, and what rank 0 has put off.
_silent: set[int] = set()
_put_off: set[tuple[int, str]] = set()


def rank() -> int | None:
    """This process's rank; None where it is alone, or its group has no store (that of MPI), so each is for itself."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return None
    return None if dist.distributed_c10d._get_default_store() is None else dist.get_rank()


def group() -> int | None:
    """Tells the default process group from one that this process may be in later; None where it is alone."""
    return None if rank() is None else id(dist.distributed_c10d._get_default_store())


class Answer(NamedTuple):
    """What rank 0 says. layout: None where there is none. final: whether to ask no more."""

    layout: Layout | None
    final: bool = True


class Answers:
    """What rank 0 has decided.

    Args:
        store: with `set`, `get` and `check`, as torch.distributed's stores.
        group: see `group`.
    """

    def __init__(self, store: Any, group: int) -> None:
        self.store, self.group = store, group

    @classmethod
    def of_the_group(cls) -> Answers:
        """Of the default process group."""
        store = dist.distributed_c10d._get_default_store()
        return cls(dist.distributed_c10d.PrefixStore("triton_bnlstm/tuning", store), id(store))

    def begin(self, name: str) -> None:
        """Rank 0: an answer is on its way."""
        self.store.set(name, _BEGUN)

    def later(self, name: str) -> None:
        """Rank 0: not now, so nobody needs to wait."""
        if (self.group, name) not in _put_off:
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

        Args:
            name: of the question.
            work: what it is about.
            identity: of this rank's device.
            seconds: the time cap of rank 0's tuning.
            clock, sleep: the time that passes.
        """
        patience = 0.0 if self.group in _silent else BEGIN_SECONDS
        begun_by, done_by = clock() + patience, clock() + BEGIN_SECONDS + seconds + END_SECONDS
        while True:
            # `check` first: `get` would hold the connection until there is an answer
            text = self.store.get(name).decode() if self.store.check([name]) else ""
            if text == _LATER:
                return Answer(None, final=False)
            if text and text != _BEGUN:
                return Answer(_read(text, work, identity))
            if clock() > (done_by if text else begun_by):
                if self.group not in _silent:
                    _silent.add(self.group)
                    tell_once(
                        f"rank 0 has not decided about {work.key}, whose layout this rank needs: "
                        "it goes on with what it knows itself, for this and whatever else rank 0 leaves unanswered"
                    )
                return Answer(None)
            sleep(0.05)


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
