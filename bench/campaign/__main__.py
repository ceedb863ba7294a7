"""The command line of `python -m bench.campaign`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from .. import records
from .runner import Campaign, NoDevice

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


def earlier(out: Path, dry_run: bool) -> list[dict[str, Any]]:
    """Records to go on from: that in `out`, else those that are kept.

    Raises:
        ValueError: one cannot be read.
    """
    own = out / records.FILE
    if own.exists():
        return [records.read(own)]
    return [] if dry_run else [records.read(path) for path in records.committed()]


def main(argv: list[str] | None = None) -> int:
    """Run a campaign. 0; 1 if a GPU test failed; 2 if there is no GPU or an earlier record cannot be read."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(argv)
    # as anybody would give it again: where its files went is nobody's affair
    told = ["DIR" if word == str(arguments.out) else word for word in argv]
    command = shlex.join(["python", "-m", "bench.campaign", *told])
    own = arguments.out / records.FILE
    if own.exists() and not arguments.resume:
        print(f"bench.campaign: {own} is there already: --resume goes on from it", file=sys.stderr)
        return 2
    try:
        found = earlier(arguments.out, arguments.dry_run) if arguments.resume else []
        campaign = Campaign(arguments.out, arguments.minutes, found, arguments.dry_run, command, print)
        status = campaign.run()
    except (ValueError, NoDevice, OSError) as error:
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
