"""The command line of `python -m bench.report`."""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .text import counted

if TYPE_CHECKING:
    from .campaign import Campaign

ROOT = Path(__file__).parents[2]

DESCRIPTION = """\
Write README's results from bench/results/<device>/campaign.json, and beside each record a page and plots.

README's block between <!-- results --> and <!-- /results --> is replaced, and the page <device>/README.md as a whole.
Plots need matplotlib (pip install -e '.[bench]'); tables and --check do without it.
"""


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = argparse.ArgumentParser(
        prog="python -m bench.report", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--results", type=Path, metavar="DIR", help="folder of the devices (default: bench/results)")
    made.add_argument("--readme", type=Path, metavar="FILE", help="where the block is (default: README.md)")
    made.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if README, pages or plots are not of these records"
    )
    made.add_argument(
        "--allow-dry-run", action="store_true", help="take records without measurements too; needs --readme"
    )
    return made


def main(argv: list[str] | None = None) -> int:
    """Run with the arguments `argv`, those of the command line if None. The exit status."""
    made = parser()
    arguments = made.parse_args(argv)
    if arguments.allow_dry_run and (arguments.readme is None or _is_own(arguments.readme)):
        made.error("--allow-dry-run needs --readme with another file: the project's README holds measurements only")
    try:
        return report(arguments)
    except (OSError, ValueError) as error:
        return _refuse(str(error))


def _is_own(readme: Path) -> bool:
    """Whether it is the project's README, by whatever path or link."""
    own = ROOT / "README.md"
    return readme.resolve() == own.resolve() or (readme.exists() and own.exists() and readme.samefile(own))


def report(arguments: argparse.Namespace) -> int:
    """Write or check. The exit status."""
    from . import page, tables

    campaigns = _campaigns(arguments.results, arguments.allow_dry_run)
    readme = arguments.readme or ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    try:
        new = tables.put(old, tables.block(campaigns, readme.absolute()))
    except ValueError as error:
        raise ValueError(f"{readme}: {error}") from error
    _tell_age(campaigns)
    if arguments.check:
        return _check(readme, old, new, campaigns)
    if new != old:
        readme.write_text(new, encoding="utf-8")
    print(f"{readme}: {'written' if new != old else 'as it was'}, {counted(len(campaigns), 'device')}")
    for campaign in campaigns:
        if (path := page.write(campaign)) is not None:
            print(f"Wrote {path}")
    if not campaigns:
        print(f"no records in {arguments.results or 'bench/results'}/*/campaign.json")
        return 0
    try:
        from . import plots
    except ModuleNotFoundError as error:
        return _refuse(f"no plots: the package {error.name!r} is missing; run: pip install -e '.[bench]'")
    for campaign in campaigns:
        for path in plots.write(campaign):
            print(f"Wrote {path}")
    return 0


def _campaigns(results: Path | None, allow_dry_run: bool) -> list[Campaign]:
    from bench import records

    from .campaign import Campaign, committed

    if results is not None and not results.is_dir():
        raise ValueError(f"--results {results}: no such folder")
    # absolute, so that links from README can be made whatever folder this is run in
    campaigns = [Campaign(path) for path in committed((results or records.RESULTS).absolute())]
    for campaign in campaigns:
        if campaign.dry_run and not allow_dry_run:
            raise ValueError(f"{campaign.path} is a dry run: toy sizes on a CPU, no measurement; it is not for README")
    return campaigns


def _tell_age(campaigns: list[Campaign]) -> None:
    """On the terminal alone: in README it would make every change of a kernel a change of README."""
    from bench import records

    now = records.source()
    for campaign in campaigns:
        if campaign.newest_source and campaign.newest_source != now:
            text = f"measured before the kernels' last change ({campaign.newest_source}, now {now})"
            print(f"bench.report: {campaign.name}: {text}", file=sys.stderr)


def _check(readme: Path, old: str, new: str, campaigns: list[Campaign]) -> int:
    from . import page, png, series

    problems = _differences(readme, old, new)
    for campaign in campaigns:
        path, text = page.path_of(campaign), page.text_of(campaign)
        problems += _differences(path, path.read_text(encoding="utf-8") if path.exists() else "", text)
        given = series.available(campaign)
        for name in series.PLOTS:
            path = campaign.path.parent / name
            if name in given and not path.exists():
                problems.append(f"{path} is missing")
            elif path.exists() and (
                name not in given or png.described(path) != png.description(name, campaign.fingerprint)
            ):
                problems.append(f"{path} is not of this record")
    if problems:
        return _refuse("\n".join([*problems, "run: python -m bench.report"]))
    print(f"{readme} is what the records give, {counted(len(campaigns), 'device')}")
    return 0


def _differences(path: Path, old: str, new: str) -> list[str]:
    if old == new:
        return []
    difference = list(difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=0))
    shown = [line if len(line) < 200 else line[:199] + "…" for line in difference[2:14]]  # without the file names
    return ["\n".join([f"{path} is not what the records give:", *shown])]


def _refuse(why: str) -> int:
    print(f"bench.report: {why}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
