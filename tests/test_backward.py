"""The backward on the kernels against the float64 oracle: every division of its product, whatever is kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.kernel_cases import (
    DEVICE,
    FLOAT16,
    FLOAT32,
    backward,
    check,
    close,
    device_lengths,
    kernel_layer,
    launched,
    one_program,
    step_mode,
)
from tests.support import need_kernels

pytest.importorskip("triton")


from triton_bnlstm import fused_backward
from triton_bnlstm.kernels import launch, launch_backward
from triton_bnlstm.kernels.config import use_config
from triton_bnlstm.packing import Packing

need_kernels()
pytestmark = pytest.mark.usefixtures("bands")

LENGTHS = {"equal": None, "ragged": [6, 2, 5, 1, 6]}
SAVES = ("preactivations", "recompute")


@pytest.mark.parametrize("resident", [False, True], ids=["streamed", "resident"])
@pytest.mark.parametrize(("splits", "groups"), [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2)])
def test_divisions_of_the_product(splits, groups, resident):
    """Nine units in programs of four; 36 columns of dz in blocks of 16, so that some parts have less or nothing."""
    layer = kernel_layer(3, 9, cell_norm=True)
    with use_config(step_mode(), backward=backward(splits=splits, groups=groups, resident=resident, tile=32)):
        check(layer, torch.randn(6, 20, 3), [6] * 9 + [5] * 8 + [2, 1, 1])


@pytest.mark.parametrize("cell_norm", [False, True], ids=["", "cell norm"])
@pytest.mark.parametrize(("splits", "groups"), [(1, 1), (2, 1), (2, 2), (1, 4)])
def test_a_walked_batch(splits, groups, cell_norm):
    """More rows than a tile has, more than all tiles of the product that are worked on at once; then fewer than one."""
    layer = kernel_layer(2, 7, cell_norm=cell_norm)
    with use_config(step_mode(), backward=backward(splits=splits, groups=groups)):
        check(layer, torch.randn(4, 42, 2), [4] * 18 + [3] * 13 + [2] * 9 + [1] * 2)


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("input_stats", ["time", "sequence"])
@pytest.mark.parametrize("columns", [1, 3])
def test_a_walked_batch_of_every_input(columns, input_stats, where, monkeypatch):
    if where == "device":
        device_lengths(monkeypatch)
    layer = kernel_layer(columns, 5, input_stats=input_stats)
    with use_config(step_mode(), backward=backward(splits=2)):
        check(layer, torch.randn(3, 20, columns), [3] * 11 + [2] * 6 + [1] * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("save", SAVES)
def test_what_is_kept_does_not_matter(save, columns, lengths, dtype):
    layer = kernel_layer(columns, 5, dtype=dtype, cell_norm=True, save=save)
    bound = FLOAT32 if dtype == torch.float32 else FLOAT16
    with use_config(step_mode(), backward=backward(splits=2)):
        check(layer, torch.randn(6, 5, columns).to(dtype), LENGTHS[lengths], bound=bound)


@pytest.mark.parametrize("lengths", [None, [6, 5, 5, 4, 2, 1], [6, 6, 1, 1, 1, 1]], ids=["equal", "ragged", "tail"])
@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("input_stats", ["time", "sequence"])
@pytest.mark.parametrize("columns", [1, 3])
def test_blocks_of_steps(columns, input_stats, where, lengths, monkeypatch):
    """W_hh h made again for a few steps at a time, among them one of the last rows alone."""
    if where == "device":
        device_lengths(monkeypatch)
    monkeypatch.setattr(fused_backward, "_BLOCK_ROWS", 8)
    layer = kernel_layer(columns, 5, cell_norm=True, input_stats=input_stats, save="recompute")
    noted = launched(monkeypatch)
    with use_config(step_mode(), backward=backward(splits=2, groups=1 if where == "host" else 2)):
        check(layer, torch.randn(6, 6, columns), lengths)
    assert noted


def test_blocks_are_all_steps_once():
    sizes = (7, 7, 6, 6, 6, 3, 1, 1)
    for most in (1, 5, 8, 20, 100):
        packing = Packing.of_host_lengths(8, torch.tensor([8, 6, 6, 5, 5, 5, 2]), torch.device("cpu"))
        assert packing.sizes == sizes
        blocks = fused_backward._blocks(packing, most)
        assert len(blocks) <= 8
        end, last = sum(sizes), len(sizes)
        for block in blocks:
            assert block.last == last
            assert block.rows == sum(sizes[block.first : block.last])
            assert block.first_row == end - block.rows
            end, last = block.first_row, block.first
        assert (end, last) == (0, 0)
    assert len(blocks) == 1


@pytest.mark.parametrize("where", ["host", "device"])
def test_recomputing_is_relative_to_deviations(where, monkeypatch):
    """Rows that are almost the same: in half precision W_hh h has to be made from what they differ in.

    With h rounded as it stands, W_hh h would be off by 2⁻¹² of itself, which is more than its deviation; so would dz,
    whose rows add up to nothing, in the product that is W_hh's gradient.
    """
    if where == "device":
        device_lengths(monkeypatch)
    x = (torch.randn(1, 16, 3) + 1e-3 * torch.randn(4, 16, 3)).half()
    h_0 = torch.randn(5).expand(1, 16, 5) + 2e-3 * torch.randn(1, 16, 5)
    hx = h_0.half(), torch.randn(1, 16, 5).half()
    found = []
    for save in SAVES:
        layer = kernel_layer(3, 5, dtype=torch.float16, save=save, eps=1e-8)
        with use_config(step_mode()):
            output = layer(x.to(DEVICE), tuple(s.to(DEVICE) for s in hx), lengths=[4, 4] * 8)[0]
        weight = torch.linspace(-1, 1, output.numel(), device=DEVICE).view(output.shape)
        found.append(torch.autograd.grad((output * weight).sum(), list(layer.parameters())))
    wide = kernel_layer(3, 5, dtype=torch.float32, eps=1e-8)
    with use_config(step_mode()):
        output = wide(x.float().to(DEVICE), tuple(s.float().to(DEVICE) for s in hx))[0]
    expected = torch.autograd.grad((output * weight.float()).sum(), list(wide.parameters()))
    for name, *both, e in zip(dict(wide.named_parameters()), *found, expected, strict=True):
        for a in both:
            close(name, a, e.double().cpu(), 10 * FLOAT16)


@hypothesis_settings(max_examples=15)
@given(
    data=st.data(),
    steps=st.integers(1, 4),
    batch=st.integers(2, 40),
    hidden=st.integers(1, 18),
    columns=st.integers(1, 4),
    cell_norm=st.booleans(),
    splits=st.sampled_from([1, 2, 4]),
    groups=st.sampled_from([1, 2]),
    inner=st.sampled_from([16, 32]),
    resident=st.booleans(),
    save=st.sampled_from(SAVES),
    input_stats=st.sampled_from(["time", "sequence"]),
)
def test_any_shape(data, steps, batch, hidden, columns, cell_norm, splits, groups, inner, resident, save, input_stats):
    lengths = data.draw(st.lists(st.integers(1, steps), min_size=batch, max_size=batch))
    lengths[0] = steps
    layout = backward(units=8, inner=inner, splits=splits, groups=groups, resident=resident)
    # a step with one row of a large batch has no deviations to be relative to: ε stands in for them
    layer = kernel_layer(
        columns, hidden, cell_norm=cell_norm, max_length=3, eps=0.1, save=save, input_stats=input_stats
    )
    with use_config(one_program(32), backward=layout):
        check(layer, torch.randn(steps, batch, columns), lengths)


@pytest.mark.skipif(DEVICE != "cpu", reason="memory is not really taken on a CPU alone; tests/test_gpu.py has its own")
@pytest.mark.parametrize("directions", [1, 2])
def test_offsets_beyond_32_bits(directions):
    """The last rows of tensors with more than 2³¹ elements, of which no others are ever touched."""
    hidden, batch = 64, 2
    rows = 2**31 // (4 * hidden * directions) + 16 * directions
    made = {
        name: torch.randn(directions, batch, size)
        for name, size in (("deviation", 4 * hidden), ("x", 4 * hidden), ("c", hidden), ("d_rows", hidden))
    }
    weight = torch.randn(directions, hidden, 4 * hidden).half() * 0.2
    table = torch.randn(2, directions, 1, 4 * hidden).abs()
    vectors, d_c = torch.randn(4, directions, 4 * hidden), torch.randn(directions, batch, hidden)
    found = []
    for held in (rows, batch):

        def at_the_end(name, dtype=torch.float16, before=0, held=held):
            whole = torch.empty(directions, before + held, made[name].shape[2], dtype=dtype)
            whole[:, -batch:] = made[name].to(dtype)
            return whole

        kept = launch_backward.Kept(
            at_the_end("deviation"), at_the_end("x"), at_the_end("c", torch.float32, batch), table, table, None
        )
        kept.c[:, -2 * batch : -batch] = made["c"].flip(1)  # c_{t−1}
        d_hidden, d_input = (torch.empty_like(kept.x) for _ in range(2))
        gradients = launch_backward.Given(at_the_end("d_rows"), torch.zeros_like(d_c).half(), d_c.clone())
        shape = launch.Rows(
            torch.tensor([held - batch, held]), torch.tensor([batch], dtype=torch.int32), 1, held, batch
        )
        sums = launch_backward.Sums.empty(shape, directions, hidden, weight.device, column=False, cell=False)
        launch_backward.backward(
            kept,
            gradients,
            launch_backward.Wanted(d_hidden, d_input, False, False, False),
            weight,
            vectors,
            None,
            torch.full((directions, 1), 0.5),
            shape,
            sums,
            explicit=backward(units=64, inner=64),
        )
        found.append([d_hidden[:, -batch:], d_input[:, -batch:], gradients.c_n, sums.columns])
    for far, near in zip(*found, strict=True):
        assert torch.equal(far, near)
        assert (near != 0).float().mean() > 0.9  # float16 has nothing below 6e-8
