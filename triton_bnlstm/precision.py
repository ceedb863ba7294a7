"""torch.autocast: matrix products in its dtype; statistics, gates and cell state stay where they are."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .checks import autocast_is_on
from .reference import Parameters


def compute_dtype(like: Tensor) -> torch.dtype:
    """Dtype of matrix products and of h, for parameters like this: autocast's, where it is on; it spares float64."""
    kind = like.device.type
    if like.dtype != torch.float64 and autocast_is_on(kind):
        return torch.get_autocast_dtype(kind)
    return like.dtype


def in_dtype(parameters: Parameters, dtype: torch.dtype) -> Parameters:
    """With weights in the dtype of products; γ, β and bias stay, since what they scale and shift is wide."""
    if parameters.weight_hh.dtype == dtype:
        return parameters
    return parameters._replace(weight_ih=parameters.weight_ih.to(dtype), weight_hh=parameters.weight_hh.to(dtype))


def without_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """What decides about its dtypes itself runs in here."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if autocast_is_on(kind) else nullcontext()
