"""Operators for PyTorch's compilers and exporters: the only torch.library code.

`population`, `layer` and `layer_backward` are functions of tensors and numbers, `learn` writes the statistics that it
is given. Eagerly the library does without them, since a call through them costs some tens of microseconds more; while
something traces (`torch.compile`, `torch.export`), and on tensors that hold nothing (`FakeTensor`), `traced` makes a
call of the layer out of them. None has a second derivative: it is asked for with an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import sequence
from .kept import Setting, Sizes, kept_shapes, list_of_population, moments_of_list, on_its_own
from .precision import without_autocast
from .recompute import in_backward
from .resolved import resolved_statistics
from .statistics import Moments, Statistics, population_at_steps, population_with_phantoms, update_statistics_
from .transforms import have_tangents

_SETTING = (
    "SymInt steps, bool rows, bool bias, bool cell_norm, bool over_time, bool frozen, bool reverse, float eps, "
    "str backend, str save, str? autotune"
)
_LAYER = f"Tensor x, Tensor? lengths, Tensor h_0, Tensor c_0, Tensor[] parameters, Tensor[] population, {_SETTING}"


def statistics_of_list(tensors: list[Tensor], *, cell_norm: bool) -> list[Statistics]:
    """From `rows`, and mean, variance and count of the norms of each direction."""
    rows, rest = tensors[0], tensors[1:]
    width = 9 if cell_norm else 6
    found = []
    for k in range(0, len(rest), width):
        ih, hh, *c = (Moments(*rest[j : j + 3]) for j in range(k, k + width, 3))
        found.append(Statistics(ih, hh, c[0] if c else None, rows))
    return found


def list_of_statistics(found: list[Statistics]) -> list[Tensor]:
    """The other way round; all have the same `rows`."""
    return [found[0].rows, *(s for own in found for norm in own[:3] if norm is not None for s in norm)]


_NO_FORWARD_MODE = (
    "forward-mode derivatives (jvp, dual_level) of a compiled or exported BN-LSTM: there are none; call the layer "
    'uncompiled, with backend="reference"'
)
_NO_TRANSFORMS = (
    "torch.func (grad, vjp, jvp, vmap, ...) of a compiled or exported BN-LSTM: its operators do not go through "
    'transforms; call the layer uncompiled, with backend="reference"'
)


def _refuse_tangents(*tensors: Tensor) -> None:
    """An operator is called without its autograd where nothing requires a gradient: tangents would end there unseen."""
    if have_tangents(tensors):
        raise RuntimeError(_NO_FORWARD_MODE)


def _refuse_transforms(*_: Any, **__: Any) -> Any:
    """For PyTorch's dispatcher, in place of what it does with any operator beneath a transform.

    jvp would unwrap the arguments, lose their tangents, and take the derivative for zero.
    """
    raise RuntimeError(_NO_TRANSFORMS)


# What normalises from outside the batch

_RECOMPUTED = (
    "a backward runs a compiled BN-LSTM again that was trained on unequal lengths (a checkpoint around it, or a "
    "compiler that saves memory, as with activation_memory_budget below 1), and the population that took its vacated "
    "seats has moved on. Leave the layer out of what is run again, or out of what is compiled "
    "(torch.compiler.disable): uncompiled it finds the population as it was. prior_count=0 takes nothing from it"
)


@torch.library.custom_op(
    "triton_bnlstm::population",
    mutates_args=(),
    schema=(
        "(Tensor[] statistics, Tensor? lengths, SymInt steps, SymInt batch, SymInt start, float? prior_count, "
        "bool rows, bool cell_norm, bool over_time, bool training) -> Tensor[]"
    ),
)
@torch.no_grad()
def population(
    statistics: list[Tensor],
    lengths: Tensor | None,
    steps: int,
    batch: int,
    start: int,
    prior_count: float | None,
    rows: bool,
    cell_norm: bool,
    over_time: bool,
    training: bool,
) -> list[Tensor]:
    """Mean and variance of each norm at steps start, start + 1, …, [T, ·]; in training the batch's weight [T], too."""
    found = []
    if training and prior_count != 0 and in_backward():
        raise RuntimeError(_RECOMPUTED)
    if training:
        packing = sequence.packing_of(lengths, steps, batch, statistics[0].device, rows=rows)
        count = on_its_own(packing.count, steps)
    for own in statistics_of_list(statistics, cell_norm=cell_norm):
        if training:
            made = population_with_phantoms(own, count, batch, start, prior_count, over_time)
        else:
            made = population_at_steps(resolved_statistics(own), start, steps, None, over_time)
        found += list_of_population(made)
    return found


@population.register_fake
def _(
    statistics: list[Tensor],
    lengths: Tensor | None,
    steps: int,
    batch: int,
    start: int,
    prior_count: float | None,
    rows: bool,
    cell_norm: bool,
    over_time: bool,
    training: bool,
) -> list[Tensor]:
    made = []
    for own in statistics_of_list(statistics, cell_norm=cell_norm):
        for norm in own[:3]:
            if norm is not None:
                length = steps if over_time or norm is not own.ih else 1
                made += [norm.mean.new_empty(length, norm.mean.shape[1]) for _ in range(2)]
        if training:
            made.append(own.rows.new_empty(steps))
    return made


# The layer


@torch.library.custom_op(
    "triton_bnlstm::layer",
    mutates_args=(),
    schema=f"({_LAYER}, bool keep) -> (Tensor, Tensor, Tensor, Tensor[], Tensor[])",
)
@torch.no_grad()
def layer(
    x: Tensor,
    lengths: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    parameters: list[Tensor],
    population: list[Tensor],
    *scalars: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """All directions of one layer; see `sequence.forward`."""
    *setting, keep = scalars
    _refuse_tangents(x, h_0, c_0, *parameters)
    with without_autocast(x):
        s = Setting(*setting)
        output, h_n, c_n, moments, kept = sequence.forward(x, lengths, h_0, c_0, parameters, population, s, keep=keep)
    return output, h_n, c_n, moments, kept


@layer.register_fake
def _(
    x: Tensor,
    lengths: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    parameters: list[Tensor],
    population: list[Tensor],
    *scalars: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    *setting, keep = scalars
    s = Setting(*setting)
    n = Sizes.of(x, h_0, s)
    output = h_0.new_empty(*x.shape[:-1], n.directions * n.hidden)
    wide = torch.float64 if h_0.dtype == torch.float64 else torch.float32
    moments, kept = [], []
    if not s.frozen:
        moments.append(x.new_empty(n.steps, dtype=torch.float64))
        for _ in range(n.directions):
            columns = [4 * n.hidden] * 2 + [n.hidden] * s.cell_norm
            lengths_ = [n.steps if s.over_time else 1] + [n.steps] * (1 + s.cell_norm)
            for length, width in zip(lengths_, columns, strict=True):
                moments += [x.new_empty(length, width, dtype=wide) for _ in range(2)]
    if keep:
        seats = bool(population) and not s.frozen
        kept = [x.new_empty(k.numel(), dtype=k.dtype) for k in kept_shapes(n, s, h_0, seats=seats)]
    return output, torch.empty_like(h_0), torch.empty_like(c_0), moments, kept


@torch.library.custom_op(
    "triton_bnlstm::layer_backward",
    mutates_args=(),
    schema=(f"(Tensor? d_output, Tensor? d_h_n, Tensor? d_c_n, {_LAYER}, Tensor[] kept, bool[] needed) -> Tensor[]"),
)
@torch.no_grad()
def layer_backward(
    d_output: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    x: Tensor,
    lengths: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    parameters: list[Tensor],
    population: list[Tensor],
    *rest: Any,
) -> list[Tensor]:
    """Gradients of those of x, h_0, c_0 and the parameters that are needed; see `sequence.backward`."""
    *setting, kept, needed = rest
    given = d_output, d_h_n, d_c_n
    _refuse_tangents(*(s for s in (*given, x, h_0, c_0, *parameters) if s is not None))
    with without_autocast(x):
        found = sequence.backward(
            given, x, lengths, h_0, c_0, parameters, population, kept, Setting(*setting), list(needed)
        )
    return [d for d in (*found[:3], *found.parameters) if d is not None]


@layer_backward.register_fake
def _(
    d_output: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    x: Tensor,
    lengths: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    parameters: list[Tensor],
    population: list[Tensor],
    *rest: Any,
) -> list[Tensor]:
    likes = x, h_0, c_0, *parameters
    return [like.new_empty(like.shape) for like, need in zip(likes, rest[-1], strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, lengths, h_0, c_0, parameters, population, *setting, keep = inputs
    moments, kept = output[3:]
    ctx.setting, ctx.keep = setting, keep
    ctx.parameters, ctx.population = len(parameters), len(population)
    ctx.save_for_backward(x, lengths, h_0, c_0, *parameters, *population, *kept)
    ctx.mark_non_differentiable(*moments, *kept)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
    if not ctx.keep:
        raise RuntimeError("triton_bnlstm::layer was called with keep=False, and keeps nothing for a backward")
    x, lengths, h_0, c_0, *rest = ctx.saved_tensors
    parameters, rest = rest[: ctx.parameters], rest[ctx.parameters :]
    population, kept = rest[: ctx.population], rest[ctx.population :]
    flags = ctx.needs_input_grad
    needed = [flags[0], flags[2], flags[3], *flags[4]]
    found = iter(
        torch.ops.triton_bnlstm.layer_backward(
            *gradients[:3], x, lengths, h_0, c_0, parameters, population, *ctx.setting, kept, needed
        )
    )
    d_x, d_h_0, d_c_0, *d_parameters = (next(found) if need else None for need in needed)
    nothing = [None] * len(population)
    return d_x, None, d_h_0, d_c_0, d_parameters, nothing, *(None for _ in ctx.setting), None


layer.register_autograd(_backward, setup_context=_setup_context)


def _no_second_derivative(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        "triton_bnlstm::layer_backward has no derivative: compiled and exported BN-LSTMs have first derivatives "
        'only, as have the kernels; for gradients of gradients call the layer eagerly, with backend="reference"'
    )


layer_backward.register_autograd(_no_second_derivative)


_beneath_transforms = torch.library.Library("triton_bnlstm", "FRAGMENT")
for _name in ("layer", "layer_backward"):
    _beneath_transforms.impl(_name, _refuse_transforms, "FuncTorchDynamicLayerFrontMode")


# Statistics


@torch.library.custom_op(
    "triton_bnlstm::learn",
    mutates_args={"statistics", "skipped_steps"},
    schema=(
        "(Tensor(a!)[] statistics, Tensor(b!) skipped_steps, Tensor[] moments, SymInt batch, SymInt start, "
        "float? momentum, bool cell_norm, bool over_time) -> ()"
    ),
)
@torch.no_grad()
def learn(
    statistics: list[Tensor],
    skipped_steps: Tensor,
    moments: list[Tensor],
    batch: int,
    start: int,
    momentum: float | None,
    cell_norm: bool,
    over_time: bool,
) -> None:
    """Merge a training step's moments into the population, all directions or, where not all are finite, none.

    A forward that runs again inside a backward, for a checkpoint, is not learnt from again.
    """
    if in_backward():
        return
    known = statistics_of_list(statistics, cell_norm=cell_norm)
    own = moments_of_list(moments, len(known), batch, over_time=over_time, cell_norm=cell_norm)
    finite = update_statistics_(list(zip(known, own, strict=True)), start, momentum)
    skipped_steps += ~finite


@learn.register_fake
def _(
    statistics: list[Tensor],
    skipped_steps: Tensor,
    moments: list[Tensor],
    batch: int,
    start: int,
    momentum: float | None,
    cell_norm: bool,
    over_time: bool,
) -> None:
    return None
