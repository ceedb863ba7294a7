"""What the compiler says of layouts: the first one in the model's order that it has nothing against.

`bench.defaults` makes the layouts of it that come with the package.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from triton_bnlstm.kernels.config import BackwardConfig, Config, Device, power_of_two
from triton_bnlstm.tuning import Work, space
from triton_bnlstm.tuning.work import layout_as_json

from .aot.checks import Request, Trial, results
from .aot.targets import Target

MOST_TRIED = 8  # layouts beside the analytic one
# A layout that the model puts further behind would cost more than the few spilled registers that it avoids.
MOST_SLOWER = 1.5


class Size(NamedTuple):
    """One entry to be made.

    Attributes:
        work: what it is looked up by.
        numbers: a name in `NUMBERS`.
        variant: the case that is compiled for it, one of `aot.cases.VARIANTS`.
    """

    work: Work
    numbers: str
    variant: str

    @property
    def name(self) -> str:
        """The text of its key."""
        return str(self.work.key)


def alternatives(device: Device, work: Work) -> list[Config]:
    """Layouts that may take the analytic one's place, in the order of their modelled time.

    They are of the same mode: where sequence mode does not run after all, the launch falls back to steps by itself, and
    a launch for each step costs more than the spilling of a few registers.
    """
    default = space.analytic(device, work)
    assert isinstance(default, Config)
    limit = MOST_SLOWER * space.modelled_seconds(device, work, default)
    found: dict[Config, float] = {}
    for layout in (*space.structures(device, work)[1:], *space.neighbours(default)):
        assert isinstance(layout, Config)
        if layout in found or layout.sequence != default.sequence or not _makes_sense(work, layout):
            continue
        seconds = space.modelled_seconds(device, work, layout)
        if seconds <= limit and space.why_not(device, work, layout) is None:
            found[layout] = seconds
    # of equal ones those with fewer warps last, which wait longer, as the model does not know; else structures first
    return sorted(found, key=lambda layout: (found[layout], layout.warps < default.warps))[:MOST_TRIED]


def _makes_sense(work: Work, layout: Config) -> bool:
    """Whether W_hh stays only where there is another step for it, and no part of a product is smaller than one can be.

    The model knows neither: it has W_hh that stays for nothing.
    """
    if layout.resident and not layout.sequence:
        return False
    if not isinstance(layout, BackwardConfig) or not layout.divided:
        return True
    return layout.product_rows >= 16 and (layout.groups == 1 or 16 * layout.groups <= power_of_two(work.batch))


class Finding(NamedTuple):
    """What the compiler says of a size.

    layout: the first one without a problem, else the analytic one. problem: the analytic layout's, "" for none.
    """

    layout: Config
    problem: str


class CannotCompile(Exception):
    """This Triton cannot compile for a target."""


class CompilerFailed(RuntimeError):
    """The compiling process ends before it compiles anything, and would do so again."""


def compiled(target: Target, wanted: Iterable[Size], cache: Path) -> Iterator[tuple[Size, Finding]]:
    """Each size with what the compiler says, as it comes, from one process after the other: one may be aborted.

    Raises:
        CannotCompile, CompilerFailed: see there.
    """
    left = []
    for size in wanted:
        default = space.analytic(target.device, size.work)
        assert isinstance(default, Config)
        left.append(_Trying(size, [default, *alternatives(target.device, size.work)]))
    while left:
        yield from _of_one_process(target, left, cache)
        left = [each for each in left if each.finding is None]


class _Trying:
    """A size, its layouts, and the problems of those that were tried."""

    def __init__(self, size: Size, layouts: list[Config]) -> None:
        self.size, self.layouts = size, layouts
        self.problems: list[list[str]] = []  # of each layout that was begun
        self.done = False

    @property
    def finding(self) -> Finding | None:
        """None as long as it is not known."""
        if not self.done:
            return None
        problem = "; ".join(self.problems[0])
        clean = not self.problems[-1]
        return Finding(self.layouts[len(self.problems) - 1] if clean else self.layouts[0], problem)

    def trial(self) -> Trial:
        """What is left to be tried."""
        work = self.size.work
        left = [layout_as_json(layout) for layout in self.layouts[len(self.problems) :]]
        return Trial(self.size.numbers, self.size.variant, work.batch, work.hidden, work.directions, left)

    def end(self) -> bool:
        """Nothing is under way: whether it is known now."""
        self.done = bool(self.problems) and (not self.problems[-1] or len(self.problems) == len(self.layouts))
        return self.done


def _of_one_process(target: Target, left: list[_Trying], cache: Path) -> Iterator[tuple[Size, Finding]]:
    """What one process finds until it ends, be it before it is through."""
    before = [len(each.problems) for each in left]
    current = -1

    def finished() -> Iterator[tuple[Size, Finding]]:
        if current >= 0 and left[current].end():
            finding = left[current].finding
            assert finding is not None
            yield left[current].size, finding

    for result in results(Request.of_trials(target.name, [each.trial() for each in left]), cache):
        if "skipped" in result:
            raise CannotCompile(result["skipped"])
        if "trial" not in result:
            raise CompilerFailed("; ".join(result["problems"]))
        if result["trial"] != current:
            yield from finished()
            current = result["trial"]
        trying = left[current]
        if len(trying.problems) == before[current] + result["layout"]:
            trying.problems.append([])
        trying.problems[-1] += [each for each in map(_in_a_line, result["problems"]) if each not in trying.problems[-1]]
    if current < 0:
        raise CompilerFailed("the compiling process said nothing")
    yield from finished()


def _in_a_line(problem: str) -> str:
    """A compiler's message may have a page."""
    text = " ".join(problem.split())
    return text if len(text) <= 160 else f"{text[:159]}…"
