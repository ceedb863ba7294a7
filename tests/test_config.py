"""Layouts chosen from a device's numbers, and what is refused before it can hang."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from triton_bnlstm import BNLSTM
from triton_bnlstm.kernels import errors
from triton_bnlstm.kernels.config import INTERPRETER, Config, Device, use_config
from triton_bnlstm.kernels.errors import KernelError
from triton_bnlstm.kernels.forward_config import default_config

H100 = Device("cuda", 90, 132, 232_448, 233_472, 65_536, 2048)
A100 = Device("cuda", 80, 108, 166_912, 167_936, 65_536, 2048)
RTX = Device("cuda", 89, 128, 101_376, 102_400, 65_536, 1536)
T4 = Device("cuda", 75, 40, 65_536, 65_536, 65_536, 1024)
MI300 = Device("hip", 0, 304, 65_536, 65_536, 65_536, 2048, 64)
DEVICES = [H100, A100, RTX, T4, MI300]


def chosen(device, hidden, batch, *, directions=1, dtype=torch.bfloat16, split_batch=False, steps=100):
    return default_config(device, hidden, batch, directions, dtype, "ieee", split_batch=split_batch, steps=steps)


def grid(config, hidden, batch, directions, split_batch):
    tiles = -(-batch // config.batch_tile) if split_batch else 1
    return directions * tiles * -(-hidden // config.units)


@given(
    device=st.sampled_from(DEVICES),
    hidden=st.integers(1, 5000),
    batch=st.integers(1, 3000),
    directions=st.sampled_from([1, 2]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    split_batch=st.booleans(),
    steps=st.integers(1, 500),
)
def test_sequence_mode_gives_every_program_a_multiprocessor(
    device, hidden, batch, directions, dtype, split_batch, steps
):
    config = chosen(
        device, hidden, batch, directions=directions, dtype=dtype, split_batch=split_batch, steps=steps
    )  # a Config checks itself
    if config.sequence:
        assert steps > 1
        assert device.backend == "cuda"
        assert config.units >= hidden or grid(config, hidden, batch, directions, split_batch) <= device.multiprocessors
    if config.resident:
        assert config.sequence
        held = (4 * config.units * max(config.inner, hidden) + config.batch_tile * config.inner) * dtype.itemsize
        assert held <= device.shared_per_program


def test_what_is_chosen_where():
    assert chosen(H100, 512, 64).sequence
    assert chosen(H100, 512, 64).resident
    assert chosen(H100, 1024, 64).sequence
    assert not chosen(H100, 20_000, 64).sequence
    assert not chosen(MI300, 100, 64).sequence
    assert not chosen(H100, 512, 64, steps=1).sequence
    assert chosen(H100, 512, 64, directions=2).sequence
    assert not chosen(T4, 1024, 64, directions=2, dtype=torch.float16, split_batch=True).resident


def test_programs_that_a_device_holds():
    assert H100.resident_programs(shared=0, registers=32, warps=4) == 132 * 16  # threads
    assert H100.resident_programs(shared=0, registers=255, warps=8) == 132  # registers: 2 × 8 × 32 × 256 > 65,536
    assert H100.resident_programs(shared=0, registers=128, warps=8) == 132 * 2
    assert H100.resident_programs(shared=116_000, registers=32, warps=4) == 132  # 1 KB of each is the system's
    assert H100.resident_programs(shared=115_000, registers=32, warps=4) == 132 * 2
    assert H100.resident_programs(shared=232_448, registers=32, warps=4) == 132
    assert H100.resident_programs(shared=240_000, registers=32, warps=4) == 0


@pytest.mark.parametrize(
    ("field", "value"), [("units", 2), ("units", 12), ("batch_tile", 8), ("inner", 24), ("warps", 3), ("stages", 0)]
)
def test_impossible_layouts(field, value):
    with pytest.raises(ValueError, match=field):
        replace(chosen(H100, 512, 64), **{field: value})


def test_products_run_on_matrix_units():
    assert H100.multiplies(torch.bfloat16, "ieee")
    assert H100.multiplies(torch.float32, "tf32")
    assert not H100.multiplies(torch.float32, "ieee")
    assert not T4.multiplies(torch.float16, "ieee")
    assert MI300.multiplies(torch.float32, "ieee")


def test_the_precision_of_float32_products_is_torchs(monkeypatch):
    launch = pytest.importorskip("triton_bnlstm.kernels.launch")
    monkeypatch.setattr(launch, "device_of", lambda device: RTX if device.index == 0 else T4)
    try:
        for setting, expected in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32"), ("highest", "ieee")):
            torch.set_float32_matmul_precision(setting)
            assert launch.product_precision(torch.float32, torch.device("cuda", 0)) == expected
            assert launch.product_precision(torch.float32, torch.device("cuda", 1)) == "ieee"
            assert launch.product_precision(torch.float16, torch.device("cuda", 0)) == "ieee"
            assert launch.product_precision(torch.float32, torch.device("cpu")) == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")


SEVERAL = Config(True, 4, 16, 16, False, 4, 1)  # of the interpreter's programs, which cannot meet


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_gpu.py has its own")
def test_a_grid_that_cannot_meet_is_refused():
    """An error, and nothing has changed."""
    pytest.importorskip("triton")
    layer = BNLSTM(2, 9, max_length=5, backend="triton")
    with use_config(SEVERAL), pytest.raises(KernelError, match="3 programs of forward_kernel have to run at the"):
        layer(torch.randn(3, 4, 2))
    assert (layer.count_hh_l0 == 0).all()
    layer.eval()
    with use_config(SEVERAL), pytest.raises(KernelError, match="3 programs of inference_kernel"):
        layer(torch.randn(3, 4, 2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can hold this grid")
def test_a_default_grid_that_turns_out_not_to_fit_goes_step_by_step(monkeypatch):
    """The default is chosen before a kernel's registers are known; then step mode is what is left."""
    launch = pytest.importorskip("triton_bnlstm.kernels.launch")
    launches = []
    run = launch._run
    monkeypatch.setattr(launch, "_run", lambda kernel, *rest: launches.append(kernel.__name__) or run(kernel, *rest))
    monkeypatch.setattr(launch, "default_config", lambda *_, steps, **__: replace(SEVERAL, sequence=steps > 1))
    layer = BNLSTM(2, 9, max_length=5, backend="triton")
    x = torch.randn(3, 4, 2)
    output = layer(x)[0]
    assert launches.count("forward_kernel") == 3
    layer.reset_statistics()

    def broken(*_):
        raise KernelError("forward_kernel: does not compile")

    # nor when the layout of sequence mode is what cannot be compiled, which is said once
    monkeypatch.setattr(launch, "resident_programs", broken)
    monkeypatch.setattr(errors, "_told", set())
    with pytest.warns(RuntimeWarning, match=r"runs in step mode, .* \(forward_kernel: does not compile\)"):
        again = layer(x)[0]
    layer.reset_statistics()
    assert torch.equal(again, output)
    assert torch.equal(layer(x)[0], output)  # a second warning would be an error
    assert launches.count("forward_kernel") == 9
    with use_config(SEVERAL), pytest.raises(KernelError, match="does not compile"):
        layer(x)
    layer.backend = "reference"
    torch.testing.assert_close(output, layer(x)[0], rtol=1e-4, atol=1e-5)


def test_the_interpreter_has_a_layout():
    for hidden in (1, 5, 64, 300):
        config = chosen(INTERPRETER, hidden, 70)
        assert config.sequence == (hidden <= 64)


def test_programs_that_meet_are_launched_together():
    """Cooperatively, so that the driver refuses what would hang; and only with the kernel's own assertions."""
    launch = pytest.importorskip("triton_bnlstm.kernels.launch")
    for sync in ("assert", "drain"):
        options = launch.launch_options(SEVERAL, sync, H100)
        assert options["launch_cooperative_grid"] is True
        assert options.get("debug", False) == (sync == "assert")
    assert "launch_cooperative_grid" not in launch.launch_options(SEVERAL, "none", H100)


@pytest.mark.parametrize(("units", "drains"), [(8, False), (16, True)])
def test_a_barrier_that_cannot_assert_has_a_kernel_behind_it_that_does(monkeypatch, units, drains):
    """With 64 rows and more of a product on Hopper: an assertion in the kernel would make its products wait."""
    launch = pytest.importorskip("triton_bnlstm.kernels.launch")
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    from bench.aot.cases import Case, launches
    from bench.aot.targets import NUMBERS, TARGETS

    layout = Config(sequence=True, units=units, batch_tile=64, inner=64, resident=False, warps=8, stages=2)
    with use_config(layout):
        found = list(launches(TARGETS["sm90"].device, NUMBERS["bf16"], Case("forward/plain", 64, 512, 2)))
    assert found[0].constants["SYNC"] == ("drain" if drains else "assert")
    assert [each.kernel.__name__ for each in found] == ["forward_kernel", *["check_kernel"] * drains]
    if drains:
        assert found[1].grid == (2,)  # a meeting of each direction
        assert found[1].tensors[0] is found[0].tensors[-1]
