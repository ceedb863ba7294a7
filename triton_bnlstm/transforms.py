"""Questions to torch.func and forward-mode differentiation: whether they are at work, and on which tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

_functorch = torch._C._functorch


def transformed() -> bool:
    """Whether a transform of torch.func (grad, vjp, jvp, vmap, functionalize, …) runs this code, and not a compiler."""
    return not torch.compiler.is_compiling() and _functorch.peek_interpreter_stack() is not None


def have_tangents(tensors: Iterable[Tensor | None]) -> bool:
    """Whether forward-mode derivatives go through any of these."""
    if getattr(forward_ad, "_current_level", -1) < 0:
        return False
    return any(s is not None and forward_ad.unpack_dual(s).tangent is not None for s in tensors)


def batched(tensor: Tensor | None) -> bool:
    """Whether this stands for a batch of tensors at any level of transforms: in vmap, or with is_grads_batched."""
    while tensor is not None:
        if _functorch.is_batchedtensor(tensor) or _functorch.is_legacy_batchedtensor(tensor):
            return True
        if not _functorch.is_functorch_wrapped_tensor(tensor):
            return False
        tensor = _functorch.get_unwrapped(tensor)
    return False
