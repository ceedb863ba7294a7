"""The least time of a layer on a device: what its bytes, its products and its chain of steps take at the ceilings.

A lower bound for one family of designs: programs own hidden units, those of one recurrence read all of the state that
the others wrote, and they meet, or are launched anew, between two steps. It is the largest of three times, each of
which assumes that all else is free:

memory    Compulsory bytes at the rate of a copy: valid rows of input and output once, weights once; backwards input,
          output and its gradient, weights, and the gradients of weights and, unless it is one column, of the input.
          What a backward needs of the forward could be made again, and what lies between layers could stay in a cache.
products  Multiply-adds of W_ih x and W_hh h for valid rows, and backwards twice as many, less those of an input
          gradient that nobody wants, at the rate of a large product in the case's precision.
chain     Steps, one behind the other. A step that follows another costs at least
            - a meeting: a barrier, or a launch; in the backward one or two, by how its product is divided,
            - and then the longer of what goes through L2 and the product of one program on its multiprocessor, since
              a product may begin with the part of the state that is there. Every program reads the whole state of
              the live rows; backwards dz, or its part of dz and partial sums. Weights stay on chip as far as
              `MOST_ON_CHIP` bytes go and come from L2 beyond; in a new launch they come from L2 in any case.
          Gates, norms, latency of memory and everything that a meeting does not include are free. A program alone with
          its recurrence neither meets nor exchanges anything. Of all numbers of programs up to one per multiprocessor,
          of all divisions, and of barrier and launch the least counts, and for each step anew. A product takes the rate
          of the large one divided by the multiprocessors, and no more than its multiply-adds.
          Batch norm needs all rows of a column in one program; at test time its statistics are constants, so there
          a program may also own a part of the rows, whose recurrence then is nobody else's affair.

It is the batch-normalised LSTM's: a plain LSTM may divide its batch among programs that never meet, and go below.

Every transition between steps counts once, so T steps have T − 1; the first step's state is given. Layers above each
other could follow as a wavefront, one transition later each; but a layer on top of two directions needs both to the
end, so there whole chains are added up. Directions run side by side and cost the chain nothing. Sequences of different
lengths: T is that of the longest, and a step has the rows that are still alive in it. Training is forward and backward
behind each other, so each of the three times is the sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from triton_bnlstm.kernels.backward_config import exchanged_bytes

from .cases import MODES, Case
from .ceilings import Ceilings

# Bytes of one multiprocessor that can hold weights, at the very most: 256 KB of registers, 256 KB of shared memory and
# first-level cache, and on B200 256 KB of tensor memory.
MOST_ON_CHIP = 768 * 1024
# Columns of the narrowest matrix instruction: a product with fewer rows of the batch takes as long.
NARROWEST = 8
# Divisions of the backward's product that are looked at: parts of its inner extent, and of its rows.
_SPLITS = (1, 2, 4, 8, 16, 32)
_GROUPS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Floor:
    """Seconds that a case takes at least, by what takes them."""

    memory_seconds: float
    products_seconds: float
    chain_seconds: float

    @property
    def total_seconds(self) -> float:
        """The largest."""
        return max(self.memory_seconds, self.products_seconds, self.chain_seconds)

    @property
    def binds(self) -> str:
        """Which one that is: "memory", "products" or "chain"."""
        parts = {"memory": self.memory_seconds, "products": self.products_seconds, "chain": self.chain_seconds}
        return max(parts, key=parts.__getitem__)

    def __add__(self, other: Floor) -> Floor:
        """Of one behind the other."""
        return Floor(
            self.memory_seconds + other.memory_seconds,
            self.products_seconds + other.products_seconds,
            self.chain_seconds + other.chain_seconds,
        )


@dataclass(frozen=True)
class _Rates:
    """What a step depends on besides its rows: the ceilings, with flops those of one multiprocessor."""

    l2: float
    barrier: float
    launch: float
    flops: float
    multiprocessors: int
    least_rows: int = 1  # of a product


def floor(case: Case, mode: str, ceilings: Ceilings, multiprocessors: int) -> Floor | None:
    """The least time of a case.

    Args:
        case: the layer.
        mode: one of `cases.MODES`.
        ceilings: of the device.
        multiprocessors: how many it has.

    Returns:
        The times, or None where a ceiling that they depend on is not known.

    Raises:
        ValueError: no such mode, or no multiprocessor.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    if multiprocessors < 1:
        raise ValueError(f"multiprocessors must be at least 1, got {multiprocessors}")
    copy, l2 = ceilings.copy_bytes_per_second, ceilings.l2_bytes_per_second
    barrier, launch = ceilings.barrier_seconds, ceilings.launch_seconds
    flops = ceilings.flops.get(case.precision)
    if copy is None or l2 is None or barrier is None or launch is None or flops is None:
        return None
    least_rows = 1 if case.precision == "float32" else NARROWEST
    rates = _Rates(l2, barrier, launch, flops / multiprocessors, multiprocessors, least_rows)

    def of(one: str) -> Floor:
        return Floor(_bytes(case, one) / copy, _flops(case, one) / flops, _chain_seconds(case, one, rates))

    return of("forward") + of("backward") if mode == "training" else of(mode)


def _inputs(case: Case) -> list[int]:
    """Columns that each layer reads."""
    return [case.columns] + [case.directions * case.hidden] * (case.layers - 1)


def _bytes(case: Case, mode: str) -> int:
    size, rows = case.dtype.itemsize, case.rows
    x = rows * case.columns
    y = rows * case.directions * case.hidden
    weights = sum(case.directions * 4 * case.hidden * (columns + case.hidden) for columns in _inputs(case))
    if mode != "backward":
        return size * (x + y + weights)
    return size * (x + 2 * y + 2 * weights + (x if case.columns > 1 else 0))


def _flops(case: Case, mode: str) -> int:
    of_a_column = 2 * case.rows * case.directions * 4 * case.hidden
    once = of_a_column * sum(columns + case.hidden for columns in _inputs(case))
    if mode != "backward":
        return once
    return 2 * once - (of_a_column if case.columns == 1 else 0)


def _chain_seconds(case: Case, mode: str, rates: _Rates) -> float:
    lengths = case.lengths_of_batch() or [case.steps] * case.batch
    longest = max(lengths)
    # live rows of the step that a transition leads to, or comes from in the backward
    alive = Counter(sum(length > t for length in lengths) for t in range(1, longest))

    def step(rows: int) -> float:
        return _step_seconds(mode, case.hidden, rows, case.dtype.itemsize, rates)

    layer = sum(count * step(rows) for rows, count in alive.items())
    if case.bidirectional:
        return case.layers * layer
    return layer + (case.layers - 1) * step(case.batch)


@lru_cache(maxsize=4096)
def _step_seconds(mode: str, hidden: int, rows: int, size: int, rates: _Rates) -> float:
    """The least time of one step after another, over all designs."""
    designs = _backward_designs if mode == "backward" else _forward_designs
    return min(designs(hidden, rows, size, rates, split_rows=mode == "inference"))


def _divisions(extent: int, most: int) -> Iterator[tuple[int, int]]:
    """Ways to share `extent` things among at most `most` programs: the largest share, and how many have one."""
    found = 0
    for programs in range(1, min(extent, most) + 1):
        share = -(-extent // programs)
        if share != found:
            found = share
            yield share, -(-extent // share)


def _forward_designs(hidden: int, rows: int, size: int, rates: _Rates, *, split_rows: bool) -> Iterator[float]:
    """Seconds of a step, by units of a program, rows of a program, and how programs meet."""
    for units, ways in _divisions(hidden, rates.multiprocessors):
        weights = 4 * units * hidden * size
        excess = max(0, weights - MOST_ON_CHIP)
        for tile, tiles in _divisions(rows, rates.multiprocessors // ways) if split_rows else [(rows, 1)]:
            multiplied = 8 * units * hidden * max(tile, rates.least_rows) / rates.flops
            if ways == 1:
                yield max(tiles * excess / rates.l2, multiplied)
                continue
            state = ways * rows * hidden * size
            yield rates.barrier + max((state + ways * tiles * excess) / rates.l2, multiplied)
            yield rates.launch + max((state + ways * tiles * weights) / rates.l2, multiplied)


def _backward_designs(hidden: int, rows: int, size: int, rates: _Rates, *, split_rows: bool) -> Iterator[float]:
    """Seconds of a step, by units of a program, how the product is divided, and how programs meet."""
    for units, ways in _divisions(hidden, rates.multiprocessors):
        multiplied = 8 * units * hidden * rows / rates.flops
        if ways == 1:
            yield max(max(0, 4 * hidden * hidden * size - MOST_ON_CHIP) / rates.l2, multiplied)
            continue
        for splits, groups in product(_SPLITS, _GROUPS):
            if splits * groups > ways or groups > rows:
                continue
            exchanged = exchanged_bytes(hidden, rows, size, units, splits, groups)
            meetings = 2 if splits * groups > 1 else 1
            weights = 4 * units * hidden * groups * size
            excess = max(0, weights - MOST_ON_CHIP)
            yield meetings * rates.barrier + max((exchanged + ways * excess) / rates.l2, multiplied)
            yield meetings * rates.launch + max((exchanged + ways * weights) / rates.l2, multiplied)
