"""Is the reference path slow for nothing? `python -m bench.reference_path`

A training step (forward and backward) of three layers of the same size, measured in one process in interleaved rounds:
torch's nn.LSTM, which has no batch norm; the loop that people write, two F.batch_norm calls per step under autograd;
and this library's reference path through its layer, population statistics included. Only the ratios mean something:
this is the eager path that serves where there are no kernels, not the library's performance.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from triton_bnlstm import BNLSTM

from .__main__ import at_least
from .loops import BatchNormLoop


def measure(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each, one call of every step per round, after a warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if number:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.reference_path",
        description="Ratios of a training step on the CPU: nn.LSTM, a loop of F.batch_norm, the reference path. "
        "Takes about a quarter of a minute.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, default, text in (
        ("steps", 100, "time steps T"),
        ("batch", 64, "sequences B"),
        ("input", 64, "features D"),
        ("hidden", 256, "hidden units H"),
        ("threads", 2, "threads of torch"),
        ("rounds", 25, "rounds; the median counts"),
    ):
        parser.add_argument(f"--{name}", type=lambda text: at_least(1, text), default=default, metavar="N", help=text)
    size = parser.parse_args()
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError as error:
        parser.error(f"the package {error.name!r} is missing; run: pip install -e '.[bench]'")
    if size.batch < 2:
        parser.error("--batch: batch norm needs 2 sequences or more")
    torch.set_num_threads(size.threads)
    torch.manual_seed(0)

    x = torch.randn(size.steps, size.batch, size.input, requires_grad=True)
    lengths = torch.linspace(max(1, size.steps // 4), size.steps, size.batch).long()
    lstm = nn.LSTM(size.input, size.hidden)
    looped_layer = BNLSTM(size.input, size.hidden, max_length=size.steps, input_stats="time")
    loop = BatchNormLoop(looped_layer)
    layer = BNLSTM(size.input, size.hidden, max_length=size.steps, input_stats="time", backend="reference")

    def step(forward: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            for p in (x, *lstm.parameters(), *looped_layer.parameters(), *layer.parameters()):
                p.grad = None
            forward().sum().backward()

        return run

    found = measure(
        {
            "nn.LSTM (no batch norm)": step(lambda: lstm(x)[0]),
            "F.batch_norm per step": step(lambda: loop(x, True)),
            "BNLSTM, reference path": step(lambda: layer(x)[0]),
            "BNLSTM, lengths T/4…T": step(lambda: layer(x, lengths=lengths)[0]),
        },
        size.rounds,
    )
    base, looped = list(found.values())[:2]
    title = f"Training step on a CPU, T={size.steps} B={size.batch} D={size.input} H={size.hidden}, ratios"
    table = Table(title=title, caption=f"torch {torch.__version__}, {size.threads} threads, {platform.machine()}")
    table.add_column("layer")
    table.add_column("to nn.LSTM", justify="right")
    table.add_column("to the loop", justify="right")
    for name, seconds in found.items():
        table.add_row(name, f"{seconds / base:.2f}", f"{seconds / looped:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
