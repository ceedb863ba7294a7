"""Evaluation in plain operations that can be traced, for programs that leave PyTorch: `torch.onnx.export` takes it.

What the rest of the library does with rows (see `packing`) is done here with the caller's rectangle [T, B, ·]: nothing
looks at a value on the host, no shape depends on one, and the loop over time is the operator `scan`, which becomes
ONNX's Scan. T, B and the lengths therefore stay free in the exported program.

Shapes and dtypes are as in `reference`: matrix products and h are in the dtype of W_hh, under autocast in its dtype;
gates, cell state and statistics in the accumulation dtype. Products are cast here, so an autocast around them finds
nothing to do. Statistics being constants, a norm is a scale and a shift for each slot, which a runtime can fold once
when it loads the program.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import checks, functional
from .precision import compute_dtype, in_dtype, in_input_dtype
from .reference import Parameters, accumulation_dtype
from .statistics import Moments, Statistics, resolve_statistics

if TYPE_CHECKING:
    from ._base import BNLSTMBase
    from .cell import BNLSTMCell
    from .module import BNLSTM

States = tuple[Tensor, Tensor]


def requested() -> bool:
    """Whether a call is being recorded for ONNX.

    Raises:
        RuntimeError: torch.jit.trace records it.
    """
    # asked first because they are cheap: the last one imports the exporter
    traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined]
    if not traced and not torch.compiler.is_exporting():
        return False
    if _for_onnx():
        return True
    if traced:
        raise RuntimeError("torch.jit.trace cannot record a BN-LSTM: use torch.export.export, or ONNX")
    return False


def _for_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


# Dynamo takes torch's function for False without a look. What torch.compiler.assume_constant_result sets, too; to call
# that here would import the compiler with the library.
_for_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]


def evaluate(
    x: Tensor,
    lengths: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    parameters: list[Parameters],
    statistics: list[Statistics],
    *,
    start: int = 0,
    over_time: bool = True,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer with all its directions, normalised by the population. Not for gradients: NaN in padding reaches them.

    Args:
        x: [T, B, D]; what stands beyond a sequence's length may be anything, NaN too.
        lengths: [B] integers, clamped to 1..T; None: all sequences have T steps.
        h_0, c_0: [directions, B, H]; zeros when None.
        parameters: of each direction, W_hh in the dtype of products; the second one's runs from each sequence's own
            last step to its first.
        statistics: the population's slots of each direction, as they were seen.
        start: slot of the first step; steps that would be before slot 0 take that one.
        over_time: statistics of W_ih x have a slot for each step; False: they have one slot.
        eps: ε added to variances.

    Returns:
        output [T, B, directions · H], 0 beyond a sequence's length; h_n and c_n [directions, B, H], each sequence's at
        its own last step (second direction: first).
    """
    # Strides of its own: those of the example would get into the program, where they hold for no other T and B. A copy
    # even where they look contiguous, as any do with B = 1.
    x = x.clone(memory_format=torch.contiguous_format)
    batch, hidden = x.shape[1], parameters[0].weight_hh.shape[1]
    time = torch.arange(x.shape[0], device=x.device)
    valid = mirror = None
    if lengths is not None:
        lengths = lengths.to(x.device, torch.int64).clamp(1, x.shape[0])
        valid = (time[:, None] < lengths)[..., None]  # [T, B, 1]
        mirror = torch.where(valid, (lengths - 1 - time[:, None])[..., None], time[:, None, None])

    outputs, h_n, c_n = [], [], []
    for k, (own, population) in enumerate(zip(parameters, statistics, strict=True)):
        h = own.weight_hh.new_zeros(batch, hidden) if h_0 is None else h_0[k]
        c = own.gamma_hh.new_zeros(batch, hidden) if c_0 is None else c_0[k]
        given = _turn(x, mirror) if k else x
        output, h, c = _direction(given, valid, h, c, time + start, own, population, over_time, eps)
        outputs.append(_turn(output, mirror) if k else output)
        h_n.append(h)
        c_n.append(c)
    output = torch.cat(outputs, 2)
    if valid is not None:
        output = torch.where(valid, output, 0)
    return output, torch.stack(h_n), torch.stack(c_n)


def _turn(x: Tensor, mirror: Tensor | None) -> Tensor:
    """Each sequence of x [T, B, ·] from its own last step to its first; mirror [T, B, 1] or None: all have T steps."""
    return x.flip(0) if mirror is None else x.gather(0, mirror.expand(-1, -1, x.shape[2]))


def _scale_and_shift(moments: Moments, gamma: Tensor, beta: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """A norm over resolved slots as z · scale + shift, each [S, C]."""
    scale = gamma.to(moments.var.dtype) * (moments.var + eps).rsqrt()
    shift = -moments.mean * scale
    return scale, shift if beta is None else shift + beta.to(shift.dtype)


def _at_steps(
    x: Tensor, slot: Tensor, parameters: Parameters, statistics: Statistics, over_time: bool, eps: float
) -> list[Tensor]:
    """What the steps need of x [T, B, D] and the slots [T]: the terms of `_step`, each for all T steps."""
    resolved = resolve_statistics(statistics)
    # The last slot serves all later steps. A program's argument may be negative, which ONNX would count from the end.
    slot = slot.clamp(0, resolved.hh.mean.shape[0] - 1)
    scale_ih, shift_ih = _scale_and_shift(resolved.ih, parameters.gamma_ih, parameters.bias, eps)
    scale_hh, shift_hh = _scale_and_shift(resolved.hh, parameters.gamma_hh, None, eps)
    if over_time:
        scale_ih = scale_ih.index_select(0, slot)[:, None]
    dtype = parameters.weight_hh.dtype
    z_x = F.linear(x.to(dtype), parameters.weight_ih.to(dtype)).to(scale_ih.dtype)
    shift = (shift_ih + shift_hh).index_select(0, slot)[:, None]
    terms = [z_x * scale_ih + shift, scale_hh.index_select(0, slot)]
    if resolved.c is not None and parameters.gamma_c is not None:
        normed = _scale_and_shift(resolved.c, parameters.gamma_c, parameters.beta_c, eps)
        terms += [term.index_select(0, slot) for term in normed]
    return terms


def _step(h: Tensor, c: Tensor, weight_hh: Tensor, a: Tensor, scale_hh: Tensor, *cell_norm: Tensor) -> States:
    """One step from h and c [B, H]: a [B, 4H] is all but W_hh h · scale_hh; cell_norm: scale and shift [H], if any."""
    gates = a + F.linear(h, weight_hh).to(a.dtype) * scale_hh
    i, f, g, o = gates.split_with_sizes([h.shape[1]] * 4, 1)  # chunk's Split has an attribute since opset 18
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    normed = c
    if cell_norm:
        scale, shift = cell_norm
        normed = c * scale + shift
    return (o.sigmoid() * normed.tanh()).to(h.dtype), c


def _direction(
    x: Tensor,
    valid: Tensor | None,
    h: Tensor,
    c: Tensor,
    slot: Tensor,
    parameters: Parameters,
    statistics: Statistics,
    over_time: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """All steps of one direction in the order of x: h of each step [T, B, H], h_n and c_n [B, H]."""
    from torch._higher_order_ops.scan import scan_op  # imports what nobody needs who does not export

    terms = _at_steps(x, slot, parameters, statistics, over_time, eps)
    each = len(terms)
    terms += [] if valid is None else [valid]

    def step(h: Tensor, c: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *given, weight_hh = tensors
        h_new, c_new = _step(h, c, weight_hh, *given[:each])
        for keep in given[each:]:
            h_new, c_new = torch.where(keep, h_new, h), torch.where(keep, c_new, c)
        return h_new, c_new, h_new.clone()  # scan allows no two names of one tensor

    # The operator and not the function `scan`: that one has Dynamo look at `step`, and compare sizes that are to be
    # free with those of programs recorded before.
    # Copies: who calls with (z, z) gives one tensor for both, which it does not take.
    states = [h.clone(), c.to(accumulation_dtype(c.dtype)).clone()]
    h_n, c_n, output = scan_op(step, states, terms, (parameters.weight_hh,))
    return output, h_n, c_n.to(c.dtype)


def run_layer(layer: BNLSTM, input: Any, hx: Any, lengths: Any, start: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`BNLSTM.forward` by way of `evaluate`; lengths are clamped to 1..T instead of being looked at.

    Raises:
        RuntimeError: the layer is in training mode, or TorchScript is tracing.
        TypeError, ValueError: an argument is wrong; the message names it.
    """
    _refuse(layer.training)
    if isinstance(input, PackedSequence):
        raise TypeError("input: a PackedSequence cannot be exported; give the padded tensor, and lengths=")
    like = layer._like()
    checks.rows_of_input(input, layer.input_size, layer.batch_first, like)
    start = _slot("start", start)
    unbatched, directions = input.dim() == 2, len(layer._suffixes[0])
    x = input.unsqueeze(1) if unbatched else input.transpose(0, 1) if layer.batch_first else input
    x, batch, dtype = in_input_dtype(x, like), x.shape[1], compute_dtype(like)
    if lengths is not None:
        lengths = checks.lengths_tensor(lengths, batch, input.device)
    places = layer.num_layers * directions
    shape = (places, layer.hidden_size) if unbatched else (places, batch, layer.hidden_size)
    h_0: Any = [None] * layer.num_layers
    c_0: Any = h_0
    if hx is not None:
        by_layer = (layer.num_layers, directions, batch, layer.hidden_size)
        h, c = checks.states(hx, shape, like)
        h_0, c_0 = h.to(dtype).view(by_layer), c.to(like.dtype).view(by_layer)

    h_n, c_n = [], []
    for k, suffixes in enumerate(layer._suffixes):
        x, h, c = evaluate(
            x,
            lengths,
            h_0[k],
            c_0[k],
            [in_dtype(_parameters(layer, suffix), dtype) for suffix in suffixes],
            [layer._statistics_of(suffix) for suffix in suffixes],
            start=start,
            over_time=layer.input_stats == "time",
            eps=layer.eps,
        )
        h_n.append(h)
        c_n.append(c)
    output = x.squeeze(1) if unbatched else x.transpose(0, 1) if layer.batch_first else x
    return output, (torch.cat(h_n).view(shape), torch.cat(c_n).view(shape))


def run_cell(cell: BNLSTMCell, input: Tensor, hx: States | None, time: int) -> States:
    """`BNLSTMCell.forward` of checked input, by plain operations.

    Raises:
        RuntimeError: the cell is in training mode, or TorchScript is tracing.
        TypeError, ValueError: hx or time is wrong; the message names it.
    """
    _refuse(cell.training)
    like = cell._like()
    dtype = compute_dtype(like)
    parameters = in_dtype(_parameters(cell, ""), dtype)
    x = in_input_dtype(input, like).view(1, -1, cell.input_size)
    slot = torch.arange(1, device=x.device) + _slot("time", time)
    terms = _at_steps(x, slot, parameters, cell._statistics_of(""), cell.input_stats == "time", cell.eps)
    shape = (*input.shape[:-1], cell.hidden_size)
    if hx is None:
        c = like.new_zeros(x.shape[1], cell.hidden_size)
        h = c.to(dtype)
    else:
        h, c = (state.view(-1, cell.hidden_size) for state in checks.states(hx, shape, like))
        h, c = h.to(dtype), c.to(like.dtype)
    h, c_n = _step(h, c.to(accumulation_dtype(dtype)), parameters.weight_hh, *(term[0] for term in terms))
    return h.view(shape), c_n.to(c.dtype).view(shape)


def _refuse(training: bool) -> None:
    if training:
        raise RuntimeError(
            "call eval() before exporting to ONNX: a program has no training mode, and normalises by the population"
        )
    if (
        torch.compiler.is_dynamo_compiling()
    ):  # so the exporter tries after an error; if this fails too, it tells that one
        raise RuntimeError("exporting to ONNX: Dynamo (strict=True) would fix sizes that are to be free")
    if not torch.compiler.is_exporting():
        raise RuntimeError(
            "exporting to ONNX needs torch.onnx.export(..., dynamo=True): TorchScript cannot record scan"
        )


def _parameters(layer: BNLSTMBase, suffix: str) -> Parameters:
    """Through getattr, as the layer itself, and checked as it does."""
    parameters = layer._parameters_of(suffix)
    functional.check_parameters(parameters, "", suffix)
    return parameters


def _slot(name: str, value: int) -> int:
    """`value` checked, unless it is symbolic: then the program takes it as an argument."""
    return value if isinstance(value, torch.SymInt) else checks.integer(name, value, 0)
