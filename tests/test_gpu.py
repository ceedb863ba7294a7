"""What only a GPU can show: real sizes and dtypes, sequence mode with its barrier, streams, graphs, the sanitizer."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support import assert_same_buffers, buffers, make_layer
from triton_bnlstm import BNLSTM

pytest.importorskip("triton")

from triton_bnlstm.kernels import launch
from triton_bnlstm.kernels.backward_config import default_backward_config
from triton_bnlstm.kernels.config import BackwardConfig, Config, device_of, use_config
from triton_bnlstm.kernels.forward_config import default_config

pytestmark = pytest.mark.gpu

# Relative RMS over two dozen steps, h carried in the dtype. float32: as in the interpreter, with longer sums. float16
# keeps 11 bits, bfloat16 8: some ten roundings of 2⁻¹² and 2⁻⁹ as steps hand them on. (The reference path in bfloat16,
# on a CPU, is off by up to 3.1e-2 in these cases, the kernels in float16 by 2.7e-3, in the interpreter.) TF32 keeps 11
# bits too, but the tensor cores cut the rest off instead of rounding: both factors of a product, and so its scale, are
# smaller by some 2⁻¹¹ each. Batch statistics take that back, those of evaluation do not: the reference path in float64
# whose factors are cut off so is off by up to 9.4e-3 in evaluation, 3.0e-3 in training.
BOUNDS = {"float32": 1e-5, "tf32": 1.5e-2, "float16": 5e-3, "bfloat16": 5e-2}


@pytest.fixture(params=BOUNDS)
def precision(request):
    """Dtype and bound, with torch's switch for TF32 set as the name says."""
    device = device_of(torch.device("cuda", torch.cuda.current_device()))
    if device.backend == "cuda" and device.capability < 80 and request.param in ("tf32", "bfloat16"):
        pytest.skip(f"no {request.param} below compute capability 8.0")
    torch.set_float32_matmul_precision("high" if request.param == "tf32" else "highest")
    yield getattr(torch, request.param.replace("tf32", "float32")), BOUNDS[request.param]
    torch.set_float32_matmul_precision("highest")


def real_layer(columns: int, hidden: int, dtype: torch.dtype = torch.float32, **options) -> BNLSTM:
    """As initialised, γ = 0.1, with a population from one step."""
    torch.manual_seed(1)
    options.setdefault("input_stats", "time")
    layer = BNLSTM(columns, hidden, max_length=20, backend="triton", device="cuda", **options)
    layer(torch.randn(24, 32, columns, device="cuda"))
    return layer.to(dtype)


def modes(layer: BNLSTM, batch: int, steps: int, dtype: torch.dtype) -> dict[str, tuple[Config, BackwardConfig]]:
    """The layouts forward and backward that this device gets in step mode and, where it can, in sequence mode."""
    device = device_of(torch.device("cuda", torch.cuda.current_device()))
    precision = launch.product_precision(dtype, torch.device("cuda"))
    found = {}
    for name, count in (("sequence", steps), ("step", 1)):
        case = (device, layer.hidden_size, batch, 2 if layer.bidirectional else 1, dtype, precision)
        config = default_config(*case, split_batch=not layer.training, steps=count)
        back = default_backward_config(*case, steps=count)
        if (config.sequence and back.sequence) or name == "step":
            found[name] = config, back
    return found


def run(layer: BNLSTM, x: Tensor, lengths=None) -> list[Tensor]:
    """Outputs, states, gradients and statistics of one call."""
    given = x.clone().requires_grad_()
    output, (h_n, c_n) = layer(given, lengths=lengths)
    weight = torch.linspace(-1, 1, output.shape[-1], device="cuda")
    # a mean over rows: float16 gradients have to stay below 65,504
    loss = ((output * weight).double().sum() + h_n.double().square().sum() + c_n.double().sum()) / output[
        ..., 0
    ].numel()
    gradients = torch.autograd.grad(loss, [given, *layer.parameters()])
    return [output, h_n, c_n, *gradients, *buffers(layer).values()]


SIZES = [(64, 512, 64), (100, 100, 1), (64, 1000, 50), (17, 129, 33), (256, 128, 16), (16, 2048, 64)]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", ["equal", "ragged", "device"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_real_sizes(sizes, kind, training, precision):
    """Every mode against the float64 reference path on the same device, statistics and gradients too."""
    dtype, bound = precision
    batch, hidden, columns = sizes
    steps = 24
    bidirectional = hidden <= 512
    layer = real_layer(columns, hidden, dtype, cell_norm=True, bidirectional=bidirectional).train(training)
    exact = copy.deepcopy(layer).double()
    exact.backend = "reference"
    x = torch.randn(steps, batch, columns, device="cuda", dtype=dtype)
    lengths: Tensor | None = None
    if kind != "equal":
        lengths = torch.randint(1, steps + 1, (batch,))
        lengths[0] = steps
        lengths = lengths.cuda() if kind == "device" else lengths
    expected = run(exact, x.double(), lengths)
    names = ["output", "h_n", "c_n", "x", *dict(layer.named_parameters()), *buffers(layer)]
    for name, (config, back) in modes(layer, batch, steps, dtype).items():
        with use_config(config, backward=back):
            found = run(copy.deepcopy(layer), x, lengths)
        for k, (a, e) in enumerate(zip(found, expected, strict=True)):
            assert a.isfinite().all(), names[k]
            error = (a.double() - e).norm() / e.double().norm().clamp_min(1e-6)
            if columns == 1 and training and names[k].startswith("weight_ih"):
                continue  # normalisation leaves a single column no gradient but what ε and rounding make
            # gradients pass through the rounding twice
            assert error <= (bound if k < 3 else 5 * bound), f"{name} mode, {names[k]}: relative RMS {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_hundred_repeats_give_the_same_bits(dtype):
    layer = real_layer(64, 512, dtype, cell_norm=True, bidirectional=True)
    start = buffers(layer)
    x = torch.randn(30, 64, 64, device="cuda", dtype=dtype)
    lengths = torch.randint(1, 31, (64,))
    first = None
    for _ in range(100):
        layer.load_state_dict({**layer.state_dict(), **{k: v for k, v in start.items() if k != "_skipped_steps"}})
        found = run(layer, x, lengths)  # statistics and gradients too
        first = found if first is None else first
        for a, b in zip(found, first, strict=True):
            assert torch.equal(a, b)


def test_modes_agree_bit_for_bit():
    """The same layouts launched per step and once for all, forward and backward."""
    layer = real_layer(64, 512, torch.float16, bidirectional=True, cell_norm=True)
    x = torch.randn(30, 64, 64, device="cuda", dtype=torch.float16)
    lengths = torch.randint(1, 31, (64,))
    layouts = modes(layer, 64, 30, torch.float16)["sequence"]
    assert all(layout.sequence for layout in layouts)
    found = []
    for sequence in (True, False):
        config, back = (replace(layout, sequence=sequence) for layout in layouts)
        with use_config(config, backward=back):
            found.append(run(copy.deepcopy(layer), x, lengths))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("sizes", [(64, 1024), (64, 512), (256, 512), (100, 100)], ids=str)
@pytest.mark.parametrize("save", ["preactivations", "recompute"])
def test_divisions_of_the_backward_agree(sizes, save):
    """The product whole, in parts of the inner extent and in parts of the rows: the same but for rounding."""
    batch, hidden = sizes
    layer = real_layer(32, hidden, torch.bfloat16, save=save)
    x = torch.randn(16, batch, 32, device="cuda", dtype=torch.bfloat16)
    back = modes(layer, batch, 16, torch.bfloat16)["step"][1]
    expected = run(copy.deepcopy(layer), x)
    for splits, groups in ((1, 1), (4, 1), (8, 1), (4, 2), (2, 4)):
        with use_config(backward=replace(back, units=8, splits=splits, groups=groups)):
            found = run(copy.deepcopy(layer), x)
        for a, e in zip(found, expected, strict=True):
            assert a.isfinite().all()
            assert (a.double() - e.double()).norm() <= 0.02 * e.double().norm().clamp_min(1e-6)  # ten roundings of 2⁻⁹


def test_offsets_beyond_32_bits():
    """W_ih x has more than 2³¹ elements: 2,100 steps of 256 rows of 4,096 columns."""
    layer = real_layer(8, 1024, torch.bfloat16).eval()
    x = torch.randn(2100, 256, 8, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        output = layer(x)[0]
        # the last steps again, from the states before them, in a call of their own
        before = layer(x[:2000])[1]
        again = layer(x[2000:], before, start=2000)[0]
    torch.testing.assert_close(output[2000:], again, rtol=0.02, atol=0.02)
    layer.train()
    with torch.no_grad():
        before = layer(x[:2000])[1]
    # gradients of the last steps depend on nothing before them but the states
    found = []
    for part, hx, start in ((x, None, 0), (x[2000:], before, 2000)):
        given = part.clone().requires_grad_()
        output = layer(given, hx, start=start)[0]
        gradient = torch.zeros_like(output)
        gradient[-100:] = torch.linspace(-1, 1, 1024, device="cuda")
        found.append(torch.autograd.grad(output, given, gradient)[0][-100:].double())
    assert found[1].norm() > 0
    assert (found[0] - found[1]).norm() <= 0.05 * found[1].norm()  # some ten roundings of 2⁻⁹


def test_two_layers_on_two_streams_at_once():
    """Two grids that want the whole device each: neither waits for programs that the other keeps out."""
    layers = [real_layer(64, 1024, torch.bfloat16) for _ in range(2)]
    x = torch.randn(200, 64, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = [copy.deepcopy(layer)(x)[0] for layer in layers]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in layers]
        found = []
        for _ in range(5):
            for layer, stream in zip(layers, streams, strict=True):
                with torch.cuda.stream(stream):
                    found.append(copy.deepcopy(layer)(x)[0])
        torch.cuda.synchronize()
    for k, output in enumerate(found):
        assert torch.equal(output, expected[k % 2])


def test_a_grid_that_is_too_large_is_refused():
    """One program more than fit: an error that says so under "triton", nothing changed, and the device works on."""
    device = device_of(torch.device("cuda", torch.cuda.current_device()))
    config = Config(True, 4, 16, 16, False, 32, 1)  # 32 warps: at most two programs on a multiprocessor
    layer = BNLSTM(2, 4 * (2 * device.multiprocessors + 1), max_length=5, backend="triton", device="cuda")
    x = torch.randn(3, 4, 2, device="cuda")
    with use_config(config), pytest.raises(RuntimeError, match="have to run at the same time"):
        layer(x)
    assert (layer.count_hh_l0 == 0).all()
    assert layer(x)[0].isfinite().all()


def test_the_driver_refuses_what_we_would_let_through(monkeypatch):
    """The second line of defence: a cooperative launch that does not fit fails at once instead of hanging."""
    monkeypatch.setattr(launch, "resident_programs", lambda *_: 1 << 30)
    device = device_of(torch.device("cuda", torch.cuda.current_device()))
    layer = BNLSTM(2, 4 * (3 * device.multiprocessors), max_length=5, backend="triton", device="cuda")
    with use_config(Config(True, 4, 16, 16, False, 32, 1)), pytest.raises(RuntimeError, match="forward_kernel"):
        layer(torch.randn(3, 4, 2, device="cuda"))
    torch.cuda.synchronize()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one direction", "two"])
@pytest.mark.parametrize("mode", ["sequence", "step"])
def test_graph_capture(mode, bidirectional, training):
    """A captured forward replayed on new input equals a call; in training the running statistics advance as well."""
    layer = real_layer(16, 256, torch.bfloat16, bidirectional=bidirectional).train(training)
    twin = copy.deepcopy(layer)
    config = modes(layer, 64, 12, torch.bfloat16)[mode][0]
    x = torch.randn(12, 64, 16, device="cuda", dtype=torch.bfloat16)
    later = torch.randn_like(x)
    with use_config(config), torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            copy.deepcopy(layer)(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = layer(x)[0]
        for batch in (later, x):
            kept = x.clone()
            x.copy_(batch)
            graph.replay()
            assert torch.equal(output, twin(x)[0])
            x.copy_(kept)
    assert_same_buffers(buffers(layer), buffers(twin))


@pytest.mark.parametrize("save", ["preactivations", "recompute"])
@pytest.mark.parametrize("mode", ["sequence", "step"])
def test_graph_capture_of_a_training_step(mode, save):
    """Forward and backward in one graph, replayed on new input."""
    layer = real_layer(16, 256, torch.bfloat16, bidirectional=True, save=save)
    twin = copy.deepcopy(layer)
    config, back = modes(layer, 64, 12, torch.bfloat16)[mode]
    x = torch.randn(12, 64, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    later = torch.randn_like(x)

    def gradients(model):
        with use_config(config, backward=back):
            return torch.autograd.grad(model(x)[0].float().square().sum(), [x, *model.parameters()])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(copy.deepcopy(layer))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(layer)
    for batch in (later, x.detach().clone()):
        with torch.no_grad():
            x.copy_(batch)
        graph.replay()
        for a, e in zip(captured, gradients(twin), strict=True):
            assert torch.equal(a, e)


def losses(layer: BNLSTM, head: torch.nn.Linear, x: Tensor, target: Tensor, steps: int) -> list[float]:
    """Training losses of an overfit run on one batch, with float32 copies of the parameters to be moved."""
    dtype = next(layer.parameters()).dtype
    own = {name: p.detach().float().clone().requires_grad_() for name, p in layer.named_parameters()}
    optimiser = torch.optim.Adam([*own.values(), *head.parameters()], lr=2e-3)
    found = []
    for _ in range(steps):
        output = torch.func.functional_call(layer, {name: p.to(dtype) for name, p in own.items()}, (x,))[0]
        loss = torch.nn.functional.mse_loss(head(output.to(head.weight.dtype)), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(loss.detach())
    return torch.stack(found).tolist()


@pytest.mark.parametrize("save", ["preactivations", "recompute"])
def test_an_overfit_run_follows_the_reference(save):
    """500 steps of Adam in bfloat16 on the kernels against float32 on the reference path.

    Means of 25 steps, in a band of 15 % and 0.5 % of the first one: the reference path itself, in bfloat16 on a CPU,
    keeps within 5.3 % of float32 in this run. Parameters stay float32, since ones that move in units of 2⁻⁹ of
    themselves leave that band after 300 steps whatever computes them.
    """
    torch.manual_seed(2)
    steps, batch, columns, hidden = 30, 64, 16, 128
    x = torch.randn(steps, batch, columns, device="cuda")
    target = torch.randn(steps, batch, 4, device="cuda").cumsum(0) / steps**0.5
    exact = BNLSTM(columns, hidden, max_length=steps, input_stats="time", device="cuda", backend="reference")
    rounded = copy.deepcopy(exact).bfloat16()
    rounded.backend, rounded.save = "triton", save
    curves = []
    for layer in (exact, rounded):
        torch.manual_seed(3)
        head = torch.nn.Linear(hidden, 4, device="cuda")
        dtype = layer.weight_hh_l0.dtype
        curves.append(losses(layer, head, x.to(dtype), target, 500))
    expected, found = (torch.tensor(curve).view(-1, 25).mean(1) for curve in curves)
    assert expected[-1] < 0.5 * expected[0]  # or nothing has been learnt
    assert ((found - expected).abs() <= 0.15 * expected + 0.005 * expected[0]).all(), (expected, found)


def test_no_synchronisation():
    """A training step and an evaluation with lengths on the device never wait for it."""
    layer = real_layer(16, 128, torch.bfloat16, bidirectional=True)
    x = torch.randn(12, 64, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    lengths = torch.randint(1, 13, (64,), device="cuda")
    layer(x, lengths=lengths)[0].sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x, lengths=lengths)[0].sum().backward()
        with torch.no_grad():
            layer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


SANITIZED = """
import torch
from triton_bnlstm import BNLSTM
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for hidden, columns in ((33, 1), (100, 5)):
        options = {"cell_norm": True, "bidirectional": True, "input_stats": ("time", "sequence")[hidden == 33]}
        layer = BNLSTM(columns, hidden, max_length=5, backend="triton", **options)
        layer.to("cuda", dtype)
        for batch in (37, 300):  # of one tile, and walked
            x = torch.randn(6, batch, columns, device="cuda", dtype=dtype)
            lengths = torch.randint(1, 7, (batch,))
            layer.train()(x, lengths=lengths)[0].float().sum().backward()
            layer(x, lengths=lengths.cuda())
            layer.eval()(x, lengths=lengths)
            with torch.no_grad():
                layer(x)
torch.cuda.synchronize()
"""


def test_compute_sanitizer():
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "7", sys.executable, "-c", SANITIZED]
    # an allocation for each tensor: what lies beyond one tensor in torch's cache is no error to the tool
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_oracle_layer_on_the_device():
    """Parameters of order one, as the interpreter's tests have them, in the default layout."""
    layer = make_layer(3, 40, dtype=torch.float32, cell_norm=True, backend="triton").cuda()
    twin = copy.deepcopy(layer).double()
    twin.backend = "reference"
    x = torch.randn(6, 20, 3, device="cuda")
    lengths = torch.randint(1, 7, (20,))
    for a, e in zip(run(layer, x, lengths), run(twin, x.double(), lengths), strict=True):
        assert (a.double() - e).norm() <= 5e-5 * e.double().norm().clamp_min(1e-6)


# Tuning


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    from triton_bnlstm.tuning import choice, online

    monkeypatch.setenv("TRITON_BNLSTM_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_BNLSTM_AUTOTUNE_SECONDS", "15")
    monkeypatch.setattr(online, "_done", set())
    choice.forget()
    yield
    choice.forget()


@pytest.mark.parametrize("kernel", ["forward", "backward", "inference", "moments", "save"])
def test_layouts_are_measured_and_right(kernel, empty_cache):
    """The default and those beside it: none fails at its launch, which the compiler could have told before."""
    from triton_bnlstm.tuning import Work
    from triton_bnlstm.tuning.device import provenance_of
    from triton_bnlstm.tuning.measure import bench_of
    from triton_bnlstm.tuning.tuner import tune

    device = torch.device("cuda", torch.cuda.current_device())
    dtype = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    work = Work(kernel, 512, 64, 1, dtype, columns=512 if kernel == "moments" else 0)
    found = tune(work, bench_of(work, device), by=provenance_of(device), case={}, seconds=25, rounds=5)
    told = {each.failed for each in found.candidates if each.failed}
    assert found.gain is not None, told
    assert found.gain > 0.9
    assert not [why for why in told if "off by" in why], told  # nothing computes something wrong
    assert not [why for why in told if "launch" in why.lower()], told


def test_a_layer_is_tuned_before_its_call(empty_cache):
    """Once; not while a graph is captured; and what is found is what runs, with the same results."""
    from triton_bnlstm.tuning import Work, choice, online

    layer = real_layer(64, 256, autotune="on_miss")
    x = torch.randn(20, 32, 64, device="cuda")
    expected = [tensor.detach().clone() for tensor in run(copy.deepcopy(layer), x)]
    device = torch.device("cuda", torch.cuda.current_device())
    tuned = [Work.of_key(question.key) for question in online._done]
    assert {work.kernel for work in tuned} == {"forward", "backward", "moments"}
    for work in tuned:
        assert choice.choose(device_of(device), work).measured
    before = len(tuned)
    found = run(layer, x)
    assert len(online._done) == before
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    other = real_layer(64, 128, autotune="off")
    for _ in range(3):
        other(x)
    other.autotune = "on_miss"
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        other(x)
    graph.replay()
    torch.cuda.synchronize()
    assert len(online._done) == before


def test_layouts_are_measured_on_a_second_device(empty_cache):
    """torch's own stream for captures belongs to the first device that captured: a graph there would be empty."""
    if torch.cuda.device_count() < 2:
        pytest.skip("two GPUs")
    from triton_bnlstm.tuning.measure import _Timed

    times = []
    for index in range(2):
        device = torch.device("cuda", index)
        x = torch.zeros(1 << 26, device=device)
        timed, key = _Timed(device), object()
        timed.add(key, lambda x=x: x.add_(1))
        before = float(x[0])
        times.append(timed.seconds(key))
        torch.cuda.synchronize(device)
        assert float(x[0]) == before + 2
    assert min(times) > 1e-5  # 512 MB are moved
