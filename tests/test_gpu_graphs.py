"""Training steps in CUDA graphs: what a replay does is what a call does, and neither waits nor allocates."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from tests.support import assert_same_buffers, buffers

pytest.importorskip("triton")

from tests.test_gpu import modes, real_layer
from triton_bnlstm import BNLSTM, use_backend
from triton_bnlstm.kernels.config import use_config

pytestmark = [
    pytest.mark.gpu,
    # steps before the capture, and those that replays are compared with, are meant to run without a graph
    pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True"),
]

STEPS, BATCH, COLUMNS, HIDDEN = 12, 64, 16, 256
OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3, capturable=True),
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, capturable=True, fused=True),
}


@contextmanager
def beside() -> Iterator[None]:
    """On a stream of its own, as what warms up for a capture has to be."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within it an operation for which the host would wait raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Training:
    """A layer with its optimiser, and one training step of it on tensors that stay in their places."""

    def __init__(self, layer: BNLSTM, optimiser: str, x: Tensor, lengths: Tensor | None) -> None:
        self.layer, self.x, self.lengths = layer, x, lengths
        self.optimiser = OPTIMISERS[optimiser](layer.parameters())

    def step(self) -> Tensor:
        """Forward, loss, backward, optimiser; gives the loss, without its graph."""
        self.optimiser.zero_grad()
        output, (_, c_n) = self.layer(self.x, lengths=self.lengths)
        loss = output.square().mean() + c_n.square().mean()
        loss.backward()
        self.optimiser.step()
        return loss.detach()

    def captured(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A step as a graph, and where its replays leave the loss. No step has been taken."""
        gc.collect()  # what is left of a graph of autograd's would tie parameters to the stream that it was made on
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self.step()
        return graph, loss

    def assert_same(self, other: Training) -> None:
        """Parameters and statistics are, to the bit."""
        pairs = zip(self.layer.named_parameters(), other.layer.parameters(), strict=True)
        for (name, mine), theirs in pairs:
            assert torch.equal(mine, theirs), name
        assert_same_buffers(buffers(self.layer), buffers(other.layer))


def batches(count: int, ragged: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
    """Inputs [count, T, B, D] and lengths [count, B] on the device."""
    x = torch.randn(count, STEPS, BATCH, COLUMNS, device="cuda", dtype=dtype)
    return x, torch.randint(1, STEPS + 1, (count, BATCH), device="cuda") if ragged else None


@pytest.mark.parametrize("kind", ["equal", "device"])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("mode", ["sequence", "step"])
def test_replays_of_a_whole_training_step_are_steps(mode, optimiser, kind):
    """Parameters and running statistics after each replay, on other data and lengths, are those after a step."""
    layer = real_layer(COLUMNS, HIDDEN, bidirectional=True, cell_norm=True)
    xs, lengths = batches(6, kind == "device")
    x, held = xs[0].clone(), None if lengths is None else lengths[0].clone()
    twins = [Training(copy.deepcopy(layer), optimiser, x, held) for _ in range(2)]
    layouts = modes(layer, BATCH, STEPS, torch.float32)
    if mode not in layouts:
        pytest.skip("no sequence mode here")
    config, back = layouts[mode]
    with use_config(config, backward=back):
        for twin in twins:  # the optimiser's state has to be there before a capture
            with beside():
                for _ in range(3):
                    twin.step()
        graph, loss = twins[0].captured()
        twins[0].assert_same(twins[1])  # a capture is no step
        start = buffers(twins[0].layer)
        for k in range(1, 6):
            x.copy_(xs[k])
            if held is not None and lengths is not None:
                held.copy_(lengths[k])
            graph.replay()
            assert torch.equal(loss, twins[1].step()), k
            twins[0].assert_same(twins[1])
    moved = buffers(twins[0].layer)
    for name in ("mean_hh_l0", "var_c_l0_reverse", "mean_ih_l0"):
        assert not torch.equal(moved[name], start[name]), name
    assert moved["rows"] == BATCH
    assert moved["_skipped_steps"] == 0


def test_a_replay_on_bad_data_leaves_the_statistics():
    """The guard is on the device; what was skipped is told when the mode changes."""
    layer = real_layer(COLUMNS, HIDDEN)
    x = batches(1, False)[0][0]
    with beside(), torch.no_grad():
        layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        layer(x)
    graph.replay()
    before = buffers(layer)
    x[3, 5] = float("nan")
    graph.replay()
    graph.replay()
    after = buffers(layer)
    assert after.pop("_skipped_steps") == 2
    before.pop("_skipped_steps")
    assert_same_buffers(before, after)
    with pytest.warns(RuntimeWarning, match=r"2 training step\(s\)"):
        layer.eval()


def test_noise_is_new_in_each_replay():
    """Initial noise and dropout come from torch's generator, which graphs know."""
    layer = real_layer(COLUMNS, HIDDEN, num_layers=2, initial_noise=0.5, dropout=0.3)
    x = batches(1, False)[0][0]
    with beside(), torch.no_grad():
        layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        output = layer(x)[0]
    found = []
    for _ in range(3):
        graph.replay()
        found.append(output.clone())
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


@pytest.mark.parametrize("kind", ["equal", "device"])
def test_a_captured_evaluation_follows_the_statistics(kind):
    """Nothing resolved earlier is in the graph, and nothing of the graph is used after it."""
    layer = real_layer(COLUMNS, HIDDEN, bidirectional=True).eval()
    xs, lengths = batches(3, kind == "device")
    x, held = xs[0].clone(), None if lengths is None else lengths[0].clone()
    with torch.no_grad():
        layer(x, lengths=held)  # resolved outside, too
        with beside():
            layer(x, lengths=held)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = layer(x, lengths=held)[0]
        for k in range(1, 3):
            layer.train()(xs[k])
            layer.eval()
            x.copy_(xs[k])
            if held is not None and lengths is not None:
                held.copy_(lengths[k])
            graph.replay()
            assert torch.equal(output, layer(x, lengths=held)[0]), k
        expected = output.clone()
        del graph, output
        gc.collect()
        torch.cuda.empty_cache()
        assert torch.equal(layer(x, lengths=held)[0], expected)


@pytest.mark.parametrize("kind", ["equal", "device"])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_no_step_waits_for_the_device(backend, kind):
    """Training steps with their optimiser, and evaluations before and after the statistics change."""
    layer = real_layer(COLUMNS, 128, bidirectional=True, num_layers=2, cell_norm=True)
    layer.backend = None
    xs, lengths = batches(3, kind == "device")
    training = Training(layer, "Adam", xs[0].requires_grad_(), None if lengths is None else lengths[0])

    def everything() -> None:
        training.step()
        layer.training = False  # eval() looks whether a step has been skipped
        layer(training.x, lengths=training.lengths)[0].sum().backward()
        with torch.no_grad():
            layer(training.x, lengths=training.lengths)
            layer(training.x)
        layer.training = True

    with use_backend(backend):
        for _ in range(2):
            everything()
        torch.cuda.synchronize()
        with no_waiting():
            for _ in range(3):
                everything()
    torch.cuda.synchronize()
    assert layer._skipped_steps == 0


def test_waiting_is_seen():
    """What the tests above rely on."""
    x = torch.zeros(1, device="cuda")
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        x.item()


@pytest.mark.parametrize("kind", ["equal", "device"])
def test_replays_allocate_nothing(kind):
    layer = real_layer(COLUMNS, HIDDEN, bidirectional=True)
    xs, lengths = batches(4, kind == "device")
    training = Training(layer, "Adam", xs[0].clone(), None if lengths is None else lengths[0].clone())
    with beside():
        for _ in range(3):
            training.step()
    graph, _ = training.captured()
    graph.replay()
    torch.cuda.synchronize()

    def allocations() -> dict[str, int]:
        stats = torch.cuda.memory_stats()
        names = (
            "num_alloc_retries",
            "num_ooms",
            "segment.all.allocated",
            "segment.all.freed",
            "allocation.all.allocated",
        )
        return {name: stats[name] for name in names} | {"now": torch.cuda.memory_allocated()}

    before = allocations()
    for k in range(20):
        training.x.copy_(xs[k % 4])
        if training.lengths is not None and lengths is not None:
            training.lengths.copy_(lengths[k % 4])
        graph.replay()
    torch.cuda.synchronize()
    assert allocations() == before


@pytest.mark.parametrize("save", ["preactivations", "recompute"])
def test_steps_of_changing_sizes_leave_no_memory(save):
    """200 steps without a graph: what is allocated between steps is the same after each round of sizes."""
    layer = real_layer(COLUMNS, 128, torch.bfloat16, bidirectional=True, num_layers=2, save=save)
    optimiser = torch.optim.SGD(layer.parameters(), lr=1e-3, momentum=0.9)

    def step(k: int) -> None:
        steps, batch = 5 + k % 4, (32, 64)[k % 2]
        x = torch.randn(steps, batch, COLUMNS, device="cuda", dtype=torch.bfloat16)
        lengths = (None, torch.randint(1, steps + 1, (batch,)), torch.randint(1, steps + 1, (batch,), device="cuda"))
        layer(x, lengths=lengths[k % 3])[0].float().square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()

    allocated = []
    gc.disable()  # nothing has to wait for it
    try:
        for k in range(200):
            step(k)
            allocated.append(torch.cuda.memory_allocated())
    finally:
        gc.enable()
    assert set(allocated[24:]) == {allocated[24]}  # all sizes come in 12 steps


def test_nothing_is_left_of_a_layer_on_the_device():
    def life() -> None:
        layer = real_layer(COLUMNS, 128, torch.bfloat16, bidirectional=True, cell_norm=True)
        x = torch.randn(6, 32, COLUMNS, device="cuda", dtype=torch.bfloat16)
        layer(x, lengths=torch.randint(1, 7, (32,)))[0].float().sum().backward()
        layer(x, lengths=torch.randint(1, 7, (32,), device="cuda"))  # a graph that nobody runs
        layer.eval()(x)
        with torch.no_grad():
            layer.train()(x, lengths=torch.randint(1, 7, (32,)))

    life()  # cuBLAS gets its workspaces
    gc.collect()
    before = torch.cuda.memory_allocated()
    gc.disable()
    try:
        life()
        assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore")  # dynamo's and inductor's own
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("kind", ["equal", "ragged"])
def test_compiled_steps_are_eager_steps(mode, kind):
    """Also where inductor puts the operators into CUDA graphs of its own."""
    torch._dynamo.reset()
    eager = real_layer(COLUMNS, HIDDEN)
    twin = copy.deepcopy(eager)
    run = torch.compile(twin, fullgraph=True, mode=mode)
    for k in range(5):
        torch.manual_seed(k)
        x = torch.randn(STEPS, BATCH, COLUMNS, device="cuda")
        lengths = torch.randint(1, STEPS + 1, (BATCH,), device="cuda") if kind == "ragged" else None
        torch.compiler.cudagraph_mark_step_begin()
        eager.zero_grad(), twin.zero_grad()
        expected, found = eager(x, lengths=lengths)[0], run(x, lengths=lengths)[0]
        expected.square().mean().backward(), found.square().mean().backward()
        # the same kernels and products; what stands around them may be added up in another order, in float32
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        for mine, theirs in zip(twin.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-6)
    for name, buffer in buffers(eager).items():
        torch.testing.assert_close(buffers(twin)[name], buffer, rtol=1e-4, atol=1e-5, msg=name)
