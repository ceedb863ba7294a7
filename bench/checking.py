"""Is a provider right? Its outputs and gradients against float64; and what its training step keeps and takes."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from .problem import Model, Problem
from .timing import synchronize

# Relative RMS against float64. float32: sums of up to 2,048 products, h handed on through hundreds of steps. TF32 and
# float16 keep 11 bits, bfloat16 8: h, W x and the gradients are rounded by 2⁻¹² and 2⁻⁹ in every step, and some ten of
# these add up.
BOUNDS = {"float32": 1e-4, "tf32": 1e-2, "float16": 1e-2, "bfloat16": 6e-2}
# Gradients pass through the rounding on both ways, and are differences of larger sums.
GRADIENT_FACTOR = 5


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


def bounds_of(problem: Problem) -> dict[str, float]:
    """What `check` may find at most.

    Some cases lose more in a precision than others, most of all one column of data over hundreds of steps in bfloat16.
    What the reference path loses there, on this device and these data, is no fault of anybody's: three times that is
    allowed, but never more than four times the usual bound.
    """
    usual = BOUNDS[problem.case.precision]
    own, _ = check(problem, problem.reference_model())
    limits = {"inference": usual, "outputs": usual, "gradients": GRADIENT_FACTOR * usual}
    return {name: min(max(limit, 3 * own[name]), 4 * limit) for name, limit in limits.items()}


def why_wrong(problem: Problem, errors: dict[str, float]) -> str:
    """What is beyond its bound; nothing if all is well."""
    if problem.bounds is None:
        problem.bounds = bounds_of(problem)
    limits = problem.bounds
    beyond = [f"{name} off by {errors[name]:.1e} (at most {limit:.0e})" for name, limit in limits.items()]
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
        tensor = tensor.detach()  # with its graph it would keep the graph, and the graph it, for ever
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
