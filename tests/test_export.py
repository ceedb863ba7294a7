"""Programs of `torch.export`, and what changes within a compiled graph besides a layer's call."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.support import CLOSE, buffers, make_layer

RAGGED = torch.tensor([6, 2, 4])


@pytest.mark.parametrize("training", [False, True])
def test_start_is_an_argument_of_an_exported_program(training):
    """As T, B and lengths are: for all of which it is the layer."""
    layer = make_layer(bidirectional=True, max_length=5).train(training)
    free = torch.export.Dim.DYNAMIC
    shapes = {"input": {0: free, 1: free}, "hx": None, "lengths": {0: free}, "start": free}
    exported = copy.deepcopy(layer)  # whose statistics the program has, and trains
    program = torch.export.export(
        exported, (torch.randn(6, 3, 3).double(), None, RAGGED, 2), dynamic_shapes=shapes
    ).module()
    for steps, lengths, start in ((6, [6, 2, 4], 2), (3, [2, 3], 0), (4, [4, 1, 1, 2], 30)):
        x, lengths = torch.randn(steps, len(lengths), 3).double(), torch.tensor(lengths)
        found, expected = program(x, None, lengths, start), layer(x, lengths=lengths, start=start)
        torch.testing.assert_close(found, expected, **CLOSE)
        torch.testing.assert_close(buffers(exported), buffers(layer), **CLOSE)
    with pytest.raises(AssertionError, match="start >= 0"):
        program(x, None, lengths, -1)


def test_the_mode_changes_within_a_graph():
    layer, x = make_layer(), torch.randn(6, 3, 3).double()

    def evaluated(x):
        layer.eval()
        return layer(x)[0]

    torch._dynamo.reset()
    found = torch.compile(evaluated, fullgraph=True, backend="aot_eager")(x)
    assert not layer.training
    torch.testing.assert_close(found, layer(x)[0], **CLOSE)
