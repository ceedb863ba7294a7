"""Under torch.compile the layer runs as it is, with a graph break, and the model around it is compiled."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.support import assert_same_buffers, buffers, make_layer

LENGTHS = [6, 2, 4]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.below = nn.Linear(3, 3).double()
        self.layer = make_layer(num_layers=2, bidirectional=True, cell_norm=True)
        self.head = nn.Linear(8, 2).double()

    def forward(self, x, lengths):
        output, (h_n, _) = self.layer(self.below(x).relu(), lengths=lengths)
        return self.head(output).sum() + h_n.square().sum()


@pytest.mark.filterwarnings("ignore")  # dynamo's own, of many kinds and versions
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("lengths", [None, torch.tensor(LENGTHS)], ids=["equal", "ragged"])
def test_compiled_is_eager(training, lengths):
    torch._dynamo.reset()
    eager = Model().train(training)
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, backend="eager")
    for _ in range(2):
        x = torch.randn(6, 3, 3).double()
        expected, value = eager(x, lengths), compiled(x, lengths)
        torch.testing.assert_close(value, expected)
        expected.backward(), value.backward()
    for mine, theirs in zip(twin.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert_same_buffers(buffers(eager.layer), buffers(twin.layer))
