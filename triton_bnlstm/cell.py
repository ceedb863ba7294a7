"""`BNLSTMCell`: one step at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import checks, plain, traced
from ._base import BNLSTMBase, States
from .agreement import attempt
from .module import BNLSTM
from .packing import Packing
from .precision import compute_dtype, in_input_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class BNLSTMCell(BNLSTMBase):
    """One step of one `BNLSTM` layer, for streams: nn.LSTMCell with the time step as an argument.

    A loop over the steps equals the layer: in evaluation for any lengths, in training for equal lengths up to
    max_length with input_stats="time", which is the default here. The cell sees one step, so it cannot know which
    sequences have finished (there are no phantom rows), and steps past max_length are merged into the last slot one by
    one instead of pooled. With input_stats="sequence" it can only evaluate: statistics over steps that are yet to come
    do not exist.

    Args:
        input_size, hidden_size, bias, max_length, cell_norm, input_stats, gamma_init, eps, momentum, recurrent_init,
            forget_bias, backend, process_group, device, dtype: as for `BNLSTM`, but for the default of input_stats.

    Inputs: input, hx=None, time=None
        * **input**: [B, D], or [D] unbatched.
        * **hx**: (h, c), each [B, H] (unbatched: [H]); zeros when None.
        * **time**: index of this step, counted from 0: the slot of its statistics. None is 0, and an error where hx
          is given, as it is from the second step on: all steps would be normalised as the first.

    Outputs: (h, c), each [B, H] (unbatched: [H])

    Attributes:
        weight_ih: [4H, D]; weight_hh: [4H, H]; bias: [4H] or None; gamma_ih, gamma_hh: [4H]; gamma_c, beta_c: [H], with
            cell_norm. Buffers as the layer's.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, and nothing has changed.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        max_length: int,
        cell_norm: bool = False,
        input_stats: str = "time",
        gamma_init: float = 0.1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        recurrent_init: str = "orthogonal",
        forget_bias: float = 1.0,
        backend: str | None = None,
        process_group: ProcessGroup | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            [[""]],
            bias=bias,
            max_length=max_length,
            cell_norm=cell_norm,
            input_stats=input_stats,
            prior_count=None,
            finished="phantom",  # a step has no sequences that have ended
            gamma_init=gamma_init,
            eps=eps,
            momentum=momentum,
            recurrent_init=recurrent_init,
            forget_bias=forget_bias,
            initial_noise=0.0,
            save="preactivations",
            backend=backend,
            autotune=None,  # of one step there is nothing to tune
            process_group=process_group,
            device=device,
            dtype=dtype,
        )

    @classmethod
    def from_layer(cls, layer: BNLSTM, index: int = 0) -> BNLSTMCell:
        """A cell with copies of one layer's forward direction: its parameters, statistics, mode and group."""
        if not isinstance(layer, BNLSTM):
            raise TypeError(f"layer must be a BNLSTM, got {type(layer).__name__}")
        if not 0 <= index < layer.num_layers:
            raise IndexError(f"index must be in 0..{layer.num_layers - 1}, got {index}")
        suffix = f"_l{index}"
        like = layer._like()
        cell = cls(
            layer.input_size if index == 0 else layer.hidden_size * len(layer._suffixes[0]),
            layer.hidden_size,
            layer.bias,
            max_length=layer.max_length,
            cell_norm=layer.cell_norm,
            input_stats=layer.input_stats,
            gamma_init=layer.gamma_init,
            eps=layer.eps,
            momentum=layer.momentum,
            recurrent_init=layer.recurrent_init,
            forget_bias=layer.forget_bias,
            backend=layer.backend,
            process_group=layer.process_group,
            device=like.device,
            dtype=like.dtype,
        )
        names = {name: name if name == "rows" else name + suffix for name in cell.state_dict()}
        # not from its state_dict, where a parametrised weight has another name
        cell.load_state_dict({name: getattr(layer, there) for name, there in names.items()})
        cell.train(layer.training)
        return cell

    def forward(self, input: Tensor, hx: States | None = None, time: int | None = None) -> States:
        """See the class."""
        if time is None:
            if hx is not None and self.max_length > 1:
                raise ValueError("time: give the index of this step, time=t from 0 on: each has statistics of its own")
            time = 0
        if self._leaves_compiled_code():
            return _forward_uncompiled(self, input, hx, time)
        group = self._group_to_meet()
        if group is None:
            return self._forward(input, hx, time, False)
        return attempt(group, self._like().device, lambda: self._forward(input, hx, time, True))

    def _forward(self, input: Tensor, hx: States | None, time: int, together: bool) -> States:
        """together: with the rows of other ranks."""
        like = self._like()
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a tensor, got {type(input).__name__}")
        if input.dim() not in (1, 2):
            raise ValueError(f"input must be [B, D], or [D] when unbatched, got {tuple(input.shape)}")
        rows = input[None] if input.dim() == 1 else input
        checks.rows_of_input(rows[None], self.input_size, False, like, empty_batch=together)
        if plain.requested():
            return plain.run_cell(self, input, hx, time)
        time = checks.integer("time", time, 0)
        if self.training:
            self._check_training(rows.shape[0], (rows, *(hx if isinstance(hx, tuple | list) else ())), together)
        if self.input_stats == "sequence" and (self.training or self._intercept is not None):
            raise ValueError(
                'input_stats="sequence": a cell sees one step, so it cannot make such statistics, only use them'
            )
        shape = (*input.shape[:-1], self.hidden_size)
        rows, dtype = in_input_dtype(rows, like), compute_dtype(like)
        if hx is not None:
            h, c = (state.view(1, rows.shape[0], self.hidden_size) for state in checks.states(hx, shape, like))
            hx = h.to(dtype), c.to(like.dtype)
        if traced.asked_for(rows):
            given = traced.Sequences(rows[None], None, False, 1, rows.shape[0])
            _, h_n, c_n = traced.run(self, given, hx, time)
        else:
            packing = Packing.of_equal_lengths(1, rows.shape[0], rows.device)
            _, h_n, c_n, _ = self._run(rows, packing, hx, time)
        return h_n.view(shape), c_n.view(shape)

    def extra_repr(self) -> str:
        """Sizes, whether the cell state is normalised, and the process group."""
        shown = f"{self.input_size}, {self.hidden_size}, max_length={self.max_length}"
        if self.cell_norm:
            shown += ", cell_norm=True"
        return shown if self.process_group is None else f"{shown}, process_group={self._group!r}"


_forward_uncompiled = traced.uncompiled(BNLSTMCell.forward)
