"""The command line of `python -m bench.paper`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path

from bench.__main__ import at_least

from .experiment import NAMES, SIZES, load
from .record import OUT, Record, path_of

DESCRIPTION = """\
Run the experiments of bench/paper/README.md, one command for each figure and table:

  gradient-flow   does gamma = 0.1 keep the gradient alive? (the paper's figure 1)
  convergence     LSTM against BN-LSTM on pixel images and characters
  statistics      statistics over time, and lengths beyond those trained on
  lengths         unequal lengths: every formulation, on three data sets
  evaluation      evaluating worse than training, reproduced and cured
  report          write README's section from the records, and draw all plots again

Each leaves a record (JSON), tables (Markdown) and a plot in bench/results/paper. After an interruption the same command
goes on where it was. Data come with installed packages; nothing is downloaded.
"""

EXAMPLES = """\
examples:
  python -m bench.paper gradient-flow
  python -m bench.paper lengths --size quick --out /tmp/paper     does it run? in a minute or two
  python -m bench.paper convergence --size full --device cuda     the paper's sizes, on a GPU

It needs some packages besides torch: pip install -e '.[paper]'
"""


def parser() -> argparse.ArgumentParser:
    """The arguments. Needs no package, so that --help always works."""
    made = argparse.ArgumentParser(
        prog="python -m bench.paper",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [name.replace("_", "-") for name in NAMES]
    made.add_argument("experiment", choices=(*names, "report"))
    made.add_argument(
        "--size",
        choices=SIZES,
        help="quick: does it run? reduced: for a CPU; full: the paper's, for a GPU (default: reduced, on a GPU full)",
    )
    made.add_argument("--device", help="a torch device, as cpu or cuda:1 (default: cuda if there is one, else cpu)")
    made.add_argument(
        "--processes",
        type=lambda text: at_least(1, text),
        metavar="N",
        help="jobs at a time (default: a core each on a CPU, 4 on a GPU)",
    )
    made.add_argument("--out", type=Path, metavar="DIR", help="where files go (default: bench/results/paper)")
    made.add_argument("--fresh", action="store_true", help="forget earlier results of this experiment and size")
    made.add_argument(
        "--check", action="store_true", help="with report: write nothing; exit 1 if anything is out of date"
    )
    return made


def main(argv: list[str] | None = None) -> int:
    """Run with the arguments `argv`, those of the command line if None. The exit status."""
    argv = sys.argv[1:] if argv is None else argv
    made = parser()
    arguments = made.parse_args(argv)
    try:
        if arguments.experiment == "report":
            from . import report

            return report.main(arguments.out or OUT, arguments.check)
        if arguments.check:
            made.error("--check goes with report")
        return _run(made, arguments, argv)
    except ModuleNotFoundError as error:
        print(f"bench.paper: the package {error.name!r} is missing; run: pip install -e '.[paper]'", file=sys.stderr)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"bench.paper: {error}", file=sys.stderr)
    return 1


def _run(made: argparse.ArgumentParser, arguments: argparse.Namespace, argv: list[str]) -> int:
    import torch
    from rich.console import Console

    from bench.environment import device_info, versions

    from . import figures, runner

    try:
        device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):
            made.error(f"--device {arguments.device}: only cpu and cuda are supported")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        made.error(f"--device {arguments.device}: {str(error).splitlines()[0]}")
    on_cpu = device.type == "cpu"
    size = arguments.size or ("reduced" if on_cpu else "full")
    cores = os.cpu_count() or 1
    processes = arguments.processes or (cores if on_cpu else 4)

    name = arguments.experiment.replace("-", "_")
    experiment = load(name)
    path = path_of(arguments.out or OUT, name, size)
    if arguments.fresh:
        path.unlink(missing_ok=True)
    record = Record(path, name, size, experiment.SIZES[size])
    info = device_info() if not on_cpu else {"name": "CPU", "type": "cpu"}
    record.begin(
        {
            "command": shlex.join(["python", "-m", "bench.paper", *argv]),
            "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "device": {**device_info(), **info},
            "versions": versions(),
            "processes": processes,
        }
    )
    record.write()  # before any work, so that a folder that cannot be written is noticed
    console = Console()
    known = len(record.results)
    console.print(f"{experiment.TITLE}; size {size}: {record.settings['about']}", highlight=False, markup=False)
    if known:
        console.print(f"{known} results are there already", highlight=False)
    runner.run(name, record, str(device), processes, console)
    figures.show(record, console)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin take the cores of other jobs
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("bench.paper: interrupted; the same command goes on from what is done")
