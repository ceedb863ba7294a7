"""Bad input, told early: every check names the argument and runs before anything changes."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def integer(name: str, value: Any, minimum: int) -> int:
    """`value` as an int that is at least `minimum`; bool and float are not integers."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    # operator.index would make a constant of what tracers have for an int: a SymInt, or in torch.compile a plain int
    if type(value) is int or isinstance(value, torch.SymInt):
        number = cast(int, value)
    else:
        try:
            number = operator.index(value)
        except TypeError:
            raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


def real(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
) -> float:
    """`value` as a finite float within bounds."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    if above is not None and value <= above:
        raise ValueError(f"{name} must be greater than {above:g}, got {value!r}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum:g}, got {value!r}")
    if maximum is not None and value > maximum:
        raise ValueError(f"{name} must be at most {maximum:g}, got {value!r}")
    return value


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """`value`, one of a few words."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return str(value)


def flag(name: str, value: Any) -> bool:
    """`value`, a bool: 0 or "yes" is a misplaced argument more often than it is meant."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")
    return value


def tensor(name: str, value: Any, shape: tuple[int, ...], like: Tensor) -> None:
    """`value` is a tensor of this shape, on `like`'s device and in its dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    same_kind(name, value, like)


def autocast_is_on(kind: str) -> bool:
    """On devices of this kind; some know no autocast."""
    return _knows_autocast(kind) and torch.is_autocast_enabled(kind)


def _knows_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


# Answered while a compiler traces, not looked into: that of torch 2.11 cannot. See `transforms`.
_knows_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def same_kind(name: str, value: Tensor, like: Tensor) -> None:
    """`value` is on the parameters' device and in their dtype (any floating dtype under autocast)."""
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, the parameters are on {like.device}")
    if value.dtype != like.dtype:
        cast_later = value.is_floating_point() and autocast_is_on(value.device.type)
        if not cast_later:
            raise TypeError(
                f"{name} has dtype {value.dtype}, the parameters have {like.dtype}: convert one of them with .to(dtype)"
            )


def rows_of_input(value: Any, input_size: int, batch_first: bool, like: Tensor, *, empty_batch: bool = False) -> None:
    """`input` is a tensor [T, B, D] (batch_first: [B, T, D]), unbatched [T, D], or a PackedSequence of such.

    empty_batch: B may be 0, of any T and T = 0 too, since other ranks have rows.
    """
    if isinstance(value, PackedSequence):
        data = value.data
        if data.dim() != 2:
            raise ValueError(f"input: a PackedSequence must hold [rows, features], got {tuple(data.shape)}")
    elif isinstance(value, Tensor):
        data = value
        if data.is_nested:
            raise TypeError("input: a nested tensor is not taken; give it padded, with lengths, or a PackedSequence")
        if data.dim() not in (2, 3):
            raise ValueError(f"input must be 3-D, or 2-D when unbatched, got {tuple(data.shape)}")
        time = 1 if batch_first and data.dim() == 3 else 0
        nobody = empty_batch and data.dim() == 3 and data.shape[1 - time] == 0
        if 0 in data.shape[:-1] and not nobody:
            what = "no time steps (T = 0)" if data.shape[time] == 0 else "an empty batch (B = 0)"
            raise ValueError(f"input has {what}: its shape is {tuple(data.shape)}")
    else:
        raise TypeError(f"input must be a tensor or a PackedSequence, got {type(value).__name__}")
    if data.shape[-1] != input_size:
        raise ValueError(f"input must have {input_size} features (input_size), got {data.shape[-1]}")
    same_kind("input", data, like)


def lengths_tensor(lengths: Any, batch: int, device: torch.device) -> Tensor:
    """`lengths` as a tensor [B] of integers on the host or on the input's device, whose values nobody has looked at."""
    if not isinstance(lengths, Tensor):
        try:
            lengths = torch.as_tensor(lengths, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"lengths must be a tensor or a list of integers: {error}") from None
    if lengths.is_floating_point() and lengths.numel() == 0:  # [] is floats to torch
        lengths = lengths.to(torch.int64)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    if tuple(lengths.shape) != (batch,):
        raise ValueError(
            f"lengths must have shape ({batch},), one for each sequence, got {tuple(lengths.shape)} "
            "(input is read as [T, B, D], with batch_first=True as [B, T, D])"
        )
    if lengths.device.type != "cpu" and lengths.device != device:
        raise ValueError(f"lengths is on {lengths.device}, the input on {device}: use the CPU or the same device")
    return lengths


def lengths_of_batch(lengths: Any, steps: int, batch: int, device: torch.device) -> Tensor:
    """`lengths` as a tensor [B]. On the host every value is checked; on an accelerator none is looked at."""
    lengths = lengths_tensor(lengths, batch, device)
    if lengths.device.type != "cpu":
        return lengths
    if batch == 0:
        return lengths.to(torch.int64)
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest < 1:
        raise ValueError(f"lengths must be at least 1, got {shortest}: leave finished sequences out of the batch")
    if longest > steps:
        raise ValueError(f"lengths must be at most T = {steps}, got {longest}")
    return lengths.to(torch.int64)


def states(hx: Any, shape: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
    """`hx` as a pair (h_0, c_0) of this shape."""
    if not isinstance(hx, tuple | list) or len(hx) != 2:
        raise TypeError(f"hx must be a pair (h_0, c_0), got {type(hx).__name__}; lengths and start follow it by name")
    for name, state in zip(("hx[0] (h_0)", "hx[1] (c_0)"), hx, strict=True):
        tensor(name, state, shape, like)
    return hx[0], hx[1]


def training_batch(batch: int) -> None:
    """Batch statistics need two rows."""
    if batch < 2:
        raise ValueError(
            "input: training needs a batch of at least 2 sequences, got 1: batch normalisation takes each step's "
            "variance over the batch, and one row has none. If this is what is left at the end of an epoch, use "
            "DataLoader(drop_last=True); to evaluate, call eval()"
        )
