"""What does a call cost besides its kernels? `python -m bench.call_overhead`

Microseconds of the host for one call of a small layer, from its first line to its last, with the launches of kernels
left out: on a GPU what the host needs before the device has all its work, on a CPU (in Triton's interpreter) the same
without the device. Medians of calls in interleaved rounds. It is the host's time, and says nothing of the kernels'.

The last rows are parts of these: what the operators of torch.library, which compilers and exporters need, cost more
than the functions behind them; what an eager call costs for its checks and packing, without layers and learning; and
what the statistics' learning costs, which is made of small operations of torch.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import nn

from .__main__ import at_least


def medians(calls: dict[str, Callable[[], object]], rounds: int, repeats: int = 20) -> dict[str, float]:
    """Median microseconds of each call, `repeats` of every one in each round, after a warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            for _ in range(repeats):
                started = time.perf_counter()
                call()
                if number:
                    times[name].append(1e6 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def measure(rounds: int, device: str) -> dict[str, float]:
    """Microseconds of each row."""
    # here, since TRITON_INTERPRET has to be set before
    from triton_bnlstm import BNLSTM, _base, kept, sequence
    from triton_bnlstm.kernels.run import only_loaded
    from triton_bnlstm.packing import Packing

    torch.set_num_threads(1)
    layer = BNLSTM(8, 8, max_length=4, input_stats="time", backend="triton", device=device)
    frozen = BNLSTM(8, 8, max_length=4, input_stats="time", backend="triton", device=device).eval()
    lstm = nn.LSTM(8, 8, device=device)
    x, h = torch.randn(4, 4, 8, device=device), torch.zeros(1, 4, 8, device=device)
    parameters = kept.list_of_parameters([layer._parameters_of("_l0")])
    setting = kept.Setting(4, False, True, False, True, False, False, 1e-5, "triton", "preactivations", None)

    def evaluated(module: nn.Module) -> object:
        with torch.no_grad():
            return module(x)

    def operator() -> object:
        with torch.no_grad():
            return torch.ops.triton_bnlstm.layer(x, None, h, h, parameters, [], *setting, True)

    def function() -> object:
        with torch.no_grad():
            return sequence.forward(x, None, h, h, parameters, [], setting, keep=True)

    with only_loaded():
        packing = Packing.of_equal_lengths(x.shape[0], x.shape[1], x.device)
        done = layer._through_layers(packing.pack(x), packing, None, [None], regularise=False)
        found = medians(
            {
                "nn.LSTM, training forward (which computes)": lambda: lstm(x),
                "layer, training forward": lambda: layer(x),
                "layer, forward and backward": lambda: layer(x)[0].sum().backward(),
                "layer, evaluation": lambda: evaluated(frozen),
                "operator": operator,
                "function": function,
            },
            rounds,
        )
        nothing = mock.patch.multiple(_base.BNLSTMBase, _through_layers=lambda *_, **__: done, _learn=lambda *_: None)
        with nothing:
            around = medians({"around": lambda: layer(x)}, rounds)["around"]
        learning = medians({"learning": lambda: layer._learn(done.moments, x.shape[1], 0)}, rounds)["learning"]
    found["an operator more than its function"] = found.pop("operator") - found.pop("function")
    found["checks and packing of an eager call"] = around
    found["learning, of a training forward"] = learning
    return found


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.call_overhead",
        description="Microseconds of the host for a call, without its kernels. Takes about ten seconds.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--rounds", type=lambda text: at_least(1, text), default=20, metavar="N", help="of 20 calls each"
    )
    rounds = parser.parse_args().rounds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError as error:
        parser.error(f"the package {error.name!r} is missing; run: pip install -e '.[bench]'")
    where = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    table = Table(title=f"host time of a call, one thread, {platform.machine()}, {where}")
    table.add_column("T = 4, B = 4, D = H = 8, float32")
    table.add_column("µs", justify="right")
    for name, microseconds in measure(rounds, device).items():
        table.add_row(name, f"{microseconds:.0f}")
    console = Console()
    console.print(table)
    console.print(f"torch {torch.__version__}, Triton {triton.__version__}, Python {platform.python_version()}")


if __name__ == "__main__":
    main()
