"""Whether layouts may be measured now, and who says so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from .. import checks
from ..recompute import in_backward

MODES = ("off", "on_miss", "force")
VARIABLE = "TRITON_BNLSTM_AUTOTUNE"
_chosen: ContextVar[str | None] = ContextVar("triton_bnlstm_autotune", default=None)


@contextmanager
def use_autotune(mode: str) -> Iterator[None]:
    """Within it, layers and functions that say nothing of their own tune their kernels like this.

    Args:
        mode: "off" measures nothing: layouts come from the user's cache, from those that are shipped, or from the
            model. "on_miss" measures, before a call, what nobody has measured for its sizes on this device, and keeps
            it. "force" measures each once more in this process, even if it is known.

    It is for the thread that it is in, as a context variable is: of threads that others start, those of
    `torch.nn.DataParallel` for one, it knows nothing. Under torch.distributed rank 0 decides for all, but with "off"
    each process reads the cache that it sees.

    Raises:
        ValueError: no such mode.
    """
    token = _chosen.set(checks.choice("autotune", mode, MODES))
    try:
        yield
    finally:
        _chosen.reset(token)


def requested_autotune(argument: str | None) -> str:
    """What is asked for: by the argument, else the innermost `use_autotune`, else the environment, else "off".

    Raises:
        ValueError: the environment variable names no mode.
    """
    if argument is not None:
        return checks.choice("autotune", argument, MODES)
    return _chosen.get() or checks.choice(VARIABLE, os.environ.get(VARIABLE) or "off", MODES)


def why_not_now(device: torch.device) -> str | None:
    """Why nothing can be measured at the moment; None if it can."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    if torch.are_deterministic_algorithms_enabled():
        return "torch.use_deterministic_algorithms is on, and a choice by timing is not deterministic"
    if in_backward():
        return "a backward is running"
    return None
