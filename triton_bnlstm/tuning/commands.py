"""The command line of `python -m triton_bnlstm.tuning`."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from . import choice, contents, machine, models, online, screens
from .doctor import doctor, why_unusable
from .machine import Here
from .models import DTYPES, LENGTHS, SAME_DTYPES, USUAL_KERNELS, USUAL_LENGTHS, Wanted
from .screens import DONE, FAILED, INTERRUPTED, NO_DEVICE, USAGE, Failure
from .store import Store
from .tuner import Tell, nobody
from .upkeep import clear, export, show, take
from .verifying import verify
from .work import KERNELS, Work, in_words

DESCRIPTION = """\
Layouts of the kernels, tuned for a card and kept in a cache: show them, measure new ones, check them, export them,
remove them, and find out why something does not work. Nothing is measured but by `tune` and `verify`.
"""
_EPILOG = f"""\
examples:
  python -m triton_bnlstm.tuning tune --hidden 512 --batch 64 --dtype bf16
  python -m triton_bnlstm.tuning tune --hidden 256,512 --batch 32,64 --dtype bf16 --directions 1,2 --lengths device
  python -m triton_bnlstm.tuning tune --from-model weights.pt --batch 64
  python -m triton_bnlstm.tuning show --candidates
  python -m triton_bnlstm.tuning export --out tuned.json
  python -m triton_bnlstm.tuning import tuned.json
  python -m triton_bnlstm.tuning doctor

exit codes:
  {DONE:<3}  done
  {FAILED:<3}  something is wrong, or failed
  {USAGE:<3}  the command line, or a file that it names, is wrong
  {NO_DEVICE:<3}  there is no device to measure on
  {INTERRUPTED:<3}  interrupted; what was tuned until then is kept
"""


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
    form = argparse.RawDescriptionHelpFormatter
    whole = argparse.ArgumentParser(
        prog=screens.program(),
        description=DESCRIPTION,
        epilog=_EPILOG.replace("python -m triton_bnlstm.tuning", screens.program()),
        formatter_class=form,
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str, more: str = "") -> argparse.ArgumentParser:
        description = f"{text[0].upper()}{text[1:]}.{' ' if more else ''}{more}"
        made = commands.add_parser(name, help=text, description=description)
        made.set_defaults(run=run)
        return made

    def add_json(made: argparse.ArgumentParser) -> None:
        made.add_argument("--json", action="store_true", help="one JSON document on stdout")

    made = add("show", show, "list what is known", "Changes nothing.")
    made.add_argument("--kernel", choices=KERNELS, help="of this one alone")
    made.add_argument("--device", choices=("this", "all"), default="all", help="whose (default: %(default)s)")
    made.add_argument("--shipped", action="store_true", help="all that comes with the package, too, for any device")
    made.add_argument(
        "--architecture", type=lambda text: text.split(","), action="extend", metavar="sm90[,sm80]", help="of these"
    )
    made.add_argument("--candidates", action="store_true", help="every layout that was tried, its time or its failure")
    add_json(made)

    made = add("tune", tune, "measure layouts on this machine's GPU, and keep the best in the cache")
    group = made.add_argument_group("for which layers")
    group.add_argument("--hidden", type=_sizes, action="extend", metavar="H[,H]", help="hidden sizes")
    group.add_argument("--columns", type=_one_size, metavar="D", help="features of the input (default: H)")
    group.add_argument("--directions", type=_directions, action="extend", metavar="1|2", help="(default: 1)")
    group.add_argument("--cell-norm", action="store_true", help="with normalised cell states")
    group.add_argument(
        "--from-model", type=Path, metavar="FILE", help="in place of these: a file with a state_dict that has them"
    )
    group = made.add_argument_group("on what data")
    group.add_argument("--batch", type=_sizes, action="extend", required=True, metavar="B[,B]", help="sequences")
    group.add_argument(
        "--dtype",
        type=_names(tuple(DTYPES), SAME_DTYPES),
        action="extend",
        metavar="|".join(DTYPES),
        help="of weights; tf32 is float32 with TF32 products (default: the model's)",
    )
    group.add_argument(
        "--lengths",
        type=_names(LENGTHS),
        action="extend",
        metavar="|".join(LENGTHS),
        help="of a batch's sequences: all equal, unequal, or unequal as a tensor on the GPU; several with commas "
        f"(default: {','.join(USUAL_LENGTHS)})",
    )
    group = made.add_argument_group("how")
    group.add_argument(
        "--kernels",
        type=_names(KERNELS),
        metavar="K[,K]",
        help=f"of {', '.join(KERNELS)} (default: {','.join(USUAL_KERNELS)})",
    )
    group.add_argument(
        "--seconds", type=_seconds, metavar="N", help=f"at most, for each kernel (default: {online.SECONDS:g})"
    )
    group.add_argument("--dry-run", action="store_true", help="only say what would be measured")
    group.add_argument("--force", action="store_true", help="measure again what is known")
    group.add_argument("--device", metavar="cuda:0", help="which GPU (default: the current one)")
    add_json(group)  # type: ignore[arg-type]

    made = add(
        "verify",
        verify,
        "check the cache's entries, on this machine's GPU if there is one",
        "With a GPU each entry of it is compiled, its results are compared with the reference path, and it is timed "
        "against the default; 5 % slower is a problem. Without one only what can be seen in the files is checked.",
    )
    made.add_argument("--seconds", type=_seconds, metavar="N", help="begin nothing new after so long (default: no end)")
    add_json(made)

    made = add(
        "export",
        export,
        "write measured layouts as the file that the package ships",
        "Of all devices of one architecture in the cache, for the current version of the kernels' code.",
    )
    made.add_argument("--out", type=Path, metavar="FILE", help="replace this file (default: stdout)")
    made.add_argument("--kernel", choices=KERNELS, help="of this one alone")
    made.add_argument("--architecture", metavar="sm90", help="which, if the cache has several")
    made.add_argument("--with-candidates", action="store_true", help="with every layout that was tried")

    made = add(
        "import",
        take,
        "put the measured layouts of files that `export` wrote into the cache",
        "So layouts that were tuned on one machine serve on another with the same device. What is newer stays.",
    )
    made.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what `export` wrote")

    made = add("clear", clear, "remove entries from the cache")
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument("--all", action="store_true", help="everything, with files that were set aside or left behind")
    unused = "what no call uses: of another version of the kernels' code, or unreadable"
    what.add_argument("--unused", action="store_true", help=unused)
    what.add_argument("--stale", action="store_true", help="what was measured with another Triton, and is still used")
    what.add_argument("--kernel", choices=KERNELS, help="of this kernel")
    made.add_argument("--device", choices=("this", "all"), default="all", help="whose (default: %(default)s)")
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
            sys.stdout.flush()
        except SystemExit as end:  # argparse's own
            return end.code if isinstance(end.code, int) else USAGE
        except Failure as failure:
            screens.complain(str(failure))
            return failure.code
        except KeyboardInterrupt:
            screens.complain("interrupted")
            return INTERRUPTED
        except BrokenPipeError:
            _close_quietly()
            return DONE
        except (OSError, RuntimeError, ValueError) as error:
            screens.complain(f"{type(error).__name__}: {error}")
            return FAILED
    return code


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    screens.complain(f"warning: {str(message).removeprefix('triton_bnlstm: ')}")


def _close_quietly() -> None:
    """Nobody reads stdout any more: Python's own flush at the end must not complain."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# Tuning

_FLOAT32 = (
    "hint: layers whose parameters are float32 compute so, also under autocast; "
    'with torch.set_float32_matmul_precision("high") tune --dtype tf32'
)


def tune(arguments: argparse.Namespace) -> int:
    """`tune`: measure one kernel after the other."""
    try:
        seconds = arguments.seconds or online.seconds_allowed()
    except ValueError as error:
        raise Failure(str(error), USAGE) from None
    layers = models.layers_asked(arguments)
    here = machine.find(arguments.device)
    for numbers in dict.fromkeys(layer.numbers for layer in layers):
        dtype, precision = DTYPES[numbers]
        reason = machine.why_not_measured(here.device, dtype)
        if reason is not None:
            raise Failure(f"nothing is measured: {reason}", NO_DEVICE)
        if precision == "tf32" and (here.numbers.backend == "hip" or here.numbers.capability < 80):
            raise Failure(f"{here.name} has no TF32: its products are those of --dtype fp32", USAGE)
    store = _store(here)
    kernels = tuple(arguments.kernels or USUAL_KERNELS)
    batches = dict.fromkeys(arguments.batch)
    lengths = dict.fromkeys(arguments.lengths or USUAL_LENGTHS)
    wanted = [Wanted(batch, each, kernels) for batch in batches for each in lengths]
    all_works = [work for layer in layers for each in wanted for work in models.works_of(layer, each)]
    works = models.without_doubles(all_works)
    if any(layer.numbers == "fp32" for layer in layers):
        print(_FLOAT32, file=sys.stderr)
    known = {work: store.get(work.key, again=True) for work in works}
    settled = {work for work in works if not arguments.force and machine.is_settled(work, here.numbers, known[work])}
    new = [work for work in works if work not in settled]
    most = seconds * len(new)
    plan = f"{screens.count(len(new), 'kernel')}, at most {screens.duration(most)}" if new else "nothing new to try"
    if settled and new:
        plan += f"; for {len(settled)} more there is nothing new to try"
    if arguments.dry_run:
        if arguments.json:
            screens.write_json({"would_measure": [str(work.key) for work in new], "at_most_seconds": most})
            return DONE
        for work in new:
            print(screens.key_words(work.key))
        print(plan)
        return DONE
    print(plan, file=sys.stderr, flush=True)
    return _tune_all(works, here, store, seconds, settled, arguments)


def _store(here: Here) -> Store:
    """The cache, seen to keep what it is given: nobody should wait for results that are lost."""
    store = choice.store_of(here.numbers) if contents.root_of_cache() is not None else None
    if store is None or store.folder is None:
        raise Failure(f"results could not be kept: {contents.why_no_cache()}")
    reason = why_unusable(store.folder)
    if reason is not None:
        raise Failure(f"results could not be kept: {reason}")
    return store


def _tune_all(
    works: list[Work],
    here: Here,
    store: Store,
    seconds: float,
    settled: set[Work],
    arguments: argparse.Namespace,
) -> int:
    done: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    interrupted = False
    try:
        for k, work in enumerate(works):
            name = screens.key_words(work.key)
            try:
                title = f"{k + 1}/{len(works)} {name}"
                with nullcontext(nobody) if work in settled else screens.progress(title, seconds) as tell:
                    told = _tune_one(work, here, store, seconds, tell, arguments)
                line = told.pop("line")
                if not arguments.json:
                    print(line, flush=True)
            except (RuntimeError, ValueError, OSError, Failure) as error:  # TuningError, or what else is in the way
                text = screens.one_line(str(error)).removeprefix(f"{work.key}: ")
                screens.complain(f"{name}: {text}")
                failed.append({"key": str(work.key), "why": text})
            else:
                done.append(told)
    except KeyboardInterrupt:
        interrupted = True
        screens.complain(f"interrupted: {len(done)} of {len(works)} are tuned, and kept in {store.folder}")
    if arguments.json:
        told = {"device": here.identity._asdict(), "cache": str(store.root), "tuned": done, "failed": failed}
        screens.write_json({**told, "interrupted": interrupted})
    return INTERRUPTED if interrupted else FAILED if failed else DONE


def _tune_one(
    work: Work, here: Here, store: Store, seconds: float, tell: Tell, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Measure, and see that it is kept. What `--json` says of it, and its line for the others.

    Raises:
        Failure: it is not kept.
        TuningError: see `online.tune_work`.
    """
    before, began = store.get(work.key, again=True), time.monotonic()
    entry = online.tune_work(
        work,
        here.device,
        here.numbers,
        make=machine.make_bench,
        seconds=seconds,
        force=arguments.force,
        complete=True,
        tell=tell,
        store=store,
    )
    anew = entry != before
    kept = Store(store.identity, store.root).get(work.key)  # as another process sees it
    if kept is None or kept.layout != entry.layout:
        raise Failure(f"its layout could not be kept in {store.folder}")
    return {
        "line": screens.result_line(entry, anew=anew),
        "key": str(work.key),
        "anew": anew,
        "us": screens.time_of(entry),
        "gain": entry.gain,
        "layout_in_words": in_words(entry.layout),
        "tried": len(entry.candidates),
        "failed": sum(bool(each.failed) for each in entry.candidates),
        "seconds": round(time.monotonic() - began, 3),
        "entry": entry.as_json(),
    }
