"""The command line of `python -m triton_bnlstm.tuning`."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from . import online, screens
from .clearing import clear, stale_hint
from .doctor import doctor
from .models import DTYPES, LENGTHS, SAME_DTYPES, USUAL_KERNELS, USUAL_LENGTHS
from .screens import DONE, FAILED, INTERRUPTED, NO_DEVICE, USAGE, Failure
from .showing import show
from .transfer import export, take
from .tune_command import tune
from .verifying import verify
from .work import KERNELS

DESCRIPTION = (
    "Layouts of the kernels, tuned for a card and kept in a cache: show them, measure new ones, check them, export and "
    "import them, remove them, and find out why something does not work. Only `tune` and `verify` measure anything."
)
_EXAMPLES = {
    "tune": ("tune --hidden 512 --batch 64 --dtype bf16", "tune --from-model weights.pt --batch 64"),
    "show": ("show --candidates",),
    "verify": ("verify",),
    "export": ("export --out tuned.json",),
    "import": ("import tuned.json",),
    "clear": ("clear --unused --dry-run",),
    "doctor": ("doctor",),
}
_CODES = {
    DONE: "done",
    FAILED: "something is wrong, or failed",
    USAGE: "the command line, or a file that it names, is wrong",
    NO_DEVICE: "there is no device to measure on",
    INTERRUPTED: "interrupted; what was tuned until then is kept",
}
_OF_COMMAND = {
    "show": (DONE, FAILED, USAGE, NO_DEVICE),
    "tune": tuple(_CODES),
    "verify": (DONE, FAILED, USAGE, INTERRUPTED),
    "export": (DONE, FAILED, USAGE),
    "import": (DONE, FAILED, USAGE),
    "clear": (DONE, FAILED, USAGE, NO_DEVICE),
    "doctor": (DONE, FAILED, USAGE),
}


def _epilog(examples: tuple[str, ...], codes: tuple[int, ...]) -> str:
    lines = ["examples:" if len(examples) > 1 else "example:", *(f"  {screens.program()} {each}" for each in examples)]
    lines += ["", "exit codes:", *(f"  {code:<3}  {_CODES[code]}" for code in codes)]
    lines += ["", 'with --json a command that ends early prints {"error": ..., "exit_code": ...}']
    return "\n".join(lines)


class _Help(argparse.HelpFormatter):
    """Descriptions as wide as the terminal, at most 100 columns; what has lines of its own as it is."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=min(100, shutil.get_terminal_size((100, 24)).columns) - 2)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return text
        return textwrap.fill(" ".join(text.split()), width, initial_indent=indent, subsequent_indent=indent)


class _Parser(argparse.ArgumentParser):
    """Whose errors are told as all others are, in JSON where that is asked for."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        raise Failure(f"error: {message}", USAGE)


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(each) for each in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, or several with commas, got {text!r}") from None
    if any(not 0 < size < 1 << 20 for size in sizes):
        raise argparse.ArgumentTypeError(f"must be positive, and below 1048576, got {text!r}")
    return sizes


def _one_size(text: str) -> int:
    sizes = _sizes(text)
    if len(sizes) > 1:
        raise argparse.ArgumentTypeError(f"must be one number, got {text!r}")
    return sizes[0]


def _directions(text: str) -> list[int]:
    if any(each not in ("1", "2") for each in text.split(",")):
        raise argparse.ArgumentTypeError(f"must be 1, 2, or 1,2, got {text!r}")
    return _sizes(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text!r}")
    return seconds


def _names(known: tuple[str, ...], same: dict[str, str] | None = None) -> Callable[[str], list[str]]:
    def split(text: str) -> list[str]:
        names = [(same or {}).get(name, name) for name in text.split(",")]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return split


def parser() -> argparse.ArgumentParser:
    """Of all commands."""
    examples = tuple(each for name in ("tune", "show", "export", "import", "doctor") for each in _EXAMPLES[name])
    epilog = _epilog(examples, tuple(_CODES))
    whole = _Parser(prog=screens.program(), description=DESCRIPTION, epilog=epilog, formatter_class=_Help)
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str, more: str = "") -> argparse.ArgumentParser:
        description = f"{text[0].upper()}{text[1:]}.{' ' if more else ''}{more}"
        epilog = _epilog(_EXAMPLES[name], _OF_COMMAND[name])
        made = commands.add_parser(name, help=text, description=description, epilog=epilog, formatter_class=_Help)
        made.set_defaults(run=run)
        return made

    def add_json(made: argparse.ArgumentParser) -> None:
        made.add_argument("--json", action="store_true", help="one JSON document on stdout")

    def add_kernel(made: argparse.ArgumentParser) -> None:
        several = f"only of these: {', '.join(KERNELS)}"
        made.add_argument("--kernel", type=_names(KERNELS), action="extend", metavar="K[,K]", help=several)

    def add_architecture(made: argparse.ArgumentParser) -> None:
        made.add_argument(
            "--architecture",
            type=lambda text: text.split(","),
            action="extend",
            metavar="A[,A]",
            help="only of devices of these: sm90, gfx942, …",
        )

    made = add("show", show, "list what is known", "Changes nothing.")
    add_kernel(made)
    made.add_argument(
        "--device", choices=("this", "all"), default="all", help="of this machine's GPU, or of all (default)"
    )
    made.add_argument("--shipped", action="store_true", help="all that comes with the package, too, for any device")
    add_architecture(made)
    made.add_argument("--candidates", action="store_true", help="every layout that was tried, its time or its failure")
    add_json(made)

    made = add("tune", tune, "measure layouts on this machine's GPU, and keep the best in the cache")
    group = made.add_argument_group("for which layers")
    group.add_argument("--hidden", type=_sizes, action="extend", metavar="H[,H]", help="hidden sizes")
    group.add_argument("--columns", type=_one_size, metavar="D", help="features of the input (default: H)")
    group.add_argument("--directions", type=_directions, action="extend", metavar="1|2|1,2", help="(default: 1)")
    group.add_argument("--cell-norm", action="store_true", help="with normalised cell states")
    group.add_argument(
        "--from-model", type=Path, metavar="FILE", help="in place of these: a file with a state_dict that has them"
    )
    group = made.add_argument_group("on what data")
    group.add_argument("--batch", type=_sizes, action="extend", metavar="B[,B]", help="sequences (needed)")
    group.add_argument(
        "--dtype",
        type=_names(tuple(DTYPES), SAME_DTYPES),
        action="extend",
        metavar="T[,T]",
        help=f"of weights: {', '.join(DTYPES)}; tf32 is float32 with TF32 products (needed without --from-model)",
    )
    group.add_argument(
        "--lengths",
        type=_names(LENGTHS),
        action="extend",
        metavar="L[,L]",
        help="of a batch's sequences: equal, unequal, or device (unequal, as a tensor on the GPU) "
        f"(default: {','.join(USUAL_LENGTHS)})",
    )
    group = made.add_argument_group("how")
    group.add_argument(
        "--kernel",
        "--kernels",
        dest="kernels",
        type=_names(KERNELS),
        action="extend",
        metavar="K[,K]",
        help=f"of {', '.join(KERNELS)} (default: {','.join(USUAL_KERNELS)})",
    )
    group.add_argument(
        "--seconds", type=_seconds, metavar="N", help=f"at most, for each kernel (default: {online.SECONDS:g})"
    )
    group.add_argument(
        "--dry-run", action="store_true", help="only say what would be measured; needs a GPU, or --architecture"
    )
    group.add_argument("--architecture", metavar="A", help="with --dry-run: plan for this one, as sm90, without a GPU")
    group.add_argument("--force", action="store_true", help="measure again what is known")
    group.add_argument("--device", metavar="cuda:0", help="which GPU (default: the current one)")
    add_json(group)  # type: ignore[arg-type]

    made = add(
        "verify",
        verify,
        "check the cache's entries, on this machine's GPU if there is one",
        "With a GPU each entry of it is compiled, its results are compared with the reference path, and it is timed "
        "against the default; more than 1.05 of its time is a problem. Without a GPU only the files are checked.",
    )
    made.add_argument("--seconds", type=_seconds, metavar="N", help="begin nothing new after so long (default: no end)")
    add_json(made)

    made = add(
        "export",
        export,
        "write measured layouts as the file that the package ships",
        "Of all devices of an architecture in the cache, for the current version of the kernels' code. What is slower "
        "than the default is left out; files that cannot be read are, too, and then the exit code is 1.",
    )
    made.add_argument("--out", type=Path, metavar="FILE", help="replace this file (default: stdout)")
    add_kernel(made)
    add_architecture(made)
    made.add_argument("--with-candidates", action="store_true", help="with every layout that was tried")
    made.add_argument("--json", action="store_true", help="what was written, as JSON on stdout; needs --out")

    made = add(
        "import",
        take,
        "put the measured layouts of files that `export` wrote into the cache",
        "So layouts that were tuned on one machine serve on another with the same device. What is newer stays.",
    )
    text = "what `export` wrote, or a folder, of which all *.json are taken"
    made.add_argument("files", nargs="+", type=Path, metavar="FILE", help=text)
    add_json(made)

    made = add("clear", clear, "remove entries from the cache")
    what = made.add_mutually_exclusive_group()
    what.add_argument("--all", action="store_true", help="everything, with files that were set aside or left behind")
    unused = "what no call uses: entries of another version of the kernels' code, or broken; broken files, also aside"
    what.add_argument("--unused", action="store_true", help=unused)
    what.add_argument("--stale", action="store_true", help=f"{stale_hint()}; of this machine's GPU without --device")
    add_kernel(made)
    made.add_argument(
        "--device", choices=("this", "all"), help="of this machine's GPU, or of all (default, but with --stale)"
    )
    made.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    add_json(made)

    made = add("doctor", doctor, "tell what tuning rests on here, and what of it does not work", "Changes nothing.")
    add_json(made)
    return whole


def main(arguments: list[str] | None = None) -> int:
    """The command line.

    Args:
        arguments: without the program's name; None: those of the process.

    Returns:
        The exit code: see the end of `--help`.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # a terminal that has no µ gets a question mark
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message="triton_bnlstm", category=RuntimeWarning)
        warnings.showwarning = _show_warning
        try:
            asked = parser().parse_args(arguments)
            code = int(asked.run(asked))
            if sys.stdout is not None:
                sys.stdout.flush()
        except SystemExit as end:  # argparse's own, of --help
            return end.code if isinstance(end.code, int) else USAGE
        except Failure as failure:
            return _failed(str(failure), failure.code, arguments)
        except KeyboardInterrupt:
            return _failed("interrupted", INTERRUPTED, arguments)
        except BrokenPipeError:
            _close_quietly()
            return DONE
        except OSError as error:  # without its number
            of = f"{error.filename}: " if error.filename else ""
            return _failed(f"{of}{error.strerror or error}", FAILED, arguments)
        except (RuntimeError, ValueError, ArithmeticError, TypeError, LookupError) as error:
            return _failed(f"{type(error).__name__}: {error}", FAILED, arguments)
    return code


def _failed(message: str, code: int, arguments: list[str] | None) -> int:
    """Say why a command has failed, for scripts, too. The exit code."""
    screens.complain(message)
    if "--json" in (sys.argv[1:] if arguments is None else arguments):
        try:
            screens.write_json({"error": screens.one_line(message).removeprefix("error: "), "exit_code": code})
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:  # nobody reads it, or there is no room for it
            _close_quietly()
    return code


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    screens.complain(f"warning: {str(message).removeprefix('triton_bnlstm: ')}")


def _close_quietly() -> None:
    """Nobody reads stdout any more: Python's own flush at the end must not complain."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
