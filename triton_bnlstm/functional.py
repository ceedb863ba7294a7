"""`bn_lstm`: one layer, one direction, as a pure function; and the way from the caller's tensors to rows and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import checks, held, traced
from .backend import BACKENDS, SAVE_CHOICES
from .dispatch import run
from .packing import Packing
from .precision import compute_dtype, in_dtype, in_input_dtype
from .reference import Call, Parameters, Problem, accumulation_dtype
from .statistics import Population, Statistics, population_at_steps, resolve_statistics, training_population
from .transforms import batched
from .tuning.mode import MODES as AUTOTUNE_MODES

INPUT_STATS = ("time", "sequence")


class Result(NamedTuple):
    """What `bn_lstm` returns.

    output: [T, B, H], or a PackedSequence for a PackedSequence; 0 beyond a sequence's length.
    h_n, c_n: [B, H], each sequence's at its own last step (reverse: at its first).
    moments: the batch's moments per step, to be given to `update_statistics`; None in evaluation.
    """

    output: Tensor | PackedSequence
    h_n: Tensor
    c_n: Tensor
    moments: Statistics | None


def to_rows(
    input: Tensor | PackedSequence, lengths: Tensor | None, batch_first: bool, like: Tensor
) -> tuple[Tensor, Packing]:
    """Checked input, for parameters like this → rows [R, D] and how they are packed."""
    if isinstance(input, PackedSequence):
        return in_input_dtype(input.data, like), Packing.of_packed_sequence(input)
    if input.dim() == 2:
        input = input.unsqueeze(1)
    elif batch_first:
        input = input.transpose(0, 1)
    steps, batch = input.shape[:2]
    if lengths is None:
        packing = Packing.of_equal_lengths(steps, batch, input.device)
    elif lengths.device.type == "cpu":
        packing = Packing.of_host_lengths(steps, lengths, input.device)
    else:
        packing = Packing.of_device_lengths(steps, lengths)
    return packing.pack(in_input_dtype(input, like)), packing


def from_rows(
    rows: Tensor, packing: Packing, input: Tensor | PackedSequence, batch_first: bool
) -> Tensor | PackedSequence:
    """Output rows [R, ·] → the form that `input` came in."""
    if isinstance(input, PackedSequence):
        return PackedSequence(rows, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
    output = packing.unpack(rows)
    if input.dim() == 2:
        return output.squeeze(1)
    return output.transpose(0, 1) if batch_first else output


def population_of(
    statistics: Statistics,
    packing: Packing,
    start: int,
    training: bool,
    over_time: bool,
    prior_count: float | None,
    frozen: bool,
) -> Population | None:
    """What this call takes from the population: constants in evaluation, phantom rows (or None) in training.

    frozen: sequences that have ended are counted themselves, so that there are no phantom rows.
    """
    if training and frozen:
        return None
    if training:
        return training_population(statistics, packing, start, prior_count, over_time)
    resolved = resolve_statistics(statistics)
    return population_at_steps(resolved, start, len(packing.sizes), None, over_time)


def bn_lstm(
    input: Tensor | PackedSequence,
    parameters: Parameters,
    statistics: Statistics,
    hx: tuple[Tensor, Tensor] | None = None,
    lengths: Tensor | list[int] | None = None,
    *,
    training: bool,
    start: int = 0,
    reverse: bool = False,
    input_stats: str = "sequence",
    prior_count: float | None = None,
    finished: str = "phantom",
    eps: float = 1e-5,
    save: str = "preactivations",
    backend: str | None = None,
    autotune: str | None = None,
) -> Result:
    """Batch-normalised LSTM of Cooijmans et al. 2016, equations (6)–(8), over one layer in one direction.

    A pure function: statistics in, moments out, nothing is written. In training each step is normalised by its own
    rows, and seats of finished sequences are taken by phantom rows with the population's moments; in evaluation by the
    population alone. Gradients flow to the input, hx and the parameters; statistics are constants.

    Args:
        input: [T, B, D], or a PackedSequence.
        parameters: weight_ih [4H, D], weight_hh [4H, H], bias [4H] or None, gamma_ih [4H], gamma_hh [4H], and with
            cell norm gamma_c [H], beta_c [H].
        statistics: the population's, S slots; `Statistics.unseen` makes those of a new layer.
        hx: (h_0, c_0), each [B, H]; zeros when None.
        lengths: [B], valid steps of each sequence; None: all T. On an accelerator clamped to 1..T, not checked.
        training: normalise by the batch rather than by the population.
        start: slot of the first step, in steps.
        reverse: each sequence from its own last step to its first; slots count from there.
        input_stats: statistics of W_x x over all valid steps ("sequence"), or per time step as in the paper ("time").
        prior_count: at most so many phantom rows per step; None: every vacated seat; 0: none.
        finished: in training, "phantom" rows in the seats of sequences that have ended, or these sequences themselves
            with their last state, "frozen"; see `BNLSTM`.
        eps: ε added to variances.
        save: what the kernels keep of W_hh h for their backward: "preactivations", "recompute" or "auto"; see `BNLSTM`.
        backend: "auto", "reference" or "triton"; None: what `use_backend` or TRITON_BNLSTM_BACKEND say, else "auto".
        autotune: "off", "on_miss" or "force"; None: what `use_autotune` or TRITON_BNLSTM_AUTOTUNE say, else "off".

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        RuntimeError: the backend cannot run here.
    """
    frozen = held.check(finished, prior_count) and training
    alone = held.leaves_compiled_code(frozen, input, lengths)
    if alone or traced.in_transform() or traced.hides_batch(input, hx):
        return _uncompiled(
            input,
            parameters,
            statistics,
            hx=hx,
            lengths=lengths,
            training=training,
            start=start,
            reverse=reverse,
            input_stats=input_stats,
            prior_count=prior_count,
            finished=finished,
            eps=eps,
            save=save,
            backend=backend,
            autotune=autotune,
        )
    if not isinstance(parameters, Parameters):
        raise TypeError(f"parameters must be Parameters, got {type(parameters).__name__}")
    if not isinstance(statistics, Statistics):
        raise TypeError(f"statistics must be Statistics, got {type(statistics).__name__}")
    checks.flag("training", training)
    checks.flag("reverse", reverse)
    checks.choice("save", save, SAVE_CHOICES)
    if backend is not None:
        checks.choice("backend", backend, BACKENDS)
    if autotune is not None:
        checks.choice("autotune", autotune, AUTOTUNE_MODES)
    checks.choice("input_stats", input_stats, INPUT_STATS)
    checks.real("eps", eps, above=0)
    if prior_count is not None:
        checks.real("prior_count", prior_count, minimum=0)
    checks.integer("start", start, 0)
    check_parameters(parameters)
    like = parameters.weight_hh
    hidden = like.shape[1]
    _check_statistics(statistics, parameters, input_stats)
    checks.rows_of_input(input, parameters.weight_ih.shape[1], False, like)
    if isinstance(input, Tensor) and input.dim() != 3:
        raise ValueError(f"input must be [T, B, D], got {tuple(input.shape)}")
    over_time, dtype = input_stats == "time", compute_dtype(like)
    tracing = traced.asked_for(input)
    if tracing:
        given = traced.sequences_of(input, hx, lengths, False, like)
        if frozen and given.lengths is not None:
            raise RuntimeError(held.NOT_TRACED)
        batch = given.batch
    else:
        host_lengths = check_lengths(input, lengths, batch_first=False)
        batch = batch_of(input, batch_first=False)
    if training:
        checks.training_batch(batch)
    if hx is None:
        h, c = (like.new_zeros(batch, hidden, dtype=kind) for kind in (dtype, like.dtype))
    else:
        h, c = checks.states(hx, (batch, hidden), like)
        h, c = h.to(dtype), c.to(like.dtype)
    if tracing:
        norms = traced.Norms(training, start, reverse, over_time, prior_count, eps, backend, save, autotune)
        return _traced(input, given, (h, c), parameters, statistics, norms)

    x, packing = to_rows(input, host_lengths, False, like)
    h, c = packing.seat(h), packing.seat(c)
    population = population_of(statistics, packing, start, training, over_time, prior_count, frozen)
    x = x.index_select(0, packing.mirror) if reverse else x
    seats, keeps_seats = packing, frozen and not packing.equal
    if keeps_seats:
        x, seats = held.spread(x, packing)
    problem = Problem(seats, population, over_time, eps, held=keeps_seats)
    rows, h_n, c_n, moments = run([Call(x, h, c, in_dtype(parameters, dtype), problem)], backend, save, autotune)[0]
    rows = held.collect(rows, packing) if keeps_seats else rows
    rows = rows.index_select(0, packing.mirror) if reverse else rows
    return Result(from_rows(rows, packing, input, False), packing.unseat(h_n), packing.unseat(c_n), moments)


_uncompiled = traced.uncompiled(bn_lstm)


def _traced(
    input: Tensor | PackedSequence,
    given: traced.Sequences,
    hx: tuple[Tensor, Tensor],
    parameters: Parameters,
    statistics: Statistics,
    norms: traced.Norms,
) -> Result:
    """`bn_lstm` out of operators that a compiler does not look into; moments have all T steps, without rows too."""
    h, c = hx
    if not isinstance(input, PackedSequence):
        return Result(*traced.one_direction(given, h, c, parameters, statistics, norms))
    _, sizes, order, inverse = input
    if order is not None:
        h, c = h.index_select(0, order), c.index_select(0, order)
    rows, h, c, moments = traced.one_direction(given, h, c, parameters, statistics, norms)
    if inverse is not None:
        h, c = h.index_select(0, inverse), c.index_select(0, inverse)
    return Result(PackedSequence(rows, sizes, order, inverse), h, c, moments)


def batch_of(input: Tensor | PackedSequence, batch_first: bool) -> int:
    """B of checked input."""
    if isinstance(input, PackedSequence):
        return int(input.batch_sizes[0])
    if input.dim() == 2:
        return 1
    return input.shape[0 if batch_first else 1]


def check_lengths(
    input: Tensor | PackedSequence, lengths: Tensor | list[int] | None, batch_first: bool
) -> Tensor | None:
    """`lengths` against checked input."""
    if lengths is None:
        return None
    if isinstance(input, PackedSequence):
        raise ValueError("lengths: a PackedSequence has its own lengths")
    if isinstance(lengths, Tensor) and batched(lengths):
        raise RuntimeError("lengths: vmap cannot go over them, since rows are sorted by them on the host")
    time = 1 if batch_first and input.dim() == 3 else 0
    return checks.lengths_of_batch(lengths, input.shape[time], batch_of(input, batch_first), input.device)


def check_parameters(parameters: Parameters, prefix: str = "parameters.", suffix: str = "") -> None:
    """Shapes, dtypes and devices of parameters against each other; messages name them prefix + name + suffix.

    Kernels read by shape: a parameter that somebody has replaced by a smaller one would be read beyond its end.
    """
    weight_ih, weight_hh, bias, gamma_ih, gamma_hh, gamma_c, beta_c = parameters

    def called(name: str) -> str:
        return f"{prefix}{name}{suffix}"

    for name, weight in (("weight_ih", weight_ih), ("weight_hh", weight_hh)):
        if not isinstance(weight, Tensor):
            raise TypeError(f"{called(name)} must be a tensor, got {type(weight).__name__}")
        if weight.dim() != 2:
            raise ValueError(f"{called(name)} must be 2-D, got {tuple(weight.shape)}")
    if not weight_hh.is_floating_point():
        raise TypeError(f"{called('weight_hh')} must have a floating dtype, got {weight_hh.dtype}")
    hidden = weight_hh.shape[1]
    checks.tensor(called("weight_hh"), weight_hh, (4 * hidden, hidden), weight_hh)
    checks.tensor(called("weight_ih"), weight_ih, (4 * hidden, weight_ih.shape[1]), weight_hh)
    if (gamma_c is None) != (beta_c is None):
        raise ValueError(f"{prefix.rstrip('.') or 'layer'}: gamma_c and beta_c come together or not at all")
    for name, vector, size in (
        ("bias", bias, 4 * hidden),
        ("gamma_ih", gamma_ih, 4 * hidden),
        ("gamma_hh", gamma_hh, 4 * hidden),
        ("gamma_c", gamma_c, hidden),
        ("beta_c", beta_c, hidden),
    ):
        if vector is not None or name.startswith(("gamma_ih", "gamma_hh")):
            checks.tensor(called(name), vector, (size,), weight_hh)


def _check_statistics(statistics: Statistics, parameters: Parameters, input_stats: str) -> None:
    hidden = parameters.weight_hh.shape[1]
    wide = accumulation_dtype(parameters.weight_hh.dtype)
    if (statistics.c is None) != (parameters.gamma_c is None):
        raise ValueError("statistics.c must be given exactly when parameters.gamma_c is")
    slots = statistics.hh.mean.shape[0]
    if slots < 1:
        raise ValueError("statistics.hh must have at least one slot")
    like = parameters.weight_hh.new_empty(0, dtype=wide)
    counts = parameters.weight_hh.new_empty(0, dtype=torch.float64)
    for name, moments, columns, length in (
        ("ih", statistics.ih, 4 * hidden, slots if input_stats == "time" else 1),
        ("hh", statistics.hh, 4 * hidden, slots),
        ("c", statistics.c, hidden, slots),
    ):
        if moments is not None:
            checks.tensor(f"statistics.{name}.mean", moments.mean, (length, columns), like)
            checks.tensor(f"statistics.{name}.var", moments.var, (length, columns), like)
            checks.tensor(f"statistics.{name}.count", moments.count, (length,), counts)
    checks.tensor("statistics.rows", statistics.rows, (), counts)
