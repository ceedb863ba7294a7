"""One case made concrete: weights, population, inputs, and what float64 says of outputs and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from triton_bnlstm import BNLSTM

from .cases import Case

# Input sets that take turns, so that nothing is timed on data that it has just seen.
SETS = 3


@dataclass
class Expected:
    """In float64: output in training [T, B, directions·H], gradients by leaf, and output in evaluation."""

    output: Tensor
    gradients: dict[str, Tensor]
    inference: Tensor


@dataclass
class Model:
    """A provider set up for one case.

    Attributes:
        call: x [T, B, D] and whether to train → output [T, B, directions·H].
        leaves: what gets gradients besides x, by name; names as in `expected`.
        expected: what it should give, found when it is first asked for.
        graphed: its device time is that of a CUDA graph's replays; else between events around the call.
        graphed_inference: in evaluation too.
        replayed: it is meant to be replayed from a graph, and is nothing without.
        layout: of kernels, where it has one.
    """

    call: Callable[[Tensor, bool], Tensor]
    leaves: dict[str, Tensor]
    expected: Callable[[], Expected]
    graphed: bool = True
    graphed_inference: bool = True
    replayed: bool = False
    layout: dict[str, Any] | None = None


@contextmanager
def product_precision(case: Case) -> Iterator[None]:
    """Float32 products, cuDNN's too, are rounded to TF32 only where the case says so."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if case.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = case.precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@dataclass
class Problem:
    """Weights and data that all providers of a case share.

    Attributes:
        case, device: what and where.
        layer: BNLSTM with the weights, in the case's dtype, and a population from one batch; to be copied, not run.
        x: [T, B, D], with a gradient unless it is one column (pixels, which nobody differentiates).
        sets: further inputs, copied into x by turns. pull: gradient of the output.
        bounds: of errors, by what is compared, once `checking` has found them.
    """

    case: Case
    device: torch.device
    seed: int = 0
    layer: BNLSTM = field(init=False)
    x: Tensor = field(init=False)
    sets: list[Tensor] = field(init=False)
    pull: Tensor = field(init=False)
    bounds: dict[str, float] | None = None

    def __post_init__(self) -> None:
        case = self.case
        torch.manual_seed(self.seed)
        layer = BNLSTM(
            case.columns,
            case.hidden,
            case.layers,
            bidirectional=case.bidirectional,
            cell_norm=case.cell_norm,
            input_stats="time",  # as the paper, and as the loops that this is compared with
            max_length=case.steps,
            backend="reference",
        ).to(self.device)
        shape = (case.steps, case.batch, case.columns)
        with torch.no_grad():
            layer(torch.randn(shape, device=self.device), lengths=case.lengths_of_batch())
        self.layer = layer.to(case.dtype)
        inputs = [torch.randn(shape, device=self.device).to(case.dtype) for _ in range(1 + SETS)]
        self.x, self.sets = inputs[0].requires_grad_(case.columns > 1), inputs[1:]
        outputs = (case.steps, case.batch, case.directions * case.hidden)
        self.pull = torch.randn(outputs, device=self.device).to(case.dtype)

    def copy_of_layer(self, **options: Any) -> BNLSTM:
        """The layer, to be run; `options` are attributes to set."""
        layer = copy.deepcopy(self.layer)
        for name, value in options.items():
            setattr(layer, name, value)
        return layer

    def layers(self, **options: Any) -> tuple[BNLSTM, BNLSTM]:
        """A copy for training and one for evaluation.

        One that goes to and fro between them would resolve its population anew each time, which no user's does.
        """
        train, evaluate = self.copy_of_layer(**options), self.copy_of_layer(**options)
        train.train()
        evaluate.eval()
        return train, evaluate

    def call_layer(self, layer: BNLSTM, x: Tensor, training: bool, *, on_device: bool = False) -> Tensor:
        """A BNLSTM on an input, in training or evaluation; on_device: lengths are given as a tensor there."""
        if layer.training != training:
            layer.train(training)
        return layer(x, lengths=self.device_lengths if on_device else self.case.lengths_of_batch())[0]

    @cached_property
    def device_lengths(self) -> Tensor | None:
        """Steps of each sequence, on the device."""
        lengths = self.case.lengths_of_batch()
        return None if lengths is None else torch.tensor(lengths, device=self.device)

    def reference_model(self) -> Model:
        """BNLSTM on the reference path, eagerly."""
        train, evaluate = self.layers(backend="reference")

        def call(x: Tensor, training: bool) -> Tensor:
            return self.call_layer(train if training else evaluate, x, training)

        leaves: dict[str, Tensor] = dict(train.named_parameters())
        return Model(call, leaves, lambda: self.batch_normalised, graphed=False)

    @property
    def capturable(self) -> bool:
        """Lengths on the host are copied to the device in every call, which a graph's capture does not allow."""
        return self.case.lengths == "equal"

    def expected_of(self, run: Callable[[Tensor, bool], Tensor], leaves: dict[str, Tensor]) -> Expected:
        """What `run`, a float64 model as `Model.call`, gives for this problem."""
        x, pull = self.x.detach().double().requires_grad_(self.x.requires_grad), self.pull.double()
        with torch.no_grad():
            inference = run(x, False)
        output = run(x, True)
        wanted = leaves | ({"x": x} if x.requires_grad else {})
        found = torch.autograd.grad(output, list(wanted.values()), pull)
        return Expected(output.detach(), dict(zip(wanted, found, strict=True)), inference)

    @cached_property
    def batch_normalised(self) -> Expected:
        """Of the batch-normalised LSTM: the reference path in float64."""
        layer = self.copy_of_layer(backend="reference").double()
        return self.expected_of(partial(self.call_layer, layer), dict(layer.named_parameters()))

    def plain_lstm(self, dtype: torch.dtype) -> nn.LSTM:
        """nn.LSTM with the same weights: no batch norm, one of its two biases zero."""
        case = self.case
        lstm = nn.LSTM(
            case.columns,
            case.hidden,
            case.layers,
            bidirectional=case.bidirectional,
            device=self.device,
            dtype=dtype,
        )
        with torch.no_grad():
            for name, parameter in lstm.named_parameters():
                if name.startswith("bias_hh"):
                    parameter.zero_()
                else:
                    parameter.copy_(getattr(self.layer, name.replace("bias_ih", "bias")))
        return lstm

    def call_plain_lstm(self, lstm: nn.LSTM, x: Tensor) -> Tensor:
        """nn.LSTM from padded input to padded output, packed between them where lengths differ."""
        lengths = self.case.lengths_of_batch()
        if lengths is None:
            return lstm(x)[0]
        packed = pack_padded_sequence(x, torch.tensor(lengths))
        return pad_packed_sequence(lstm(packed)[0], total_length=self.case.steps)[0]

    @cached_property
    def without_batch_norm(self) -> Expected:
        """Of the plain LSTM: PyTorch's own operations in float64, not cuDNN's."""
        lstm = self.plain_lstm(torch.float64)
        with torch.backends.cudnn.flags(enabled=False):
            return self.expected_of(lambda x, _: self.call_plain_lstm(lstm, x), dict(lstm.named_parameters()))
