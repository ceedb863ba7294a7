"""`estimate_statistics`: population statistics from a pass over a data set, for any model that holds BN-LSTM layers."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from . import checks, held
from ._base import BNLSTMBase, Pass, States
from .distributed import GroupHandle
from .packing import Packing
from .peers import Lockstep, Peers, group_of_layers
from .statistics import Moments, Statistics, all_finite, slots_of_steps, update_statistics_
from .whole import Captured, on_host, run_whole
from .wrapped import Convoy, without_broadcasts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MODES = ("batches", "whole", "paper")
Forward = Callable[[nn.Module, Any], Any]
NOT_FINITE = "batches: the statistics of this data are not finite; look for NaN or infinity in it"


def estimate_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    mode: str = "batches",
    *,
    forward: Forward | None = None,
    progress: bool = False,
    offload: bool = False,
    process_group: ProcessGroup | str | None = None,
) -> None:
    """Replace the population statistics of every BN-LSTM in `model` by those of a data set.

    Running statistics trail behind the weights while these move; what this sets is of the weights as they stand. The
    rest of the model runs in eval, dropout and noise are off, no gradient is recorded; the model's mode and weights are
    as before afterwards. A layer that the model does not call keeps its statistics, and after an error all do.

    Which evaluates better is a question to a validation set: after a learning rate that has decayed, running statistics
    may be as good, and a layer trained with `initial_noise` has seen larger variances in its first steps than a pass
    without noise finds.

    Modes:
        * ``"batches"``: each batch is normalised as in training, with the statistics at entry behind its phantom
          rows (of which there are none with finished="frozen"), and the moments of all batches are merged by their
          rows. One pass; the order of the batches does not matter, their composition does a little.
        * ``"whole"``: the data set is one batch. Step t of all rows is normalised by the statistics that these very
          rows give slot t, so evaluating the same data reproduces this pass exactly, however it is split. The last
          slot stands on the first step that it serves. One pass for each BN-LSTM module in the order of their calls;
          inputs and states of all rows are held at once. Not for unequal lengths with finished="frozen".
        * ``"paper"``: the plain average of the batches' means and variances, whatever their rows (Cooijmans et al.,
          section 3). One pass, normalised as in "batches".

    Args:
        model: any module that holds `BNLSTM` or `BNLSTMCell`.
        batches: an iterable of items; for "whole" one that can be iterated over again, as a DataLoader or a list can.
            An item is called as model(*item) if it is a tuple or list, model(**item) if a mapping, else model(item).
        mode: see above.
        forward: called as forward(model, item) instead, for items that are not just the model's arguments.
        progress: show a progress bar (needs the package `rich`).
        offload: "whole" keeps inputs, states and outputs of the rows on the CPU.
        process_group: ranks that each have a part of the data: "world" or a ProcessGroup, as for `BNLSTM`. All of them
            call this, with as many items as each has, also none, and all get the statistics of all items, as one
            process that has them would; where one fails, all raise. Each batch is one rank's, but "whole" goes through
            the rows of all ranks in lockstep. None: the layers' own groups; if they have none, this process alone.
            `DistributedDataParallel` in `model` sends no buffers around meanwhile. Ranks that parameters are divided
            among (`fully_shard`) need equally many items, since they gather them in each call.

    Raises:
        TypeError, ValueError: an argument is wrong; a batch of one sequence in a mode that normalises by the batch;
            unequal numbers of items where parameters are divided among ranks; statistics that are not finite; in
            "whole", a layer called more than once for an item; layers that have different groups.
        RuntimeError: another rank has failed, or cannot be reached, or torch.distributed is not initialised.
        ImportError: progress=True without rich.

    Example:
        >>> import torch
        >>> from triton_bnlstm import BNLSTM
        >>> layer = BNLSTM(3, 4, max_length=10)
        >>> loader = [(torch.randn(10, 8, 3), [10, 9, 9, 5, 4, 2, 2, 1], "labels")]
        >>> estimate_statistics(layer, loader, forward=lambda model, item: model(item[0], lengths=item[1]))
        >>> layer.statistics()["hh"].count[:4]
        tensor([8., 7., 5., 5.], dtype=torch.float64)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    checks.choice("mode", mode, MODES)
    checks.flag("progress", progress)
    checks.flag("offload", offload)
    if isinstance(batches, torch.Tensor | PackedSequence) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be an iterable of items, such as [x] or a DataLoader, got {type(batches).__name__}"
        )
    if mode == "whole" and isinstance(batches, Iterator):
        raise TypeError(
            'batches: mode="whole" passes over the data once per layer; give a list or a DataLoader, not an iterator'
        )
    layers = [module for module in model.modules() if isinstance(module, BNLSTMBase)]
    if not layers:
        raise ValueError("model holds no BNLSTM or BNLSTMCell")
    if forward is None:
        forward = _call
    peers = Peers(group_of_layers(layers, GroupHandle(process_group).group))

    with _as_found(model, layers), without_broadcasts(model), torch.no_grad(), _uncompiled():
        if mode == "whole":
            _estimate_whole(model, layers, batches, forward, progress, offload, peers)
        else:
            _estimate_by_batches(model, layers, batches, forward, progress, mode == "paper", peers)


def _uncompiled() -> AbstractContextManager[Any]:
    """What torch.compile has made runs as it was written: a compiled layer cannot be stopped to look at its batch."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _call(model: nn.Module, item: Any) -> Any:
    args: tuple[Any, ...] = ()
    named: dict[str, Any] = {}
    if isinstance(item, Mapping):
        named = dict(item)
    elif isinstance(item, tuple | list) and not isinstance(item, PackedSequence):
        args = tuple(item)
    else:
        args = (item,)
    try:
        return model(*args, **named)
    except TypeError as error:
        try:
            inspect.signature(model.forward).bind(*args, **named)
        except TypeError as reason:
            raise TypeError(
                f"batches: an item does not fit the model's forward ({reason}). Where it holds more than the model's "
                "inputs, such as labels, say how the model is called: forward=lambda model, item: model(item[0])"
            ) from error
        raise


@contextmanager
def _as_found(model: nn.Module, layers: list[BNLSTMBase]) -> Generator[None, None, None]:
    """The model in eval; afterwards its modes as they were, and after an error its statistics too."""
    modes = {module: module.training for module in model.modules()}
    statistics = [{name: buffer.clone() for name, buffer in layer.named_buffers(recurse=False)} for layer in layers]
    try:
        model.eval()
        yield
    except BaseException:
        with torch.no_grad():
            for layer, before in zip(layers, statistics, strict=True):
                for name, buffer in layer.named_buffers(recurse=False):
                    buffer.copy_(before[name])
        raise
    finally:
        for layer in layers:
            layer._intercept = None
        for module, mode in modes.items():
            module.training = mode


def _shown(batches: Iterable[Any], progress: bool, text: str) -> Iterable[Any]:
    """`batches` behind a progress bar."""
    if not progress:
        return batches
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError as error:
        raise ImportError("progress=True needs the package rich: pip install 'triton_bnlstm[progress]'") from error
    return track(batches, text, console=Console(stderr=True), transient=True)


class _Collected:
    """Moments of all batches for one layer's directions."""

    def __init__(self, layer: BNLSTMBase, plain_average: bool) -> None:
        self.layer = layer
        self.plain_average = plain_average
        self.called = False
        self.finite: bool | torch.Tensor = True
        self.sums = [_zeros_like(layer._statistics_of(suffix)) for suffix in layer._all_suffixes()]
        self.batches = [_zeros_like(s) for s in self.sums]  # of which only counts are used: batches that saw the slot

    def intercept(self, x: torch.Tensor, packing: Packing, hx: States | None, start: int) -> Pass:
        """Run the layer as in training, and take the moments."""
        if packing.batch < 2:
            raise ValueError(
                "batches: an item has a batch of one sequence; this mode normalises by the batch and needs at least 2. "
                'Use drop_last=True, or mode="whole"'
            )
        layer = self.layer
        done = layer._through_layers(x, packing, hx, layer._batch_populations(packing, start), regularise=False)
        self.called = True
        for total, seen, own in zip(self.sums, self.batches, done.moments, strict=True):
            assert own is not None
            if self.plain_average:
                _add(total, seen, own, start)
            else:
                self.finite &= update_statistics_([(total, _doubled(own))], start, None)
        return done

    def share(self, peers: Peers) -> None:
        """Make what was collected that of all ranks."""
        together = peers.add if self.plain_average else peers.merge
        self.sums = [_each(together, statistics) for statistics in self.sums]
        self.batches = [_each(peers.add, statistics) for statistics in self.batches]

    def write(self) -> None:
        """Put what was collected into the layer."""
        first: float = 0.0
        for suffix, total, seen in zip(self.layer._all_suffixes(), self.sums, self.batches, strict=True):
            statistics = self.layer._statistics_of(suffix)
            if not bool(all_finite(total[:3])):
                raise ValueError(NOT_FINITE)
            for buffers, sums, batches in zip(statistics[:3], total[:3], seen[:3], strict=True):
                if buffers is None or sums is None or batches is None:
                    continue
                mean, var = sums.mean, sums.var
                if self.plain_average:
                    share = batches.count.clamp_min(1)[:, None]
                    mean, var = mean / share, var / share
                unseen = (sums.count == 0)[:, None]
                buffers.mean.copy_(torch.where(unseen, 0, mean))
                buffers.var.copy_(torch.where(unseen, 1, var))
                buffers.count.copy_(sums.count)
            first = float(total.hh.count[0])
        if not self.layer.rows:
            self.layer.rows.fill_(first)


def _zeros_like(statistics: Statistics) -> Statistics:
    """Nothing seen yet, float64."""

    def zeros(moments: Moments) -> Moments:
        return Moments(*(torch.zeros_like(s, dtype=torch.float64) for s in moments))

    return _each(zeros, statistics)._replace(rows=torch.zeros_like(statistics.rows))


def _each(change: Callable[[Moments], Moments], statistics: Statistics) -> Statistics:
    """`change` of each norm's moments."""
    ih, hh, c, rows = statistics
    return Statistics(change(ih), change(hh), None if c is None else change(c), rows)


def _doubled(moments: Statistics) -> Statistics:
    """In float64, so that the order of merging leaves no trace."""
    return _each(lambda m: Moments(m.mean.double(), m.var.double(), m.count), moments)


def _add(total: Statistics, seen: Statistics, own: Statistics, start: int) -> None:
    """Add one batch's estimates to sums, counting the batches that saw each slot."""
    for sums, batches, moments in zip(total[:3], seen[:3], own[:3], strict=True):
        if sums is None or batches is None or moments is None:
            continue
        first, by_slot = slots_of_steps(moments, start, sums.mean.shape[0])
        touched = slice(first, first + by_slot.mean.shape[0])
        present = by_slot.count > 0
        sums.mean[touched] += by_slot.mean * present[:, None]
        sums.var[touched] += by_slot.var * present[:, None]
        sums.count[touched] += by_slot.count
        batches.count[touched] += present


def _estimate_by_batches(
    model: nn.Module,
    layers: list[BNLSTMBase],
    batches: Iterable[Any],
    forward: Forward,
    progress: bool,
    plain_average: bool,
    peers: Peers,
) -> None:
    collected = [_Collected(layer, plain_average) for layer in layers]
    for each in collected:
        each.layer._intercept = each.intercept
    empty, error = True, None

    def run(item: Any) -> None:
        nonlocal empty
        empty = False
        forward(model, item)

    try:
        Convoy(model).go(_shown(batches, progress, "population statistics"), run)
        if not all(each.finite for each in collected):
            raise ValueError(NOT_FINITE)
    except Exception as raised:
        error = raised
    mode = "paper" if plain_average else "batches"
    told = peers.settle(error, _facts(mode, layers) | {"empty": empty, "called": [each.called for each in collected]})
    _check_same(told, ("mode", "layers"))
    if all(facts["empty"] for facts in told):
        raise ValueError("batches is empty")
    for k, each in enumerate(collected):
        if any(facts["called"][k] for facts in told):
            each.share(peers)
            each.write()


def _facts(mode: str, layers: list[BNLSTMBase]) -> dict[str, Any]:
    """What has to be the same on all ranks."""
    shapes = [[(name, tuple(buffer.shape)) for name, buffer in layer.named_buffers()] for layer in layers]
    return {"mode": mode, "layers": shapes}


def _check_same(told: list[dict[str, Any]], names: tuple[str, ...]) -> None:
    """What ranks have told, which all of them see alike."""
    for name in names:
        for rank, facts in enumerate(told):
            if facts[name] != told[0][name]:
                raise ValueError(
                    f"process_group: the ranks make different calls; {name}: {told[0][name]!r} on rank 0, "
                    f"{facts[name]!r} on rank {rank}"
                )


class _Stop(Exception):
    """Ends a model's forward at the layer whose input was wanted."""


class _Door:
    """Stands before one layer in "whole": takes its input and stops the model until the layer's statistics are done,
    then lets it evaluate, once for an item.
    """

    def __init__(self, layer: BNLSTMBase, arrivals: list[tuple[_Door, Captured]], offload: bool) -> None:
        self.layer = layer
        self.arrivals = arrivals
        self.offload = offload
        self.done = False
        self.calls_of_item = 0

    def intercept(self, x: torch.Tensor, packing: Packing, hx: States | None, start: int) -> Pass:
        """In place of the layer's own run."""
        self.calls_of_item += 1
        if self.calls_of_item > 1:
            raise ValueError(
                'mode="whole": the model calls a layer more than once for an item, so its calls cannot be one batch; '
                'use mode="batches"'
            )
        if self.done:
            return self.layer._run_evaluation(x, packing, hx, start)
        if self.offload:
            x, hx = x.to("cpu"), None if hx is None else (hx[0].to("cpu"), hx[1].to("cpu"))
        self.arrivals.append((self, Captured(x, packing, hx, start)))
        raise _Stop


def _full_steps(call: Captured) -> int:
    """Steps that all sequences of a call have."""
    return call.packing.sizes.count(call.packing.batch)


def _estimate_whole(
    model: nn.Module,
    layers: list[BNLSTMBase],
    batches: Iterable[Any],
    forward: Forward,
    progress: bool,
    offload: bool,
    peers: Peers,
) -> None:
    arrivals: list[tuple[_Door, Captured]] = []
    doors = [_Door(layer, arrivals, offload) for layer in layers]
    for door in doors:
        door.layer._intercept = door.intercept

    convoy, empty = Convoy(model), True

    def run(item: Any) -> None:
        nonlocal empty
        empty = False
        for door in doors:
            door.calls_of_item = 0
        with suppress(_Stop):
            forward(model, item)

    while not all(door.done for door in doors):
        arrivals.clear()
        empty, error = True, None
        number = 1 + sum(door.done for door in doors)
        calls: list[Captured] = []
        facts = _facts("whole", layers)
        try:
            text = f"population statistics, layer {number} of {len(doors)}"
            convoy.go(_shown(batches, progress, text), run)
            calls = [on_host(call) for _, call in arrivals]
        except Exception as raised:
            error = raised
        facts["targets"] = sorted({doors.index(door) for door, _ in arrivals})
        facts["starts"] = sorted({call.start for call in calls})
        facts |= {"empty": empty, "steps": max((len(call.packing.sizes) for call in calls), default=0)}
        facts["shortest"] = min((_full_steps(call) for call in calls if call.packing.batch), default=None)
        facts["batch"] = sum(call.packing.batch for call in calls)
        told = peers.settle(error, facts)
        _check_same(told, ("mode", "layers"))
        if all(of_rank["empty"] for of_rank in told):
            raise ValueError("batches is empty")
        targets, starts = ({k for of_rank in told for k in of_rank[name]} for name in ("targets", "starts"))
        if not targets:  # the model does not call what is left
            return
        if len(targets) > 1:
            raise ValueError('mode="whole": the model calls its layers in another order for other items')
        if len(starts) > 1:
            raise ValueError(
                'mode="whole": calls with different start cannot be taken as one batch; use mode="batches"'
            )
        target = doors[targets.pop()]
        steps, batch = max(of_rank["steps"] for of_rank in told), sum(of_rank["batch"] for of_rank in told)
        if target.layer.finished == "frozen" and any(of_rank["shortest"] not in (None, steps) for of_rank in told):
            raise ValueError(held.NOT_WHOLE)
        lockstep = Lockstep(peers.group, 4 * target.layer.hidden_size, target.layer.rows.device)
        try:
            run_whole(target.layer, calls, offload, starts.pop(), steps, batch, lockstep)
        except Exception as raised:
            error = raised
        lockstep.close(error)
        if not all(bool(all_finite(target.layer._statistics_of(s)[:3])) for s in target.layer._all_suffixes()):
            raise ValueError(NOT_FINITE)
        target.done = True
    error = None
    try:
        convoy.go(islice(batches, 1), run)  # one past the last layer, to see that no layer is called again
    except Exception as raised:
        error = raised
    peers.settle(error, {})
