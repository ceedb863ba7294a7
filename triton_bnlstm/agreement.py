"""What ranks say to each other before they do something together: one message, of one size whatever it is.

Ranks that are about to do different things all read that, and all raise. Collectives of different sizes would end a
process instead, and those of one size would give wrong numbers. A rank whose call fails before it has met the others
says so in the same message, so no rank waits for it, and all are at the next call together.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .distributed import CollectiveError, PeerError, gather, gather_objects

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Result = TypeVar("Result")

FAILED, FORWARD, AGAIN, BACKWARD = range(4)
_DOING = {
    FORWARD: "a forward",
    AGAIN: "a forward that a backward runs again (an activation checkpoint)",
    BACKWARD: "a backward",
}
WORDS = 48
# Training calls that this process and the others of a group have made together.
_calls: WeakKeyDictionary[ProcessGroup, int] = WeakKeyDictionary()


def say(
    group: ProcessGroup, doing: int, own: list[float], measured: Tensor, error: Exception | None = None
) -> tuple[list[list[float]], int]:
    """Tell the others what this rank is about to do, and hear what they are: all ranks do it, or all raise.

    Args:
        group: with two ranks or more.
        doing: FORWARD, AGAIN, BACKWARD, or FAILED with an `error`.
        own: numbers that the host knows, exact in float64.
        measured: [n] float64, numbers that the device knows; the message goes out from there.
        error: what this rank's call has failed by.

    Returns:
        for each rank its numbers, `own` and then `measured`; and how many calls there are now, the same on all ranks.

    Raises:
        PeerError: on all ranks, if a call has failed on any.
        ValueError: on all ranks, if they are about to do different things.
        RuntimeError: the ranks cannot be reached.
    """
    what = "saying what comes next in training"
    calls = _calls.get(group, 0) + (doing != BACKWARD)
    head = measured.new_tensor([doing, calls, *own])
    message = torch.cat([head, measured, measured.new_zeros(WORDS - len(head) - len(measured))])
    told = gather(group, message, what).tolist()
    _calls[group] = calls = int(max(other[1] for other in told))
    kinds = [int(other[0]) for other in told]
    if FAILED in kinds:
        rank = kinds.index(FAILED)
        texts = gather_objects(group, f"{type(error).__name__}: {error}", what)
        raise PeerError(f"process_group: the call failed on rank {rank}, so on all; there: {texts[rank]}")
    other = next((k for k, kind in enumerate(kinds) if kind != kinds[0]), None)
    if other is not None:
        raise ValueError(
            f"process_group: the ranks make different calls; rank 0 is in {_DOING[kinds[0]]}, rank {other} in "
            f"{_DOING[kinds[other]]}. Each calls the layer, and its backward, as often as the others: a loss that has "
            "no use for an output takes it with weight 0"
        )
    return [numbers[2:] for numbers in told], calls


def attempt(group: ProcessGroup, device: torch.device, call: Callable[[], Result]) -> Result:
    """`call()`, a layer's call in training; an error in it before the ranks have met is told to the others.

    device: the parameters', which the ranks' messages go out from.
    """
    before = _calls.get(group, 0)
    try:
        return call()
    except Exception as error:
        if _calls.get(group, 0) == before and not isinstance(error, CollectiveError):
            # This rank has an error of its own to raise; what it says goes past a transform of torch.func around it.
            with suppress(PeerError, CollectiveError), torch._C._DisableFuncTorch():
                say(group, FAILED, [], torch.zeros(0, dtype=torch.float64, device=device), error)
        raise


def agree_on_backward(group: ProcessGroup, call: int, place: int, like: Tensor) -> None:
    """Before the collectives of one direction's backward: all ranks are in that of the same call and place.

    Raises:
        ValueError: on all ranks, if they are not.
    """
    told, _ = say(group, BACKWARD, [call, place], like.new_zeros(0, dtype=torch.float64))
    found = [(int(other[0]), int(other[1])) for other in told]
    other = next((k for k, each in enumerate(found) if each != found[0]), None)
    if other is not None:
        (call_0, place_0), (call_k, place_k) = found[0], found[other]
        raise ValueError(
            "process_group: the ranks' backwards are of different calls or layers; rank 0 is at call "
            f"{call_0}, direction {place_0}, rank {other} at call {call_k}, direction {place_k}. Every rank's loss "
            "uses every call, in the same order: one that has no use for an output takes it with weight 0"
        )
