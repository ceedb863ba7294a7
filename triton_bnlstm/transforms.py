"""Questions to torch.func: whether its transforms are at work, and which of them see a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

_functorch = torch._C._functorch


def transformed() -> bool:
    """Whether a transform of torch.func (grad, vjp, jvp, vmap, functionalize, …) runs this code."""
    return _functorch.peek_interpreter_stack() is not None


def batched(tensor: Tensor | None) -> bool:
    """Whether this stands for a batch of tensors at any level of transforms: in vmap, or with is_grads_batched."""
    while tensor is not None:
        if _functorch.is_batchedtensor(tensor) or _functorch.is_legacy_batchedtensor(tensor):
            return True
        if not _functorch.is_functorch_wrapped_tensor(tensor):
            return False
        tensor = _functorch.get_unwrapped(tensor)
    return False
