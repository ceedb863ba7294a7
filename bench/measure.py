"""One case, all providers: each is checked against float64; those that are right are timed in interleaved rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import records
from .cases import MODES, Case
from .problem import Model, Problem, product_precision
from .providers import Provider, TimeUp, time_limit
from .records import Result, Timing
from .timing import captured, percentiles, sample, synchronize, wall_seconds
from .unavailable import Unavailable

# Relative RMS against float64. float32: sums of up to 2,048 products, h handed on through hundreds of steps; γ/σ is of
# order one, so errors do not grow. TF32 and float16 keep 11 bits, bfloat16 8: h, W x and the gradients are rounded by
# 2⁻¹² and 2⁻⁹ in every step, and some ten of these add up.
BOUNDS = {"float32": 1e-4, "tf32": 1e-2, "float16": 1e-2, "bfloat16": 6e-2}
# Gradients pass through the rounding on both ways, and are differences of larger sums.
GRADIENT_FACTOR = 5

Tell = Callable[[str, str], None]


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


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖; infinite where something is not finite."""
    if actual.shape != expected.shape or not bool(actual.isfinite().all()):
        return float("inf")
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-6))


def leaves_of(problem: Problem, model: Model) -> dict[str, Tensor]:
    """What gets gradients, by name."""
    return dict(model.leaves) | ({"x": problem.x} if problem.x.requires_grad else {})


def gradients(problem: Problem, model: Model, output: Tensor) -> dict[str, Tensor]:
    """Of all leaves, for the problem's gradient of the output."""
    leaves = leaves_of(problem, model)
    return dict(zip(leaves, torch.autograd.grad(output, list(leaves.values()), problem.pull), strict=True))


def check(problem: Problem, model: Model) -> tuple[dict[str, float], float]:
    """Largest relative RMS errors in evaluation, in training and of gradients; seconds of that first training step."""
    expected = model.expected()
    with torch.no_grad():  # first: training changes the population
        inference = relative_error(model.call(problem.x, False), expected.inference)
    synchronize(problem.device)
    started = time.perf_counter()
    output = model.call(problem.x, True)
    found = gradients(problem, model, output)
    synchronize(problem.device)
    seconds = time.perf_counter() - started
    # Normalisation leaves a single column no gradient but what ε and rounding make.
    compared = [n for n in found if not (problem.case.columns == 1 and n.startswith("weight_ih_l0"))]
    worst = max(relative_error(found[n], expected.gradients[n]) for n in compared)
    outputs = relative_error(output.detach(), expected.output)
    return {"inference": inference, "outputs": outputs, "gradients": worst}, seconds


def why_wrong(case: Case, errors: dict[str, float]) -> str:
    """What is beyond its bound; nothing if all is well."""
    bound = BOUNDS[case.precision]
    limits = {"inference": bound, "outputs": bound, "gradients": GRADIENT_FACTOR * bound}
    beyond = [f"{name} off by {errors[name]:.1e} (at most {limits[name]:.0e})" for name in limits]
    return "; ".join(text for text, name in zip(beyond, limits, strict=True) if not errors[name] <= limits[name])


def saved_bytes(problem: Problem, model: Model) -> int:
    """Bytes of all memory that autograd keeps from a forward for its backward, besides input and parameters."""
    given = {s.untyped_storage().data_ptr() for s in (problem.x, *model.leaves.values())}
    kept: dict[int, int] = {}
    held = []  # so that no memory is given to two tensors

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.call(problem.x, True)
    del output
    return sum(kept.values())


def peak_bytes(problem: Problem, model: Model) -> int | None:
    """Most memory of a training step, besides what was there before; None on a CPU."""
    if problem.device.type != "cuda":
        return None
    synchronize(problem.device)
    torch.cuda.reset_peak_memory_stats(problem.device)
    before = torch.cuda.memory_allocated(problem.device)
    gradients(problem, model, model.call(problem.x, True))
    synchronize(problem.device)
    return torch.cuda.max_memory_allocated(problem.device) - before


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


def runner_of(problem: Problem, model: Model) -> Runner:
    """Graphs where the model can be captured on this device, else plain calls."""
    if problem.device.type != "cuda":
        return _eager_runner(problem, model, "cpu")
    if model.graphed:
        try:
            return _graph_runner(problem, model)
        except RuntimeError as error:
            if is_lost(problem.device) or isinstance(error, torch.OutOfMemoryError):
                raise
            return _eager_runner(problem, model, f"events; no graph: {short(error, 120)}")
    return _eager_runner(problem, model, "events")


def _times(
    problem: Problem, runners: dict[str, Runner], rounds: int, seconds: float, modes: Collection[str], tell: Tell
) -> dict[str, dict[str, Timing]]:
    """Rounds in which providers take turns, each on an input that nobody has just seen.

    The first of several is not counted: it pays for what is used for the first time.
    """
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in runners}
    spent = dict.fromkeys(runners, 0.0)
    least, share = min(5, rounds), seconds / max(1, len(runners))
    idle = -1 if rounds > 1 else 0
    for round_ in range(idle, rounds):
        with torch.no_grad():
            problem.x.copy_(problem.sets[round_ % len(problem.sets)])
        for name, runner in runners.items():
            if round_ >= least and spent[name] > share:
                continue  # the slow ones would take the time of all others
            if round_ < least:
                tell(name, "time")
            started = time.perf_counter()
            found = {}
            if "inference" in modes:
                found["inference"] = sample([runner.infer], problem.device)[0]
            if any(mode != "inference" for mode in modes):
                forward, backward = sample([runner.forward, runner.backward], problem.device)
                found |= {"forward": forward, "backward": backward, "training": forward + backward}
            if round_ < 0:
                continue
            spent[name] += time.perf_counter() - started
            for mode, value in found.items():
                taken[name].setdefault(mode, []).append(1e6 * value)
    return {
        name: {
            mode: Timing(percentiles(values), len(values), _how(runners[name], mode), samples_us=values)
            for mode, values in by_mode.items()
        }
        for name, by_mode in taken.items()
    }


def _how(runner: Runner, mode: str) -> str:
    return runner.how_inference if mode == "inference" else runner.how


def _prepare(problem: Problem, provider: Provider, result: Result, limit_s: float | None) -> Model | None:
    """The provider's model, if it can run the case and is right; what became of it goes into `result`."""
    try:
        with time_limit(limit_s or provider.limit_s or 3600):
            model = provider.build(problem)
            result.layout = model.layout
            result.errors, result.first_call_s = check(problem, model)
        result.why = why_wrong(problem.case, result.errors)
        if result.why:
            result.status = records.WRONG
            return None
        result.saved_bytes, result.peak_bytes = saved_bytes(problem, model), peak_bytes(problem, model)
        return model
    except Unavailable as error:
        result.status, result.why = records.CANNOT, short(error)
    except TimeUp:
        result.status, result.why = records.FAILED, f"no first training step within {limit_s or provider.limit_s:.0f} s"
    except Exception as error:
        if is_lost(problem.device):
            raise DeviceLost(provider.name, error) from error
        result.status, result.why = records.FAILED, f"{type(error).__name__}: {short(error)}"
    return None


def measure(
    case: Case,
    device: torch.device,
    providers: Iterable[Provider],
    *,
    rounds: int = 40,
    seconds: float = 6.0,
    withheld: dict[str, str] | None = None,
    timed: bool = True,
    modes: Collection[str] = MODES,
    limit_s: float | None = None,
    tell: Tell = lambda provider, what: None,
) -> list[Result]:
    """All providers in one case, in every mode.

    Args:
        case, device: what and where.
        providers: who.
        rounds: at most so many, at least 5; `seconds` bound what all providers together take of them.
        withheld: reasons, by provider's name, not to run it at all.
        timed: False: only check.
        modes: which of `MODES` are timed; forward, backward and training come together.
        limit_s: seconds for each provider's first training step, instead of the provider's own limit.
        tell: is told which provider is at what.

    Raises:
        DeviceLost: the device cannot be used any more in this process.
    """
    withheld = withheld or {}
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
            model = _prepare(problem, provider, result, limit_s)
            if model is None or not timed:
                continue
            try:
                tell(name, "capture")
                runners[name], models[name] = runner_of(problem, model), model
            except Exception as error:
                if is_lost(device):
                    raise DeviceLost(name, error) from error
                result.status, result.why = records.FAILED, f"{type(error).__name__}: {short(error)}"
        if runners:
            for name, by_mode in _times(problem, runners, rounds, seconds, modes, tell).items():
                found[name].modes = by_mode
            for name, model in models.items():
                tell(name, "wall")
                _wall_times(problem, model, found[name], min(3, rounds))
    return list(found.values())


def _wall_times(problem: Problem, model: Model, result: Result, rounds: int) -> None:
    """As a user calls it, launch by launch, whatever the device time was taken from."""
    eager = _eager_runner(problem, model, "events")

    def train() -> None:
        eager.forward()
        eager.backward()

    for mode, call in (("inference", eager.infer), ("training", train)):
        if mode in result.modes:
            result.modes[mode].wall_us = 1e6 * wall_seconds(call, problem.device, rounds)
