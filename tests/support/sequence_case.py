"""Small calls of a layer whose kernels run in sequence mode: what the tests of its barrier have in common."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tests.support import make_layer
from tests.support.launches import Recorded, recording
from triton_bnlstm.kernels.config import BackwardConfig, Config, use_config

STEPS = 3
PLAIN = Config(sequence=True, units=4, batch_tile=16, inner=16, resident=False, warps=4, stages=1)
BACKWARD = BackwardConfig(sequence=True, units=4, batch_tile=16, inner=16, resident=False, warps=4, stages=1)
DIVIDED = replace(BACKWARD, splits=2)
RESIDENT = replace(PLAIN, resident=True)
EQUAL = None
RAGGED = (2, 3, 1, 3, 2)
RAGGED_TILES = (3, 1) * 9  # at first 18 rows in two tiles of 16, from the second step on 9 rows in one


def call(
    config: Config,
    *,
    backward: BackwardConfig | None = None,
    training: bool = True,
    hidden: int = 8,
    batch: int = 5,
    lengths: tuple[int, ...] | None = EQUAL,
    grad: bool = True,
    input_size: int = 3,
    within: AbstractContextManager[Any] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Every tensor that a call gives or changes, by name.

    Args:
        config, backward: layouts; backward None: that kernel's in step mode.
        training, hidden, batch, lengths, grad, input_size: H, B, D and so on.
        within: is entered around the call.
        options: of the layer.
    """
    options = {"bidirectional": True, "cell_norm": True, **options}
    layer = make_layer(input_size, hidden, dtype=torch.float32, backend="triton", **options).train(training)
    directions = 2 if options["bidirectional"] else 1
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, batch, input_size, generator=generator).requires_grad_(grad)
    hx = tuple(torch.randn(directions, batch, hidden, generator=generator) for _ in range(2))
    layout = backward or replace(BACKWARD, sequence=False)
    with torch.set_grad_enabled(grad), use_config(config, backward=layout), within or nullcontext():
        output, (h_n, c_n) = layer(x, hx, lengths and list(lengths))
        if grad:  # made from the states of all steps: a wrong cell state in between would show here
            (output.square().sum() + h_n.sum() + c_n.square().sum()).backward()
    found = {"output": output.detach(), "h_n": h_n.detach(), "c_n": c_n.detach()}
    found |= {name: buffer.clone() for name, buffer in layer.named_buffers()}
    if grad:
        found |= {f"gradient of {name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
        assert x.grad is not None
        found["gradient of x"] = x.grad
    return found


@cache
def call_by_steps(**case: Any) -> dict[str, Tensor]:
    """The same in step mode."""
    config = case.pop("config", PLAIN)
    back = case.pop("backward", None)
    back = back and replace(back, sequence=False)
    return call(replace(config, sequence=False), backward=back, **case)


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not the same bit for bit; NaN is never the same."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


_FORWARD: dict[str, Any] = {"config": PLAIN, "grad": False}
_BACKWARD: dict[str, Any] = {"config": replace(PLAIN, sequence=False), "backward": BACKWARD}
_PARTS: dict[str, Any] = {**_BACKWARD, "backward": DIVIDED}
_EVALUATION: dict[str, Any] = {**_FORWARD, "training": False}

# Calls in which one launch's programs meet. Both directions in one launch, with cell norm, unless it says otherwise.
CASES: dict[str, dict[str, Any]] = {
    "forward, equal": _FORWARD,
    "forward, ragged": {**_FORWARD, "lengths": RAGGED},
    "forward, walked": {**_FORWARD, "batch": 18, "lengths": RAGGED_TILES},
    "forward, 16 programs": {**_FORWARD, "config": RESIDENT, "hidden": 32, "lengths": RAGGED},
    "backward, equal": _BACKWARD,
    "backward, ragged": {**_BACKWARD, "lengths": RAGGED},
    "backward, in parts, equal": _PARTS,
    "backward, in parts, ragged": {**_PARTS, "lengths": RAGGED},
    "backward, in parts, walked": {**_PARTS, "batch": 18, "lengths": RAGGED_TILES},
    "evaluation, ragged": {**_EVALUATION, "batch": 18, "lengths": RAGGED_TILES},
}

_ALL = 8  # units: one program holds the recurrence, and its threads alone meet
_ONE = replace(PLAIN, units=_ALL)
# The same where no programs meet.
ONE_PROGRAM: dict[str, dict[str, Any]] = {
    "forward, one program": {**_FORWARD, "config": _ONE, "lengths": RAGGED},
    "forward, one program, walked": {**_FORWARD, "config": _ONE, "batch": 18, "lengths": RAGGED_TILES},
    "backward, one program": {**_BACKWARD, "backward": replace(BACKWARD, units=_ALL), "lengths": RAGGED},
    "evaluation, one program": {**_EVALUATION, "config": _ONE, "lengths": RAGGED},
}


@cache
def recorded(name: str) -> Recorded:
    """The launch of one of `CASES` or `ONE_PROGRAM`."""
    with recording() as found:
        call(**{**CASES, **ONE_PROGRAM}[name])
    (launch,) = found
    return launch
