"""A model in eval() goes through torch.onnx.export and gives in onnxruntime what it gives here, for any T and B."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

from tests.support import CLOSE, EXPORTER_WARNINGS, make_layer
from triton_bnlstm import BNLSTMCell, plain

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.filterwarnings(*EXPORTER_WARNINGS)

FREE = Dim.DYNAMIC
# float32 in another order, over a dozen steps: some roundings of numbers of order one, each 6e-8
SINGLE = {"rtol": 1e-5, "atol": 5e-6}
# an ε that float32 holds: the exporter writes numbers that stand in the code in single precision
EPS = 2.0**-8


class Exported:
    """A model as onnxruntime runs it, called with what the model is called with."""

    def __init__(self, path, model, args, kwargs=None, dynamic_shapes=None, **options):
        options |= {"kwargs": kwargs, "dynamic_shapes": dynamic_shapes, "dynamo": True, "verbose": False}
        torch.onnx.export(model, args, path, **options)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options)

    def __call__(self, *args, **kwargs):
        given = [torch.as_tensor(leaf).numpy() for leaf in tree_leaves((args, kwargs)) if leaf is not None]
        names = [value.name for value in self.session.get_inputs()]
        return [torch.from_numpy(value) for value in self.session.run(None, dict(zip(names, given, strict=True)))]


def assert_same(exported, model, *args, tolerance, **kwargs):
    """Every output of the same shape, in the same dtype, with the same values, all finite."""
    with torch.no_grad():
        expected = tree_leaves(model(*args, **kwargs))
    found = exported(*args, **kwargs)
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert theirs.isfinite().all()
        torch.testing.assert_close(mine, theirs, **tolerance)


def ragged(steps, batch, batch_first=False, dtype=torch.float32):
    """Input whose padding is NaN, and its lengths, of which one is T."""
    lengths = torch.randint(1, steps + 1, (batch,))
    lengths[-1] = steps
    x = torch.randn(batch, steps, 3, dtype=dtype)
    x[torch.arange(steps) >= lengths[:, None]] = float("nan")
    return (x if batch_first else x.transpose(0, 1).contiguous()), lengths


def trained(layer):
    """Statistics of some training steps in which late slots see few rows, or none."""
    layer.train()
    for _ in range(3):
        layer(torch.randn(4, 5, 3) + 1, lengths=torch.tensor([4, 1, 2, 1, 1]))
    return layer.eval()


# the export's own; shorter and longer than it and than max_length = 5; a single step, a single sequence
SIZES = [(7, 5), (3, 2), (12, 6), (1, 4), (9, 1), (1, 1)]


def test_lengths_time_and_batch_are_free(tmp_path):
    layer = trained(make_layer(dtype=torch.float32, max_length=5))
    seen, used = layer.statistics()["hh"], layer.statistics(resolved=True)["hh"]
    assert seen.count[3] < seen.count[0]
    assert not torch.allclose(seen.mean[3], used.mean[3])  # so resolving shows
    assert not torch.allclose(used.mean[1], used.mean[2])
    x, lengths = ragged(7, layer.hidden_size)
    shapes = {"input": {0: FREE, 1: FREE}, "lengths": {0: FREE}}
    # First with all sizes fixed: nothing of that may stay behind and fix those of the program that is made next. Dynamo
    # would leave a guard of it that takes B for H, these being the same. In an older opset, too.
    fixed = Exported(tmp_path / "fixed.onnx", layer, (x,), {"lengths": lengths}, opset_version=17)
    assert_same(fixed, layer, x, lengths=lengths, tolerance=SINGLE)
    part = torch.cat([x, x], 1)[:, : layer.hidden_size]  # whose strides are those of another B
    exported = Exported(tmp_path / "layer.onnx", layer, (part,), {"lengths": lengths.repeat(2)[::2]}, shapes)
    for steps, batch in SIZES:
        x, lengths = ragged(steps, batch)
        assert_same(exported, layer, x, lengths=lengths, tolerance=SINGLE)
    x = torch.randn(7, 3, 3)
    wrong, clamped = exported(x, lengths=torch.tensor([0, 9, 4])), exported(x, lengths=torch.tensor([1, 7, 4]))
    for mine, theirs in zip(wrong, clamped, strict=True):
        assert torch.equal(mine, theirs)


def test_every_option_at_once(tmp_path):
    """Layers, directions, cell norm, batch_first, hx; in double precision, and from an example of one sequence."""
    layer = make_layer(
        num_layers=2, bidirectional=True, cell_norm=True, batch_first=True, bias=False, max_length=2, eps=EPS
    ).eval()

    def arguments(steps, batch):
        x, lengths = ragged(steps, batch, True, torch.float64)
        return x, tuple(torch.randn(4, batch + 1, 4).double()[:, 1:] for _ in range(2)), lengths

    shapes = {"input": {0: FREE, 1: FREE}, "hx": ({1: FREE}, {1: FREE}), "lengths": {0: FREE}}
    exported = Exported(tmp_path / "layer.onnx", layer, arguments(7, 1), None, shapes)
    for steps, batch in SIZES:
        assert_same(exported, layer, *arguments(steps, batch), tolerance=CLOSE)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.below = nn.Linear(2, 3)
        self.layer = make_layer(dtype=torch.float32, bidirectional=True, input_stats="sequence", max_length=4)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        nought = x.new_zeros(2, x.shape[1], 4)  # one tensor for both states, as with nn.LSTM
        output, (h_n, _) = self.layer(self.below(x).relu(), (nought, nought))
        return self.head(output), h_n.sum(0)


def test_in_a_model_without_lengths(tmp_path):
    model = Model().eval()
    exported = Exported(tmp_path / "model.onnx", model, (torch.randn(7, 5, 2),), None, {"x": {0: FREE, 1: FREE}})
    for steps, batch in SIZES:
        assert_same(exported, model, torch.randn(steps, batch, 2), tolerance=SINGLE)


@pytest.mark.parametrize("autocast", [False, True])
def test_chunks_of_an_unbatched_stream_in_half_precision(tmp_path, autocast):
    """`start` and the states are arguments of the program, so that it can be called chunk by chunk."""
    layer = make_layer(dtype=torch.float32 if autocast else torch.float16).eval()
    dtype = layer.weight_hh_l0.dtype

    def arguments(steps, start):
        h, c = torch.randn(2, 1, 4)
        return torch.randn(steps, 3, dtype=dtype), (h.half().to(dtype), c.to(dtype)), None, start

    shapes = {"input": {0: FREE}, "hx": (None, None), "lengths": None, "start": FREE}
    # h is rounded at each step, to 2⁻¹² of numbers below one; over a dozen steps some roundings differ
    tolerance = {"rtol": 2e-3, "atol": 2e-3}
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        exported = Exported(tmp_path / "layer.onnx", layer, arguments(1, 2), None, shapes)
        for steps, start in ((1, 2), (4, 2), (3, 0), (5, 4), (12, 1), (1, 9)):
            assert_same(exported, layer, *arguments(steps, start), tolerance=tolerance)
    *others, start = arguments(1, 0)
    for mine, theirs in zip(exported(*others, -2), exported(*others, start), strict=True):
        assert torch.equal(mine, theirs)


def test_cell_takes_its_time_as_an_argument(tmp_path):
    cell = BNLSTMCell.from_layer(make_layer(dtype=torch.float32, cell_norm=True).eval())

    def arguments(batch, time):
        return torch.randn(batch, 6)[:, ::2], tuple(torch.randn(4, batch).t() for _ in range(2)), time

    shapes = {"input": {0: FREE}, "hx": ({0: FREE}, {0: FREE}), "time": FREE}
    exported = Exported(tmp_path / "cell.onnx", cell, arguments(1, 3), None, shapes)
    for batch, time in ((1, 3), (5, 3), (1, 0), (3, 5), (2, 40)):
        assert_same(exported, cell, *arguments(batch, time), tolerance=SINGLE)


def test_an_lstm_folded_from_equal_slots_agrees(tmp_path):
    """`to_lstm` goes the exporter's own way for nn.LSTM."""
    layer = make_layer(dtype=torch.float32).eval()
    with torch.no_grad():
        for name, buffer in layer.named_buffers():
            if name.startswith(("mean", "var")):
                buffer.copy_(buffer[:1].expand_as(buffer))
    x = torch.randn(9, 5, 3)
    exported = Exported(tmp_path / "lstm.onnx", layer.to_lstm(), (x,))
    assert_same(exported, layer, x, tolerance=SINGLE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_bfloat16_without_onnx(monkeypatch, dtype):
    """onnxruntime's CPU has no bfloat16; torch.export keeps the same program and runs it. Others under autocast."""
    monkeypatch.setattr(plain, "requested", torch.compiler.is_exporting)
    layer = make_layer(dtype=dtype, num_layers=2, bidirectional=True, max_length=3).eval()
    shapes = {"input": {0: FREE, 1: FREE}, "lengths": {0: FREE}}
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.bfloat16):
        x, lengths = ragged(4, 2, dtype=dtype)
        program = torch.export.export(layer, (x,), {"lengths": lengths}, dynamic_shapes=shapes).module()
        x, lengths = ragged(8, 3, dtype=dtype)
        found, expected = (tree_leaves(call(x, lengths=lengths)) for call in (program, layer))
    # a rounding of h to 2⁻⁹ that falls the other way, and what it moves at later steps; autocast spares float64
    tolerance = CLOSE if dtype == torch.float64 else {"rtol": 0.0, "atol": 2**-7}
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)


def test_refusals_are_what_the_exporter_tells(tmp_path):
    """It tries another way after an error, and would tell why that one failed, if it came any further."""
    layer, x = make_layer(dtype=torch.float32), torch.randn(7, 5, 3)
    with (
        pytest.warns(UserWarning, match="training mode"),  # the exporter's word
        pytest.raises(torch.onnx.errors.OnnxExporterError, match=r"call eval\(\) before"),
    ):
        Exported(tmp_path / "layer.onnx", layer, (x,))
    assert layer.rows == 4  # nothing has been learnt
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match=r"lengths must have shape \(5,\)"):
        Exported(tmp_path / "layer.onnx", layer.eval(), (x,), {"lengths": torch.tensor([7, 7])})


@pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning")
def test_torchscript_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="dynamo=True"):
        torch.onnx.export(
            make_layer(dtype=torch.float32).eval(), (torch.randn(7, 5, 3),), tmp_path / "layer.onnx", dynamo=False
        )


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_a_torchscript_trace_is_refused():
    with pytest.raises(RuntimeError, match=r"torch.jit.trace cannot record a BN-LSTM"):
        torch.jit.trace(make_layer().eval(), torch.randn(6, 3, 3).double())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((pack_padded_sequence(torch.randn(4, 2, 3), torch.tensor([4, 2])),), TypeError, "input.*lengths="),
        ((torch.randn(4, 2, 5),), ValueError, "input must have 3 features"),
        ((torch.randn(4, 2, 3), None, torch.tensor([4, 2, 1])), ValueError, r"lengths must have shape \(2,\)"),
        ((torch.randn(4, 2, 3), None, torch.tensor([4.0, 2.0])), TypeError, "lengths must be integers"),
        ((torch.randn(4, 2, 3), (torch.zeros(1, 3, 4),) * 2), ValueError, "h_0"),
        ((torch.randn(4, 2, 3), None, None, -1), ValueError, "start"),
    ],
)
def test_arguments_are_checked(monkeypatch, arguments, error, message):
    monkeypatch.setattr(plain, "requested", lambda: True)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    with pytest.raises(error, match=message):
        make_layer(dtype=torch.float32).eval()(*arguments)
