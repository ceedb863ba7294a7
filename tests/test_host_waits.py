"""On a CPU, what would make the host wait for a GPU: operations whose results it has to look at, and where they are.

tests/test_gpu_graphs.py asks CUDA itself; this finds a new one without a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import triton_bnlstm
from tests.kernel_cases import DEVICE, device_lengths
from tests.support import make_layer, need_kernels
from triton_bnlstm import BNLSTMCell, _base, checks

ROOT = str(Path(triton_bnlstm.__file__).parent)
aten = torch.ops.aten
# Their results' sizes or values are the host's.
WAITS = {
    *(aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal, aten.allclose, aten.nonzero),
    *(aten.masked_select, aten.unique_dim, aten._unique2, aten.unique_consecutive, aten.bincount),
}
# On a CPU they read or make memory, and no operation is seen that says so; on a GPU they copy, and wait for it.
COPIES = {
    *(Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.cpu),
    *(torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, Tensor.new_tensor),
}
# Only while lengths are on the host, or tensors are.
ON_A_CPU = {("checks.py", "lengths_of_batch"), ("checks.py", "lengths_tensor"), ("_base.py", "_tell_skipped_steps")}
# Where kernels are called, and in the interpreter copied to and from NumPy.
LAUNCH = ("kernels/run.py", "run")


class Waits(TorchDispatchMode):
    """Records (file, function) of this package for each operation that waits for what a device has computed."""

    def __init__(self) -> None:
        super().__init__()
        self.places: set[tuple[str, str]] = set()
        self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.operations += 1
        if self._waits(function, args, kwargs):
            self.note()
        return function(*args, **kwargs)

    def __enter__(self):
        self._copies = Copies(self)
        self._copies.__enter__()
        return super().__enter__()

    def __exit__(self, *of):
        super().__exit__(*of)
        self._copies.__exit__(*of)

    def note(self) -> None:
        """The innermost function of the package that is running now."""
        places = []
        frame = sys._getframe(2)
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(ROOT):
                places.append((name[len(ROOT) + 1 :], frame.f_code.co_name))
            frame = frame.f_back  # type: ignore[assignment]
        if LAUNCH not in places:
            self.places.add(places[0] if places else ("", "outside"))

    def _waits(self, function, args, kwargs) -> bool:
        packet = function.overloadpacket
        if packet in WAITS:
            return True
        if packet in (
            aten.index,
            aten.index_put,
            aten.index_put_,
            aten._index_put_impl_,
        ):  # by a mask is by its nonzero
            return any(isinstance(s, Tensor) and s.dtype in (torch.bool, torch.uint8) for s in args[1])
        if packet is aten.repeat_interleave:
            return kwargs.get("output_size") is None
        # from or to another device: the copy waits unless the host's side is pinned
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        asked = kwargs.get("device")
        if packet is aten._to_copy and asked is not None:
            devices.add(torch.device(asked).type)
        return packet in (aten._to_copy, aten.copy_) and len(devices) > 1


class Copies(TorchFunctionMode):
    """Tells `Waits` of what goes from or to the host without an operation."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in COPIES:
            self._waits.note()
        return function(*args, **(kwargs or {}))


def lengths_stay_where_they_are(monkeypatch):
    """Lengths on a CPU take the way of lengths on a device, which nobody checks."""
    device_lengths(monkeypatch)
    monkeypatch.setattr(checks, "lengths_of_batch", lambda lengths, *_: lengths)


OPTIONS = {
    "plain": {},
    "all": {"num_layers": 2, "bidirectional": True, "cell_norm": True, "initial_noise": 0.1, "dropout": 0.1},
    "sequence": {"input_stats": "sequence", "prior_count": 2.0, "momentum": None},
    "one column": {"input_size": 1, "save": "recompute"},
}


@pytest.mark.parametrize("lengths", [None, [4, 1, 3]], ids=["equal", "device"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_training_step_and_evaluation_do_not_wait(backend, options, lengths, monkeypatch):
    if backend == "triton":
        need_kernels()
        if DEVICE != "cpu":
            pytest.skip("CUDA itself tells, see tests/test_gpu_graphs.py")
    lengths_stay_where_they_are(monkeypatch)
    given = {"input_size": 3, **OPTIONS[options]}
    layer = make_layer(**given, backend=backend, dtype=torch.float32)
    x = torch.randn(4, 3, layer.input_size, requires_grad=True)
    held = None if lengths is None else torch.tensor(lengths)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    with Waits() as waits:
        layer(x, lengths=held)[0].sum().backward()
        optimiser.step()
        told = waits.places - {("_base.py", "_tell_skipped_steps")}
        assert told == set()
        layer.training = False  # as eval(), which tells of skipped steps
        layer(x, lengths=held)[0].sum().backward()
        with torch.no_grad():
            layer(x, lengths=held)
            layer(x, lengths=held)
    assert waits.places == {("_base.py", "_tell_skipped_steps")}
    assert waits.operations > 100


def test_a_cell_does_not_wait():
    cell = BNLSTMCell.from_layer(make_layer(cell_norm=True))
    x, state = torch.randn(4, 3, 3).double(), None
    with Waits() as waits:
        for t, step in enumerate(x):
            state = cell(step, state, time=t)
        state[0].sum().backward()
    assert waits.places == {("_base.py", "_tell_skipped_steps")}


def test_what_is_known_to_wait_does_so_on_a_cpu_only():
    """`_tell_skipped_steps` is called in training where `finite` is on a CPU, and otherwise when the mode changes."""
    layer = make_layer()
    looked = []
    layer._tell_skipped_steps = lambda **_: looked.append(1)

    class Elsewhere:
        """What `update_statistics_` gives where it must not be looked at."""

        device = torch.device("cuda")

        def __invert__(self):
            return torch.zeros((), dtype=torch.bool)

        def __bool__(self):
            raise AssertionError("the host looks")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_base, "update_statistics_", lambda *_: Elsewhere())
        layer(torch.randn(4, 3, 3).double())
    assert looked == []
    layer(torch.randn(4, 3, 3).double())
    assert looked == [1]


@pytest.mark.parametrize(
    "operation",
    [
        lambda x, mask: float(x.sum()),
        lambda x, mask: bool(mask.any()),
        lambda x, mask: x[mask],
        lambda x, mask: x.masked_select(mask),
        lambda x, mask: x.nonzero(),
        lambda x, mask: torch.where(mask),
        lambda x, mask: torch.equal(x, x),
        lambda x, mask: torch.allclose(x, x),
        lambda x, mask: x.unique(),
        lambda x, mask: x.tolist(),
        lambda x, mask: x.numpy(),
        lambda x, mask: x.cpu(),
        lambda x, mask: torch.tensor([1, 2]),
        lambda x, mask: x.new_tensor(2),
        lambda x, mask: x.__setitem__(mask, torch.ones(2)),
        lambda x, mask: torch.repeat_interleave(mask.to(torch.int64)),
        lambda x, mask: x.to("meta"),
        lambda x, mask: torch.empty(3, device="meta").copy_(x),
    ],
)
def test_what_waits_is_seen(operation):
    x, mask = torch.randn(3), torch.tensor([True, False, True])
    with Waits() as waits:
        operation(x, mask)
    assert waits.places == {("", "outside")}


def test_what_does_not_wait_is_not():
    x, mask, index = torch.randn(3), torch.tensor([True, False, True]), torch.tensor([0, 2, 1])
    with Waits() as waits:
        torch.where(mask, x, 0)
        x[index]
        x.masked_fill(mask, 1)
        torch.repeat_interleave(x, index, output_size=3)
        x.to(torch.float64)
    assert waits.places == set()


def test_lengths_on_the_host_are_looked_at_there():
    """And nowhere else: what is made of them goes to the device."""
    layer = make_layer()
    with Waits() as waits:
        layer(torch.randn(4, 3, 3).double(), lengths=[4, 1, 3])[0].sum().backward()
    assert waits.places - ON_A_CPU == {("packing.py", "of_host_lengths")}
