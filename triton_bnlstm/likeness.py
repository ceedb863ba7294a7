"""Whether ranks mean the same layer: a few numbers of its running statistics and weights, which they tell each other.

Ranks hold the same of both, but for rounding where machines differ. So layers are told apart by what they hold: names
and counters may differ between ranks of a well-behaved program, as where one has an averaged copy of the model. There
are tolerances, and what is not a number is no difference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ._base import BNLSTMBase

_TENSORS, _EACH = 4, 8  # weights that are looked at, and elements of each
STATISTICS = ("rows of the last step", "rows seen", "means", "variances", "sizes of the means")
SIZE = len(STATISTICS) + _TENSORS * _EACH
# Rounding on other machines is far below; a checkpoint that another rank has not loaded, or another step's, far above.
_STATISTICS_DIFFER = 1e-4
# Of the larger norm: independent weights are √2 apart, and copies that were trained apart are not to be found so.
_WEIGHTS_DIFFER = 0.5


def likeness(layer: BNLSTMBase) -> Tensor:
    """[SIZE] float64 on the layer's device: sums over its statistics (see STATISTICS), then elements of its weights."""
    with torch.no_grad():
        sums = []
        for suffix in layer._all_suffixes():
            for moments in layer._statistics_of(suffix)[:3]:
                if moments is not None:
                    mean, var = (s.sum(dtype=torch.float64) for s in (moments.mean, moments.var))
                    sums.append(
                        torch.stack([moments.count.sum(), mean, var, moments.mean.abs().sum(dtype=torch.float64)])
                    )
        found = torch.cat([layer.rows[None], torch.stack(sums).sum(0), *_elements(layer)])
        return torch.cat([found, found.new_zeros(SIZE - len(found))])


def _elements(layer: BNLSTMBase) -> list[Tensor]:
    """Of the first weights as they are stored: none that a parametrisation would compute, no shards."""
    found: list[Tensor] = []
    for name, p in layer.named_parameters():
        is_weight = "weight_" in name and name.rpartition(".")[2].startswith(("weight_", "original"))
        if is_weight and type(p) in (nn.Parameter, Tensor) and p.numel() and len(found) < _TENSORS:
            flat = p.detach().reshape(-1)
            part = flat[:: len(flat) // _EACH + 1].to(layer.rows.device, torch.float64)
            found.append(part)
    return found


def difference(told: list[list[float]]) -> str:
    """Likenesses of all ranks → in what they differ, in words; "" if they are of one layer."""
    first, *others = told
    known = len(STATISTICS)
    for rank, other in enumerate(others, 1):
        a, b = first[known:], other[known:]
        apart = sum((s - t) * (s - t) for s, t in zip(a, b, strict=True))  # ** would raise where it is infinite
        if apart > _WEIGHTS_DIFFER**2 * max(sum(s * s for s in a), sum(s * s for s in b)):
            return (
                f"ranks 0 and {rank} call different layers, or their weights differ. All call layers in the same "
                "order, and start from the same weights (as DistributedDataParallel gives "
                "them, or torch.distributed.broadcast)"
            )
    for rank, other in enumerate(others, 1):
        size = max(first[known - 1], other[known - 1])
        for k, name in enumerate(STATISTICS[:-1]):
            scale = size if name == "means" else max(abs(first[k]), abs(other[k]))
            if abs(first[k] - other[k]) > _STATISTICS_DIFFER * scale:
                return (
                    f"running statistics differ ({name}: {first[k]:.7g} on rank 0, {other[k]:.7g} on rank {rank}), or "
                    "ranks call different layers. What one rank has loaded or reset, all load or reset, or it is "
                    "broadcast to them"
                )
    return ""
