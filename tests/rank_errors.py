"""Ranks whose calls do not go together, as jobs of tests/test_rank_errors.py (see `rank_jobs`)."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from tests.rank_jobs import ALL, inputs, raised
from tests.support import buffers, make_layer
from triton_bnlstm import BNLSTM


def layers() -> tuple[BNLSTM, BNLSTM]:
    """Two layers of one configuration."""
    return tuple(make_layer(seed=seed, **ALL, process_group="world") for seed in (1, 2))  # type: ignore[return-value]


def run(layer: BNLSTM, x: Tensor, lengths: list[int]) -> Tensor:
    return layer(x, lengths=lengths)[0]


def gradients(*of: BNLSTM) -> list[dict[str, Tensor | None]]:
    return [{name: p.grad for name, p in layer.named_parameters()} for layer in of]


def backwards(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Backwards of different calls: all ranks raise, and are together again at the next call."""
    x, lengths = inputs(0, rank)
    x.requires_grad_()
    results: dict[str, Any] = {}
    first, second = layers()

    a, b = run(first, x, lengths).sum(), run(second, x, lengths).sum()
    results["layers"] = raised((a if rank == 0 else b).backward)
    a, b = run(first, x, lengths).sum(), run(first, 2 * x, lengths).sum()
    results["calls"] = raised((a if rank == 0 else b).backward)
    a, b = (checkpoint(run, each, x, lengths, use_reentrant=False).sum() for each in (first, second))
    results["checkpoints"] = raised((a if rank == 0 else b).backward)
    a, b = (checkpoint(run, first, k * x, lengths, use_reentrant=False).sum() for k in (1, 2))
    results["checkpoints of a layer"] = raised((a if rank == 0 else b).backward)
    a = run(first, x, lengths).sum()
    results["none"] = raised(a.backward if rank == 0 else lambda: run(second, x, lengths))
    a = checkpoint(run, first, x, lengths, use_reentrant=False).sum()
    results["none of a checkpoint"] = raised(a.backward if rank == 0 else lambda: run(first, x, lengths))
    leaf = x.detach().requires_grad_(rank == 0)  # only with a gradient to give is it run again
    a = checkpoint(run, first, leaf, lengths, use_reentrant=True).sum()
    results["reentrant"] = raised(a.backward if rank == 0 else lambda: run(first, x, lengths))
    a = run(first, x, lengths).sum()  # its last direction alone, on rank 1 all of them
    part = [first.get_parameter("weight_hh_l1_reverse" if rank == 0 else "weight_hh_l0")]
    results["directions"] = raised(lambda: (torch.autograd.grad(a, part), run(first, x, lengths)))
    return results


class Routed(nn.Module):
    """Two layers that are called, of which a loss takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = layers()

    def forward(self, x: Tensor, lengths: list[int], weights: list[float | None]) -> Tensor:
        parts = [run(layer, x, lengths).sum() for layer in (self.first, self.second)]
        used = [weight * part for weight, part in zip(weights, parts, strict=True) if weight is not None]
        return torch.stack(used).sum()


def routed(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Ranks under DistributedDataParallel that take another layer each."""
    x, lengths = inputs(0, rank)
    results: dict[str, Any] = {}
    for name, other in (("left out", None), ("weight 0", 0.0)):
        wrapped = DistributedDataParallel(Routed(), find_unused_parameters=True)
        loss = wrapped(x, lengths, [1.0, other] if rank == 0 else [other, 1.0])
        results[name] = raised(loss.backward)
    return results


def backwards_together(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """A graph gone through twice, a part of it, and losses with weight 0."""
    x, lengths = inputs(0, rank)
    first, second = layers()
    loss = run(first, x, lengths).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    (twice,) = gradients(first)
    part = [first.get_parameter("weight_hh_l1_reverse"), first.get_parameter("bias_l1")]
    of_part = torch.autograd.grad(run(first, x, lengths).square().sum(), part)
    first, second = layers()
    a, b = (run(each, x, lengths).square().sum() for each in (first, second))
    (a + 0 * b if rank == 0 else 0 * a + b).backward()
    return {"twice": twice, "part": dict(enumerate(of_part)), "weight 0": gradients(first, second)}


def failures(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """A call that fails on one rank before the ranks have met, in a loop that goes on."""
    x, lengths = inputs(0, rank)
    layer, _ = layers()
    before = buffers(layer)
    wrong = lengths if rank == 0 else [99] * len(lengths)
    results: dict[str, Any] = {"lengths": raised(lambda: layer(x, lengths=wrong))}
    results["input"] = raised(lambda: layer(x[:, :, :2] if rank == 0 else "x", lengths=lengths))
    results["changed"] = [name for name, value in buffers(layer).items() if not torch.equal(value, before[name])]
    output = layer(x, lengths=lengths)[0]
    results["backward"] = raised(output.sum().backward if rank == 0 else lambda: layer(x, start=-1))
    results["output"] = output.detach()
    return results


def refused_early(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """What would be refused in the midst of a call is refused before the ranks meet."""
    x, lengths = inputs(0, rank)
    layer, _ = layers()
    before = buffers(layer)
    results: dict[str, Any] = {}

    def loss(x: Tensor) -> Tensor:
        return run(layer, x, lengths).sum()

    results["grad"] = raised(lambda: torch.func.grad(loss)(x))
    results["vmap"] = raised(lambda: torch.func.vmap(loss)(torch.stack([x, x])))
    results["jvp"] = raised(lambda: torch.func.jvp(loss, (x,), (x,)))
    results["grad on one rank"] = raised(lambda: torch.func.grad(loss)(x) if rank == 0 else loss(x))
    for name, value in (("save", "nothing"), ("autotune", "never")):
        kept = getattr(layer, name)
        setattr(layer, name, value)
        results[name] = raised(lambda: loss(x))
        setattr(layer, name, kept)
    layer.process_group = group = dist.new_group([0, 1])
    dist.destroy_process_group(group)
    results["destroyed"] = raised(lambda: loss(x))
    layer.process_group = "world"
    results["changed"] = [name for name, value in buffers(layer).items() if not torch.equal(value, before[name])]
    results["next"] = raised(lambda: loss(x))
    return results


def nothing(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Rank 1 has what a collate function makes of no sequences: no steps, and lengths without a type."""
    x, lengths = inputs(0, 0)
    results: dict[str, Any] = {}
    empties: dict[str, Any] = {"list": [], "floats": torch.tensor([]), "none": None}
    for name, empty in empties.items():
        for batch_first in (False, True):
            layer = make_layer(**ALL, batch_first=batch_first, process_group="world")
            mine = (x.transpose(0, 1) if batch_first else x, lengths) if rank == 0 else (x.new_zeros(0, 0, 3), empty)
            output, (h_n, _) = layer(mine[0], lengths=mine[1])
            (output.square().sum() + h_n.sum()).backward()
            results[f"{name}, {batch_first}"] = {
                "output": output.detach().transpose(0, 1) if batch_first else output.detach(),
                "h_n": h_n.detach(),
                "parameters": gradients(layer)[0],
                "buffers": buffers(layer),
            }
    results["no steps"] = raised(lambda: layer(x.new_zeros(0, 2 if rank == 0 else 0, 3).transpose(0, 1)))
    results["nobody"] = raised(lambda: layer(x[:0, :0]))
    return results


def unlike(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Ranks that call different layers, or whose layers hold different things."""
    x, lengths = inputs(0, rank)
    results: dict[str, Any] = {}
    first, second = layers()
    before = [buffers(layer) for layer in (first, second)]
    results["layers"] = raised(lambda: run(first if rank == 0 else second, x, lengths))
    with mock.patch.object(first, "_parameters", dict(second._parameters) if rank == 0 else first._parameters):
        results["weights"] = raised(lambda: run(first, x, lengths))
    if rank == 1:
        first.reset_statistics()
    results["reset"] = raised(lambda: run(first, x, lengths))
    with torch.no_grad():
        for name, buffer in first.named_buffers():
            buffer.copy_(before[0][name])
        first.get_buffer("mean_hh_l1")[3] += 0.01 * rank
    results["means"] = raised(lambda: run(first, x, lengths))
    results["changed"] = [not torch.equal(value, before[1][name]) for name, value in second.named_buffers()]
    for _, buffer in first.named_buffers():
        dist.broadcast(buffer, 0)
    results["broadcast"] = raised(lambda: run(first, x, lengths))
    # equal weights and statistics: told apart once their statistics are
    twin = copy.deepcopy(second)
    results["twins"] = raised(lambda: run(second if rank == 0 else twin, x, lengths))
    results["twins, later"] = raised(lambda: run(second, x, lengths))
    return results


def alike(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """What is no difference: layers that one rank has more, rounding, weights that are no numbers."""
    x, lengths = inputs(0, rank)
    results: dict[str, Any] = {}
    first, second = layers()
    if rank == 0:
        make_layer(**ALL, process_group="world")
        AveragedModel(first)
    results["more on one rank"] = raised(lambda: run(first, x, lengths))
    with torch.no_grad():
        first.get_parameter("weight_hh_l0").mul_(1 + 1e-3 * rank)
        first.get_buffer("mean_hh_l0").mul_(1 + 1e-7 * rank)
    results["rounded"] = raised(lambda: run(first, x, lengths))
    for value in (torch.inf, torch.nan, 1e300 * (1 + rank)):
        with torch.no_grad():
            second.get_parameter("weight_ih_l0").fill_(value)
        with warnings.catch_warnings(record=True):
            results[str(value)] = raised(lambda: run(second, x, lengths))
    return results
