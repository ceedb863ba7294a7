"""torch.autocast: matrix products in its dtype; statistics, gates and cell state stay where they are."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import autocast_is_on

if TYPE_CHECKING:
    from .reference import Parameters


def in_input_dtype(x: Tensor, like: Tensor) -> Tensor:
    """Input in the dtype of products, if it comes so, or of the parameters: then it is rounded when it is centred."""
    return x if x.dtype == compute_dtype(like) else x.to(like.dtype)


def compute_dtype(like: Tensor) -> torch.dtype:
    """Dtype of matrix products and of h, for parameters like this: autocast's, where it is on; it spares float64."""
    kind = like.device.type
    if like.dtype != torch.float64 and autocast_is_on(kind):
        return torch.get_autocast_dtype(kind)
    return like.dtype


def in_dtype(parameters: Parameters, dtype: torch.dtype) -> Parameters:
    """With W_hh in the dtype of products, which it so tells. What γ, β and bias scale and shift is wide, and W_ih is
    rounded where it meets deviations: the mean of the input meets it as it is.
    """
    if parameters.weight_hh.dtype == dtype:
        return parameters
    return parameters._replace(weight_hh=parameters.weight_hh.to(dtype))


def without_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """What decides about its dtypes itself runs in here."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if autocast_is_on(kind) else nullcontext()
