"""Several ranks as one batch: which ranks, and the collectives that they have.

What they say to each other in a training call is in `meeting`, in a pass over data in `peers`; every collective is made
here. One that fails, as when another process is gone, is a RuntimeError that names process_group and says what was
under way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

WORLD = "world"
NO_TRANSFORMS = (
    "process_group: torch.func's transforms and forward-mode derivatives do not reach the rows of other ranks; set "
    "process_group=None for them"
)
NO_KERNELS = "process_group: statistics over all ranks are made on the reference path only"
Model = TypeVar("Model", bound=nn.Module)


class CollectiveError(RuntimeError):
    """A collective has failed: nothing more can be said to the other ranks."""


class PeerError(RuntimeError):
    """Another rank has failed, and all ranks know."""


class GroupHandle:
    """A layer's process_group: copies of the layer share it, and None and "world" alone can be pickled."""

    def __init__(self, group: ProcessGroup | str | None) -> None:
        known = group is None or (isinstance(group, str) and group == WORLD)
        if not known and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            hint = ""
            if dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER:
                hint = " (torch.distributed.new_group gives that to processes that are not in the group)"
            raise TypeError(
                f'process_group must be None, "world" or a torch.distributed.ProcessGroup, got {group!r}{hint}'
            )
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupHandle:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.group is None or isinstance(self.group, str):
            return GroupHandle, (self.group,)
        raise TypeError(
            'process_group: a ProcessGroup cannot be pickled or saved; set layer.process_group to "world" (the default '
            "group at the time of each call) or None before"
        )

    def __repr__(self) -> str:
        if self.group is None or isinstance(self.group, str):
            return repr(self.group)
        return f"<ProcessGroup of {self.group.size()} ranks>"


class Grouped(nn.Module):
    """A module that has a process_group."""

    _group = GroupHandle(None)  # of layers that were pickled by a version without it

    @property
    def process_group(self) -> ProcessGroup | str | None:
        """Whose ranks' rows training normalises by: None, "world" or a ProcessGroup; can be set."""
        return self._group.group

    @process_group.setter
    def process_group(self, group: ProcessGroup | str | None) -> None:
        self._group = GroupHandle(group)

    def _group_to_meet(self) -> ProcessGroup | None:
        """Ranks whose rows this call is normalised by, too; None in evaluation, without a group, or alone in it."""
        return active_group(self._group.group) if self.training else None


def convert_sync(model: Model, process_group: ProcessGroup | str | None = WORLD) -> Model:
    """Let every BNLSTM and BNLSTMCell in `model` normalise by the rows of all ranks, in training; returns the model.

    What torch.nn.SyncBatchNorm.convert_sync_batchnorm is to batch norms, but in place; see `BNLSTM` on `process_group`.

    Args:
        model: any module that holds `BNLSTM` or `BNLSTMCell`.
        process_group: "world", the default group at the time of each call (it need not be there yet); a ProcessGroup;
            None: each rank by itself again.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the model holds no such layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    handle = GroupHandle(process_group)
    layers = [module for module in model.modules() if isinstance(module, Grouped)]
    if not layers:
        raise ValueError("model holds no BNLSTM or BNLSTMCell")
    for layer in layers:
        layer.process_group = handle.group
    return model


def active_group(group: ProcessGroup | str | None) -> ProcessGroup | None:
    """The group to communicate in; None where there is nobody to communicate with.

    Raises:
        RuntimeError: torch.distributed is not available or not initialised, the group has been destroyed, or its ranks
            are no longer together.
    """
    if group is None:
        return None
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            f"process_group={GroupHandle(group)!r}: torch.distributed is not initialised. Call "
            "torch.distributed.init_process_group first, or set process_group=None"
        )
    found: Any = dist.group.WORLD if isinstance(group, str) else group
    if found in _lost:
        raise CollectiveError(
            "process_group: this group cannot be used any more, since its ranks are no longer together. Start the "
            f"processes again, or make a new group on all of them. It began with: {_lost[found]}"
        )
    try:
        dist.get_rank(found)
    except ValueError as error:
        raise RuntimeError(f"process_group: the ProcessGroup has been destroyed ({error})") from error
    return found if dist.get_world_size(found) > 1 else None


# Collectives

# Groups in which this rank has left what all do together, and why: what it said next would be taken for something else.
_lost: WeakKeyDictionary[ProcessGroup, str] = WeakKeyDictionary()


def lose(group: ProcessGroup, error: BaseException) -> None:
    """From now on the group is an error on this rank: it has left the others in the midst of something."""
    _lost.setdefault(group, f"{type(error).__name__}: {error}")


def _failed(group: ProcessGroup, what: str, error: Exception) -> CollectiveError:
    failure = CollectiveError(
        f"process_group: {what} failed on rank {dist.get_rank(group)} of {dist.get_world_size(group)}. Another rank "
        f"may have ended or raised, or made another call: {type(error).__name__}: {error}"
    )
    lose(group, failure)
    return failure


def gather(group: ProcessGroup, own: Tensor, what: str) -> Tensor:
    """Tensors of one shape from all ranks, [N, ..], in the order of the ranks."""
    own = own.contiguous()
    found = own.new_empty(dist.get_world_size(group), *own.shape)
    try:
        dist.all_gather(list(found.unbind()), own, group=group)
    except (RuntimeError, ValueError) as error:
        raise _failed(group, what, error) from error
    return found


def gather_objects(group: ProcessGroup, own: Any, what: str) -> list[Any]:
    """What can be pickled, from all ranks."""
    found: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(found, own, group=group)
    except (RuntimeError, ValueError) as error:
        raise _failed(group, what, error) from error
    return found


def sum_over_ranks(group: ProcessGroup, own: Tensor, what: str) -> Tensor:
    """The sum of all ranks' tensors, in place of this rank's."""
    try:
        dist.all_reduce(own, group=group)
    except (RuntimeError, ValueError) as error:
        raise _failed(group, what, error) from error
    return own


def of_first(group: ProcessGroup, own: Tensor, what: str) -> Tensor:
    """Rank 0's tensor, in place of this rank's."""
    own = own.contiguous()
    try:
        dist.broadcast(own, dist.get_global_rank(group, 0), group=group)
    except (RuntimeError, ValueError) as error:
        raise _failed(group, what, error) from error
    return own
