"""Forwards that run again inside a backward: activation checkpoints.

A checkpoint runs a forward a second time when its graph is wanted, and by then the statistics have moved on. The second
run has to normalise as the first did, and must not be learnt from again. So a training call that takes something from
the population leaves a note of it, and a run inside the autograd engine looks its note up.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any, cast

import torch
from torch import Tensor

from .packing import Packing
from .reference import accumulation_dtype
from .statistics import Population

# First runs of reentrant checkpoints have no graph to live with; so many of them can be under way at a time.
GRAPHLESS_CALLS = 16


def in_backward() -> bool:
    """True inside the autograd engine: a forward that runs there is a recomputation."""
    return bool(torch._C._current_graph_task_id() != -1)


def fingerprint(x: Tensor, packing: Packing, hx: tuple[Tensor, Tensor] | None) -> Tensor:
    """What tells one call from another: sums over the rows of the input and the states, and the rows of each step."""
    wide = accumulation_dtype(x.dtype)
    parts = [x.detach().sum(0, dtype=wide), packing.count.to(wide)]
    parts += [state.detach().sum((0, 1), dtype=wide) for state in hx or ()]
    return torch.cat(parts)


class _Call:
    """What one call took from the population, for as long as its graph lives."""

    def __init__(self, number: int, mark: Tensor, populations: list[Population | None]) -> None:
        self.number = number
        self.mark = mark
        self.populations = populations
        self.backward = -1  # the backward that has run it again

    def matches(self, mark: Tensor) -> bool:
        """True where the sums are the same but for rounding: on an accelerator sums may differ from run to run."""
        return mark.shape == self.mark.shape and torch.allclose(mark, self.mark, rtol=1e-3, atol=1e-5, equal_nan=True)


class Calls:
    """The calls of one layer that may be run again."""

    def __init__(self) -> None:
        self.number = 0
        self.with_graph: weakref.WeakSet[_Call] = weakref.WeakSet()
        self.without_graph: deque[_Call] = deque(maxlen=GRAPHLESS_CALLS)

    def __deepcopy__(self, memo: dict[int, Any]) -> Calls:
        """None of them: they are the original's to run again."""
        return Calls()

    def remember(self, mark: Tensor, populations: list[Population | None], results: tuple[Tensor, ...]) -> None:
        """Keep a call for as long as the graph of any of its results."""
        self.number += 1
        call = _Call(self.number, mark, populations)
        nodes = [result.grad_fn for result in results if result.grad_fn is not None]
        for node in nodes:
            cast(dict[str, Any], node.metadata)["triton_bnlstm"] = call
        if nodes:
            self.with_graph.add(call)
        else:
            self.without_graph.append(call)

    def find(self, mark: Tensor) -> list[Population | None]:
        """What the call with this input took, for its run again in the backward.

        Calls on equal inputs are run again latest first, as a backward does; each once in one backward.
        """
        backward = torch._C._current_graph_task_id()
        calls = [call for call in (*self.with_graph, *self.without_graph) if call.matches(mark)]
        if not calls:
            raise RuntimeError(
                "a forward in training ran inside a backward pass, but no earlier forward of this layer on this input "
                "is known: the statistics that it was normalised with are gone. With reentrant checkpoints no more "
                f"than {GRAPHLESS_CALLS} calls can wait for their backward; use_reentrant=False has no such limit"
            )
        call = max(calls, key=lambda call: (call.backward != backward, call.number))
        call.backward = backward
        if call in self.without_graph:
            self.without_graph.remove(call)
        return call.populations
