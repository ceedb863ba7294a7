"""`BNLSTM`: nn.LSTM's conventions around the batch-normalised LSTM."""

from __future__ import annotations

import inspect
import math
import warnings
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import checks, functional, held, plain, traced
from ._base import BNLSTMBase, States
from .agreement import attempt
from .precision import compute_dtype
from .statistics import Moments, resolve_statistics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


_NOT_SHOWN = ("self", "input_size", "hidden_size", "device", "dtype")  # by name in a layer's repr


def _tensors(given: Any) -> tuple[Any, ...]:
    """A tensor, or those of a pair or a PackedSequence; whatever else it may be is told later."""
    return tuple(given) if isinstance(given, tuple | list) else (given,)


class BNLSTM(BNLSTMBase):
    r"""Multi-layer LSTM with batch normalisation in the recurrence, for sequences of equal and unequal lengths.

    Cooijmans et al. 2016 (arXiv 1603.09025), equations (6)–(8), for each layer and direction at step t::

        a_t = BN(W_hh h_{t−1}; γ_hh, slot t) + BN(W_ih x_t; γ_ih) + bias
        i, f, g, o = σ, σ, tanh, σ of the four quarters of a_t
        c_t = f ∘ c_{t−1} + i ∘ g
        h_t = o ∘ tanh(c_t)                          with cell_norm: o ∘ tanh(BN(c_t; γ_c, β_c, slot t))

    Training normalises each step by the batch's own rows, W_ih x by those of all steps (or of each, see input_stats);
    evaluation by running statistics, one slot per time step. Where sequences have finished, their seats in the batch
    are taken by phantom rows that have the population's mean and variance of that step, so that a step with one
    sequence left is still normalised sensibly.

    It is used as `torch.nn.LSTM` is: the first seven arguments, the shapes of inputs, outputs and states, packed
    sequences and unbatched input are nn.LSTM's. What differs: a batch has two sequences or more in training, there is
    one bias per layer and direction, and no `proj_size`.

    Args:
        input_size: features D of the input.
        hidden_size: units H.
        num_layers: stacked layers.
        bias: learn a bias; without it there is no forget bias either.
        batch_first: input and output are [B, T, ·] rather than [T, B, ·]; states are [·, B, H] either way.
        dropout: probability of dropout on the outputs of each layer but the last, in training.
        bidirectional: a second direction, from each sequence's own last step to its first.
        max_length: slots S of the population statistics. Steps beyond use the last slot, so this bounds memory, not
            sequence length.
        cell_norm: normalise the cell state on its way to the output, equation (8) of the paper.
        input_stats: one set of statistics of W_ih x over all steps of all sequences ("sequence"), which learnt better
            where it was tried (bench/paper/README.md), or one per time step ("time", as in the paper). In training a
            call with `start` has the statistics of its own steps.
        prior_count: at most so many phantom rows per step. None: every vacated seat; 0: none (plain masking).
        finished: whose rows training counts in the seats of sequences that have ended: "phantom" rows, as above; or
            "frozen": their own, each with its last hidden state, its last input (with input_stats="time") and, under
            cell_norm, its last cell state, through which gradients flow. Steps are then of B rows, for the population
            too, and prior_count has no use. Unequal lengths run on the reference path, uncompiled; no process_group.
        gamma_init: initial γ. The paper's 0.1 keeps gradients alive over hundreds of steps; from 1 they explode with
            orthogonal recurrent matrices, and vanish with the identity (bench/paper/README.md).
        eps: ε, added to variances.
        momentum: weight of a full batch against the running statistics, in (0, 1]; None: all rows weigh the same.
        recurrent_init: "orthogonal" or "identity", for each gate's recurrent matrix.
        forget_bias: initial bias of the forget gate.
        initial_noise: standard deviation of Gaussian noise on h_0, in training and when hx is not given: columns that
            are constant at the first steps (the black frame of MNIST) then have a variance. `estimate_statistics`
            leaves it out, so first steps are then normalised by smaller variances than the running statistics have:
            compare both on held-out data, or give the noise as hx through its `forward`.
        save: whether the kernels keep W_hh h for their backward. "preactivations" does; "recompute" makes it again from
            h in one product, to the same accuracy, and keeps 14 bytes of each unit, row and step instead of 22 in half
            precision. In evaluation it is always made again. "auto": what tuning found to be faster on this device,
            else "preactivations". The reference path knows no such choice.
        backend: "auto" takes the Triton kernels on a GPU where they can run, else the reference path, and says why
            once; "reference"; "triton" raises at the call where they cannot run. None: what `use_backend` or the
            environment variable TRITON_BNLSTM_BACKEND say, else "auto".
        autotune: "off" measures no layouts of the kernels; "on_miss" measures before a call, and keeps in the user's
            cache, what nobody has measured for its sizes on this device; "force" measures once more in this process.
            None: what `use_autotune` or the environment variable TRITON_BNLSTM_AUTOTUNE say, else "off".
        process_group: in training, batch statistics are made of the rows of all ranks of this group, forward and
            backward: "world" (torch.distributed's default group at the time of the call) or a ProcessGroup. Ranks may
            have different numbers of sequences and steps, also none (B = 0), with two sequences in all; each calls the
            layer, and its backward, as often as the others and in the same order. Each rank's gradients of parameters
            are its part of a sum over the ranks. It runs on the reference path, whatever the device, and without
            gradients of gradients. Nothing is communicated in evaluation. None: each rank by itself.
        device, dtype: of the parameters. Statistics are float32 (float64 for float64 parameters), counts float64.

    Inputs: input, hx=None, lengths=None, start=0
        * **input**: [T, B, D], [B, T, D] with batch_first, [T, D] unbatched, or a PackedSequence.
        * **hx**: (h_0, c_0), each [num_layers · directions, B, H] (unbatched: without B); zeros when None.
        * **lengths**: [B] integers, steps of each sequence, as in a PackedSequence; what stands beyond in `input` is
          never read. A list or a CPU tensor is checked; a tensor on the input's own accelerator is clamped to 1..T
          instead, so that nothing waits for the device, and so are those that an ONNX program is given.
        * **start**: slot of the first step, for sequences given in chunks. A sequence that ended in an earlier chunk
          is left out of the batch, and of hx. Slots of the second direction count from the end of each chunk.

    Outputs: output, (h_n, c_n)
        * **output**: [T, B, directions · H] of the last layer (or as `input` came), 0 beyond a sequence's length.
        * **h_n**, **c_n**: [num_layers · directions, B, H], at each sequence's own last step (reverse: first).

    Attributes:
        weight_ih_l{k}: [4H, D] ([4H, directions · H] for k > 0); gates in the order i, f, g, o.
        weight_hh_l{k}: [4H, H].
        bias_l{k}: [4H], or None.
        gamma_ih_l{k}, gamma_hh_l{k}: [4H].
        gamma_c_l{k}, beta_c_l{k}: [H], with cell_norm.
        mean_*_l{k}, var_*_l{k}, count_*_l{k}: buffers, slots of the statistics; see `statistics`.

    The suffix is `_l{k}_reverse` for the second direction.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, and nothing has changed. With a process group
            that includes ranks that make different calls; all of them raise.
        RuntimeError: process_group is given and torch.distributed not initialised, or another rank has failed or cannot
            be reached: statistics are as before a forward. Or backend="triton", and the kernels cannot run this.

    Example:
        >>> layer = BNLSTM(13, 64, max_length=100, batch_first=True)
        >>> output, (h_n, c_n) = layer(torch.randn(32, 90, 13), lengths=[90] * 16 + [40] * 16)
        >>> output.shape, h_n.shape
        (torch.Size([32, 90, 64]), torch.Size([1, 32, 64]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        max_length: int,
        cell_norm: bool = False,
        input_stats: str = "sequence",
        prior_count: float | None = None,
        finished: str = "phantom",
        gamma_init: float = 0.1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        recurrent_init: str = "orthogonal",
        forget_bias: float = 1.0,
        initial_noise: float = 0.0,
        save: str = "preactivations",
        backend: str | None = None,
        autotune: str | None = None,
        process_group: ProcessGroup | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        num_layers = checks.integer("num_layers", num_layers, 1)
        batch_first = checks.flag("batch_first", batch_first)
        dropout = checks.real("dropout", dropout, minimum=0, maximum=1)
        bidirectional = checks.flag("bidirectional", bidirectional)
        directions = ("", "_reverse") if bidirectional else ("",)
        super().__init__(
            input_size,
            hidden_size,
            [[f"_l{k}{direction}" for direction in directions] for k in range(num_layers)],
            bias=bias,
            max_length=max_length,
            cell_norm=cell_norm,
            input_stats=input_stats,
            prior_count=prior_count,
            finished=finished,
            gamma_init=gamma_init,
            eps=eps,
            momentum=momentum,
            recurrent_init=recurrent_init,
            forget_bias=forget_bias,
            initial_noise=initial_noise,
            save=save,
            backend=backend,
            autotune=autotune,
            process_group=process_group,
            device=device,
            dtype=dtype,
        )
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = dropout
        self.bidirectional = bidirectional
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                f"dropout={dropout:g} has no effect with num_layers=1: it stands between layers", stacklevel=2
            )

    @overload
    def forward(
        self,
        input: Tensor,
        hx: States | None = None,
        lengths: Tensor | list[int] | None = None,
        start: int = 0,
    ) -> tuple[Tensor, States]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: States | None = None, lengths: None = None, start: int = 0
    ) -> tuple[PackedSequence, States]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: States | None = None,
        lengths: Tensor | list[int] | None = None,
        start: int = 0,
    ) -> tuple[Tensor | PackedSequence, States]:
        """See the class."""
        if plain.requested():
            return plain.run_layer(self, input, hx, lengths, start)
        frozen = self.training and self.finished == "frozen"
        alone = held.leaves_compiled_code(frozen, input, lengths)
        if alone or self._leaves_compiled_code() or traced.hides_batch(input, hx):
            return _forward_uncompiled(self, cast(Any, input), hx, lengths, start)
        group = self._group_to_meet()
        if group is None:
            return self._forward(input, hx, lengths, start, False)
        return attempt(group, self._like().device, lambda: self._forward(input, hx, lengths, start, True))

    def _forward(
        self,
        input: Tensor | PackedSequence,
        hx: States | None,
        lengths: Tensor | list[int] | None,
        start: int,
        together: bool,
    ) -> tuple[Tensor | PackedSequence, States]:
        """together: with the rows of other ranks."""
        like = self._like()
        checks.rows_of_input(input, self.input_size, self.batch_first, like, empty_batch=together)
        start, dtype = checks.integer("start", start, 0), compute_dtype(like)
        tracing = traced.asked_for(input)
        if tracing:
            given = traced.sequences_of(input, hx, lengths, self.batch_first, like)
            batch = given.batch
        else:
            host_lengths = functional.check_lengths(input, lengths, self.batch_first)
            batch = functional.batch_of(input, self.batch_first)
        if self.training:
            self._check_training(batch, (*_tensors(input), *_tensors(hx)), together)
        unbatched = isinstance(input, Tensor) and input.dim() == 2
        places = self.num_layers * (2 if self.bidirectional else 1)
        shape = (places, self.hidden_size) if unbatched else (places, batch, self.hidden_size)
        if hx is not None:
            h_0, c_0 = checks.states(hx, shape, like)
            by_place = (places, batch, self.hidden_size)
            hx = h_0.to(dtype).view(by_place), c_0.to(like.dtype).view(by_place)
        if tracing:
            return self._traced(given, input, hx, start, shape)

        x, packing = functional.to_rows(input, host_lengths, self.batch_first, like)
        if hx is not None:
            hx = packing.seat(hx[0]), packing.seat(hx[1])
        rows, h_n, c_n, _ = self._run(x, packing, hx, start)
        output = functional.from_rows(rows, packing, input, self.batch_first)
        return output, (packing.unseat(h_n).view(shape), packing.unseat(c_n).view(shape))

    def _traced(
        self,
        given: traced.Sequences,
        input: Tensor | PackedSequence,
        hx: States | None,
        start: int,
        shape: tuple[int, ...],
    ) -> tuple[Tensor | PackedSequence, States]:
        """The same out of operators that a compiler does not look into."""
        if not isinstance(input, PackedSequence):
            output, h_n, c_n = traced.run(self, given, hx, start)
            if input.dim() == 2:
                output = output.squeeze(1)
            elif self.batch_first:
                output = output.transpose(0, 1)
            return output, (h_n.view(shape), c_n.view(shape))
        _, sizes, order, inverse = input
        if hx is not None and order is not None:
            hx = hx[0].index_select(1, order), hx[1].index_select(1, order)
        rows, h_n, c_n = traced.run(self, given, hx, start)
        if inverse is not None:
            h_n, c_n = h_n.index_select(1, inverse), c_n.index_select(1, inverse)
        return PackedSequence(rows, sizes, order, inverse), (h_n, c_n)

    def statistics(self, layer: int = 0, reverse: bool = False, resolved: bool = False) -> dict[str, Moments]:
        """Population statistics of one layer and direction: {"ih" | "hh" | "c": (mean [S, ·], var [S, ·], count [S])}.

        "ih" has one slot with input_stats="sequence"; "c" is there with cell_norm. The tensors are copies.

        Args:
            layer: which layer, from 0.
            reverse: the second direction.
            resolved: what is used instead of what was seen: rows that a slot lacks against slot 0 are inherited from
                the slot before it, and `count` includes them.

        Raises:
            IndexError: no such layer.
            ValueError: `reverse` of a layer that has one direction.
        """
        if not 0 <= layer < self.num_layers:
            raise IndexError(f"layer must be in 0..{self.num_layers - 1}, got {layer}")
        if reverse and not self.bidirectional:
            raise ValueError("reverse: this layer has one direction")
        found = self._statistics_of(self._suffixes[layer][int(reverse)])
        if resolved:
            found = resolve_statistics(found)
        return {
            name: moments.clone()
            for name, moments in zip(("ih", "hh", "c"), found[:3], strict=True)
            if moments is not None
        }

    def flatten_parameters(self) -> None:
        """Nothing: weights need no particular place in memory. Here because code that uses nn.LSTM calls it."""

    def extra_repr(self) -> str:
        """Arguments that are not at their defaults."""
        shown = [f"{self.input_size}, {self.hidden_size}"]
        arguments = inspect.signature(BNLSTM.__init__).parameters
        defaults = {name: a.default for name, a in arguments.items() if name not in _NOT_SHOWN}
        options = {k: self._group if k == "process_group" else getattr(self, k) for k in defaults}
        shown += [f"{k}={options[k]!r}" for k, default in defaults.items() if getattr(self, k) != default]
        return ", ".join(shown)

    @classmethod
    def from_lstm(
        cls,
        lstm: nn.LSTM,
        *,
        max_length: int,
        cell_norm: bool = False,
        input_stats: str = "sequence",
        prior_count: float | None = None,
        finished: str = "phantom",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        initial_noise: float = 0.0,
        save: str = "preactivations",
        backend: str | None = None,
        autotune: str | None = None,
        process_group: ProcessGroup | str | None = None,
    ) -> BNLSTM:
        """A layer with an nn.LSTM's weights, that in eval() computes what the LSTM does until its statistics change.

        Both biases become their sum, and γ = √(1 + ε) undoes the normalisation by the initial mean 0 and variance 1.
        Training, and `estimate_statistics` too, put other statistics in their place, and so make it another function:
        it has to be fine-tuned from there.

        Args:
            lstm: without proj_size.
            max_length, cell_norm, input_stats, prior_count, finished, eps, momentum, initial_noise, save, backend,
                autotune, process_group: as for the layer.

        Raises:
            TypeError: `lstm` is not an nn.LSTM.
            ValueError: it has projections.
        """
        if not isinstance(lstm, nn.LSTM):
            raise TypeError(f"lstm must be a torch.nn.LSTM, got {type(lstm).__name__}")
        if lstm.proj_size:
            raise ValueError("lstm: proj_size is not supported")
        weight = cast(Tensor, lstm.weight_hh_l0)
        layer = cls(
            lstm.input_size,
            lstm.hidden_size,
            lstm.num_layers,
            lstm.bias,
            lstm.batch_first,
            lstm.dropout,
            lstm.bidirectional,
            max_length=max_length,
            cell_norm=cell_norm,
            input_stats=input_stats,
            prior_count=prior_count,
            finished=finished,
            gamma_init=math.sqrt(1 + eps),
            eps=eps,
            momentum=momentum,
            initial_noise=initial_noise,
            save=save,
            backend=backend,
            autotune=autotune,
            process_group=process_group,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            for suffix in layer._all_suffixes():
                p = layer._parameters_of(suffix)
                p.weight_ih.copy_(getattr(lstm, f"weight_ih{suffix}"))
                p.weight_hh.copy_(getattr(lstm, f"weight_hh{suffix}"))
                if p.bias is not None:
                    p.bias.copy_(getattr(lstm, f"bias_ih{suffix}") + getattr(lstm, f"bias_hh{suffix}"))
        layer.train(lstm.training)
        return layer

    def to_lstm(self) -> nn.LSTM:
        """An nn.LSTM with the last slot's statistics folded into weights and bias.

        In eval() the layer equals it from the last slot on (and from wherever statistics stop changing). It keeps the
        device, the dtype and the mode; its second bias is 0.

        Raises:
            ValueError: with cell_norm, since no LSTM normalises its cell state.
        """
        if self.cell_norm:
            raise ValueError("cell_norm: a layer that normalises its cell state cannot be folded into an nn.LSTM")
        like = self._like()
        lstm = nn.LSTM(
            self.input_size,
            self.hidden_size,
            self.num_layers,
            True,  # normalisation shifts even where no bias is learnt
            self.batch_first,
            self.dropout if self.num_layers > 1 else 0.0,
            self.bidirectional,
            device=like.device,
            dtype=like.dtype,
        )
        with torch.no_grad():
            for suffix in self._all_suffixes():
                p = self._parameters_of(suffix)
                last = resolve_statistics(self._statistics_of(suffix))
                wide = last.hh.mean.dtype
                scale_ih = p.gamma_ih.to(wide) * (last.ih.var[-1] + self.eps).rsqrt()
                scale_hh = p.gamma_hh.to(wide) * (last.hh.var[-1] + self.eps).rsqrt()
                bias = -(scale_ih * last.ih.mean[-1] + scale_hh * last.hh.mean[-1])
                if p.bias is not None:
                    bias = bias + p.bias
                getattr(lstm, f"weight_ih{suffix}").copy_(scale_ih[:, None] * p.weight_ih)
                getattr(lstm, f"weight_hh{suffix}").copy_(scale_hh[:, None] * p.weight_hh)
                getattr(lstm, f"bias_ih{suffix}").copy_(bias)
                getattr(lstm, f"bias_hh{suffix}").zero_()
        return lstm.train(self.training)


# Lazily: importing torch._dynamo takes a second, which nobody should pay who does not compile.
_forward_uncompiled = traced.uncompiled(BNLSTM.forward)
