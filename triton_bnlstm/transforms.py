"""Questions to PyTorch: which transforms, forward-mode derivatives and exporters are at work, and on which tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

_functorch = torch._C._functorch


def transformed() -> bool:
    """Whether a transform of torch.func (grad, vjp, jvp, vmap, …) runs this code, or is traced with it."""
    return _functorch.peek_interpreter_stack() is not None


def exporting() -> bool:
    """Whether this call is recorded by torch.export."""
    return torch.compiler.is_exporting()


# A compiler is to ask these while it traces, and not to look into them: it takes an empty stack for an object, and that
# of torch 2.11 says that it exports whenever it compiles. What torch.compiler.assume_constant_result does, which
# imports the whole compiler for it; graphs are guarded by the stack.
transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]
exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forward_mode() -> bool:
    """Whether there is a `dual_level`, or a jvp, in which tensors may have tangents."""
    return getattr(forward_ad, "_current_level", -1) >= 0


def have_tangents(tensors: Iterable[Tensor | None]) -> bool:
    """Whether forward-mode derivatives go through any of these."""
    return forward_mode() and any(s is not None and forward_ad.unpack_dual(s).tangent is not None for s in tensors)


def batched(tensor: Tensor | None) -> bool:
    """Whether this stands for a batch of tensors at any level of transforms: in vmap, or with is_grads_batched."""
    while tensor is not None:
        if _functorch.is_batchedtensor(tensor) or _functorch.is_legacy_batchedtensor(tensor):
            return True
        if not _functorch.is_functorch_wrapped_tensor(tensor):
            return False
        tensor = _functorch.get_unwrapped(tensor)
    return False
