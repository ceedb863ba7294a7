"""Device time of one recurrent step on a GPU: `python -m bench.steps`.

Each case is a layer of T steps in bfloat16, D = H, without gradients: the kernels in sequence mode and in step mode, in
training and in evaluation, and cuDNN's nn.LSTM, which has no batch norm. All are replayed from CUDA graphs in
interleaved rounds; the figure is the median time of a replay divided by T, the input side included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from triton_bnlstm import BNLSTM, backend_report

# (B, H, modelled µs of a step in sequence mode, forward, on an H100)
CASES = [(64, 512, 3.1), (64, 1024, 4.3), (64, 1000, None), (128, 1024, None), (100, 100, None), (128, 2000, None)]


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
            try:
                with use_config(chosen), torch.no_grad():
                    graphs[label] = captured(partial(layer, x))
            except RuntimeError as error:
                print(f"  {label}: {error}", file=sys.stderr)
    lstm = nn.LSTM(hidden, hidden, device="cuda", dtype=x.dtype)
    with torch.no_grad():
        graphs["nn.LSTM (cuDNN, no batch norm)"] = captured(partial(lstm, x))
    return graphs, layouts


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="T (default 100)")
    parser.add_argument("--rounds", type=int, default=50, help="timed replays of each (default 50)")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--out", type=Path, help="write the figures as JSON here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench.steps: needs a GPU; bench.reference_path times the reference path on a CPU")
    print(backend_report())
    results = []
    for batch, hidden, modelled in CASES:
        x = torch.randn(arguments.steps, batch, hidden, device="cuda", dtype=getattr(torch, arguments.dtype))
        graphs, layouts = graphs_of_case(batch, hidden, arguments.steps, x)
        print(
            f"\nB = {batch}, H = {hidden}, T = {arguments.steps}" + (f" (modelled {modelled} µs)" if modelled else "")
        )
        for name, milliseconds in replay_times(graphs, arguments.rounds).items():
            per_step = milliseconds * 1000 / arguments.steps
            print(f"  {name:32} {per_step:8.2f} µs a step  {layouts.get(name, '')}")
            case = {"batch": batch, "hidden": hidden, "steps": arguments.steps, "dtype": arguments.dtype}
            results.append({**case, "provider": name, "us_per_step": per_step, "layout": layouts.get(name)})
    if arguments.out:
        report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "results": results}
        arguments.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
