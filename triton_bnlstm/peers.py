"""The ranks of a pass over data that each has a part of: `estimate_statistics` with a process group.

No rank goes into a collective before it is known that all of them come: what can fail runs by itself first, and then
the ranks tell each other how it went (`settle`). While ranks go in lockstep, what they exchange has one size and a
place for "I have failed" (`Lockstep`), so a rank can leave at any point without leaving the others waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .distributed import CollectiveError, Grouped, PeerError, active_group, gather, gather_objects
from .statistics import Moments, merge

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def group_of_layers(layers: Sequence[Grouped], given: ProcessGroup | str | None) -> ProcessGroup | None:
    """The group that a pass over data is shared by: the one that is given, else the layers' own.

    Raises:
        ValueError: the layers have different groups.
        RuntimeError: torch.distributed is not initialised.
    """
    if given is not None:
        return active_group(given)
    groups = [layer.process_group for layer in layers]
    if any(group is not groups[0] and group != groups[0] for group in groups):
        raise ValueError("process_group: the model's layers have different groups; say which one holds for this pass")
    return active_group(groups[0])


class Peers:
    """All ranks of a pass; with group None this process alone, and nothing is communicated."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group

    def settle(self, error: Exception | None, facts: dict[str, Any]) -> list[dict[str, Any]]:
        """How each rank has fared so far: all ranks' facts in their order, or an error on all if any rank has one.

        Raises:
            PeerError: on ranks that have no error while another has. A rank's own error is raised as it is.
        """
        if self.group is None:
            if error is not None:
                raise error
            return [facts]
        own = None if error is None else f"{type(error).__name__}: {error}"
        try:
            told = gather_objects(self.group, (own, facts), "estimate_statistics, telling how a pass went,")
        finally:
            if error is not None:
                raise error
        for rank, (text, _) in enumerate(told):
            if text is not None:
                raise PeerError(f"process_group: estimate_statistics failed on rank {rank}, so on all; there: {text}")
        return [of_rank for _, of_rank in told]

    def merge(self, own: Moments) -> Moments:
        """The rows of all ranks together, in their order; float64 [S, C]."""
        merged, *others = self._of_ranks(own)
        for other in others:
            merged = merge(merged, other)
        return merged

    def add(self, own: Moments) -> Moments:
        """Sums over the ranks, in their order."""
        total, *others = self._of_ranks(own)
        for other in others:
            total = Moments(*(a + b for a, b in zip(total, other, strict=True)))
        return total

    def _of_ranks(self, own: Moments) -> list[Moments]:
        if self.group is None:
            return [own]
        found = [gather(self.group, s, "estimate_statistics, merging the ranks' statistics,") for s in own]
        return [Moments(*of_rank) for of_rank in zip(*found, strict=True)]


class Lockstep:
    """Moments of one step after the other, each of all ranks' rows.

    Args:
        group: None: this process's rows alone.
        columns: the most that moments have.
        device: where moments are.
    """

    def __init__(self, group: ProcessGroup | None, columns: int, device: torch.device) -> None:
        self.group = group
        # failed, count, mean [columns], var [columns]
        self.message = torch.zeros(2 + 2 * columns, dtype=torch.float64, device=device)

    def _exchange(self, message: Tensor) -> Tensor:
        assert self.group is not None
        found = gather(self.group, message, "estimate_statistics, moments of a step,")
        failed = found[:, 0].tolist()
        if any(failed):
            raise PeerError(
                f"process_group: estimate_statistics failed on rank {failed.index(1.0)}, so on all; its own error "
                "says why"
            )
        return found

    def merge(self, own: Moments | None, columns: int) -> Moments:
        """[1, C] float64 of this rank's rows, None where it has none → of all ranks' rows."""
        if self.group is None:
            assert own is not None
            return own
        message = torch.zeros_like(self.message)
        parts = message[1:2], message[2 : 2 + columns], message[2 + columns : 2 + 2 * columns]
        if own is not None:
            for part, value in zip(parts, (own.count, own.mean[0], own.var[0]), strict=True):
                part.copy_(value)
        found = self._exchange(message)[:, None, 1:]
        count, mean, var = found[:, :, 0], found[:, :, 1 : 1 + columns], found[:, :, 1 + columns : 1 + 2 * columns]
        merged, *others = (Moments(*of_rank) for of_rank in zip(mean, var, count, strict=True))
        for other in others:
            merged = merge(merged, other)
        return merged

    def close(self, error: Exception | None) -> None:
        """The end, on every rank: by itself, or by an error, which is raised on all of them."""
        if self.group is not None and not isinstance(error, CollectiveError | PeerError):
            message = torch.zeros_like(self.message)
            message[0] = error is not None
            try:
                self._exchange(message)
            except PeerError:
                if error is None:
                    raise
        if error is not None:
            raise error
