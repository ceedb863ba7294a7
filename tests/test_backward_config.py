"""Layouts of the backward kernel: what is counted, what is chosen, what is refused."""

from __future__ import annotations

import pytest
import torch

from bench.aot.targets import TARGETS
from triton_bnlstm.kernels import backward_config
from triton_bnlstm.kernels.backward_config import bytes_around_the_loop, default_backward_config, exchanged_bytes
from triton_bnlstm.kernels.config import (
    BackwardConfig,
    Config,
    explicit_backward_config,
    explicit_config,
    use_config,
)

H100 = TARGETS["sm90"].device


def test_the_table_of_exchanged_bytes_is_what_is_counted():
    """The one that the module's page shows, and the layouts that it says are taken."""
    lines = [line.split() for line in str(backward_config.__doc__).splitlines() if line[:9].strip().isdigit()]
    assert len(lines) == 9
    for batch, hidden, units, *figures, splits, _, groups in lines:
        case = int(hidden), int(batch), 2, int(units)
        divisions = [(1, 1), (4, 1), (8, 1), (16, 1), (8, 2), (4, 4), (8, 4)]
        counted = [exchanged_bytes(*case, *division) / 1e6 for division in divisions]
        assert [f"{c:.1f}" for c in (*counted, counted[0] / 16)] == figures
        taken = default_backward_config(H100, int(hidden), int(batch), 1, torch.bfloat16, "ieee", steps=9)
        assert (taken.splits, taken.groups, taken.units) == (int(splits), int(groups), int(units))


def test_exchanged_bytes_by_walking_the_programs():
    """Every program's reads and writes, one by one."""
    hidden, batch, size, units, splits, groups = 64, 32, 2, 4, 4, 2
    layout = BackwardConfig(True, units, 16, 16, False, 4, 1, splits, groups)
    found = 0
    for _ in range(layout.programs(hidden)):
        found += batch // groups * (4 * hidden // splits) * size  # its part of dz
        found += batch // groups * layout.product_rows * 4  # partial sums that it writes
        found += splits * batch * units * 4  # partial sums of its units
    assert exchanged_bytes(hidden, batch, size, units, splits, groups) == found
    assert exchanged_bytes(hidden, batch, size, units) == hidden // units * batch * 4 * hidden * size


@pytest.mark.parametrize("steps", [1, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("batch", [2, 64, 1000])
@pytest.mark.parametrize("hidden", [1, 3, 100, 1000, 4000])
@pytest.mark.parametrize("target", ["sm75", "sm80", "sm90", "gfx942"])
def test_backward_layouts(target, hidden, batch, directions, dtype, steps):
    """Every case has a layout; sequence mode where its programs can all run at once."""
    device = TARGETS[target].device
    layout = default_backward_config(device, hidden, batch, directions, dtype, "ieee", steps=steps)
    programs = layout.programs(hidden)
    assert programs * layout.units >= hidden
    assert programs * layout.product_rows >= layout.splits * layout.groups * hidden
    if layout.sequence:
        assert steps > 1
        assert device.backend == "cuda"
        assert programs == 1 or directions * programs <= device.multiprocessors
    if layout.resident:
        assert layout.sequence
        held = layout.product_rows * (4 * hidden / layout.splits) * dtype.itemsize
        assert held <= device.shared_per_program
    assert not layout.divided or layout.product_rows >= 16


@pytest.mark.parametrize(
    ("change", "message"),
    [({"splits": 3}, "splits must be a power of two"), ({"groups": 0}, "groups must be a power of two")],
)
def test_bad_backward_layouts(change, message):
    good = {"sequence": False, "units": 4, "batch_tile": 16, "inner": 16, "resident": False, "warps": 4, "stages": 1}
    with pytest.raises(ValueError, match=message):
        BackwardConfig(**{**good, **change})


@pytest.mark.parametrize(
    ("layouts", "message"),
    [
        ({"backward": Config(False, 4, 16, 16, False, 4, 1)}, "backward must be a BackwardConfig, got Config"),
        ({"config": BackwardConfig(False, 4, 16, 16, False, 4, 1)}, "config must be a Config, got BackwardConfig"),
        ({"config": "sequence"}, "config must be a Config, got str"),
    ],
)
def test_layouts_of_the_wrong_kind(layouts, message):
    with pytest.raises(TypeError, match=message), use_config(**layouts):
        pass


def test_a_backward_layout_is_asked_for_where_the_call_is():
    """And is that of the call's backward, whichever context that runs in."""
    layout = BackwardConfig(False, 4, 16, 16, False, 4, 1)
    assert explicit_backward_config() is None
    with use_config(backward=layout):
        assert explicit_backward_config() is layout
        assert explicit_config() is None
    assert explicit_backward_config() is None


def test_bytes_around_the_loop_one_by_one():
    """At H = 100, D = 40 in half precision, tensor by tensor."""
    h, z, x, c = 2 * 100, 8 * 100, 2 * 40, 4 * 100
    loop = (z + z) + 2 * c + h + (z + z)  # deviation, W_ih x; cells; output's gradient; both gradients
    hidden_side = (h + h) + (h + z)  # states less their mean, made and multiplied with dz
    input_side = (x + x) + (x + z) + (z + x)  # the same of x, and its gradient
    assert bytes_around_the_loop(100, 40, 2, save="preactivations") == loop + hidden_side + input_side
    again = h + z  # W_hh h from the states
    assert bytes_around_the_loop(100, 40, 2, save="recompute") == loop + hidden_side + input_side + again
