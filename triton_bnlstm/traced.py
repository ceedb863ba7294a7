"""A call of the layer made of the operators in `ops`, for compilers and exporters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils.rnn import PackedSequence

from . import checks, held, ops
from .backend import SAVE_CHOICES, traced_backend
from .kept import list_of_parameters, moments_of_list
from .precision import compute_dtype, in_dtype, in_input_dtype
from .reference import Parameters
from .statistics import Statistics
from .transforms import exporting, forward_mode, transformed

if TYPE_CHECKING:
    from ._base import BNLSTMBase, States

P = ParamSpec("P")
T = TypeVar("T")

# Operators have a backward for autograd, and no more: forward mode would take their derivative for zero.
NO_TRANSFORMS = (
    "torch.func (grad, vjp, jvp, vmap, ...) and forward-mode derivatives of an exported BN-LSTM: its operators do not "
    "go through them"
)
# What a compiler says where it may not step back from a graph.
UNCOMPILED = (
    "a compiled BN-LSTM goes through no transform of torch.func (grad, vjp, jvp, vmap, ...), has no forward-mode "
    "derivatives, meets no other ranks (process_group, in training), counts no sequences that have ended "
    '(finished="frozen", in training with lengths), and cannot see how many sequences a '
    "PackedSequence holds that does not say it (pack with enforce_sorted=False, or give hx, or a tensor and lengths): "
    "such a call is made uncompiled, which fullgraph=True does not allow"
)


def in_transform() -> bool:
    """Whether a compiler traces a transform of torch.func, or within a level of forward mode: not a call to trace.

    Raises:
        RuntimeError: the call is being exported.
    """
    if not torch.compiler.is_compiling() or not (transformed() or forward_mode()):
        return False
    if exporting():
        raise RuntimeError(NO_TRANSFORMS)
    return True


def hides_batch(input: object, hx: object) -> bool:
    """Whether a compiler cannot see how many sequences a PackedSequence holds: an exporter has to, and is told so."""
    if not isinstance(input, PackedSequence) or input.sorted_indices is not None or hx is not None:
        return False
    return torch.compiler.is_compiling() and not exporting()


def uncompiled(function: Callable[P, T]) -> Callable[P, T]:
    """The function, left alone by compilers with all that it calls; they give `UNCOMPILED` for a reason."""
    left_alone = _disable_dynamo(function)

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return left_alone(*args, **kwargs)

    # What torch.compiler.disable sets, too; to call that here would import the compiler with the library.
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    call._torchdynamo_disable_msg = UNCOMPILED  # type: ignore[attr-defined]
    return call


def asked_for(input: Tensor | PackedSequence) -> bool:
    """Whether something traces this call, or it is made on tensors that hold nothing."""
    data = input.data if isinstance(input, PackedSequence) else input
    return torch.compiler.is_compiling() or isinstance(data, FakeTensor)


def holds_nothing(tensor: Tensor) -> bool:
    """Whether there are no values to look at."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


class Sequences(NamedTuple):
    """Input of a layer: x [T, B, D], or rows [R, D] of a PackedSequence; lengths [B], sorted for rows; T and B."""

    x: Tensor
    lengths: Tensor | None
    rows: bool
    steps: int
    batch: int


class Norms(NamedTuple):
    """How a layer normalises, and where it runs."""

    training: bool
    start: int
    reverse: bool
    over_time: bool
    prior_count: float | None
    eps: float
    backend: str | None
    save: str
    autotune: str | None


def sequences_of(
    input: Tensor | PackedSequence,
    hx: object,
    lengths: Tensor | list[int] | None,
    batch_first: bool,
    like: Tensor,
) -> Sequences:
    """From checked input, for parameters like this; values of lengths are not looked at.

    Raises:
        TypeError, ValueError: lengths are no integers for each sequence, or a PackedSequence does not say how many.
    """
    if isinstance(input, PackedSequence):
        if lengths is not None:
            raise ValueError("lengths: a PackedSequence has its own lengths")
        data, sizes, order, _ = input
        if order is not None:
            batch = order.shape[0]
        elif isinstance(hx, tuple | list) and len(hx) > 0 and isinstance(hx[0], Tensor):
            batch = hx[0].shape[-2]
        else:
            raise ValueError(
                "input: a compiler cannot see how many sequences this PackedSequence holds; pack with "
                "enforce_sorted=False, or give hx, or a tensor and lengths"
            )
        held = (sizes[:, None] > torch.arange(batch, device=sizes.device)).sum(0)
        return Sequences(in_input_dtype(data, like), held, True, sizes.shape[0], batch)
    if input.dim() == 2:
        input = input.unsqueeze(1)
    elif batch_first:
        input = input.transpose(0, 1)
    steps, batch = input.shape[:2]
    if lengths is not None:
        lengths = checks.lengths_tensor(lengths, batch, input.device)
    return Sequences(in_input_dtype(input, like), lengths, False, steps, batch)


def _layer(
    given: Sequences, h: Tensor, c: Tensor, parameters: list[Parameters], statistics: list[Statistics], norms: Norms
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """All directions of one layer: output, h_n, c_n [directions, B, H], and in training a list of moments."""
    p = parameters[0]
    cell_norm = p.gamma_c is not None
    population: list[Tensor] = []
    if not norms.training or given.lengths is not None:
        population = torch.ops.triton_bnlstm.population(
            ops.list_of_statistics(statistics),
            given.lengths,
            given.steps,
            given.batch,
            norms.start,
            norms.prior_count,
            given.rows,
            cell_norm,
            norms.over_time,
            norms.training,
        )
    tensors = list_of_parameters([in_dtype(own, h.dtype) for own in parameters])
    save = checks.choice("save", norms.save, SAVE_CHOICES)
    found: tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]] = torch.ops.triton_bnlstm.layer(
        given.x,
        given.lengths,
        h,
        c,
        tensors,
        population,
        given.steps,
        given.rows,
        p.bias is not None,
        cell_norm,
        norms.over_time,
        not norms.training,
        norms.reverse,
        norms.eps,
        traced_backend(norms.backend),
        # which of the two is faster is known where they run, but what is kept has to be known before
        "preactivations" if save == "auto" else save,
        norms.autotune,
        _keeps([given.x, h, c, *tensors], norms.training),
    )
    return found[:4]


def _keeps(tensors: list[Tensor], training: bool) -> bool:
    """Whether there will be a backward; an exported evaluation has none."""
    if not training and exporting():
        return False
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def run(layer: BNLSTMBase, given: Sequences, hx: States | None, start: int) -> tuple[Tensor, Tensor, Tensor]:
    """All layers and directions, and in training the write to the statistics.

    hx: (h_0, c_0), each [layers · directions, B, H], in the order of the sequences (for rows: of their states).

    Returns:
        output as x came, with directions · H columns; h_n and c_n as hx.

    Raises:
        RuntimeError: sequences that have ended are to be counted, which the operators do not do.
    """
    if layer.training and layer.finished == "frozen" and given.lengths is not None:
        raise RuntimeError(held.NOT_TRACED)
    norms = Norms(
        layer.training,
        start,
        False,
        layer.input_stats == "time",
        layer.prior_count,
        layer.eps,
        layer.backend,
        layer.save,
        layer.autotune,
    )
    h_n, c_n = [], []
    known: list[Statistics] = []
    moments: list[Tensor] = []
    for k, suffixes in enumerate(layer._suffixes):
        parameters = [layer._checked_parameters(suffix, given.x.shape[-1]) for suffix in suffixes]
        directions = len(suffixes)
        like = parameters[0].weight_hh
        dtype = compute_dtype(like)
        if hx is None:
            c = like.new_zeros(directions, given.batch, layer.hidden_size)
            h = torch.zeros_like(c, dtype=dtype)
            if layer.training and layer.initial_noise > 0:
                h = torch.randn_like(h) * layer.initial_noise
        else:
            places = slice(k * directions, (k + 1) * directions)
            h, c = hx[0][places].to(dtype), hx[1][places].to(like.dtype)
        statistics = [layer._statistics_of(suffix) for suffix in suffixes]
        x, h, c, own = _layer(given, h, c, parameters, statistics, norms)
        h_n.append(h)
        c_n.append(c)
        known += statistics
        moments += own if not moments else own[1:]  # the count of rows is the same for all layers
        if layer.training and layer.dropout > 0 and k + 1 < len(layer._suffixes):
            x = F.dropout(x, layer.dropout)
        given = given._replace(x=x)
    if layer.training:
        torch.ops.triton_bnlstm.learn(
            ops.list_of_statistics(known),
            layer._skipped_steps,
            moments,
            given.batch,
            start,
            layer.momentum,
            layer.cell_norm,
            norms.over_time,
        )
    return given.x, torch.cat(h_n), torch.cat(c_n)


def one_direction(
    given: Sequences,
    h: Tensor,
    c: Tensor,
    parameters: Parameters,
    statistics: Statistics,
    norms: Norms,
) -> tuple[Tensor, Tensor, Tensor, Statistics | None]:
    """`bn_lstm`: output, h_n and c_n [B, H], and in training the moments of all T steps."""
    output, h_n, c_n, own = _layer(given, h[None], c[None], [parameters], [statistics], norms)
    moments = None
    if norms.training:
        cell_norm = parameters.gamma_c is not None
        moments = moments_of_list(own, 1, given.batch, over_time=norms.over_time, cell_norm=cell_norm)[0]
    return output, h_n[0], c_n[0], moments
