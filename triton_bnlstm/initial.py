"""Initial values of a layer's parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .reference import Parameters, accumulation_dtype


@torch.no_grad()
def initialise_(parameters: Parameters, gamma: float, forget_bias: float, *, orthogonal: bool) -> None:
    """γ as given (0.1 in the paper's section 4), β and biases 0 but for the forget gate's, orthogonal weights per gate.

    Args:
        parameters: of one layer and direction, written to.
        gamma: of all norms.
        forget_bias: of the forget gate.
        orthogonal: the recurrent weights of each gate, too; else the identity.
    """
    hidden = parameters.weight_hh.shape[1]
    for gate in parameters.weight_ih.split(hidden):
        _orthogonal_(gate)
    for gate in parameters.weight_hh.split(hidden):
        if orthogonal:
            _orthogonal_(gate)
        else:
            nn.init.eye_(gate)
    parameters.gamma_ih.fill_(gamma)
    parameters.gamma_hh.fill_(gamma)
    if parameters.bias is not None:
        parameters.bias.zero_()
        parameters.bias[hidden : 2 * hidden] = forget_bias
    if parameters.gamma_c is not None and parameters.beta_c is not None:
        parameters.gamma_c.fill_(gamma)
        parameters.beta_c.zero_()


def _orthogonal_(weight: Tensor) -> None:
    """`nn.init.orthogonal_` for every dtype: half precisions have no QR decomposition."""
    if not weight.is_meta:
        weight.copy_(nn.init.orthogonal_(torch.empty_like(weight, dtype=accumulation_dtype(weight.dtype))))
