"""finished="frozen": sequences that have ended keep their seats in the statistics, with what they held last.

In training a step t < T (T: the longest sequence of the batch) is then normalised by the moments of all B rows. A
sequence that has ended is counted with its last hidden state, with its last input where statistics of W_ih x are made
per step, and with its last cell state under cell norm; gradients go to these through the statistics. Nothing is taken
from the population, which learns those moments as of B rows. Input statistics over sequences are of valid frames alone.

Here is what that needs around the recurrence: every step with B rows and a mask (see `packing`), as lengths on a device
have it anyway, and inputs that stay at each sequence's last frame. What rows count is in `reference` and `bptt`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import checks
from .packing import Packing
from .transforms import exporting

FINISHED = ("phantom", "frozen")

NO_KERNELS = (
    'finished="frozen": training on unequal lengths, or with lengths on a device, is done on the reference path only'
)
NO_RANKS = (
    'process_group: statistics over all ranks are not made with finished="frozen" in training; set process_group=None '
    'or finished="phantom"'
)
NOT_TRACED = (
    'finished="frozen": training with lengths, or on a PackedSequence, can neither be exported nor traced; call eval()'
)
NOT_WHOLE = (
    'mode="whole": with finished="frozen" sequences of unequal lengths cannot be taken as one batch, whose statistics '
    'would be of rows that evaluation does not have; use mode="batches"'
)


def check(finished: str, prior_count: float | None) -> bool:
    """Whether sequences that have ended are held.

    Raises:
        TypeError, ValueError: there is no such choice, or it leaves nothing for prior_count to limit.
    """
    frozen = checks.choice("finished", finished, FINISHED) == "frozen"
    if frozen and prior_count is not None:
        raise ValueError(
            f'prior_count={prior_count!r}: it limits phantom rows, of which there are none with finished="frozen"'
        )
    return frozen


def _with_lengths(input: Tensor | PackedSequence, lengths: object) -> bool:
    return lengths is not None or isinstance(input, PackedSequence)


def leaves_compiled_code(frozen: bool, input: Tensor | PackedSequence, lengths: object) -> bool:
    """Whether a compiler must leave this training call as it is: its operators know phantom rows only.

    Raises:
        RuntimeError: the call is being exported.
    """
    if not frozen or not torch.compiler.is_compiling() or not _with_lengths(input, lengths):
        return False
    if exporting():
        raise RuntimeError(NOT_TRACED)
    return True


def spread(x: Tensor, packing: Packing) -> tuple[Tensor, Packing]:
    """Rows x [R, D] → [T·B, D], all seats in every step, and that packing; zeros in seats that have been left."""
    if packing.mask is not None:
        return x, packing
    steps, batch = len(packing.sizes), packing.batch
    mask = packing.lengths > torch.arange(steps, device=packing.lengths.device)[:, None]
    rows = x.new_zeros(steps * batch, x.shape[1]).index_copy(0, packing.places, x)
    all_seats = Packing((batch,) * steps, batch, steps, packing.count, packing.lengths, mask=mask.reshape(-1, 1))
    return rows, all_seats


def collect(rows: Tensor, packing: Packing) -> Tensor:
    """Of rows [T·B, ·] of what `spread` made of this packing, those that are its own."""
    return rows if packing.mask is not None else rows.index_select(0, packing.places)


def hold(x: Tensor, packing: Packing) -> Tensor:
    """Rows x [T·B, D] in a masked packing, with each sequence's last row again in the rows beyond its end.

    The gradient of a last row is summed step by step: no two of its terms are added up in an order left to chance.
    """
    assert packing.mask is not None
    by_step = len(packing.sizes), packing.batch
    seats = torch.arange(packing.batch, device=packing.lengths.device)
    last = x.index_select(0, (packing.lengths - 1) * packing.batch + seats)
    return torch.where(packing.mask.view(*by_step, 1), x.view(*by_step, x.shape[1]), last).flatten(0, 1)
