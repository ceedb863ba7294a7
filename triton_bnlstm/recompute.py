"""Forwards that run again inside a backward: activation checkpoints.

A checkpoint runs a forward a second time when its graph is wanted, and by then the statistics have moved on. The second
run has to normalise as the first did, and must not be learnt from again. So a training call that takes something from
the population, and that may be run again, leaves a note of it, and a run inside the autograd engine looks its note up:

- under `checkpoint(use_reentrant=False)` by the checkpoint's frame, an object that the hooks of its first run and of
  its reruns refer to, and which lives as long as its graph;
- else by the node of the graph that runs at the moment (that of `checkpoint(use_reentrant=True)`, or of another
  function that computes again): its calls began right after it was made, which autograd counts.

Both run their calls again in the order of the first run. What was noted of the input has to agree; where the place in
the graph does not lead to a call on that input, one that is the only one on it will do.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from .packing import Packing
from .reference import accumulation_dtype
from .statistics import Population

# First runs without a graph have nothing to live with until they are run again; so many of them are kept.
GRAPHLESS_CALLS = 16

_GONE = (
    "a forward in training ran inside a backward pass, but no earlier forward of this layer on this input is known: "
    "the statistics that it was normalised with are gone. It was none of a checkpoint's, or its input is another one "
    "now (dropout with preserve_rng_state=False, for one), or it is a reentrant checkpoint's, of which no more than "
    f"{GRAPHLESS_CALLS} calls can wait for their backward; use_reentrant=False has no such limit"
)
_WHICH = (
    "a forward in training ran inside a backward pass, and several earlier forwards of this layer on this input took "
    "different statistics: which of them is run again cannot be told. torch.utils.checkpoint with use_reentrant=False, "
    "and no other hooks around the layer, tells it"
)

# How far sums of a recomputed input may be from the first run's, against how far these are from their mean: what comes
# before the layer may not be deterministic, and may have been rounded otherwise. Other inputs are further away by far:
# sums of independent ones differ by √2 of it.
NEAR = 0.05

# torch 2.7 does not tell which hooks there are.
_top_hooks: Callable[[bool], Any] | None = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
_Frame: type | tuple[()] = getattr(torch.utils.checkpoint, "_CheckpointFrame", ())


def in_backward() -> bool:
    """True inside the autograd engine: a forward that runs there is a recomputation."""
    return bool(torch._C._current_graph_task_id() != -1)


@contextmanager
def unwatched() -> Generator[None, None, None]:
    """Operations in it are none that a selective checkpoint keeps: it counts them, and its reruns have others."""
    if any(type(mode).__module__ == torch.utils.checkpoint.__name__ for mode in _get_current_dispatch_mode_stack()):
        with _disable_current_modes():
            yield
    else:
        yield


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
        if self.sums[0].device != other.sums[0].device or not torch.equal(self.valid, other.valid):
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


class _Level(NamedTuple):
    """A checkpoint that is around: its frame, and whether it runs again, by which hook (another one at each rerun)."""

    frame: Any
    hook: Any
    again: bool


def _levels() -> list[_Level]:
    """Checkpoints around what runs here, the innermost one first; other hooks are left out."""
    if _top_hooks is None:
        return []
    found = []
    try:  # only the top can be looked at, so the others are uncovered one by one
        while (top := _top_hooks(True)) is not None:
            found.append(top)
            torch._C._autograd._pop_saved_tensors_default_hooks()
    finally:
        for pack, unpack in reversed(found):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)
    levels = []
    for hook, _ in found:
        for cell in getattr(inspect.unwrap(hook), "__closure__", None) or ():
            held = cell.cell_contents
            again = isinstance(held, weakref.ref)
            frame = held() if again else held
            if isinstance(frame, _Frame):
                levels.append(_Level(frame, hook, again))
    return levels


class _Call:
    """What one call took from the population.

    began: the number that autograd would have given to a node then. run_again: by what it was last run again.
    """

    def __init__(self, number: int, mark: Mark, populations: list[Population | None]) -> None:
        self.number = number
        self.mark = mark
        self.populations = populations
        self.began = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        self.thread = threading.get_ident()
        self.run_again: Any = None


class Calls:
    """The calls of one layer that may be run again."""

    def __init__(self) -> None:
        self.number = 0
        self.of_frames: weakref.WeakKeyDictionary[Any, list[_Call]] = weakref.WeakKeyDictionary()
        self.of_nodes: weakref.WeakSet[_Call] = weakref.WeakSet()
        self.without_graph: list[_Call] = []
        self.forgotten: dict[int, int] = {}  # by thread: of those that nothing kept, the latest beginning

    def __deepcopy__(self, memo: dict[int, Any]) -> Calls:
        """None of them: they are the original's to run again."""
        return Calls()

    def _all(self) -> Iterator[_Call]:
        for calls in tuple(self.of_frames.values()):
            yield from calls
        yield from self.of_nodes
        yield from self.without_graph

    def remember(
        self,
        x: Tensor,
        packing: Packing,
        hx: tuple[Tensor, Tensor] | None,
        start: int,
        populations: list[Population | None],
        results: tuple[Tensor, ...],
    ) -> None:
        """Keep what a call took, if it may be run again; a rerun's too, for checkpoints inside of others."""
        frames = [level.frame for level in _levels() if not level.again]
        graph = torch.is_grad_enabled()
        if graph and not frames and _top_hooks is not None:
            return
        self.number += 1
        call = _Call(self.number, fingerprint(x, packing, hx, start), populations)
        for frame in frames:
            self.of_frames.setdefault(frame, []).append(call)
        if not graph:
            self.without_graph.append(call)
            if len(self.without_graph) > GRAPHLESS_CALLS:
                oldest = self.without_graph.pop(0)
                self.forgotten[oldest.thread] = max(oldest.began, self.forgotten.get(oldest.thread, -1))
        elif not frames:
            self._keep(call, [result.grad_fn for result in results])

    def _keep(self, call: _Call, nodes: list[Any]) -> None:
        """As long as any of these nodes."""
        for node in nodes:
            if node is not None:
                cast(dict[str, Any], node.metadata).setdefault("triton_bnlstm", []).append(call)
        self.of_nodes.add(call)

    def find(
        self, x: Tensor, packing: Packing, hx: tuple[Tensor, Tensor] | None, start: int
    ) -> list[Population | None]:
        """What the call took that is run again now; each once in one rerun.

        Raises:
            RuntimeError: there was no such call, it is forgotten, or several may be meant.
        """
        mark = fingerprint(x, packing, hx, start)
        again = next((level for level in _levels() if level.again), None)
        if again is not None:
            call = self._next(self.of_frames.get(again.frame, []), again.hook)
        else:
            node = torch._C._current_autograd_node()
            call = None if node is None else self._of_node(node, mark)
        if call is not None and call.mark.distance(mark) is not None:
            return call.populations
        return self._only_one(mark).populations

    @staticmethod
    def _next(calls: list[_Call], by: Any) -> _Call | None:
        """The first of these that `by` has not yet run again."""
        for call in calls:
            if call.run_again != by:
                call.run_again = by
                return call
        return None

    def _of_node(self, node: Any, mark: Mark) -> _Call | None:
        number = node._sequence_nr()
        calls = [call for call in (*self.of_nodes, *self.without_graph) if call.began > number]
        # of nodes that other threads make numbers may be higher by chance; its own are the next
        calls.sort(key=lambda call: (call.began, call.number))
        call = self._next(calls, (torch._C._current_graph_task_id(), number))
        if call is None:
            return None
        if number < self.forgotten.get(call.thread, -1) and call not in self.of_nodes:
            raise RuntimeError(_GONE)  # its own came before the one that was forgotten
        for other in calls:
            at_once = call.began == number + 1 != other.began  # without a graph there is no node in between
            if other.thread != call.thread and not at_once and self._may_be(other, call, mark):
                return None
        if call in self.without_graph:
            self.without_graph.remove(call)
            self._keep(call, [node])
        return call

    @staticmethod
    def _may_be(other: _Call, call: _Call, mark: Mark) -> bool:
        """Whether another thread's call, on the same input but with another population, could be meant as well."""
        return other.populations is not call.populations and other.mark.distance(mark) is not None

    def _only_one(self, mark: Mark) -> _Call:
        """The call on this input; of several the nearest, if it is one."""
        near: dict[int, tuple[float, _Call]] = {}  # a rerun's note has the populations of the first run's
        for call in self._all():
            distance = call.mark.distance(mark)
            if distance is not None and distance <= near.get(id(call.populations), (distance, call))[0]:
                near[id(call.populations)] = distance, call
        if not near:
            raise RuntimeError(_GONE)
        (first, call), *others = sorted(near.values(), key=lambda each: each[0])
        if others and others[0][0] <= first:
            raise RuntimeError(_WHICH)
        return call
