"""One layer, both directions, on the Triton kernels, for autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor

from . import bptt, checks, fused_backward
from .backend import SAVES
from .fused_forward import Trained, infer, last_states, train
from .kernels import launch
from .kernels.config import SaveConfig, device_of, explicit_backward_config
from .kernels.errors import KernelError
from .packing import Packing
from .precision import without_autocast
from .reference import Call, Parameters, Problem, Ran
from .statistics import Statistics
from .transforms import batched
from .tuning import choice, online


def _results(h: Tensor, h_n: list[Tensor], c_n: list[Tensor], packing: Packing) -> list[Tensor]:
    """Rows [R, H], h_n and c_n [B, H] of each direction."""
    results = []
    for direction in range(h.shape[0]):
        rows = h[direction, packing.batch :]
        # The same memory as a tensor of its own: autograd refuses in-place operations on views made in a Function.
        rows = h.new_empty(0).set_(h.untyped_storage(), rows.storage_offset(), rows.shape, rows.stride())
        results += [rows, h_n[direction], c_n[direction]]
    return results


@dataclass(frozen=True)
class Options:
    """How a layer is run.

    Attributes:
        save: "preactivations" keeps W_hh h for the backward, "recompute" makes it again, "auto" is the faster of both.
        only_kernels: what the kernels cannot do is an error; else the reference path does it, and `tell` says so.
        tell: takes what the user should know, once.
        failed: takes the error of a backward kernel that cannot run here, before the reference path steps in.
        autotune: "off", "on_miss" or "force"; see `BNLSTM`.
    """

    save: str
    only_kernels: bool
    tell: Callable[[str], None]
    failed: Callable[[KernelError], None]
    autotune: str = "off"


_INPUTS, _OUTPUTS = bptt.INPUTS, 3  # of a direction


def _calls_of(inputs: tuple[Any, ...], problems: list[Problem]) -> list[Call]:
    calls = []
    for direction, problem in enumerate(problems):
        x, h, c, *parameters = inputs[direction * _INPUTS : (direction + 1) * _INPUTS]
        calls.append(Call(x, h, c, Parameters(*parameters), problem))
    return calls


def saved_bytes(
    steps: int, batch: int, rows: int, hidden: int, size: int, *, save: str, column: bool, seats: bool, cell_norm: bool
) -> int:
    """Bytes that one direction of a layer keeps from its forward in training for its backward, besides its inputs.

    For equal lengths of T steps that is, per step, row and unit, in half precision and for T much greater than 1,

        save="preactivations"   22 + 48/B       h 2, c 4, W_ih x 8, W_hh h 8; statistics 48 for a step and unit
        save="recompute"        14 + 48/B
        one input column         8 less         x itself, 4/H, instead of W_ih x
        cell norm                8/B more
        vacated seats           80/B more       a mean besides the deviation of W_hh h, 16, and the population that took
                                                the seats, 64; with cell norm 8/B for that norm's, too

    Args:
        steps, batch, rows, hidden: T, B, R and H; R is T·B where no sequence is known to be shorter.
        size: bytes of a parameter's element.
        save: as `BNLSTM` has it.
        column: the input is one column.
        seats: seats are vacated, or may be: lengths live on a device.
        cell_norm: the cell state is normalised.

    Raises:
        ValueError: there is no such `save`.
    """
    checks.choice("save", save, SAVES)
    states = (rows + batch) * hidden * (size + 4)  # h and float32 c; the first B rows are the initial ones
    inputs = rows * 4 if column else rows * 4 * hidden * size
    deviations = rows * 4 * hidden * size if save == "preactivations" else 0
    of_cells = 8 if cell_norm else 0
    statistics = steps * hidden * (48 + of_cells + (16 + 64 + of_cells if seats else 0))
    return states + inputs + deviations + statistics


def _run(calls: list[Call], save: str, *, clean: bool = False) -> Trained:
    """The forward, and what its backward needs; `clean` as in `train`."""
    if calls[0].problem.frozen:
        h, c, x = infer(calls, keep_cells=True)
        return Trained(h, c, [], x, None, None, None, None)
    return train(calls, save, clean=clean)


def _tensors_of(ran: Trained) -> list[Tensor | None]:
    return [ran.h, ran.c, ran.x, ran.deviation, ran.ih, ran.hh, ran.cell]


class _Layer(torch.autograd.Function):
    """Both ways on the kernels. Inputs of each direction: x, h_0, c_0 and seven parameters."""

    @staticmethod
    def forward(
        ctx: Any, problems: list[Problem], options: Options, found: list[Statistics], *inputs: Any
    ) -> tuple[Tensor, ...]:
        calls = _calls_of(inputs, problems)
        packing = problems[0].packing
        ran = _run(calls, options.save)
        found += ran.moments
        results = _results(ran.h, last_states(ran.h, packing), last_states(ran.c, packing), packing)
        ctx.problems, ctx.options, ctx.layout = problems, options, explicit_backward_config()
        ctx.may_reuse, ctx.spent = _saved_as_they_are(), False
        ctx.set_materialize_grads(False)
        # The output is h's memory; as a tensor of its own it lets autograd see when somebody writes over it.
        ctx.save_for_backward(*inputs, *results[::_OUTPUTS], *_tensors_of(ran))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        problems: list[Problem] = ctx.problems
        options: Options = ctx.options
        count, places = len(problems), iter(ctx.saved_tensors)
        inputs = tuple(islice(places, count * _INPUTS))
        h, c, *rest = tuple(places)[count:]  # behind the outputs
        flags = [ctx.needs_input_grad[3:][k * _INPUTS : (k + 1) * _INPUTS] for k in range(count)]
        wanted = [gradients[k * _OUTPUTS : (k + 1) * _OUTPUTS] for k in range(count)]
        if any(batched(gradient) for gradient in gradients):
            raise RuntimeError("the kernels take one gradient at a time: is_grads_batched and vmap are not supported")
        if ctx.spent:
            raise RuntimeError(
                "an earlier backward through this layer did not finish, and has written over what the forward had "
                "kept: run the forward again, or keep the graph (retain_graph=True)"
            )
        with without_autocast(h):  # as the forward
            if torch.is_grad_enabled():
                if options.only_kernels:
                    raise RuntimeError(_NO_GRAPH)
                options.tell("gradients with a graph of their own (create_graph=True) run on the reference path")
                return None, None, None, *_by_the_reference(inputs, problems, wanted, flags)
            ran = Trained(h, c, [], *rest)
            ctx.spent = reuse = ctx.may_reuse and not _graph_is_kept()
            try:
                found = fused_backward.backward(
                    _calls_of(inputs, problems), ran, wanted, flags, ctx.layout, reuse=reuse
                )
            except KernelError as error:
                if options.only_kernels or ctx.layout is not None:
                    raise
                options.failed(error)
                with torch.enable_grad():
                    found = [d if d is None else d.detach() for d in _by_the_reference(inputs, problems, wanted, flags)]
            return None, None, None, *found


def _graph_is_kept() -> bool:
    """Whether the running backward may be followed by another one through the same graph; True if that is not known."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if asked is None else bool(asked())


def _saved_as_they_are() -> bool:
    """Whether nobody's hooks (`torch.autograd.graph.saved_tensors_hooks`) see what is saved now, and may keep it."""
    asked = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return asked is not None and asked(False) is None


_NO_GRAPH = (
    'backend="triton": the kernels have no second derivatives, so their gradients cannot have a graph of their own '
    '(create_graph=True); use backend="reference", or "auto", which takes the reference path for them'
)


def _by_the_reference(
    inputs: tuple[Any, ...],
    problems: list[Problem],
    wanted: list[tuple[Tensor | None, ...]],
    flags: list[tuple[bool, ...]],
) -> list[Tensor | None]:
    """All gradients, by differentiating the reference path's forward."""
    found: list[Tensor | None] = []
    for k, problem in enumerate(problems):
        own = inputs[k * _INPUTS : (k + 1) * _INPUTS]
        if any(flags[k]):
            x, h, c = own[:3]
            shapes = (h.new_empty(x.shape[0], h.shape[1]), h, c)
            filled = [torch.zeros_like(s) if d is None else d for d, s in zip(wanted[k], shapes, strict=True)]
            found += bptt.differentiable_backward(own, problem, tuple(filled), flags[k])
        else:
            found += [None] * _INPUTS
    return found


def _tuned(calls: list[Call], options: Options, gradients: bool) -> Options:
    """Measure layouts before the call, if that is asked for; and what "auto" saves."""
    wanted = options.autotune != "off"
    weight = calls[0].parameters.weight_hh
    asks = options.save == "auto" and gradients and not calls[0].problem.frozen
    if not (wanted or asks) or len(calls[0].problem.packing.sizes) == 1:
        return options if options.save != "auto" else replace(options, save="preactivations")
    precision = launch.product_precision(weight.dtype, weight.device)
    if wanted:
        online.ensure(calls, precision, options.autotune, gradients=gradients, save=asks)
    if options.save != "auto":
        return options
    found = choice.choose(device_of(weight.device), online.work_of_save(calls, precision)).layout if asks else None
    again = isinstance(found, SaveConfig) and found.recompute
    return replace(options, save="recompute" if again else "preactivations")


def layer(calls: list[Call], options: Options) -> list[Ran]:
    """All directions of one layer; they share their packing and options. `bptt.layer` tells what each gives.

    Raises:
        KernelError: a kernel cannot run here; nothing has changed.
    """
    dtypes = [call.c.dtype for call in calls]
    calls = [call._replace(c=call.c.float()) for call in calls]
    problems = [call.problem for call in calls]
    inputs = [s for call in calls for s in (call.x, call.h, call.c, *call.parameters)]
    moments: list[Statistics] = []
    gradients = torch.is_grad_enabled() and any(s is not None and s.requires_grad for s in inputs)
    with without_autocast(calls[0].x):
        options = _tuned(calls, options, gradients)
        if gradients:
            results = cast(tuple[Tensor, ...], _Layer.apply(problems, options, moments, *inputs))
        else:
            results = _without_gradient(calls, moments)
    return _ran(results, dtypes, moments)


def _ran(results: tuple[Tensor, ...], dtypes: list[torch.dtype], moments: list[Statistics]) -> list[Ran]:
    ran = []
    for direction, dtype in enumerate(dtypes):
        rows, h_n, c_n = results[direction * _OUTPUTS : (direction + 1) * _OUTPUTS]
        ran.append(Ran(rows, h_n, c_n.to(dtype), moments[direction] if moments else None))
    return ran


def forward(calls: list[Call], options: Options, *, keep: bool) -> tuple[list[Ran], list[Tensor]]:
    """`layer` without autograd: what each direction gives, and with `keep` what `backward` takes.

    Raises:
        KernelError: a kernel cannot run here.
    """
    dtypes = [call.c.dtype for call in calls]
    options = _tuned(calls, options, keep)
    if not keep:
        moments: list[Statistics] = []
        return _ran(_without_gradient(calls, moments), dtypes, moments), []
    ran, packing = _run(calls, options.save, clean=True), calls[0].problem.packing
    results = tuple(_results(ran.h, last_states(ran.h, packing), last_states(ran.c, packing), packing))
    return _ran(results, dtypes, ran.moments), [s for s in _tensors_of(ran) if s is not None]


def backward(
    calls: list[Call],
    kept: list[Tensor],
    wanted: list[tuple[Tensor | None, Tensor | None, Tensor | None]],
    flags: list[tuple[bool, ...]],
    save: str,
) -> list[Tensor | None]:
    """Gradients of x, h_0, c_0 and the seven parameters of each direction, without autograd.

    Args:
        calls: what was called.
        kept: by `forward`.
        wanted: gradients of rows, h_n and c_n of each direction.
        flags: which gradients are needed.
        save: as in `forward`.

    Raises:
        KernelError: a kernel cannot run here.
    """
    h, c, x, *tables = kept
    deviation = ih = hh = cell = None
    if tables:
        deviation = tables.pop(0) if save == "preactivations" else None
        ih, hh, cell, *_ = (*tables, None)
    ran = Trained(h, c, [], x, deviation, ih, hh, cell)
    return fused_backward.backward(calls, ran, wanted, flags, explicit_backward_config(), reuse=False)


@torch.no_grad()
def _without_gradient(calls: list[Call], moments: list[Statistics]) -> tuple[Tensor, ...]:
    packing = calls[0].problem.packing
    if calls[0].problem.frozen:
        h, c_n, _ = infer(calls, keep_cells=False)
        last = [c.clone() for c in c_n]
    else:
        h, c, found, *_ = train(calls, None)
        moments += found
        last = last_states(c, packing)
    return tuple(_results(h, last_states(h, packing), last, packing))
