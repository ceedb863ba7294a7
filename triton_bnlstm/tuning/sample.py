"""A layer to tune on: its weights and data, what is right in float64, and what a dtype loses on the reference path."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from .. import bptt
from ..packing import Packing
from ..reference import Call, Parameters, Problem
from ..statistics import Population, Statistics, population_at_steps, resolve_statistics, training_population
from .work import Work

# Steps: enough that what stands before and behind the loop does not count, few enough for float64, of whose numbers
# some fifteen for each step, row and unit are kept.
MOST_STEPS, LEAST_STEPS = 32, 8
_NUMBERS = 1 << 22
_COLUMNS = 16  # of the input, where its width does not matter
# Relative RMS errors that are beyond doubt: sums of up to some thousand products, and h, W x and the gradients rounded
# in every step, to 24, 11, 11 and 8 bits. What the reference path loses on the same data counts too.
_BOUNDS = {"float32": 1e-4, "tf32": 1e-2, "float16": 1e-2, "bfloat16": 6e-2}
# Gradients pass through the rounding on both ways, and are differences of larger sums.
_GRADIENTS = 5
# Three times what the reference path loses is allowed, but never more than so many times the bound.
_REFERENCE, _MOST = 3, 4


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖; infinite where something is not finite."""
    if actual.shape != expected.shape or not bool(actual.isfinite().all()):
        return float("inf")
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-6))


def usual_steps(work: Work) -> int:
    """T of a sample."""
    return min(MOST_STEPS, max(LEAST_STEPS, _NUMBERS // (work.batch * max(work.hidden, work.columns, 1))))


@dataclass
class Sample:
    """Both directions of one layer, in training or evaluation, with the options that a kernel's work names.

    Attributes:
        work, device, steps: what and where, and T.
        calls: of each direction, in the work's dtype. pull: gradient of the rows, of each.
        expected: in float64, by name. limits: the largest errors that pass, by name.
    """

    work: Work
    device: torch.device
    steps: int
    calls: list[Call] = field(init=False)
    pull: list[Tensor] = field(init=False)
    expected: dict[str, Tensor] = field(init=False)
    limits: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self._generator = torch.Generator(self.device).manual_seed(0)
        packing = self._packing()
        self.calls = [self._call(packing) for _ in range(self.work.directions)]
        rows = sum(packing.sizes)
        self.pull = [self._normal(rows, self.work.hidden).to(self.work.dtype) for _ in self.calls]
        self.expected = self.by_reference(torch.float64)
        own = self.errors(self.by_reference(self.work.dtype))
        usual = _BOUNDS["tf32" if self.work.precision == "tf32" else str(self.work.dtype).removeprefix("torch.")]
        self.limits = {}
        for name, error in own.items():
            limit = usual * (_GRADIENTS if name.startswith("d_") else 1)
            self.limits[name] = min(max(limit, _REFERENCE * error), _MOST * limit)

    @property
    def training(self) -> bool:
        """Batch statistics, and a backward behind it."""
        return self.work.kernel != "inference"

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device)

    def _packing(self) -> Packing:
        work, steps = self.work, self.steps
        if not {"seats", "fill"} & set(work.flags):
            return Packing.of_equal_lengths(steps, work.batch, self.device)
        lengths = torch.linspace(steps, steps // 2, work.batch, device="cpu").round().long()
        if "fill" in work.flags:
            return Packing.of_device_lengths(steps, lengths.to(self.device))
        return Packing.of_host_lengths(steps, lengths, self.device)

    def _call(self, packing: Packing) -> Call:
        work = self.work
        hidden, dtype = work.hidden, work.dtype
        columns = 1 if "narrow" in work.flags else _COLUMNS
        rows, cell_norm = sum(packing.sizes), "cell_norm" in work.flags
        bias = torch.zeros(4 * hidden, device=self.device)
        bias[hidden : 2 * hidden] = 1.0
        vector = torch.full((4 * hidden,), 0.1, device=self.device)
        vector_c = vector[:hidden] if cell_norm else None
        parameters = Parameters(
            self._normal(4 * hidden, columns) / columns**0.5,
            self._normal(4 * hidden, hidden) / hidden**0.5,
            bias,
            vector,
            vector.clone(),
            vector_c,
            None if vector_c is None else torch.zeros_like(vector_c),
        )
        parameters = Parameters(*(None if p is None else p.to(dtype) for p in parameters))  # type: ignore[arg-type]
        x = self._normal(rows, columns).to(dtype)
        h, c = (0.1 * self._normal(work.batch, hidden).to(dtype) for _ in range(2))
        equal = Packing.of_equal_lengths(self.steps, work.batch, self.device)
        problem = Problem(packing, self._population(parameters, equal, packing, h, c), True, 1e-5)
        return Call(x, h, c, parameters, problem)

    def _population(
        self, parameters: Parameters, equal: Packing, packing: Packing, h: Tensor, c: Tensor
    ) -> Population | None:
        """Of a batch that was seen before; None where nothing is taken from it."""
        if self.training and packing.equal:
            return None
        x = self._normal(self.steps * self.work.batch, parameters.weight_ih.shape[1]).to(self.work.dtype)
        with torch.no_grad():
            seen = cast(Statistics, bptt.layer(Call(x, h, c, parameters, Problem(equal, None, True, 1e-5))).moments)
            if self.training:
                return training_population(seen, packing, 0, None, True)
            return population_at_steps(resolve_statistics(seen), 0, self.steps, None, True)

    def by_reference(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What the reference path gives in this dtype, by name; gradients only in training."""
        found: dict[str, Tensor] = {}
        for k, call in enumerate(self.calls):
            problem = call.problem
            if problem.population is not None and dtype == torch.float64:
                problem = problem._replace(population=_in_double(problem.population))
            leaves = [None if s is None else s.to(dtype) for s in (call.x, call.h, call.c, *call.parameters)]
            if self.training:
                leaves = [None if s is None else s.detach().requires_grad_() for s in leaves]
            x, h, c, *parameters = leaves
            with torch.enable_grad():
                ran = bptt.layer(Call(x, h, c, Parameters(*parameters), problem))  # type: ignore[arg-type]
                found |= {f"output {k}": ran.rows, f"h_n {k}": ran.h_n, f"c_n {k}": ran.c_n}
                if ran.moments is not None:
                    found |= {f"mean {k}": ran.moments.hh.mean, f"variance {k}": ran.moments.hh.var}
                if self.training:
                    wanted = [leaf for leaf in leaves if leaf is not None]
                    gradients = torch.autograd.grad(ran.rows, wanted, self.pull[k].to(dtype))
                    found |= {f"d_{n} {k}": d for n, d in zip(self.names(), gradients, strict=True)}
        return {name: tensor.detach() for name, tensor in found.items()}

    def names(self) -> list[str]:
        """Of what has gradients."""
        parameters = self.calls[0].parameters
        given = [name for name in Parameters._fields if getattr(parameters, name) is not None]
        return ["x", "h", "c", *given]

    def errors(self, found: dict[str, Tensor]) -> dict[str, float]:
        """Relative errors of what can be compared."""
        skipped = ("d_weight_ih", "d_x") if "narrow" in self.work.flags else ()  # nothing but what ε and rounding leave
        names = [name for name in self.expected if not name.startswith(skipped or ("\0",))]
        return {name: relative_error(found[name], self.expected[name]) for name in names if name in found}

    def why_wrong(self, found: dict[str, Tensor]) -> str | None:
        """What is beyond its limit; None if all is well."""
        beyond = [
            f"{name} off by {error:.1e} (at most {self.limits[name]:.0e})"
            for name, error in self.errors(found).items()
            if not error <= self.limits[name]
        ]
        return "; ".join(beyond[:3]) or None


def _in_double(population: Population) -> Population:
    ih, hh = (cast(tuple[Tensor, Tensor], tuple(s.double() for s in pair)) for pair in (population.ih, population.hh))
    c = None if population.c is None else (population.c[0].double(), population.c[1].double())
    return Population(ih, hh, c, population.weight)
