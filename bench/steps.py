"""Device time of one recurrent step on a GPU: `python -m bench.steps`.

Each case is a layer of T steps, D = H: the kernels in sequence mode and in step mode, forward in training
and in evaluation, and training steps, forward and backward with gradients of everything; and cuDNN's nn.LSTM, which
has no batch norm. All are replayed from CUDA graphs in interleaved rounds; the figure is the median time of a replay
divided by T, the input side and all products included. "Modelled" is what `kernels/backward_config.py` reckons for
the backward: the recurrence's steps, the rest of the bytes at the given memory bandwidth, and the products at the
given rate.

Peak memory is that of one training step outside of a graph, more than what was there before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from triton_bnlstm import BNLSTM, backend_report
from triton_bnlstm.backend import SAVES
from triton_bnlstm.kernels.config import BackwardConfig, Config

# (B, H, modelled µs of a step in sequence mode, forward, on an H100)
CASES = [(64, 512, 3.1), (64, 1024, 4.3), (64, 1000, None), (128, 1024, None), (100, 100, None), (128, 2000, None)]


@contextmanager
def reported(label: str) -> Iterator[None]:
    """What cannot run is told and left out."""
    try:
        yield
    except RuntimeError as error:
        print(f"  {label}: {error}", file=sys.stderr)


def captured(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A graph of one call, warmed up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def replay_times(graphs: dict[str, torch.cuda.CUDAGraph], rounds: int) -> dict[str, float]:
    """Median milliseconds of a replay of each, in rounds that take turns."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(found) for name, found in times.items()}


def graphs_of_case(
    batch: int, hidden: int, steps: int, x: Tensor
) -> tuple[dict[str, torch.cuda.CUDAGraph], dict[str, Any]]:
    """Graphs by provider, and the layouts that were used."""
    from triton_bnlstm.kernels import launch
    from triton_bnlstm.kernels.config import default_config, device_of, use_config

    graphs, layouts = {}, {}
    device = device_of(x.device)
    for mode, training in (("training", True), ("evaluation", False)):
        layer = BNLSTM(hidden, hidden, max_length=steps, backend="triton", device="cuda")
        layer(torch.randn(steps, batch, hidden, device="cuda"))
        layer.to(x.dtype).train(training)
        precision = launch.product_precision(x.dtype, x.device)
        config = default_config(device, hidden, batch, 1, x.dtype, precision, split_batch=not training, steps=steps)
        step = default_config(device, hidden, batch, 1, x.dtype, precision, split_batch=not training, steps=1)
        for name, chosen in (("sequence", config), ("step", replace(step, sequence=False))):
            if name == "sequence" and not config.sequence:
                continue
            label = f"{mode}, {name} mode"
            layouts[label] = asdict(chosen)
            with reported(label), use_config(chosen), torch.no_grad():
                graphs[label] = captured(partial(layer, x))
    lstm = nn.LSTM(hidden, hidden, device="cuda", dtype=x.dtype)
    with torch.no_grad():
        graphs["nn.LSTM (cuDNN, no batch norm)"] = captured(partial(lstm, x))
    return graphs, layouts


def training_step(model: nn.Module, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward; gradients of the input and of all parameters."""
    return torch.autograd.grad(model(x)[0], [x, *model.parameters()], weight)


def graphs_of_training(
    batch: int, hidden: int, steps: int, x: Tensor
) -> tuple[dict[str, torch.cuda.CUDAGraph], dict[str, Any], dict[str, int]]:
    """Graphs of training steps by provider, the backward's layouts, and peak memory in bytes."""
    from triton_bnlstm.kernels import launch
    from triton_bnlstm.kernels.backward_config import default_backward_config
    from triton_bnlstm.kernels.config import default_config, device_of, use_config

    x, weight = x.detach().clone().requires_grad_(), torch.randn_like(x)
    case = (device_of(x.device), hidden, batch, 1, x.dtype, launch.product_precision(x.dtype, x.device))
    calls: dict[str, Callable[[], Any]] = {}
    layouts: dict[str, Any] = {}
    for name, count in (("sequence", steps), ("step", 1)):
        config = default_config(*case, split_batch=False, steps=count)
        layout = default_backward_config(*case, steps=count)
        for save in SAVES:
            layer = BNLSTM(hidden, hidden, max_length=steps, save=save, backend="triton", device="cuda", dtype=x.dtype)
            label = f"training step, {name} mode, {save}"
            layouts[label] = asdict(layout)

            def call(
                layer: BNLSTM = layer, config: Config = config, layout: BackwardConfig = layout
            ) -> tuple[Tensor, ...]:
                with use_config(config, backward=layout):
                    return training_step(layer, x, weight)

            calls[label] = call
    lstm = nn.LSTM(hidden, hidden, device="cuda", dtype=x.dtype)
    calls["nn.LSTM training step (cuDNN, no batch norm)"] = partial(training_step, lstm, x, weight)
    graphs, memory = {}, {}
    for label, run in calls.items():
        with reported(label):
            run()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            memory[label] = torch.cuda.max_memory_allocated() - before
            graphs[label] = captured(run)
    return graphs, layouts, memory


def modelled_backward(batch: int, hidden: int, dtype: torch.dtype, bandwidth: float, rate: float) -> float:
    """Microseconds of a step's backward, save="preactivations", D = H, in the device's default layout.

    Args:
        batch, hidden, dtype: B, H, dtype of the products.
        bandwidth: of the device's memory, bytes a second.
        rate: floating-point operations a second of large products.
    """
    from triton_bnlstm.kernels.backward_config import bytes_around_the_loop, default_backward_config, step_seconds
    from triton_bnlstm.kernels.config import device_of

    device = device_of(torch.device("cuda", torch.cuda.current_device()))
    layout = default_backward_config(device, hidden, batch, 1, dtype, "ieee", steps=2)
    size = dtype.itemsize
    step = step_seconds(device, layout, hidden, batch, size, matrix=device.multiplies(dtype, "ieee"))
    moved = batch * bytes_around_the_loop(hidden, hidden, size, save="preactivations") / bandwidth
    products = 3 * 2 * batch * 4 * hidden * hidden / rate
    return 1e6 * (step + moved + products)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.steps", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100, help="T (default 100)")
    parser.add_argument("--rounds", type=int, default=50, help="timed replays of each (default 50)")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--bandwidth", type=float, default=3.35e12, help="of memory, bytes/s (default: an H100's)")
    parser.add_argument("--rate", type=float, default=6e14, help="of large products, flop/s (default %(default)g)")
    parser.add_argument("--out", type=Path, help="write the figures as JSON here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench.steps: needs a GPU; bench.reference_path times the reference path on a CPU")
    print(backend_report())
    results = []
    for batch, hidden, modelled in CASES:
        x = torch.randn(arguments.steps, batch, hidden, device="cuda", dtype=getattr(torch, arguments.dtype))
        graphs, layouts = graphs_of_case(batch, hidden, arguments.steps, x)
        of_training, layouts_of_training, memory = graphs_of_training(batch, hidden, arguments.steps, x)
        graphs, layouts = graphs | of_training, layouts | layouts_of_training
        backward = modelled_backward(batch, hidden, x.dtype, arguments.bandwidth, arguments.rate)
        print(
            f"\nB = {batch}, H = {hidden}, T = {arguments.steps}; modelled: forward (H100, bfloat16) "
            + (f"{modelled} µs, " if modelled else "unknown, ")
            + f"backward {backward:.1f} µs"
        )
        for name, milliseconds in replay_times(graphs, arguments.rounds).items():
            per_step = milliseconds * 1000 / arguments.steps
            peak = f"{memory[name] / 2**20:8.0f} MB " if name in memory else " " * 12
            print(f"  {name:44} {per_step:8.2f} µs a step {peak} {layouts.get(name, '')}")
            case = {"batch": batch, "hidden": hidden, "steps": arguments.steps, "dtype": arguments.dtype}
            results.append({**case, "provider": name, "us_per_step": per_step, "layout": layouts.get(name)})
            results[-1] |= {"peak_bytes": memory.get(name), "modelled_backward_us": backward}
    if arguments.out:
        report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "results": results}
        arguments.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
