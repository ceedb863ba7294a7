"""Forwards that run again inside a backward: activation checkpoints.

A checkpoint runs a forward a second time when its graph is wanted, and by then the statistics have moved on. The second
run has to normalise as the first did, and must not be learnt from again. So a training call that takes something from
the population leaves a note of it, and a run inside the autograd engine looks its note up: by what it is given, and
where several calls were given the same, by where in the graph it is run again.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .packing import Packing
from .reference import accumulation_dtype
from .statistics import Population

# First runs of reentrant checkpoints have no graph to live with; so many of them can be under way at a time.
GRAPHLESS_CALLS = 16

# How far sums of a recomputed input may be from the first run's, against how far these are from their mean: what comes
# before the layer may not be deterministic, and may have been rounded otherwise. Other inputs are further away by far:
# sums of independent ones differ by √2 of it.
NEAR = 0.05

_hooks: Callable[[bool], Any] | None = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def in_backward() -> bool:
    """True inside the autograd engine: a forward that runs there is a recomputation."""
    return bool(torch._C._current_graph_task_id() != -1)


class Mark(NamedTuple):
    """What tells one call from another.

    shape: start, B, and the rows held at each step. valid: those of them that are valid. sums: over the columns and
    over the rows of the input and of each state, which differ for other values, and for other orders of them.
    """

    shape: tuple[int, ...]
    valid: Tensor
    sums: list[Tensor]

    def distance(self, other: Mark) -> float | None:
        """0 for the same call, at most 1 for one that may be it but for rounding, None for another one."""
        if self.shape != other.shape or [s.shape for s in self.sums] != [s.shape for s in other.sums]:
            return None
        if not torch.equal(self.valid, other.valid):
            return None
        worst = 0.0
        for own, its in zip(self.sums, other.sums, strict=True):
            if torch.equal(own.nan_to_num(), its.nan_to_num()):
                continue
            allowed = NEAR * (own - own.mean()).norm() + torch.finfo(own.dtype).eps ** 0.75 * own.norm()
            far = float((own - its).norm() / allowed)
            if not far <= 1:
                return None
            worst = max(worst, far)
        return worst


def fingerprint(x: Tensor, packing: Packing, hx: tuple[Tensor, Tensor] | None, start: int) -> Mark:
    """Of a call on rows x [R, D] and states hx, each [layers · directions, B, H]."""
    wide = accumulation_dtype(x.dtype)
    sums = []
    for values in (x, *(state.flatten(0, 1) for state in hx or ())):
        sums += [values.detach().sum(dim, dtype=wide) for dim in (0, 1)]
    return Mark((start, packing.batch, *packing.sizes), packing.count, sums)


def _region() -> weakref.ref[Any] | None:
    """What keeps tensors for the graph here: under a checkpoint something that belongs to it alone."""
    hooks = None if _hooks is None else _hooks(True)
    return None if hooks is None else weakref.ref(hooks[0])


class _Call:
    """What one call took from the population, for as long as its graph lives.

    began: the number that autograd would have given to a node when it began; of later nodes it is higher.
    """

    def __init__(self, mark: Mark, began: int, populations: list[Population | None]) -> None:
        self.mark = mark
        self.began = began
        self.populations = populations
        self.region = _region()
        self.backward = -1  # the backward that has run it again

    def shares_region(self, other: _Call) -> bool:
        """Whether one checkpoint runs both again, in the order of their first runs."""
        return self is other or (self.region is not None and self.region == other.region)


class Calls:
    """The calls of one layer that may be run again."""

    def __init__(self) -> None:
        self.with_graph: weakref.WeakSet[_Call] = weakref.WeakSet()
        self.without_graph: deque[_Call] = deque(maxlen=GRAPHLESS_CALLS)

    def __deepcopy__(self, memo: dict[int, Any]) -> Calls:
        """None of them: they are the original's to run again."""
        return Calls()

    def remember(
        self, mark: Mark, began: int, populations: list[Population | None], results: tuple[Tensor, ...]
    ) -> None:
        """Keep a call for as long as the graph of any of its results; began: `place_in_graph` before it."""
        call = _Call(mark, began, populations)
        nodes = [result.grad_fn for result in results if result.grad_fn is not None]
        for node in nodes:
            cast(dict[str, Any], node.metadata)["triton_bnlstm"] = call
        if nodes:
            self.with_graph.add(call)
        else:
            self.without_graph.append(call)

    def find(self, mark: Mark) -> list[Population | None]:
        """What the call with this input took, for its run again in the backward; each once in one backward.

        Raises:
            RuntimeError: there was no such call, or it is forgotten.
        """
        distances = {call: mark.distance(call.mark) for call in (*self.with_graph, *self.without_graph)}
        calls = [call for call, distance in distances.items() if distance is not None]
        if not calls:
            raise RuntimeError(
                "a forward in training ran inside a backward pass, but no earlier forward of this layer on this input "
                "is known: the statistics that it was normalised with are gone. With reentrant checkpoints no more "
                f"than {GRAPHLESS_CALLS} calls can wait for their backward; use_reentrant=False has no such limit"
            )
        nearest = min(cast(float, distances[call]) for call in calls)
        backward = torch._C._current_graph_task_id()
        same = [call for call in calls if distances[call] == nearest]
        call = self._run_again([call for call in same if call.backward != backward] or same)
        call.backward = backward
        if call in self.without_graph:
            self.without_graph.remove(call)
        return call.populations

    def _run_again(self, same: list[_Call]) -> _Call:
        """Which of the calls on the same input the node that runs at the moment has run again.

        A reentrant checkpoint is a node of its own, older than its calls, and they are run in their order. Another one
        is entered from a node of its graph, which is younger than the beginning of the call that it belongs to.
        """
        now = torch._C._current_autograd_node()
        number = now._sequence_nr()
        after = [call for call in same if call in self.without_graph and call.began > number]
        if after and type(now).__name__ == "CheckpointFunctionBackward":
            return min(after, key=lambda call: call.began)
        before = [call for call in same if call in self.with_graph and call.began <= number]
        last = max(before or same, key=lambda call: call.began)
        return min((call for call in before if call.shares_region(last)), key=lambda call: call.began, default=last)


def place_in_graph() -> int:
    """The number of the node that autograd makes next in this thread."""
    return torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
