"""One layer over whole sequences as a function of tensors and numbers alone: what the operators of `ops` compute.

A compiler sees such an operator as one node, so everything that it gives has a shape that follows from shapes: rows are
packed and unpacked in here, and moments have all T steps, with a count of zero in those that no sequence reached.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from . import bptt, checks, dispatch, reference
from .kept import (
    Setting,
    Sizes,
    flat_of_reference,
    kept_shapes,
    moments_of_all_steps,
    parameters_of_list,
    populations_of_list,
    put,
    reference_of_flat,
    take,
    takes_kernels,
)
from .kernels.config import explicit_backward_config
from .kernels.errors import KernelError
from .packing import Packing
from .reference import Call, Problem, Ran, Saved, accumulation_dtype
from .statistics import Statistics


class Results(NamedTuple):
    """Of a layer: output [T, B, directions·H] or rows [R, ·], h_n and c_n [directions, B, H]; moments, and what is
    kept, as `kept` lists them.
    """

    output: Tensor
    h_n: Tensor
    c_n: Tensor
    moments: list[Tensor]
    kept: list[Tensor]


def packing_of(lengths: Tensor | None, steps: int, batch: int, device: torch.device, *, rows: bool) -> Packing:
    """Which rows exist. Lengths on the host are checked here: no earlier place could read them.

    Raises:
        ValueError: lengths are out of range.
    """
    if lengths is None:
        return Packing.of_equal_lengths(steps, batch, device)
    if lengths.device.type != "cpu":
        return Packing.of_device_lengths(steps, lengths)
    lengths = checks.lengths_of_batch(lengths, steps, batch, device)
    packing = Packing.of_host_lengths(steps, lengths, device)
    # a PackedSequence's rows and states are in their order already
    return replace(packing, index=None, order=None, inverse=None) if rows else packing


def _calls(
    x: Tensor,
    lengths: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    parameters: list[Tensor],
    population: list[Tensor],
    s: Setting,
) -> tuple[Packing, list[Call]]:
    """All directions over rows."""
    n = Sizes.of(x, h_0, s)
    packing = packing_of(lengths, n.steps, n.batch, x.device, rows=s.rows)
    rows = x if s.rows else packing.pack(x)
    h, c = packing.seat(h_0), packing.seat(c_0).to(accumulation_dtype(h_0.dtype))
    populations = populations_of_list(population, n.directions, len(packing.sizes), s)
    calls = []
    for k, p in enumerate(parameters_of_list(parameters, n.directions, s)):
        turned = rows.index_select(0, packing.mirror) if k == 1 or s.reverse else rows
        calls.append(Call(turned, h[k], c[k], p, Problem(packing, populations[k], s.over_time, s.eps)))
    return packing, calls


def _turned(tensors: list[Tensor], packing: Packing, s: Setting) -> list[Tensor]:
    """Rows of each direction, from its own order to that of the input, or the other way round."""
    return [rows.index_select(0, packing.mirror) if k == 1 or s.reverse else rows for k, rows in enumerate(tensors)]


def forward(
    x: Tensor,
    lengths: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    parameters: list[Tensor],
    population: list[Tensor],
    s: Setting,
    *,
    keep: bool,
) -> Results:
    """All directions of one layer.

    Args:
        x: [T, B, D]; or rows [R, D].
        lengths: [B]; None: all are T.
        h_0, c_0: [directions, B, H].
        parameters, population: lists; no population in training without lengths.
        s: everything else.
        keep: keep what the backward needs.

    Raises:
        ValueError: lengths are out of range.
        RuntimeError: the backend that is asked for cannot run here.
    """
    packing, calls = _calls(x, lengths, h_0, c_0, parameters, population, s)
    n, seats = Sizes.of(x, h_0, s), bool(population) and not s.frozen
    of_kernels = takes_kernels(s, h_0)
    done = _on_the_kernels(calls, s, keep=keep)
    stepped_in = of_kernels and done is None  # then the reference path will do the backward, too, from the inputs
    ran, tensors = done or _on_the_reference_path(calls, keep=keep and not of_kernels)
    kept: list[Tensor] = []
    if keep:
        room = kept_shapes(n, s, h_0, seats=seats)
        kept = [h_0.new_empty(k.numel(), dtype=k.dtype) for k in room] if stepped_in else put(tensors, room)
    rows = _turned([one.rows for one in ran], packing, s)
    output = rows[0] if len(rows) == 1 else torch.cat(rows, 1)
    output = output if s.rows else packing.unpack(output)
    taken = {tensor.untyped_storage().data_ptr() for tensor in (*kept, *(one.rows for one in ran))}
    if output.untyped_storage().data_ptr() in taken:
        output = output.clone(memory_format=torch.contiguous_format)
    h_n = packing.unseat(torch.stack([one.h_n for one in ran]))
    c_n = packing.unseat(torch.stack([one.c_n for one in ran]))
    moments: list[Tensor] = []
    if not s.frozen:
        moments = moments_of_all_steps([cast(Statistics, one.moments) for one in ran], n.steps, s.over_time)
    return Results(output.contiguous(), h_n, c_n.to(c_0.dtype), moments, kept)


def _on_the_kernels(calls: list[Call], s: Setting, *, keep: bool) -> tuple[list[Ran], list[Tensor]] | None:
    """None where the reference path has to do it."""
    if not dispatch.for_kernels(calls, s.backend):
        return None
    fused = importlib.import_module("triton_bnlstm.fused")
    options = dispatch.options_of(calls, s.backend, s.save, s.autotune)
    try:
        return cast("tuple[list[Ran], list[Tensor]]", fused.forward(calls, options, keep=keep))
    except KernelError as error:
        if not dispatch.may_step_in(s.backend):
            raise
        dispatch.note_failure(dispatch.case_of(calls), error)
        return None


def _on_the_reference_path(calls: list[Call], *, keep: bool) -> tuple[list[Ran], list[Tensor]]:
    ran: list[Ran] = []
    tensors: list[Tensor] = []
    for call in calls:
        saved: list[Saved] | None = [] if keep else None
        rows, h_n, c_n, moments, z_x, used = reference.forward(*call, saved)
        ran.append(Ran(rows, h_n, c_n, moments))
        if saved is not None:
            tensors += flat_of_reference(rows, z_x, used, saved)
    return ran, tensors


class Gradients(NamedTuple):
    """Of x, h_0, c_0 and the list of parameters; None where not needed."""

    x: Tensor | None
    h_0: Tensor | None
    c_0: Tensor | None
    parameters: list[Tensor | None]


def backward(
    given: tuple[Tensor | None, Tensor | None, Tensor | None],
    x: Tensor,
    lengths: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    parameters: list[Tensor],
    population: list[Tensor],
    kept: list[Tensor],
    s: Setting,
    needed: list[bool],
) -> Gradients:
    """Gradients of all directions of one layer.

    Args:
        given: gradients of output, h_n and c_n.
        x, lengths, h_0, c_0, parameters, population, s: as in `forward`.
        kept: by it.
        needed: of x, h_0, c_0 and each of the parameters.
    """
    packing, calls = _calls(x, lengths, h_0, c_0, parameters, population, s)
    n, seats = Sizes.of(x, h_0, s), bool(population) and not s.frozen
    hidden, directions = n.hidden, n.directions
    d_output, d_h_n, d_c_n = given
    d_rows: list[Tensor | None] = [None] * directions
    if d_output is not None:
        packed = d_output if s.rows else packing.pack(d_output)
        d_rows = list(_turned(list(packed.split(hidden, 1)), packing, s))
    d_h = [None] * directions if d_h_n is None else list(packing.seat(d_h_n))
    d_c = [None] * directions if d_c_n is None else list(packing.seat(d_c_n).to(calls[0].c.dtype))
    wanted = list(zip(d_rows, d_h, d_c, strict=True))

    flags, width = [], len(parameters) // directions
    for k in range(directions):
        own = iter(needed[3 + k * width : 3 + (k + 1) * width])
        of_parameters = [False if p is None else next(own) for p in calls[k].parameters]
        flags.append((*needed[:3], *of_parameters))
    real = n._replace(steps=len(packing.sizes), rows=sum(packing.sizes))
    tensors = take(kept, kept_shapes(real, s, h_0, seats=seats))
    found = None
    if takes_kernels(s, h_0):
        found = _backward_on_the_kernels(calls, tensors, wanted, flags, s)
        if found is None:
            _, tensors = _on_the_reference_path(calls, keep=True)
    if found is None:
        found = _backward_on_the_reference_path(calls, tensors, wanted, flags, seats=seats)

    inputs: list[list[Tensor | None]] = [found[k * bptt.INPUTS : (k + 1) * bptt.INPUTS] for k in range(directions)]
    d_x = None
    if needed[0]:
        d_x = cast(Tensor, sum(_turned([cast(Tensor, own[0]) for own in inputs], packing, s)))
        if packing.mask is not None:
            d_x = torch.where(packing.mask, d_x, 0)
        d_x = (d_x if s.rows else packing.unpack(d_x)).contiguous()
    states = [
        packing.unseat(torch.stack([cast(Tensor, own[k]) for own in inputs])).to(like.dtype) if needed[k] else None
        for k, like in ((1, h_0), (2, c_0))
    ]
    there = [p is not None for p in calls[0].parameters]
    listed = [d for own in inputs for d, given in zip(own[3:], there, strict=True) if given]
    of_list = [d if need else None for d, need in zip(listed, needed[3:], strict=True)]
    return Gradients(d_x, states[0], states[1], of_list)


def _backward_on_the_kernels(
    calls: list[Call],
    tensors: list[Tensor],
    wanted: list[tuple[Tensor | None, Tensor | None, Tensor | None]],
    flags: list[tuple[bool, ...]],
    s: Setting,
) -> list[Tensor | None] | None:
    """None where the reference path has to do it, as it has done the forward, or since a kernel fails now."""
    if s.backend == "auto" and dispatch.has_failed(calls):
        return None
    fused = importlib.import_module("triton_bnlstm.fused")
    try:
        return cast("list[Tensor | None]", fused.backward(calls, tensors, wanted, flags, s.save))
    except KernelError as error:
        if not dispatch.may_step_in(s.backend) or explicit_backward_config() is not None:
            raise
        dispatch.note_failure(dispatch.case_of(calls), error)
        return None


def _backward_on_the_reference_path(
    calls: list[Call],
    tensors: list[Tensor],
    wanted: list[tuple[Tensor | None, Tensor | None, Tensor | None]],
    flags: list[tuple[bool, ...]],
    *,
    seats: bool,
) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    width = len(tensors) // len(calls)
    for k, call in enumerate(calls):
        x, h, c, parameters, problem = call
        cell_norm = parameters.gamma_c is not None
        result, saved = reference_of_flat(
            tensors[k * width : (k + 1) * width], problem, seats=seats, cell_norm=cell_norm
        )
        shapes = (result[0], h, c)
        filled = [torch.zeros_like(like) if d is None else d for d, like in zip(wanted[k], shapes, strict=True)]
        gradients = filled[0], filled[1], filled[2]
        d_x, d_h, d_c, d_parameters = bptt.backward(x, h, c, parameters, problem, result, saved, gradients, flags[k][0])
        found += [d_x, d_h, d_c, *d_parameters]
    return found
