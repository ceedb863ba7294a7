"""Models whose forward communicates by itself, in a pass of `estimate_statistics`, in which ranks have their own items.

`DistributedDataParallel` sends buffers around, which a pass can do without. Where parameters are divided among ranks
(`fully_shard`, tensor parallelism) a forward gathers them: there all of these ranks call the model equally often.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .distributed import PeerError, gather

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@contextmanager
def without_broadcasts(model: nn.Module) -> Generator[None, None, None]:
    """No `DistributedDataParallel` in `model` sends buffers around before a forward; afterwards as before."""
    wrappers = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    before = [wrapper.require_forward_param_sync for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            wrapper.require_forward_param_sync = False
        yield
    finally:
        for wrapper, value in zip(wrappers, before, strict=True):
            wrapper.require_forward_param_sync = value


class Convoy:
    """The ranks that a model's parameters are divided among; none, if each rank has all of them.

    That they stay together within a forward is the model's own affair.
    """

    def __init__(self, model: nn.Module) -> None:
        self.groups: list[ProcessGroup] = []
        self.device = torch.device("cpu")
        tensor = sys.modules.get("torch.distributed.tensor")  # who has not imported it divides nothing
        for parameter in model.parameters() if tensor is not None else ():
            if not isinstance(parameter, tensor.DTensor):  # type: ignore[union-attr]
                continue
            self.device = parameter.device
            for dim, placement in enumerate(parameter.placements):
                group = parameter.device_mesh.get_group(dim)
                if not placement.is_replicate() and group not in self.groups:
                    self.groups.append(group)

    def go(self, items: Iterable[Any], run: Callable[[Any], None]) -> None:
        """`run(item)` for each item, once it is known that all ranks of the convoy have one.

        Raises:
            ValueError: on all of them, some having no item left while others have.
            PeerError: another rank has failed between two calls of the model, or in one that all others could end.
        """
        if not self.groups:
            for item in items:
                run(item)
            return
        error, number, left = None, 0, iter(())
        try:
            left = iter(items)
        except Exception as raised:
            error = raised
        while True:
            item = None
            has = False
            if error is None:
                try:
                    item = next(left)
                    has = True
                except StopIteration:
                    pass
                except Exception as raised:
                    error = raised
            if not self._all_have(has, error, number):
                return
            number += 1
            try:
                run(item)
            except Exception as raised:
                error = raised

    def _all_have(self, has: bool, error: Exception | None, number: int) -> bool:
        """Whether there is another item, after `number` of them; all ranks return the same, or raise."""
        ended = not has and error is None
        told = torch.tensor([has, ended, error is not None], dtype=torch.int32, device=self.device)
        for group in self.groups:  # what one of them says reaches the others through the next
            told = gather(group, told, "estimate_statistics, before an item,").amax(0)
        some_have, some_ended, some_failed = told.tolist()
        if error is not None:
            raise error
        if some_failed:
            raise PeerError("process_group: estimate_statistics failed on another rank, whose own error says why")
        if some_have and some_ended:
            raise ValueError(
                "batches: the model's parameters are divided among ranks, which have to call it equally often, but "
                f"after {number} item(s) some ranks have another one and some have none. Give all ranks as many items, "
                "or estimate on a model that is not divided"
            )
        return bool(some_have)
