"""Under torch.distributed: rank 0 decides, the others take its word.

No collective is involved, which would wait for ranks that never ask: the group's key-value store carries the answers. A
rank that rank 0 leaves without an answer goes on with what it knows itself, after a while and with a warning.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from ..kernels.errors import tell_once
from .device import Identity
from .work import Key, Layout, layout_as_json, layout_of_json

# How long a rank waits for rank 0 to begin with what it needs; and, once it has, for the end of it beyond the time cap.
BEGIN_SECONDS, END_SECONDS = 60.0, 120.0
_BEGUN = "begun"
_asked: dict[tuple[Key, str], int] = {}  # how often this process has asked: each question has its own answer


def rank() -> int | None:
    """This process's rank; None where it is alone."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return None
    return dist.get_rank()


class Answers:
    """What rank 0 has decided.

    Args:
        store: with `set`, `get` and `check`, as torch.distributed's stores.
    """

    def __init__(self, store: Any) -> None:
        self.store = store

    @classmethod
    def of_the_group(cls) -> Answers:
        """Of the default process group."""
        return cls(
            dist.distributed_c10d.PrefixStore("triton_bnlstm/tuning", dist.distributed_c10d._get_default_store())
        )

    def begin(self, name: str) -> None:
        """Rank 0: an answer is on its way."""
        self.store.set(name, _BEGUN)

    def give(self, name: str, identity: Identity, layout: Layout | None) -> None:
        """Rank 0: this is it; None: nothing was found, each takes what it has."""
        told = {"device": identity._asdict(), "layout": None if layout is None else layout_as_json(layout)}
        self.store.set(name, json.dumps(told))

    def wait(
        self,
        name: str,
        key: Key,
        identity: Identity,
        seconds: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> Layout | None:
        """Another rank: what rank 0 has decided; None: nothing, or on another kind of device, or not in time.

        seconds: the time cap of its tuning.
        """
        begun_by, done_by = clock() + BEGIN_SECONDS, clock() + BEGIN_SECONDS + seconds + END_SECONDS
        while True:
            # `check` first: `get` would hold the connection until there is an answer
            text = self.store.get(name).decode() if self.store.check([name]) else ""
            if text and text != _BEGUN:
                return _read(text, key, identity)
            if clock() > (done_by if text else begun_by):
                tell_once(
                    f"rank 0 has not decided about {key}, whose layout this rank needs: "
                    "it goes on with what it knows itself"
                )
                return None
            sleep(0.05)


def _read(text: str, key: Key, identity: Identity) -> Layout | None:
    with suppress(ValueError):
        told = json.loads(text)
        if Identity.of_json(told["device"]) != identity:
            tell_once(f"rank 0 has another kind of device: its layout of {key} is not for this rank's {identity}")
        elif told["layout"] is not None:
            return layout_of_json(key.kernel, told["layout"])
    return None


def question(key: Key, mode: str) -> str:
    """A name for what is asked now: the same on all ranks that ask the same things."""
    asked = _asked.get((key, mode), 0)
    _asked[key, mode] = asked + 1
    return f"{mode}/{key}/{asked}"
