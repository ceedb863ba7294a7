"""BN-LSTM by the recipe that most copies follow: a peer, whose statistics can be replaced to compare them.

The choices are those of jihunchoi/recurrent-batch-normalization-pytorch; the code is not:

    statistics   of each time step, a moving average with weight 0.1 that starts from mean 0 and variance 1, of the
                 unbiased variances of the batches; nothing is estimated after training
    beyond S     steps past the last slot use it, and write it too
    norms        of W_ih x, W_hh h and c; γ starts at 0.1, and a β of each is trained beside the bias
    weights      W_ih orthogonal, each gate's W_hh the identity, all biases 0, the forget gate's too
    states       h_0 and c_0 are small noise, in evaluation as well (0.1 in its training script, for pixel images)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_bnlstm import BNLSTM

NORMS = ("ih", "hh", "c")
States = tuple[Tensor, Tensor]


class Recipe(nn.Module):
    """One layer, one direction, for sequences of equal length, with gates in nn.LSTM's order i, f, g, o.

    Args:
        input_size: features D.
        hidden_size: units H.
        max_length: slots S.
        initial_noise: standard deviation of h_0 and c_0 where hx is not given.
        momentum, eps: as torch's batch norm has them.

    Attributes:
        weight_ih, weight_hh, bias: [4H, D], [4H, H], [4H].
        gamma_ih, beta_ih, gamma_hh, beta_hh: [4H]. gamma_c, beta_c: [H].
        mean_ih, var_ih, mean_hh, var_hh: buffers [S, 4H]. mean_c, var_c: [S, H].
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        max_length: int,
        *,
        initial_noise: float = 0.1,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.max_length = input_size, hidden_size, max_length
        self.initial_noise, self.momentum, self.eps = initial_noise, momentum, eps
        self.weight_ih = nn.Parameter(nn.init.orthogonal_(torch.empty(input_size, 4 * hidden_size)).t().contiguous())
        self.weight_hh = nn.Parameter(torch.eye(hidden_size).repeat(4, 1))
        self.bias = nn.Parameter(torch.zeros(4 * hidden_size))
        for norm in NORMS:
            columns = hidden_size if norm == "c" else 4 * hidden_size
            self.register_parameter(f"gamma_{norm}", nn.Parameter(torch.full((columns,), 0.1)))
            self.register_parameter(f"beta_{norm}", nn.Parameter(torch.zeros(columns)))
            self.register_buffer(f"mean_{norm}", torch.zeros(max_length, columns))
            self.register_buffer(f"var_{norm}", torch.ones(max_length, columns))

    def _normalise(self, norm: str, values: Tensor, step: int) -> Tensor:
        """Batch norm of values [B, ·]: by the batch in training, else by the step's slot."""
        slot = min(step, self.max_length - 1)
        mean, var, gamma, beta = (getattr(self, f"{part}_{norm}") for part in ("mean", "var", "gamma", "beta"))
        return F.batch_norm(values, mean[slot], var[slot], gamma, beta, self.training, self.momentum, self.eps)

    def forward(self, x: Tensor, hx: States | None = None) -> tuple[Tensor, States]:
        """Input [T, B, D], hx two [1, B, H] → output [T, B, H] and the last states, two [1, B, H]."""
        if hx is None:
            h, c = self.initial_noise * torch.randn(2, x.shape[1], self.hidden_size, device=x.device, dtype=x.dtype)
        else:
            h, c = hx[0][0], hx[1][0]
        output = []
        for step, rows in enumerate(x @ self.weight_ih.t()):
            recurrent = self._normalise("hh", h @ self.weight_hh.t(), step)
            i, f, g, o = (recurrent + self._normalise("ih", rows, step) + self.bias).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * self._normalise("c", c, step).tanh()
            output.append(h)
        return torch.stack(output), (h[None], c[None])

    @torch.no_grad()
    def to_bnlstm(self, **options: Any) -> BNLSTM:
        """A layer of the library with these weights and statistics: the same function in training and in evaluation.

        Its norms before the gates have no shifts, since the bias is one: it becomes bias + β_ih + β_hh.
        options: further ones of BNLSTM.
        """
        layer = BNLSTM(
            self.input_size,
            self.hidden_size,
            max_length=self.max_length,
            cell_norm=True,
            input_stats="time",
            backend="reference",  # what it is compared with is no less exact
            eps=self.eps,
            device=self.bias.device,
            dtype=self.bias.dtype,
            **options,
        )
        for name in ("weight_ih", "weight_hh", "gamma_ih", "gamma_hh", "gamma_c", "beta_c"):
            layer.get_parameter(f"{name}_l0").copy_(self.get_parameter(name))
        shifts = self.get_parameter("beta_ih") + self.get_parameter("beta_hh")
        layer.get_parameter("bias_l0").copy_(self.bias + shifts)
        for norm in NORMS:
            for part in ("mean", "var"):
                layer.get_buffer(f"{part}_{norm}_l0").copy_(self.get_buffer(f"{part}_{norm}"))
            layer.get_buffer(f"count_{norm}_l0").fill_(1)  # all slots alike, so that none inherits from another
        layer.train(self.training)
        return layer
