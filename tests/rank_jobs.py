"""What the processes of tests/test_distributed.py do; each function is one job, run by every rank.

Jobs hand back what the test compares. Where all depends on it that the ranks stay together, a job looks itself.
"""

from __future__ import annotations

import copy
import gc
import io
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tests.support import buffers, make_layer
from tests.support.rank_cases import CASES, run_case
from tests.support.ranks import EXIT
from triton_bnlstm import BNLSTM, BNLSTMCell, convert_sync, dispatch, estimate_statistics, meeting, whole
from triton_bnlstm.reference import update_cell

LENGTHS = ([5, 2, 3], [7, 1])  # of each of two ranks
ALL: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "cell_norm": True, "max_length": 5}


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(seed: int, rank: int | None) -> tuple[Tensor, list[int]]:
    """[T, B, D] and lengths of one of two ranks, or of both together."""
    x, lengths = numbers(seed, 7, 5, 3), [n for part in LENGTHS for n in part]
    if rank is None:
        return x, lengths
    first, last = (0, 3) if rank == 0 else (3, 5)
    return x[: max(LENGTHS[rank]), first:last], lengths[first:last]


class Model(nn.Module):
    """A layer between others, as people have it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.below = nn.Linear(3, 3).double()
        self.layer = make_layer(**options)
        self.head = nn.Linear(8, 2).double()
        with torch.no_grad():
            for k, p in enumerate((*self.below.parameters(), *self.head.parameters())):
                p.copy_(numbers(k, *p.shape))

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:
        output, (h_n, _) = self.layer(self.below(x).tanh(), lengths=lengths)
        valid = torch.arange(len(output))[:, None] < torch.tensor(lengths)
        return (self.head(output).tanh() * valid[:, :, None]).sum((0, 2)) + h_n.square().sum((0, 2))  # [B]


def raised(call: Callable[[], Any]) -> str:
    """The type and text of the error that a call raises; "" if it raises none."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def cases(rank: int, size: int, folder: Path) -> dict[str, Any]:
    return {name: run_case(case, rank) for name, case in CASES[size].items()}


def ddp(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Three training steps under DistributedDataParallel, then an evaluation, synchronised and not."""
    found = {}
    for kind in ("together", "alone"):
        model = Model(**ALL)
        if kind == "together":
            assert convert_sync(model) is model
        wrapped = DistributedDataParallel(model)
        for seed in range(3):
            wrapped.zero_grad()
            wrapped(*inputs(seed, rank)).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        state = buffers(model.layer)
        found[kind] = {"gradients": gradients, "buffers": state, "evaluated": wrapped.eval()(*inputs(9, None)).detach()}
    return found


def fsdp(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """A training step with parameters that are divided among the ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = convert_sync(Model(**ALL))
    mesh = init_device_mesh("cpu", (size,))
    for part in (model.layer, model):
        fully_shard(part, mesh=mesh)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(*inputs(0, rank)).sum().mul(size).backward()  # gradients are averaged over the ranks
    optimiser.step()
    held: dict[str, Any] = dict(model.named_parameters())
    sharded = sum(p.to_local().numel() for p in held.values())
    parameters = {name: p.full_tensor().detach() for name, p in held.items()}
    return {"parameters": parameters, "buffers": buffers(model.layer), "sharded": sharded}


def fsdp_mixed(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Parameters in float64 that a layer has in bfloat16 while it runs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    layer = make_layer(**ALL, process_group="world")
    fully_shard(layer, mesh=init_device_mesh("cpu", (size,)), mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    x, lengths = inputs(0, rank)
    with warnings.catch_warnings(record=True):  # of outputs that are views
        output = layer(x, lengths=lengths)[0]
    output.double().square().sum().mul(size).backward()
    held: dict[str, Any] = dict(layer.named_parameters())
    gradients = {name: p.grad.full_tensor() for name, p in held.items()}
    return {"output": output.detach().double(), "buffers": buffers(layer), "gradients": gradients}


def losses(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Each rank's loss has another part of the answer: the backward is that of all of them nevertheless."""
    layer = make_layer(**ALL, process_group="world")
    x, lengths = inputs(0, rank)
    x.requires_grad_()
    output, (h_n, _) = layer(x, lengths=lengths)
    (h_n[2] if rank == 0 else output[..., 4:]).square().sum().backward()
    return {"x": x.grad, "parameters": {name: p.grad for name, p in layer.named_parameters()}}


def empty_passes(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Evaluation, and a group of one rank, ask nobody: rank 0 does both by itself."""
    alone = [dist.new_group([k]) for k in range(size)][rank]
    results = {}
    if rank == 0:
        x, lengths = inputs(0, None)
        layer = make_layer(**ALL, process_group="world").eval()
        results["evaluated"] = layer(x, lengths=lengths)[0].detach()
        layer = make_layer(**ALL, process_group=alone)
        results["trained"] = layer(x, lengths=lengths)[0].detach()
        results["B = 1"] = raised(lambda: layer(x[:, :1]))
        results["B = 0"] = raised(lambda: layer.eval()(x[:, :0]))
    return results


def not_finite(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """One rank's input is broken: no rank learns from that step, and each says so."""
    layer = make_layer(**ALL, process_group="world")
    x, lengths = inputs(0, rank)
    x = x * torch.nan if rank == 1 else x
    before = buffers(layer)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        layer(x, lengths=lengths)
    changed = [name for name, value in buffers(layer).items() if not torch.equal(value, before[name])]
    return {"told": [str(warning.message) for warning in told], "changed": changed}


def unequal_weights(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Weights that are equal but for rounding, as optimisers on different machines may leave them."""
    layer = make_layer(**ALL, process_group="world")
    with torch.no_grad():
        layer.get_parameter("weight_ih_l0").mul_(1 + rank * 1e-12)
    x, lengths = inputs(0, rank)
    layer(3 + x, lengths=lengths)
    return {"buffers": buffers(layer)}


def forgotten(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """What a call keeps for its backward goes with its graph, in which the directions of all layers are one chain."""
    layer = make_layer(**ALL, process_group="world")
    x, lengths = inputs(0, rank)
    output = layer(x, lengths=lengths)[0]
    kept = [_alive()]
    found: dict[Any, list[Any]] = {}
    waiting: list[Any] = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found[node] = [after for after, _ in node.next_functions]
            waiting += found[node]
    ours = {node for node in found if node.name() == "_LayerOfRanksBackward"}
    chained = sum(after in ours for node in ours for after in found[node])
    del found, waiting, node, ours
    del output
    gc.collect()
    return {"kept": [*kept, _alive()], "chained": chained}


def _alive() -> int:
    return sum(isinstance(each, meeting.Ranks) for each in gc.get_objects())


def recomputed(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Activation checkpoints and torch.compile, against the plain run."""
    results: dict[str, Any] = {}
    for kind in ("plain", "checkpoint", "reentrant", "compiled"):
        model: Any = convert_sync(Model(**ALL))
        call = model
        if kind == "compiled" and rank == 0:  # one will do to see that it does the same: importing dynamo takes seconds
            call = torch.compile(model, backend="eager")
        for seed in range(2):
            x, lengths = inputs(seed, rank)
            x.requires_grad_()
            if kind in ("checkpoint", "reentrant"):
                loss = checkpoint(model, x, lengths, use_reentrant=kind == "reentrant").sum()
            else:
                loss = call(x, lengths).sum()
            loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()} | {"x": x.grad}
        results[kind] = gradients | buffers(model.layer)
    return results


def refused(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Calls that cannot be one call: all ranks raise, nothing has changed, and the next call is none the worse."""
    layer = make_layer(cell_norm=True, process_group="world", prior_count=None)
    x, lengths = inputs(0, rank)
    before = buffers(layer)
    results: dict[str, Any] = {}

    def frozen() -> Any:
        other = make_layer(process_group="world").requires_grad_(False)
        return other(x.clone().requires_grad_(rank == 0))

    def other_options() -> Any:
        layer.prior_count = None if rank == 0 else 2.0
        try:
            return layer(x)
        finally:
            layer.prior_count = None

    def in_two_modes() -> Any:
        with torch.set_grad_enabled(rank == 1):
            return layer(x)

    results["start"] = raised(lambda: layer(x, start=3 * rank))
    results["options"] = raised(other_options)
    results["gradients"] = raised(in_two_modes)
    results["frozen"] = raised(frozen)
    results["one sequence"] = raised(lambda: layer(x[:, : 1 - rank]))
    layer.backend = "triton"
    results["triton"] = raised(lambda: layer(x))
    layer.backend = None
    double = make_layer(process_group="world")  # ragged statistics were not learnt from: those of `layer` are looked at
    leaf = x.clone().requires_grad_()
    loss = double(leaf, lengths=lengths)[0].square().sum()
    results["double"] = raised(lambda: torch.autograd.grad(loss, leaf, create_graph=True))
    results["changed"] = [name for name, value in buffers(layer).items() if not torch.equal(value, before[name])]
    with mock.patch.object(dispatch, "KERNEL_DEVICES", ("cpu",)), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            results["output"] = layer(x, lengths=lengths)[0].detach()
    results["told"] = [str(warning.message) for warning in told]
    return results


def handles(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """A layer with a ProcessGroup: copies share it, saving it is refused, and it serves as "world" does."""
    group = dist.new_group(list(range(size)))
    layer = BNLSTM(3, 4, max_length=5, process_group=group)
    twin = copy.deepcopy(layer)
    no_member: Any = [dist.new_group([k]) for k in (0, 1)][1 - min(rank, 1)]
    from_lstm = BNLSTM.from_lstm(nn.LSTM(3, 4), max_length=5, process_group=group)
    results: dict[str, Any] = {
        "shared": [
            other.process_group is group for other in (twin, copy.copy(layer), from_lstm, BNLSTMCell.from_layer(layer))
        ],
        "repr": [repr(layer), repr(BNLSTMCell.from_layer(layer))],
        "saved": raised(lambda: torch.save(layer, io.BytesIO())),
        "state_dict": raised(lambda: torch.save(layer.state_dict(), io.BytesIO())),
        "no member": raised(lambda: BNLSTM(3, 4, max_length=5, process_group=no_member)),
    }
    convert_sync(layer)
    memory = io.BytesIO()
    torch.save(layer, memory)
    memory.seek(0)
    results["loaded"] = torch.load(memory, weights_only=False).process_group
    for value in (group, "world"):
        layer = make_layer(**ALL, process_group=value)
        x, lengths = inputs(0, rank % 2)
        results[f"output {value == 'world'}"] = layer(x, lengths=lengths)[0].detach()
    return results


def halves(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Two groups of two ranks at the same time, each with a batch of its own."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    layer = make_layer(**ALL, process_group=groups[rank // 2])
    x, lengths = inputs(rank // 2, rank % 2)
    output = layer(x, lengths=lengths)[0]
    output.square().sum().backward()
    return {"parameters": {name: p.grad for name, p in layer.named_parameters()}, "buffers": buffers(layer)}


# estimate_statistics


class Stack(nn.Module):
    """Two layers, of which one item may use only the first; and one that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first = make_layer(seed=1, seen=False, bidirectional=True, cell_norm=True, max_length=5)
        self.second = make_layer(8, 4, seed=2, input_stats="sequence", max_length=5)
        self.unused = make_layer(seed=3)

    def forward(self, x: Tensor, lengths: list[int], deep: bool = True) -> Tensor:
        if x.isinf().any():
            raise OverflowError("an infinite input")
        output, _ = self.first(x, lengths=lengths)
        return self.second(output, lengths=lengths)[0] if deep else output


def items_of(rank: int | None, size: int) -> list[tuple[Tensor, list[int], bool]]:
    """Rank 0 has three items, the last rank none if there are more than two, others one."""
    own = [3, 1] if size == 2 else [3, 1, 1, 0]
    places = range(sum(own)) if rank is None else range(sum(own[:rank]), sum(own[: rank + 1]))
    lengths = ([7, 5, 2], [4, 4], [1, 3, 2, 2], [3, 6], [2, 2, 7])
    return [(numbers(k, max(lengths[k]), len(lengths[k]), 3) + 2, list(lengths[k]), k != 1) for k in places]


def estimates(rank: int, size: int, folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for mode in ("batches", "paper", "whole"):
        for own_group in (False, True):
            model = convert_sync(Stack()) if own_group else Stack()
            group = None if own_group else "world"
            estimate_statistics(model, items_of(rank, size), mode, process_group=group)
            results[f"{mode}, {own_group}"] = buffers(model)  # type: ignore[arg-type]
    return results


def estimates_refused(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """One rank fails, in its own pass or in the midst of what all do together: all raise, and all is as before."""
    model: Any = convert_sync(Stack())
    before = buffers(model)
    results: dict[str, Any] = {}
    items = items_of(rank, size)
    broken = [(items[0][0] * torch.inf, *items[0][1:])] if rank == 1 else items

    def later(*arguments: Any) -> Any:
        """`update_cell` that fails at its fifth call, on rank 1."""
        calls.append(1)
        if rank == 1 and len(calls) == 5:
            raise MemoryError("no memory is left")
        return update_cell(*arguments)

    calls: list[int] = []
    for mode in ("batches", "whole"):
        results[f"pass, {mode}"] = raised(lambda mode=mode: estimate_statistics(model, broken, mode))  # type: ignore[misc]
    with mock.patch.object(whole, "update_cell", later):
        results["lockstep"] = raised(lambda: estimate_statistics(model, items, "whole"))
    unequal = "batches" if rank == 0 else "paper"
    results["modes"] = raised(lambda: estimate_statistics(model, items, unequal))
    results["empty"] = raised(lambda: estimate_statistics(model, []))
    no_number = [(items[0][0] * torch.nan, *items[0][1:])] if rank == 1 else items
    results["NaN"] = raised(lambda: estimate_statistics(model, no_number))
    model.second.process_group = None
    results["groups"] = raised(lambda: estimate_statistics(model, items))
    results["changed"] = [name for name, value in buffers(model).items() if not torch.equal(value, before[name])]
    return results


# Ranks that leave in the midst of what all do


def _until(name: str, calls: int, rank: int) -> Any:
    """`meeting`'s function of that name, which fails at that call on rank 1."""
    real, counted = getattr(meeting, name), []

    def until(*arguments: Any) -> Any:
        counted.append(1)
        if rank == 1 and len(counted) == calls:
            raise MemoryError("no memory is left")
        return real(*arguments)

    return mock.patch.object(meeting, name, until)


def crash(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """The last job of four ranks: in each half one fails, here in a forward and there in a backward.

    It goes on with another call, as loops do that catch errors, and then its process ends, which the other one sees.
    """
    group = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    layer = make_layer(**ALL, process_group=group)
    x, lengths = inputs(0, rank % 2)
    before, began = buffers(layer), time.monotonic()
    if rank < 2:
        with _until("gather", 20, rank % 2):
            error = raised(lambda: layer(x, lengths=lengths))
    else:
        loss = layer(x, lengths=lengths)[0].sum()
        with _until("sum_over_ranks", 5, rank % 2):
            error = raised(loss.backward)
    changed = [name for name, value in buffers(layer).items() if not torch.equal(value, before[name])]
    seconds, later = time.monotonic() - began, raised(lambda: layer(x, lengths=lengths))
    said = folder / f"said_{rank // 2}.txt"
    if rank % 2 == 1:
        said.write_text(f"{error}\n{later}")
        os._exit(EXIT)
    return {"error": error, "changed": changed, "seconds": seconds, "later": later, "other": said.read_text()}
