"""A training call that several ranks make as one: where they meet, and what they tell each other from there on.

At a call's entry the ranks tell each other how many rows each has at each step (`meet`). From then on all run the same
steps, with no rows where they have none, so that their collectives match. Moments are merged by counts from mean and
centred variance, in the order of the ranks, so all ranks hold the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.utils.checkpoint
from torch import Tensor

from . import checks
from .agreement import AGAIN, FORWARD, agree_on_backward, say
from .backend import SAVE_CHOICES, requested_backend
from .distributed import NO_KERNELS, NO_TRANSFORMS, active_group, gather, gather_objects, lose, of_first, sum_over_ranks
from .likeness import SIZE, difference, likeness
from .packing import Packing
from .precision import compute_dtype
from .transforms import have_tangents, transformed
from .tuning.mode import requested_autotune

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ._base import BNLSTMBase, Pass, States

Pair = tuple[Tensor, Tensor]
Result = TypeVar("Result")
# By this a checkpoint ends a forward that it runs again, once it has all that it wants; so it does on every rank.
_ENOUGH: type[BaseException] | tuple[()] = getattr(torch.utils.checkpoint, "_StopRecomputationError", ())


class Ranks:
    """The ranks that share a training call's statistics.

    Attributes:
        call: number of this call, the same on all ranks.
        places: directions that have a node of the autograd graph so far, which is the next one's place.
        over: no collective of the forward is left.
        whole: the rows of all ranks together; of its fields only sizes, batch, steps and count may be asked.
        chain: [] 0-d, what the last direction's node of the autograd graph gave; the next one takes it, so that a
            backward runs all of them, on every rank in the same order, whatever each rank's loss uses.
    """

    def __init__(self, group: ProcessGroup, call: int, counts: Tensor, batch: int) -> None:
        """counts: [N, T] float64, rows of each rank at each step. batch: B of all ranks."""
        self.group, self.call = group, call
        self.places = 0
        self.over = False
        held = counts.sum(0)
        self.whole = Packing(
            sizes=tuple(int(n) for n in held.tolist()),
            batch=batch,
            steps=counts.shape[1],
            count=held,
            lengths=counts.new_zeros(0, dtype=torch.int64),
        )
        self.chain: Tensor | None = None
        # Each rank's part of a step's rows, and of all rows: [N, T, 1] and [N, 1, 1].
        self._by_step = (counts / held)[:, :, None]
        self._over_steps = (counts.sum(1) / counts.sum())[:, None, None]
        self._shares: tuple[Tensor, ...] = ()

    def _merge(self, own: Tensor, share: Tensor, what: str) -> tuple[Tensor, Tensor]:
        """Own [2, .., C], mean and variance; share broadcasts against [N, .., C] → those of all ranks' rows."""
        mean, var = gather(self.group, own, what).unbind(1)
        total = (share * mean).sum(0)
        return total, (share * (var + (mean - total).square())).sum(0)

    def merge_steps(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's moments of all steps, each [T, C], or of all rows, [1, C] → those of all ranks' rows."""
        share = self._by_step if mean.shape[0] == len(self.whole.sizes) else self._over_steps
        return self._merge(torch.stack([mean, var]), share.to(mean.dtype), "the forward, moments of the input")

    def merge_step(self, t: int, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's moments of step t, each [C] → those of all ranks' rows."""
        if not self._shares:
            self._shares = self._by_step.to(mean.dtype).unbind(1)
        return self._merge(torch.stack([mean, var]), self._shares[t], f"the forward, moments of step {t}")

    def sum_in_order(self, own: Tensor) -> Tensor:
        """Sums over the ranks, the same bits on all of them."""
        return gather(self.group, own, "the forward, means of the input").sum(0)

    def of_first(self, own: Tensor) -> Tensor:
        """Rank 0's tensor: matrix products of the same numbers may differ in their last bit from rank to rank."""
        return of_first(self.group, own, "the forward, a shift of the input's moments")

    def run_backward(self, place: int, backward: Callable[[], Result]) -> Result:
        """`backward()` of one direction's node, once all ranks are known to be at it."""
        active_group(self.group)
        agree_on_backward(self.group, self.call, place, self._by_step)
        try:
            return backward()
        except BaseException as error:
            lose(self.group, error)
            raise

    def sum_gradients(self, t: int, *own: Pair) -> list[Pair]:
        """Sums over the ranks of pairs of tensors of one shape, for the backward of step t."""
        both = torch.stack([torch.stack(pair) for pair in own])
        return [(a, b) for a, b in sum_over_ranks(self.group, both, f"the backward, sums of step {t}").unbind()]


def _differences(told: list[dict[str, Any]]) -> str:
    """The first thing in which the ranks differ, in words."""
    for name in told[0]:
        values = [facts.get(name) for facts in told]
        other = next((k for k, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            return f"{name}: {values[0]!r} on rank 0, {values[other]!r} on rank {other}"
    return "they have other layers"


def meet(layer: BNLSTMBase, group: ProcessGroup, packing: Packing, facts: dict[str, Any]) -> tuple[Packing, Ranks]:
    """The entry of a training call: what the ranks have, and this rank's packing for as many steps as any rank has.

    Args:
        layer: which this rank calls.
        group: with two ranks or more.
        packing: this rank's, without a mask.
        facts: what has to be the same on all ranks, by name.

    Raises:
        ValueError: on all ranks, if `facts` differ, layers do, or all ranks together have fewer than two sequences.
        RuntimeError: the call has failed on another rank, or the ranks cannot be reached.
    """
    digest = int.from_bytes(hashlib.blake2b(repr(sorted(facts.items())).encode(), digest_size=6).digest(), "big")
    held = sum(n > 0 for n in packing.sizes)
    doing = AGAIN if torch._C._current_graph_task_id() != -1 else FORWARD
    told, call = say(group, doing, [digest, packing.batch, held], likeness(layer))
    if any(other[0] != told[0][0] for other in told):
        all_facts = gather_objects(group, facts, "telling how a training call is made")
        raise ValueError(f"process_group: the ranks make different calls; {_differences(all_facts)}")
    unlike = difference([other[3 : 3 + SIZE] for other in told])
    if unlike:
        if doing == AGAIN:
            unlike += ". A backward runs these calls again: every rank's loss uses every call, if need be with weight 0"
        raise ValueError(f"process_group: {unlike}")
    batch, steps = int(sum(other[1] for other in told)), int(max(other[2] for other in told))
    if batch < 2:
        raise ValueError(
            "input: training needs a batch of at least 2 sequences over all ranks of process_group together, got "
            f"{batch}: batch normalisation takes each step's variance over the batch, and one row has none"
        )
    packing = packing.with_steps(steps)
    counts = gather(group, packing.count, "telling the rows of each step")
    return packing, Ranks(group, call, counts, batch)


def train_together(
    layer: BNLSTMBase, group: ProcessGroup, x: Tensor, packing: Packing, hx: States | None, start: int
) -> Pass:
    """A layer's call in training, normalised by the rows of all ranks; arguments as those of `BNLSTMBase._run`."""
    if requested_backend(layer.backend) == "triton":
        raise RuntimeError(f'backend="triton": {NO_KERNELS}; use backend="auto" or "reference", or process_group=None')
    # What would be refused later on, in the midst of what all ranks do.
    checks.choice("save", layer.save, SAVE_CHOICES)
    requested_autotune(layer.autotune)
    if transformed() or have_tangents((x, *(hx or ()), *layer.parameters())):
        raise RuntimeError(NO_TRANSFORMS)
    known, x = _without_mask(packing, x)
    known, ranks = meet(layer, group, known, _facts(layer, x, hx, start))
    try:
        done = layer._run_training(x, known, hx, start, ranks)
    except BaseException as error:
        if not ranks.over and not isinstance(error, _ENOUGH):
            lose(group, error)
        raise
    finally:
        ranks.chain = None  # the graph has it; and the graph has `ranks`, so it would keep itself alive
    return done._replace(rows=_with_mask(packing, known, done.rows))


def _facts(layer: BNLSTMBase, x: Tensor, hx: States | None, start: int) -> dict[str, Any]:
    """What has to be the same on all ranks for their collectives and statistics to match."""
    names = ("input_size", "hidden_size", "max_length", "cell_norm", "input_stats", "prior_count", "eps", "momentum")
    facts = {name: getattr(layer, name) for name in names}
    facts |= {
        "layers and directions": layer._suffixes,
        "start": start,
        "dtype": compute_dtype(layer._like()),
        "device": x.device.type,
    }
    facts["gradients are recorded"] = torch.is_grad_enabled()
    if torch.is_grad_enabled():
        # not through `_parameters_of`, which would compute a parametrised weight once more
        trained = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
        facts["parameters that require gradients"] = trained
        # With a frozen first layer it depends on its inputs whether it has a backward at all.
        ends = {part for name in trained for part in name.split(".")}
        if not all(any(end.endswith(suffix) for end in ends) for suffix in layer._suffixes[0]):
            facts["input or hx require gradients"] = any(s.requires_grad for s in (x, *(hx or ())))
    return facts


def _without_mask(packing: Packing, x: Tensor) -> tuple[Packing, Tensor]:
    """Lengths that only the device knows, and rows x [R, D] → a prefix of rows for each step, seats as they were."""
    if packing.mask is None:
        return packing, x
    known = Packing.of_host_lengths(packing.steps, packing.lengths.cpu(), x.device)
    known = replace(known, order=None, inverse=None)  # the lengths are sorted already
    return known, known.pack(x.view(packing.steps, packing.batch, x.shape[1]))


def _with_mask(packing: Packing, known: Packing, rows: Tensor) -> Tensor:
    """Output rows in `known` → rows in `packing`, of which it was made; zero where there is none."""
    return rows if packing.mask is None else known.unpack(rows).flatten(0, 1)
