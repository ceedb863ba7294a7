"""What is measured: sizes, precisions and kinds of sequences, the most telling first."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

# inference: evaluation without gradients; forward: in training, keeping what the backward needs; backward: gradients
# of input and parameters; training: both together.
MODES = ("inference", "forward", "backward", "training")
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
LENGTHS = ("equal", "uniform", "vowels")

# Steps of the 270 training sequences of the UCI data set "Japanese Vowels" (Kudo, Toyama, Shimbo 1999), and how many
# sequences have so many: a small real mixture of lengths, of 12 features. Their values are not used, only the lengths.
VOWEL_LENGTHS = {7: 1, 9: 2, 10: 10, 11: 18, 12: 22, 13: 21, 14: 22, 15: 41, 16: 28, 17: 27, 18: 22, 19: 13, 20: 8}
VOWEL_LENGTHS |= {21: 14, 22: 5, 23: 11, 24: 2, 25: 2, 26: 1}


@dataclass(frozen=True)
class Case:
    """One layer to be run, whoever runs it.

    Attributes:
        batch, hidden, steps, columns: B, H, T, D.
        precision: dtype of parameters, inputs and products; "tf32" is float32 with products rounded to TF32.
        layers: stacked layers. bidirectional: two directions. cell_norm: equation (8) of the paper.
        lengths: "equal"; "uniform" from T/4 to T; "vowels", lengths drawn from `VOWEL_LENGTHS`, of which T is the most.
        name: what the paper or the field calls it, if anything.
    """

    batch: int
    hidden: int
    steps: int
    columns: int
    precision: str = "bfloat16"
    layers: int = 1
    bidirectional: bool = False
    cell_norm: bool = False
    lengths: str = "equal"
    name: str = ""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, got {self.precision!r}")
        if self.lengths not in LENGTHS:
            raise ValueError(f"lengths must be one of {LENGTHS}, got {self.lengths!r}")

    @property
    def key(self) -> str:
        """What tells it from every other case, in letters, digits and hyphens."""
        parts = [f"B{self.batch}", f"H{self.hidden}", f"T{self.steps}", f"D{self.columns}", self.precision]
        parts += [f"{self.layers}layers"] if self.layers > 1 else []
        parts += ["bidirectional"] if self.bidirectional else []
        parts += ["cellnorm"] if self.cell_norm else []
        parts += [self.lengths] if self.lengths != "equal" else []
        return "-".join(parts)

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and inputs."""
        return getattr(torch, self.precision.replace("tf32", "float32"))

    @property
    def directions(self) -> int:
        """1 or 2."""
        return 2 if self.bidirectional else 1

    def lengths_of_batch(self) -> list[int] | None:
        """Steps of each sequence, longest first; None where all have T."""
        if self.lengths == "equal":
            return None
        if self.lengths == "uniform":
            shortest = max(1, self.steps // 4)
            spread = [self.steps - (self.steps - shortest) * b / max(1, self.batch - 1) for b in range(self.batch)]
            return [round(length) for length in spread]
        # evenly spaced quantiles of the real lengths, from the longest one on
        real = sorted((n for n, count in VOWEL_LENGTHS.items() for _ in range(count)), reverse=True)
        drawn = [real[b * (len(real) - 1) // max(1, self.batch - 1)] for b in range(self.batch)]
        return [min(length, self.steps) for length in drawn]

    @property
    def rows(self) -> int:
        """Steps of all sequences together."""
        lengths = self.lengths_of_batch()
        return self.steps * self.batch if lengths is None else sum(lengths)

    def as_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)

    def toy(self) -> Case:
        """The same kind of case at a size for Triton's interpreter, which cannot do bfloat16 and knows no TF32."""
        return replace(
            self,
            batch=min(self.batch, 5 if self.batch % 2 else 6),
            hidden=10 if self.hidden & (self.hidden - 1) else 8,
            steps=8 if self.lengths == "vowels" else 3,  # the shortest vowel has 7
            columns=min(self.columns, 4),
            precision="float16" if self.precision == "float16" else "float32",
        )


SMNIST = Case(100, 100, 784, 1, name="sMNIST")
PTB = Case(64, 1000, 100, 50, name="PTB characters")
TEXT8 = Case(128, 2000, 180, 27, name="text8")
HOT = (Case(64, 512, 100, 512), Case(64, 1024, 100, 1024))


def _square(batch: int, hidden: int, steps: int, **options: Any) -> Case:
    return Case(batch, hidden, steps, hidden, **options)


def _ordered() -> list[Case]:
    """All cases, each once, the most telling first."""
    half, whole = HOT
    cases = [*HOT, PTB, SMNIST, TEXT8]
    # step time against H, and against T
    cases += [_square(64, hidden, 100) for hidden in (128, 256, 2048)]
    cases += [_square(64, hidden, steps) for hidden in (512, 1024) for steps in (200, 400, 784)]
    # sequences of different lengths
    cases += [replace(half, lengths="uniform"), replace(whole, lengths="uniform")]
    cases += [Case(64, 128, 26, 12, lengths="vowels", name="Japanese Vowels")]
    cases += [replace(half, precision=precision) for precision in ("float32", "tf32", "float16")]
    cases += [replace(half, cell_norm=True), replace(half, layers=2, bidirectional=True)]
    # batch sizes, odd sizes, and the rest of the grid
    cases += [_square(batch, hidden, 100) for hidden in (512, 1024) for batch in (16, 128, 256)]
    cases += [_square(100, 1000, 100)]
    cases += [replace(whole, precision=precision) for precision in ("float32", "tf32", "float16")]
    cases += [replace(whole, cell_norm=True), replace(PTB, lengths="uniform", name="")]
    cases += [replace(c, precision="float32") for c in (SMNIST, PTB)]
    cases += [_square(batch, hidden, 100) for hidden in (128, 256, 2048) for batch in (16, 128, 256)]
    cases += [_square(32, hidden, 100) for hidden in (128, 256, 512, 1024, 2048)]
    # long sequences; beyond this many units and rows float64 results and their graph do not fit beside everything else
    grid = [(batch, hidden) for hidden in (128, 256, 512, 1024, 2048) for batch in (16, 64, 256)]
    cases += [_square(batch, hidden, 784) for batch, hidden in grid if batch * hidden <= 1 << 17]
    return list(dict.fromkeys(cases))


CASES = _ordered()
