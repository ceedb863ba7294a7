"""What the processes of tests/test_estimate_wrapped.py do; each function is one job, run by both ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.rank_jobs import Stack, items_of, numbers, raised
from tests.support import buffers
from triton_bnlstm import estimate_statistics

MODES = ("batches", "paper", "whole")


def named_buffers(model: nn.Module) -> dict[str, Any]:
    return buffers(model)  # type: ignore[arg-type]


def ddp(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Rank 0 has three items, rank 1 has one; then rank 0 estimates by itself."""
    found: dict[str, Any] = {}
    for mode in MODES:
        model = Stack()
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        estimate_statistics(wrapped, items_of(rank, size), mode, process_group="world")
        found[mode] = named_buffers(model)
    if rank == 0:
        estimate_statistics(wrapped, items_of(rank, size))
    found["alone"] = named_buffers(model)
    wrapped(*items_of(0, size)[0])  # where it goes on, rank 0's statistics are sent around as before
    found["sent"] = named_buffers(model)
    return found


def even_items(rank: int | None) -> list[Any]:
    """Two of each rank, or all."""
    places = range(4) if rank is None else range(2 * rank, 2 * rank + 2)
    return [(numbers(k, 5, 3, 3) + 2, [5, 4 - k, 2]) for k in places]


def sharded(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Parameters divided among the ranks: equally many items, too few on one rank, and loaders that fail."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (size,))

    def divided() -> Stack:
        model = Stack()
        for part in (*model.children(), model):
            fully_shard(part, mesh=mesh)
        return model

    def loader() -> Iterator[Any]:
        yield from even_items(rank)
        if rank == 1:
            raise OSError("the disk is gone")

    def call(model: nn.Module, item: Any) -> None:
        model(*item)
        if rank == 1:
            raise OverflowError("a large loss")

    items = even_items(rank)
    found: dict[str, Any] = {}
    model = divided()
    for mode in MODES:
        uneven = items[: 2 - rank]
        before = named_buffers(model)
        found[f"uneven, {mode}"] = raised(lambda: estimate_statistics(model, uneven, mode, process_group="world"))  # noqa: B023
        found[f"none, {mode}"] = raised(lambda: estimate_statistics(model, items[rank * 2 :], mode))  # noqa: B023
        if mode != "whole":
            found[f"loader, {mode}"] = raised(lambda: estimate_statistics(model, loader(), mode))  # noqa: B023
            found[f"call, {mode}"] = raised(lambda: estimate_statistics(model, items, mode, forward=call))  # noqa: B023
        found[f"changed, {mode}"] = [n for n, value in named_buffers(model).items() if not value.equal(before[n])]
    for mode in MODES:
        model = divided()
        estimate_statistics(model, items, mode, process_group="world")
        found[mode] = named_buffers(model)
    return found
