"""What the layer and the cell share: parameters, statistics as buffers, and one pass over all layers and directions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks, functional, held, kept, ops, state, traced
from .backend import BACKENDS, SAVE_CHOICES, requested_backend
from .dispatch import run
from .distributed import Grouped
from .initial import initialise_
from .meeting import Ranks, train_together
from .packing import Packing
from .precision import compute_dtype, in_dtype
from .recompute import Calls, in_backward, unwatched
from .reference import Call, Parameters, Problem, accumulation_dtype
from .resolved import forget, resolved_statistics
from .statistics import (
    Moments,
    Population,
    Statistics,
    population_at_steps,
    resized,
    training_population,
    update_statistics_,
)
from .transforms import batched, exporting, transformed
from .tuning.mode import MODES as AUTOTUNE_MODES

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

RECURRENT_INITS = ("orthogonal", "identity")
States = tuple[Tensor, Tensor]


class Pass(NamedTuple):
    """What one pass over all layers gives.

    rows [R, directions·H]; h_n and c_n [layers·directions, B, H] in the order of the rows; each direction's moments
    (None in evaluation).
    """

    rows: Tensor
    h_n: Tensor
    c_n: Tensor
    moments: list[Statistics | None]


class BNLSTMBase(Grouped):
    """Parameters and population statistics of stacked batch-normalised LSTM layers; see `BNLSTM`."""

    rows: Tensor
    _skipped_steps: Tensor
    _version = state.VERSION
    finished = "phantom"  # of layers that were pickled by a version without it

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        suffixes: list[list[str]],
        *,
        bias: bool,
        max_length: int,
        cell_norm: bool,
        input_stats: str,
        prior_count: float | None,
        finished: str,
        gamma_init: float,
        eps: float,
        momentum: float | None,
        recurrent_init: str,
        forget_bias: float,
        initial_noise: float,
        save: str,
        backend: str | None,
        autotune: str | None,
        process_group: ProcessGroup | str | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.input_size = checks.integer("input_size", input_size, 1)
        self.hidden_size = checks.integer("hidden_size", hidden_size, 1)
        self._with_bias = checks.flag("bias", bias)
        self.max_length = checks.integer("max_length", max_length, 1)
        self.cell_norm = checks.flag("cell_norm", cell_norm)
        self.input_stats = checks.choice("input_stats", input_stats, functional.INPUT_STATS)
        self.prior_count = None if prior_count is None else checks.real("prior_count", prior_count, minimum=0)
        held.check(finished, self.prior_count)
        self.finished = finished
        self.gamma_init = checks.real("gamma_init", gamma_init)
        self.eps = checks.real("eps", eps, above=0)
        self.momentum = None if momentum is None else checks.real("momentum", momentum, above=0, maximum=1)
        self.recurrent_init = checks.choice("recurrent_init", recurrent_init, RECURRENT_INITS)
        self.forget_bias = checks.real("forget_bias", forget_bias)
        self.initial_noise = checks.real("initial_noise", initial_noise, minimum=0)
        self.save = checks.choice("save", save, SAVE_CHOICES)
        self.backend = None if backend is None else checks.choice("backend", backend, BACKENDS)
        self.autotune = None if autotune is None else checks.choice("autotune", autotune, AUTOTUNE_MODES)
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating dtype, got {dtype}")
        self.process_group = process_group
        self.dropout = 0.0
        self._suffixes = suffixes

        weight = torch.empty(0, device=device, dtype=dtype)
        for k, directions in enumerate(suffixes):
            width = self.input_size if k == 0 else self.hidden_size * len(directions)
            for suffix in directions:
                self._register(suffix, width, weight)
        self.register_buffer("rows", torch.zeros((), dtype=torch.float64, device=weight.device))
        self.register_buffer(
            "_skipped_steps", torch.zeros((), dtype=torch.int64, device=weight.device), persistent=False
        )
        self._forget_the_moment()
        self.reset_parameters()

    # Parameters and buffers

    def _register(self, suffix: str, width: int, like: Tensor) -> None:
        columns, hidden = 4 * self.hidden_size, self.hidden_size
        shapes: dict[str, tuple[int, ...] | None] = {
            "weight_ih": (columns, width),
            "weight_hh": (columns, hidden),
            "bias": (columns,) if self._with_bias else None,
            "gamma_ih": (columns,),
            "gamma_hh": (columns,),
            "gamma_c": (hidden,) if self.cell_norm else None,
            "beta_c": (hidden,) if self.cell_norm else None,
        }
        for name, shape in shapes.items():
            parameter = None if shape is None else nn.Parameter(like.new_empty(shape))
            # gamma_c and beta_c belong to an option, bias is nn.LSTM's: only that one is there as None when off
            if parameter is not None or name == "bias":
                self.register_parameter(name + suffix, parameter)
        unseen = Statistics.unseen(
            self.max_length,
            hidden,
            cell_norm=self.cell_norm,
            input_stats=self.input_stats,
            dtype=accumulation_dtype(like.dtype),
            device=like.device,
        )
        for norm, moments in (("ih", unseen.ih), ("hh", unseen.hh), ("c", unseen.c)):
            if moments is not None:
                for name, value in zip(Moments._fields, moments, strict=True):
                    self.register_buffer(f"{name}_{norm}{suffix}", value)

    def _all_suffixes(self) -> list[str]:
        return [suffix for directions in self._suffixes for suffix in directions]

    def _parameters_of(self, suffix: str) -> Parameters:
        """Through getattr, so that a parametrised or functionally replaced weight is what is used."""
        found: list[Any] = [getattr(self, name + suffix, None) for name in Parameters._fields]
        return Parameters(*found)

    def _checked_parameters(self, suffix: str, columns: int) -> Parameters:
        """Of the sizes that they are used in: somebody may have replaced one."""
        parameters = self._parameters_of(suffix)
        functional.check_parameters(parameters, "", suffix)
        if parameters.weight_ih.shape[1] != columns or parameters.weight_hh.shape[1] != self.hidden_size:
            shapes = f"{tuple(parameters.weight_ih.shape)} and {tuple(parameters.weight_hh.shape)}"
            raise ValueError(f"weight_ih{suffix} and weight_hh{suffix} {shapes} are not of this layer's size")
        return parameters

    def _like(self) -> Tensor:
        """A parameter that tells device and dtype: not a weight, which a parametrisation would compute for this."""
        return cast(Tensor, getattr(self, "gamma_hh" + self._suffixes[0][0]))

    def _statistics_of(self, suffix: str) -> Statistics:
        """The buffers themselves."""

        def moments(norm: str) -> Moments:
            return Moments(*(getattr(self, f"{name}_{norm}{suffix}") for name in Moments._fields))

        return Statistics(moments("ih"), moments("hh"), moments("c") if self.cell_norm else None, self.rows)

    def reset_parameters(self) -> None:
        """Initial values: γ = gamma_init, β = 0, orthogonal (or identity) recurrent weights per gate, forget bias."""
        for suffix in self._all_suffixes():
            parameters = self._parameters_of(suffix)
            initialise_(parameters, self.gamma_init, self.forget_bias, orthogonal=self.recurrent_init == "orthogonal")
        self.reset_statistics()

    def reset_statistics(self) -> None:
        """Forget the population: mean 0, variance 1, no rows in any slot."""
        with torch.no_grad():
            for suffix in self._all_suffixes():
                for moments in self._statistics_of(suffix)[:3]:
                    if moments is not None:
                        moments.mean.zero_()
                        moments.var.fill_(1)
                        moments.count.zero_()
            self.rows.zero_()
            self._skipped_steps.zero_()
        self._skips_told = 0

    def set_max_length(self, max_length: int) -> None:
        """Change the number of slots, for a longer or shorter memory of positions than the layer was built with.

        New slots have seen nothing, so they are used as the last one is until they are trained. Slots that go are
        pooled into the new last one, by the rows they have seen.
        """
        slots = checks.integer("max_length", max_length, 1)
        for suffix in self._all_suffixes():
            for norm, moments in zip(("ih", "hh", "c"), self._statistics_of(suffix)[:3], strict=True):
                if moments is None or (norm == "ih" and self.input_stats == "sequence"):
                    continue
                for name, values in zip(Moments._fields, resized(moments, slots), strict=True):
                    self._buffers[f"{name}_{norm}{suffix}"] = values
        self.max_length = slots

    # Conversions, copies and state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BNLSTMBase:
        """Conversions of dtype are for the parameters: statistics go to float32 or float64 as these say."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is None or new is None or not old.is_floating_point():
                continue
            dtype = state.buffer_dtype(name, self._like().dtype)
            if new.dtype != dtype:
                self._buffers[name] = old.to(device=new.device, dtype=dtype)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        state.prepare(self, self._all_suffixes(), self.max_length, state_dict, prefix, local_metadata)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if local_metadata.get("assign_to_params_buffers", False):  # tools that halve all floats halve statistics too
            for name, buffer in self.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    self._buffers[name] = buffer.to(state.buffer_dtype(name, self._like().dtype))
        self._skipped_steps = torch.zeros_like(self._skipped_steps, device=self.rows.device)
        self._forget_the_moment()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._tell_skipped_steps()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def train(self, mode: bool = True) -> BNLSTMBase:
        """Training mode (batch statistics) or evaluation (population statistics)."""
        if torch.compiler.is_compiling():
            super().train(mode)
            return self
        if not mode:
            self._tell_skipped_steps()
        for suffix in self._all_suffixes():
            forget(self._statistics_of(suffix))  # a change of mode is the time to look again
        super().train(mode)
        return self

    def _forget_the_moment(self) -> None:
        """Drop what lasts from one call to another but is no part of the layer's state."""
        self._calls = Calls()
        self._asked_for: str | None = None
        self._intercept: Callable[[Tensor, Packing, States | None, int], Pass] | None = None
        self._skips_told = 0

    def __getstate__(self) -> dict[str, Any]:
        transient = ("_calls", "_asked_for", "_intercept")
        return {name: value for name, value in self.__dict__.items() if name not in transient}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        told = self._skips_told
        self._forget_the_moment()
        self._skips_told = told

    # One pass over all layers and directions

    def _population_of(self, suffix: str, start: int, steps: int) -> Population:
        """What evaluation normalises by."""
        resolved = resolved_statistics(self._statistics_of(suffix))
        return population_at_steps(resolved, start, steps, None, self.input_stats == "time")

    def _through_layers(
        self,
        x: Tensor,
        packing: Packing,
        hx: States | None,
        populations: list[Population | None],
        *,
        regularise: bool,
        ranks: Ranks | None = None,
    ) -> Pass:
        """All layers and directions over rows, each with its population; pure but for what `ranks` tell each other.

        regularise: dropout and noise.
        """
        own, keeps_seats = packing, populations[0] is None and not packing.equal and self.finished == "frozen"
        if keeps_seats:
            x, packing = held.spread(x, own)
        backend, save = requested_backend(self.backend), checks.choice("save", self.save, SAVE_CHOICES)
        if in_backward() and self._asked_for is not None:  # a recomputation: contexts may be gone, or another thread's
            backend = self._asked_for
        self._asked_for = backend
        mirrored = packing.mirror if any(len(directions) > 1 for directions in self._suffixes) else None
        dtype = compute_dtype(self._like())
        h_n: list[Tensor] = []
        c_n: list[Tensor] = []
        moments: list[Statistics | None] = []
        for k, directions in enumerate(self._suffixes):
            calls = []
            for direction, suffix in enumerate(directions):
                place = k * len(directions) + direction
                parameters = self._checked_parameters(suffix, x.shape[1])
                if hx is not None:
                    h, c = hx[0][place], hx[1][place]
                else:
                    c = parameters.weight_hh.new_zeros(packing.batch, self.hidden_size)
                    h = c.to(dtype)
                    if regularise and self.initial_noise > 0:
                        h = torch.randn_like(h) * self.initial_noise
                problem = Problem(packing, populations[place], self.input_stats == "time", self.eps, ranks, keeps_seats)
                turned = x if direction == 0 or mirrored is None else x.index_select(0, mirrored)
                calls.append(Call(turned, h, c, in_dtype(parameters, dtype), problem))
            outputs = []
            for direction, ran in enumerate(run(calls, backend, save, self.autotune)):
                outputs.append(ran.rows if direction == 0 or mirrored is None else ran.rows.index_select(0, mirrored))
                h_n.append(ran.h_n)
                c_n.append(ran.c_n)
                moments.append(ran.moments)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
            if regularise and self.dropout > 0 and k + 1 < len(self._suffixes):
                x = F.dropout(x, self.dropout)
        if ranks is not None:
            ranks.over = True
        return Pass(held.collect(x, own) if keeps_seats else x, torch.stack(h_n), torch.stack(c_n), moments)

    def _leaves_compiled_code(self) -> bool:
        """Whether a compiler must leave this call as it is: for a transform, or for what ranks tell each other.

        Raises:
            RuntimeError: the call is being exported.
        """
        if traced.in_transform():
            return True
        if not torch.compiler.is_compiling() or not self.training or self.process_group is None:
            return False
        if exporting():
            raise RuntimeError("process_group: training on the rows of all ranks cannot be exported; call eval()")
        return True

    def _run(self, x: Tensor, packing: Packing, hx: States | None, start: int) -> Pass:
        """A call of the layer: by its mode, and in training with the one write to the statistics."""
        if self._intercept is not None:
            return self._intercept(x, packing, hx, start)
        if self.training:
            group = self._group_to_meet()
            if group is not None:
                return train_together(self, group, x, packing, hx, start)
            return self._run_training(x, packing, hx, start)
        return self._run_evaluation(x, packing, hx, start)

    def _run_evaluation(self, x: Tensor, packing: Packing, hx: States | None, start: int) -> Pass:
        steps = len(packing.sizes)
        frozen: list[Population | None] = [self._population_of(s, start, steps) for s in self._all_suffixes()]
        return self._through_layers(x, packing, hx, frozen, regularise=False)

    def _batch_populations(self, packing: Packing, start: int) -> list[Population | None]:
        """Phantom rows of every direction, from the statistics as they are now; None where there are none."""
        if self.finished == "frozen":
            return [None] * len(self._all_suffixes())
        over_time, dtype = self.input_stats == "time", accumulation_dtype(self._like().dtype)
        with torch.no_grad():
            found = [
                training_population(self._statistics_of(suffix), packing, start, self.prior_count, over_time)
                for suffix in self._all_suffixes()
            ]
        return [None if each is None else each.in_dtype(dtype) for each in found]

    def _check_training(self, batch: int, inputs: Iterable[Any], together: bool) -> None:
        """A batch of B sequences can be trained on: not a single one, nor in a vmap that has one population for all.

        together: with the rows of other ranks, which are counted where they meet.
        """
        if held.check(self.finished, self.prior_count) and self.process_group is not None:
            raise ValueError(held.NO_RANKS)
        if transformed() and not batched(self.rows):
            parameters = (p for suffix in self._all_suffixes() for p in self._parameters_of(suffix))
            if any(isinstance(s, Tensor) and batched(s) for s in (*inputs, *parameters)):
                raise RuntimeError(
                    "vmap in training: each call that it stands for would be normalised by its own part of the batch, "
                    "and all of them would write to the same running statistics. Give the layer the whole batch "
                    "instead, call eval(), or for an ensemble let vmap go over parameters and buffers, as "
                    "torch.func.stack_module_state gives them"
                )
        if not together:
            checks.training_batch(batch)

    def _run_training(
        self, x: Tensor, packing: Packing, hx: States | None, start: int, ranks: Ranks | None = None
    ) -> Pass:
        whole, again = packing if ranks is None else ranks.whole, in_backward()
        alone = whole.equal or self.finished == "frozen"  # nothing is taken from the population
        if alone:
            populations: list[Population | None] = [None] * len(self._all_suffixes())
        else:
            with unwatched():
                found = self._calls.find(x, packing, hx, start) if again else None
                populations = found or self._batch_populations(whole, start)
        done = self._through_layers(x, packing, hx, populations, regularise=True, ranks=ranks)
        with unwatched():
            if not alone and not transformed():  # nor can a checkpoint run again in there
                self._calls.remember(x, packing, hx, start, populations, (done.rows, done.h_n, done.c_n))
            if not again:
                self._learn(done.moments, whole.batch, start)
        return done

    def _learn(self, moments: list[Statistics | None], batch: int, start: int) -> None:
        """Merge a training step of B sequences into the population, all directions or none."""
        own = [m for m in moments if m is not None]
        known = [self._statistics_of(suffix) for suffix in self._all_suffixes()]
        if transformed() and not batched(self.rows):  # only an operator may write beneath a transform
            listed = ops.list_of_statistics(known), self._skipped_steps, kept.list_of_moments(own)
            norms = self.momentum, self.cell_norm, self.input_stats == "time"
            torch.ops.triton_bnlstm.learn(*listed, batch, start, *norms)
            return
        finite = update_statistics_(list(zip(known, own, strict=True)), start, self.momentum)
        if transformed():  # each of the models in a vmap has its own; which of them skipped a step, nobody counts
            return
        with torch.no_grad():
            self._skipped_steps += ~finite
        if finite.device.type == "cpu":  # elsewhere a look would wait for the device: told later
            self._tell_skipped_steps(factor=10)

    def _tell_skipped_steps(self, *, factor: int = 1) -> None:
        """A warning, if there are more than were told, and at least `factor` times as many."""
        if traced.holds_nothing(self._skipped_steps):
            return
        skipped = int(self._skipped_steps)
        if skipped > self._skips_told and skipped >= factor * self._skips_told:
            self._skips_told = skipped
            warnings.warn(
                f"{skipped} training step(s) had batch statistics that are not finite; the running statistics were "
                "left as they were. Look for NaN or infinity in the input, or a diverging loss",
                RuntimeWarning,
                stacklevel=2,
            )
