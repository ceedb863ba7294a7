"""Where a recurrent kernel's time goes: the kernel with one stage left out, timed beside the whole one.

A variant is the library's own kernel, its source untouched, in which some of the functions that it calls are others:
stand-ins that do next to nothing (`stage_kernels`). What it computes is wrong, and no stage's time is the difference to
the whole one's exactly, as stages overlap: the sum of all differences may be less or more than the whole.

Numbers decide nothing but numbers in these kernels: which rows are read and written, and how often a loop runs, comes
from tensors that no kernel writes. So a variant stays within its tensors and ends, also where programs do not wait for
each other and read states that are not there yet.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cache
from types import FunctionType, ModuleType
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import KernelInterface

from triton_bnlstm.kernels import launch, launch_backward
from triton_bnlstm.kernels.backward_config import default_backward_config
from triton_bnlstm.kernels.config import BackwardConfig, Config, device_of, use_config
from triton_bnlstm.kernels.forward_config import default_config
from triton_bnlstm.kernels.run import FATAL

from . import stage_kernels as stand_ins
from .cases import Case
from .problem import Problem, product_precision
from .timing import CaptureFailed, Tell, captured, sample, synchronize

WAYS = ("forward", "backward")

_COMMON: dict[str, dict[str, Any]] = {
    "barrier": {"wait": stand_ins.no_wait, "arrive": stand_ins.no_arrive},
    "product": {"product": stand_ins.no_product},
    "state": {"load_state": stand_ins.no_state},
    "gates": {"sigmoid": stand_ins.no_sigmoid, "tanh": stand_ins.no_tanh},
}
# By way and stage: functions, by the name that their callers know them by, and what stands in for them. A name "tl.·"
# is replaced in the kernel's own text alone.
#   barrier     the grid's meetings
#   product     the recurrent product with its loads, but for 16 of its inner extent
#   state       the loads of what other programs wrote, but for the first BK columns
#   parts       reading and adding partial sums, where the backward's product is divided
#   statistics  sums over the batch
#   gates       exponentials and divisions of the non-linearities; the rest of the cell's arithmetic stays
#   input       forward: loads of W_ih x
#   saved       backward: three of four loads of it and of W_hh h
#   stores      forward: of everything; backward: of both gradients of pre-activations
STAGES: dict[str, dict[str, dict[str, Any]]] = {
    "forward": {
        **_COMMON,
        "statistics": {"moments_of_live_rows": stand_ins.no_moments},
        "input": {"load_input": stand_ins.no_input},
        "stores": {"tl.store": stand_ins.no_store},
    },
    "backward": {
        **_COMMON,
        "parts": {"sum_of_parts": stand_ins.no_sum_of_parts},
        "statistics": {"tl.sum": stand_ins.no_sum},
        "saved": {"load_gates": stand_ins.one_gate},
        "stores": {"store_gates": stand_ins.no_store_gates},
    },
}
_PLACES: dict[str, tuple[Any, str]] = {
    "forward": (launch, "forward_kernel"),
    "backward": (launch_backward, "backward_kernel"),
}
_KERNELS = {way: getattr(*place) for way, place in _PLACES.items()}


def _language(replaced: dict[str, Any]) -> ModuleType:
    """Triton's language with other functions, under a name of its own.

    Triton's cache does not look at functions of a module that is called like the language: it would give the whole
    kernel's code for the variant's.
    """
    module = ModuleType("language_with_stand_ins")
    module.__dict__.update(replaced, __getattr__=lambda name: getattr(tl, name))
    return module


class _Builder:
    """Copies a kernel and all functions on the way to those that are replaced."""

    def __init__(self, stage: str, replaced: dict[str, Any]) -> None:
        self.stage, self.replaced = stage, replaced
        self.copies: dict[int, Any] = {}
        self.found: set[str] = set()

    def kernel(self, original: Any) -> Any:
        """The kernel's variant.

        Raises:
            ValueError: a function that is to be replaced is not called.
        """
        own = {name[3:]: value for name, value in self.replaced.items() if name.startswith("tl.")}
        changed: dict[str, Any] = {}
        if own:
            # the interpreter wants to see the language itself among a function's globals, whatever its name there
            changed = {"tl": _language(own), "_language": tl}
            self.found.update(f"tl.{name}" for name in own if name in original.fn.__code__.co_names)
        made = self._copy(original, changed)
        missing = self.replaced.keys() - self.found
        if missing:
            raise ValueError(f"{original.__name__} calls no {', '.join(sorted(missing))}")
        return made

    def _copy(self, original: Any, changed: dict[str, Any]) -> Any:
        if id(original) in self.copies:
            return self.copies[id(original)]
        function = original.fn
        for name in function.__code__.co_names:
            called = function.__globals__.get(name)
            if called is not None and name in self.replaced:
                self.found.add(name)
                changed[name] = self.replaced[name]
            elif isinstance(called, KernelInterface):
                copy = self._copy(called, {})
                if copy is not called:
                    changed[name] = copy
        made = original
        if changed:
            made = self._compilable(original, {**function.__globals__, **changed})
        self.copies[id(original)] = made
        return made

    def _compilable(self, original: Any, names: dict[str, Any]) -> Any:
        function = original.fn
        copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
        copy.__dict__.update(function.__dict__)
        copy.__kwdefaults__, copy.__annotations__ = function.__kwdefaults__, dict(function.__annotations__)
        copy.__doc__, copy.__module__, copy.__qualname__ = function.__doc__, function.__module__, function.__qualname__
        if not launch.interpreted():  # the interpreter runs the text again, and looks for what that calls itself
            copy.__name__ = copy.__qualname__ = f"{function.__name__}_without_{self.stage}"
        return triton.jit(copy, do_not_specialize=list(getattr(original, "do_not_specialize", ())))


@cache
def variant(way: str, stage: str) -> Any:
    """The kernel of this way without a stage, ready for Triton to compile.

    Where kernels are compiled its name is "<kernel>_without_<stage>", so that what the library keeps of a compiled
    kernel by its name is not mistaken for the other's.

    Raises:
        KeyError: there is no such way or stage.
        ValueError: the kernel does not call what the stage is made of.
    """
    return _Builder(stage, STAGES[way][stage]).kernel(_KERNELS[way])


@contextmanager
def left_out(way: str, stage: str) -> Iterator[None]:
    """Within it the library launches the kernel of this way, in all threads, without a stage.

    Args:
        way: "forward" or "backward".
        stage: a name in `STAGES[way]`.

    Raises:
        KeyError, ValueError: as `variant`.
    """
    with mock.patch.object(*_PLACES[way], variant(way, stage)):
        yield


def stages_of(way: str, layout: Config) -> list[str]:
    """Stages that a kernel has in this layout."""
    absent = set()
    if not layout.sequence:
        absent.add("barrier")
    if not (isinstance(layout, BackwardConfig) and layout.divided):
        absent.add("parts")
    return [stage for stage in STAGES[way] if stage not in absent]


def layouts(problem: Problem, way: str) -> list[Config]:
    """What is tried: the device's default layout in sequence mode, if it has one, and that in step mode."""
    case, device = problem.case, device_of(problem.device)
    precision = launch.product_precision(case.dtype, problem.device)
    common = (device, case.hidden, case.batch, 1, case.dtype, precision)

    def default(steps: int) -> Config:
        if way == "forward":
            return default_config(*common, split_batch=False, steps=steps)
        return default_backward_config(*common, steps=steps)

    sequence, step = default(case.steps), replace(default(1), sequence=False)
    return [sequence, step] if sequence.sequence else [step]


class _Timed:
    """One way of a layer, whole or without a stage, compiled and ready to be timed.

    calls: what is timed together, of which the last one counts.
    """

    def __init__(self, problem: Problem, way: str, stage: str | None, layout: Config, *, graphed: bool) -> None:
        self.problem, self.way, self.stage, self.layout = problem, way, stage, layout
        self.layer = problem.copy_of_layer(backend="triton")  # its own: wrong statistics would reach the others
        self.leaves = [*self.layer.parameters(), *([problem.x] if problem.x.requires_grad else [])]
        self.held: list[Any] = []
        calls: dict[str, Callable[[], Any]] = {"forward": self._forward, "backward": self._backward}
        self.calls = [calls[name] for name in WAYS[: WAYS.index(way) + 1]]
        self._all()
        if graphed:
            self.calls = self._graphs()
        synchronize(problem.device)

    def seconds(self) -> float:
        """Of one call."""
        return sample(self.calls, self.problem.device)[-1]

    @contextmanager
    def _as_asked(self) -> Iterator[None]:
        of_way: dict[str, Any] = {"config" if self.way == "forward" else "backward": self.layout}
        without = nullcontext() if self.stage is None else left_out(self.way, self.stage)
        with use_config(**of_way), without, warnings.catch_warnings():
            if self.stage is not None:  # what it computes is wrong, and may be too large for statistics
                warnings.simplefilter("ignore", RuntimeWarning)
            yield

    def _output(self) -> Tensor:
        with self._as_asked():
            return self.problem.call_layer(self.layer, self.problem.x, True)

    def _gradients(self, output: Tensor) -> Any:
        with self._as_asked():
            return torch.autograd.grad(output, self.leaves, self.problem.pull)

    def _forward(self) -> None:
        self.held[:] = [self._output()]

    def _backward(self) -> None:
        self._gradients(self.held.pop())

    def _all(self) -> None:
        for call in self.calls:
            call()

    def _graphs(self) -> list[Callable[[], Any]]:
        """A graph for each call, with one memory; `held` keeps what they write."""
        forward, output = captured(self._output, warm=self._all)
        self.held[:] = [forward, output]
        if self.way == "forward":
            return [forward.replay]
        backward, found = captured(lambda: self._gradients(output), pool=forward.pool())
        self.held += [backward, found]
        return [forward.replay, backward.replay]


def _ready(
    problem: Problem, way: str, stage: str | None, layout: Config, graphed: bool, failed: dict[str, str], name: str
) -> _Timed | None:
    """What can be timed; or None, and the reason in `failed`.

    Raises:
        Exception: nothing can go on behind it.
    """
    try:
        return _Timed(problem, way, stage, layout, graphed=graphed)
    except CaptureFailed:
        raise  # the process cannot go on
    except Exception as error:
        if isinstance(error, MemoryError) or any(word in str(error) for word in FATAL):
            raise
        text = str(error).strip().splitlines()
        failed[name] = f"{type(error).__name__}: {text[0] if text else ''}"[:300]
        return None


def _whole(problem: Problem, way: str, failed: dict[str, str], graphed: bool) -> tuple[_Timed, bool] | None:
    """The whole kernel in the first layout that runs, from a graph if it can be captured, and whether it is."""
    capturable = graphed and problem.device.type == "cuda" and problem.capturable
    for layout in layouts(problem, way):
        mode = "sequence mode" if layout.sequence else "step mode"
        timed = _ready(
            problem, way, None, layout, capturable, failed, f"whole, {mode}{', graph' if capturable else ''}"
        )
        if timed is not None:
            return timed, capturable
    return None


def _measure_way(
    problem: Problem, key: str, way: str, rounds: int, graphed: bool, skip: dict[str, str], tell: Tell
) -> dict[str, Any]:
    failed: dict[str, str] = {}
    found: dict[str, Any] = {"case": key, "way": way, "whole_us": None, "without_us": {}, "failed": failed}
    tell(f"{way}, whole", "prepare")
    whole = _whole(problem, way, failed, graphed)
    if whole is None:
        return found
    timed, graphed = {"": whole[0]}, whole[1]
    layout = whole[0].layout
    for stage in stages_of(way, layout):
        if f"{way}, {stage}" in skip:
            failed[stage] = skip[f"{way}, {stage}"]
            continue
        tell(f"{way}, {stage}", "prepare")
        without = _ready(problem, way, stage, layout, graphed, failed, stage)
        if without is not None:
            timed[stage] = without
    tell(way, "time")
    taken: dict[str, list[float]] = {stage: [] for stage in timed}
    for _ in range(rounds):
        for stage, each in timed.items():
            taken[stage].append(each.seconds())
    medians = {stage: 1e6 * statistics.median(seconds) for stage, seconds in taken.items()}
    found |= {"whole_us": medians.pop(""), "without_us": medians, "rounds": rounds, "layout": asdict(layout)}
    found["how"] = "cpu" if problem.device.type != "cuda" else "graph" if graphed else "events"
    return found


def measure(
    case: Case,
    device: torch.device,
    *,
    rounds: int = 15,
    graphed: bool = True,
    skip: dict[str, str] | None = None,
    tell: Tell = lambda stage, what: None,
) -> list[dict[str, Any]]:
    """Times of a layer's forward and of its backward, whole and without each stage of the recurrent kernel.

    One layer and one direction of the case, in training, in rounds in which all take turns. Times are those of all that
    the way does, products before and behind the recurrence too: only "whole less without" is about the kernel alone.

    Args:
        case, device: what and where; on a CPU Triton's interpreter has to run the kernels, and times mean nothing.
        rounds: how often each is timed; on a CPU once.
        skip: reasons, by the names that `tell` is told, not to try them.
        graphed: whether calls are captured in graphs where they can be.
        tell: is told what is at work.

    Returns:
        For each way a record: case (its key), way, whole_us (median of a call, microseconds; None if it cannot run),
        without_us by stage, failed (why, by stage, or by "whole, <mode>"), and where anything was timed rounds, layout
        and how ("graph", "events" or "cpu").

    Raises:
        CaptureFailed: calls cannot be captured; measure again without graphs, in a new process.
        Exception: the device cannot be used any more, or its memory does not suffice.
    """
    single = replace(case, layers=1, bidirectional=False)
    rounds = rounds if device.type == "cuda" else 1
    with product_precision(single):
        problem = Problem(single, device)
        return [_measure_way(problem, case.key, way, rounds, graphed, skip or {}, tell) for way in WAYS]
