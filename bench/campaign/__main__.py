"""The command line of `python -m bench.campaign`."""

from __future__ import annotations

import argparse
import shlex
import shutil
import signal
import sys
import textwrap
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Measure everything on this machine's GPU: run the tests that need one, measure the device's ceilings, and time this
library against a compiled step in a CUDA graph, eager loops and cuDNN, the most telling cases first, until the time is
up. Needs torch, triton, numpy and pytest, and no network. A case that crashes or hangs is noted, and the rest goes on.

Writes campaign.json and campaign.log into DIR. With --resume the next call goes on where this one ended, from DIR's
campaign.json or, if there is none, from the one in bench/results/ that is of the same device.
"""
EPILOG = """\
To keep the figures, copy both files into bench/results/<device>/ (the last line of the output names it) and run
python -m bench.report, which makes README's tables and plots.
"""


def positive(text: str) -> float:
    """`text` as a number above zero, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = argparse.ArgumentParser(
        prog="python -m bench.campaign",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--minutes", type=positive, default=9.0, metavar="N", help="to be done in (default: 9)")
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="where record and log go")
    made.add_argument("--resume", action="store_true", help="go on from an earlier campaign's record")
    made.add_argument(
        "--dry-run", action="store_true", help="the whole plan at toy sizes on the CPU; its figures mean nothing"
    )
    return made


def earlier(out: Path, dry_run: bool) -> list[tuple[Path, dict[str, Any]]]:
    """Records to go on from, and their files: that in `out`, else those that are kept.

    Raises:
        ValueError: one cannot be read.
    """
    from .. import records

    own = out / records.FILE
    paths = [own] if own.exists() else [] if dry_run else records.committed()
    return [(path, records.read(path)) for path in paths]


def shown(line: str) -> None:
    """A line for the user, broken between words where a terminal is too narrow."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        line = textwrap.fill(line, width, subsequent_indent=" " * 18, break_on_hyphens=False, break_long_words=False)
    print(line, flush=True)


def _terminated(*_: Any) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Run a campaign. 0; 1 if a GPU test failed; 2 if there is no GPU or an earlier record cannot be gone on with."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(argv)
    import torch  # not at the top: --help need not wait for it

    from .. import records
    from .runner import Campaign, NoDevice

    # as anybody would give it again: where its files went is nobody's affair
    flags = [flag for flag in ("resume", "dry_run") if getattr(arguments, flag)]
    words = ["--minutes", f"{arguments.minutes:g}", "--out", "DIR", *("--" + flag.replace("_", "-") for flag in flags)]
    command = shlex.join(["python", "-m", "bench.campaign", *words])
    own = arguments.out / records.FILE
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminated)
    try:
        if own.exists() and not arguments.resume:
            raise ValueError(f"{own} is there already: --resume goes on from it")
        found = earlier(arguments.out, arguments.dry_run) if arguments.resume else []
        if not arguments.dry_run and not torch.cuda.is_available():
            raise NoDevice("no GPU: torch.cuda.is_available() is False; --dry-run walks through the plan without one")
        campaign = Campaign(arguments.out, arguments.minutes, found, arguments.dry_run, command, shown)
        status = campaign.run()
    except OSError as error:
        print(f"bench.campaign: --out {arguments.out}: {error.strerror or error}", file=sys.stderr)
        return 2
    except (ValueError, NoDevice) as error:
        print(f"bench.campaign: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench.campaign: interrupted; what was found is in the record", file=sys.stderr)
        return 130
    where = f"bench/results/{campaign.record['device']['slug']}/"
    print(f"Wrote {own}" + ("; a dry run is not for keeping" if arguments.dry_run else f"; to keep it: {where}"))
    return status


if __name__ == "__main__":
    sys.exit(main())
