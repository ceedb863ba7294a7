"""One case, all providers: each is checked against float64; those that are right are timed in interleaved rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import records
from .cases import MODES, Case
from .checking import check, gradients, peak_bytes, saved_bytes, why_wrong
from .problem import Model, Problem, product_precision
from .providers import Provider, TimeUp, time_limit
from .records import Result, Timing
from .timing import CaptureFailed, Tell, captured, percentiles, sample, synchronize, wall_seconds
from .unavailable import Unavailable


class CannotCapture(RuntimeError):
    """A provider's calls cannot be captured in a graph; `provider` names it.

    A capture that failed leaves a process in which others may fail too: go on in a new one.
    """

    def __init__(self, provider: str, error: BaseException) -> None:
        super().__init__(short(error, 160))
        self.provider = provider


class DeviceLost(RuntimeError):
    """The device is of no use to this process any more; the provider that was at work is named in `provider`."""

    def __init__(self, provider: str, error: BaseException) -> None:
        super().__init__(f"{type(error).__name__}: {short(error)}")
        self.provider = provider


def short(error: BaseException, most: int = 300) -> str:
    """The first lines of an error's message."""
    text = " ".join(str(error).split())
    return text[:most] or type(error).__name__


def is_lost(device: torch.device) -> bool:
    """Whether an earlier error keeps the device from doing anything more."""
    try:
        synchronize(device)
    except Exception:
        return True
    return False


@dataclass
class Runner:
    """A model's calls, ready to be timed: evaluation; forward and backward in training, in this order.

    how, how_inference: as `records.Timing` has it.
    """

    infer: Callable[[], Any]
    forward: Callable[[], Any]
    backward: Callable[[], Any]
    how: str
    how_inference: str
    memory: tuple[Any, ...] = ()  # what the graphs write


def _eager_runner(problem: Problem, model: Model, how: str) -> Runner:
    held: list[Tensor] = []

    def infer() -> None:
        with torch.no_grad():
            model.call(problem.x, False)

    def forward() -> None:
        held[:] = [model.call(problem.x, True)]

    def backward() -> None:
        gradients(problem, model, held.pop())

    return Runner(infer, forward, backward, how, how)


def _graph_runner(problem: Problem, model: Model) -> Runner:
    """As `torch.cuda.make_graphed_callables` does: forward and backward are two graphs with one memory."""
    eager = _eager_runner(problem, model, "events")

    def warm() -> None:
        eager.forward()
        eager.backward()

    infer, how = eager.infer, "events"
    if model.graphed_inference:
        inference, _ = captured(eager.infer, warm=eager.infer)
        infer, how = inference.replay, "graph"
    forward, output = captured(lambda: model.call(problem.x, True), warm=warm)
    backward, found = captured(lambda: gradients(problem, model, output), pool=forward.pool())
    return Runner(infer, forward.replay, backward.replay, "graph", how, (output, found))


def runner_of(problem: Problem, model: Model, plain: str | None = None) -> Runner:
    """Graphs where there are any; else plain calls.

    plain: why it is not to be captured.

    Raises:
        CaptureFailed: it cannot be captured.
        Unavailable: it cannot be captured, and is nothing without that.
    """
    if problem.device.type != "cuda":
        return _eager_runner(problem, model, "cpu")
    if plain is not None:
        if model.replayed:
            raise Unavailable(f"it cannot be captured in a graph: {plain}")
        return _eager_runner(problem, model, f"events; no graph: {plain}")
    return _graph_runner(problem, model) if model.graphed else _eager_runner(problem, model, "events")


class _Round:
    """Takes one sample of a provider after the other, and drops a provider whose call fails."""

    def __init__(self, problem: Problem, runners: dict[str, Runner], found: dict[str, Result], tell: Tell) -> None:
        self.problem, self.runners, self.found, self.tell = problem, runners, found, tell

    def call(self, name: str, what: str, take: Callable[[], None], *, quietly: bool = False) -> None:
        """One provider's turn."""
        if not quietly:
            self.tell(name, what)
        try:
            take()
        except Exception as error:
            if is_lost(self.problem.device):
                raise DeviceLost(name, error) from error
            del self.runners[name]
            result = self.found[name]
            if what == "time":  # an error behind that leaves the device's times as they are
                result.status, result.why = records.FAILED, f"{type(error).__name__}: {short(error)}"


def _times(
    problem: Problem, runners: dict[str, Runner], rounds: int, seconds: float, modes: Collection[str], turn: _Round
) -> dict[str, dict[str, Timing]]:
    """Rounds in which providers take turns, each on an input that nobody has just seen.

    The first of several is not counted: it pays for what is used for the first time.
    """
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in runners}
    spent = dict.fromkeys(runners, 0.0)
    least, share = min(5, rounds), seconds / max(1, len(runners))

    def take(name: str, counted: bool) -> None:
        runner, started = runners[name], time.perf_counter()
        found = {}
        if "inference" in modes:
            found["inference"] = sample([runner.infer], problem.device)[0]
        if any(mode != "inference" for mode in modes):
            forward, backward = sample([runner.forward, runner.backward], problem.device)
            found |= {"forward": forward, "backward": backward, "training": forward + backward}
        if counted:
            spent[name] += time.perf_counter() - started
            for mode, value in found.items():
                taken[name].setdefault(mode, []).append(1e6 * value)

    for round_ in range(-1 if rounds > 1 else 0, rounds):
        with torch.no_grad():
            problem.x.copy_(problem.sets[round_ % len(problem.sets)])
        for name in list(runners):
            if round_ >= least and spent[name] > share:
                continue  # the slow ones would take the time of all others
            turn.call(name, "time", partial(take, name, round_ >= 0), quietly=round_ >= least)
    return {
        name: {
            mode: Timing(percentiles(values), len(values), _how(runners[name], mode), samples_us=values)
            for mode, values in by_mode.items()
        }
        for name, by_mode in taken.items()
        if name in runners
    }


def _how(runner: Runner, mode: str) -> str:
    return runner.how_inference if mode == "inference" else runner.how


def _prepare(problem: Problem, provider: Provider, result: Result, tell: Tell) -> Model | None:
    """The provider's model, if it can run the case and is right; what became of it goes into `result`."""
    try:
        with time_limit(provider.limit_s or 3600):
            model = provider.build(problem)
            result.layout = model.layout
            result.errors, result.first_call_s = check(problem, model)
        tell(provider.name, "check")
        result.why = why_wrong(problem, result.errors)
        if result.why:
            result.status = records.WRONG
            return None
        result.saved_bytes, result.peak_bytes = saved_bytes(problem, model), peak_bytes(problem, model)
        return model
    except Unavailable as error:
        result.status, result.why = records.CANNOT, short(error)
    except TimeUp:
        result.status, result.why = records.FAILED, f"no first training step within {provider.limit_s:.0f} s"
    except Exception as error:
        if is_lost(problem.device):
            raise DeviceLost(provider.name, error) from error
        result.status, result.why = records.FAILED, f"{type(error).__name__}: {short(error)}"
    return None


def compile_all(case: Case, device: torch.device, providers: Iterable[Provider], tell: Tell) -> None:
    """An evaluation and a training step of each provider, for what they leave in the caches of compiled code.

    Nothing is compared, so that many processes may do this at once: float64 results take much memory. Whoever cannot
    run will say so when the case is measured.
    """
    with product_precision(case):
        problem = Problem(case, device)
        for provider in providers:
            tell(provider.name, "prepare")
            try:
                model = provider.build(problem)
                with torch.no_grad():
                    model.call(problem.x, False)
                gradients(problem, model, model.call(problem.x, True))
            except Exception as error:
                if is_lost(device):
                    raise DeviceLost(provider.name, error) from error


def measure(
    case: Case,
    device: torch.device,
    providers: Iterable[Provider],
    *,
    rounds: int = 40,
    seconds: float = 6.0,
    withheld: dict[str, str] | None = None,
    plain: dict[str, str] | None = None,
    timed: bool = True,
    modes: Collection[str] = MODES,
    tell: Tell = lambda provider, what: None,
) -> list[Result]:
    """All providers in one case, in every mode.

    Args:
        case, device: what and where.
        providers: who.
        rounds: at most so many, at least 5; `seconds` bound what all providers together take of them.
        withheld: reasons, by provider's name, not to run it at all.
        plain: reasons, by provider's name, not to capture its calls in graphs.
        timed: False: only check.
        modes: which of `MODES` are timed; forward, backward and training come together.
        tell: is told which provider is at what.

    Raises:
        DeviceLost: the device cannot be used any more in this process.
        CannotCapture: a provider's calls cannot be captured; measure again with it in `plain`, in a new process.
    """
    withheld, plain = withheld or {}, plain or {}
    found: dict[str, Result] = {}
    runners: dict[str, Runner] = {}
    models: dict[str, Model] = {}
    with product_precision(case):
        problem = Problem(case, device)
        for provider in providers:
            name = provider.name
            result = found[name] = Result(case.key, name, source=records.source())
            if name in withheld:
                result.status, result.why = records.WITHHELD, withheld[name]
                continue
            tell(name, "prepare")
            model = _prepare(problem, provider, result, tell)
            if model is None or not timed:
                continue
            try:
                tell(name, "capture")
                runners[name], models[name] = runner_of(problem, model, plain.get(name)), model
            except CaptureFailed as error:
                raise CannotCapture(name, error) from error
            except Unavailable as error:
                result.status, result.why = records.FAILED, short(error)
            except Exception as error:
                if is_lost(device):
                    raise DeviceLost(name, error) from error
                result.status, result.why = records.FAILED, f"{type(error).__name__}: {short(error)}"
        turn = _Round(problem, runners, found, tell)
        for name, by_mode in _times(problem, runners, rounds, seconds, modes, turn).items():
            found[name].modes = by_mode
        for name in list(runners):
            turn.call(
                name, "wall", partial(_wall_times, problem, models[name], runners[name], found[name], min(3, rounds))
            )
    return list(found.values())


def _wall_times(problem: Problem, model: Model, runner: Runner, result: Result, rounds: int) -> None:
    """As its users call it: launch by launch, or as replays where a graph is what it is."""
    user = runner if model.replayed else _eager_runner(problem, model, "events")

    def train() -> None:
        user.forward()
        user.backward()

    for mode, call in (("inference", user.infer), ("training", train)):
        if mode in result.modes:
            result.modes[mode].wall_us = 1e6 * wall_seconds(call, problem.device, rounds)
