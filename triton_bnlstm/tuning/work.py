"""What a kernel has to do, as far as its layout depends on it, and the key that tuned layouts are kept under.

Neither the number of steps nor the lengths themselves are part of it: a layout serves any T from 2 on, and shorter
sequences only mean fewer live rows in the same tiles. Whether lengths are equal at all is: other code runs then
(`FLAGS`). Sizes are put into buckets, so that a new batch size is not a new question each time:

    H   up to 16 as it is; beyond, rounded up to a quarter of the power of two below it: 100 → 112, 1000 → 1024
    B   rounded up to a power of two, at least 16, which is what its tiles are
    D   (columns of the input side's moments) rounded up to a power of two, at least 16

A layout that was found for one size of a bucket is looked at again before another size gets it.
"""

from __future__ import annotations

import hashlib
import io
import tokenize
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..kernels.config import BackwardConfig, Config, MomentsConfig, SaveConfig, power_of_two

Layout = Config | MomentsConfig | SaveConfig

# "save" is no kernel but a training step of several: whether its forward keeps what its backward needs.
KERNELS = ("forward", "backward", "inference", "moments", "save")
# Compiled into a kernel, of each: cell norm; x is one column; unequal lengths leave seats, which the population takes;
# rows that are not live are written too; a step's rows are the states before it; rows less their mean are written.
FLAGS = {
    "forward": ("cell_norm", "narrow", "seats"),
    "backward": ("cell_norm", "fill", "narrow"),
    "inference": ("cell_norm", "narrow"),
    "moments": ("before", "centre"),
    "save": ("cell_norm", "fill", "narrow", "seats"),
}
LAYOUTS: dict[str, type[Layout]] = {
    "forward": Config,
    "inference": Config,
    "backward": BackwardConfig,
    "moments": MomentsConfig,
    "save": SaveConfig,
}
# Of the package `kernels`: files whose code is, or is called by, a kernel.
_FILES = {
    "forward": ("forward", "common", "barrier"),
    "inference": ("inference", "common", "barrier"),
    "backward": ("backward", "gradients", "common", "barrier"),
    "moments": ("input_side", "common"),
    "save": ("forward", "backward", "gradients", "common", "barrier", "input_side"),
}


def hidden_bucket(hidden: int) -> int:
    """The bucket of H: see the module's page."""
    if hidden <= 16:
        return hidden
    quarter = max(power_of_two(hidden) // 8, 1)
    return -(-hidden // quarter) * quarter


def power_bucket(size: int) -> int:
    """The bucket of B and D."""
    return max(16, power_of_two(size))


@lru_cache
def source_hash(kernel: str) -> str:
    """Of the code that a kernel is compiled from, comments and docstrings left out: 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in _FILES[kernel]:
        text = (Path(__file__).parents[1] / "kernels" / f"{name}.py").read_text(encoding="utf-8")
        digest.update("\x00".join(_code(text)).encode())
    return digest.hexdigest()[:12]


def _code(text: str) -> list[str]:
    """Tokens of a Python file but for comments, empty lines and strings that are statements."""
    found: list[str] = []
    begins, skipped = True, False  # a statement begins here; the last one was a string
    for token in _tokens(text):
        if token.type in (tokenize.COMMENT, tokenize.NL):
            continue
        if (begins and token.type == tokenize.STRING) or (skipped and token.type == tokenize.NEWLINE):
            skipped, begins = token.type == tokenize.STRING, True
            continue
        indents = token.type in (tokenize.INDENT, tokenize.DEDENT)
        begins = indents or token.type == tokenize.NEWLINE
        found.append(f"{token.type}" if indents else token.string)
    return found


def _tokens(text: str) -> Iterator[tokenize.TokenInfo]:
    """Of a Python file; an f-string is one of them, as it was before Python 3.12, so that all versions hash alike."""
    begin, end = getattr(tokenize, "FSTRING_START", None), getattr(tokenize, "FSTRING_END", None)
    lines = text.splitlines(keepends=True)
    open_strings: list[tuple[int, int]] = []  # where they begin
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if begin is not None and token.type == begin:
            open_strings.append(token.start)
        elif end is not None and token.type == end:
            start = open_strings.pop()
            if not open_strings:
                part = lines[start[0] - 1 : token.end[0]]
                part[-1] = part[-1][: token.end[1]]
                part[0] = part[0][start[1] :]
                yield tokenize.TokenInfo(tokenize.STRING, "".join(part), start, token.end, token.line)
        elif not open_strings:
            yield token


class Key(NamedTuple):
    """What tuned layouts are kept under, beside the device.

    kernel: one of `KERNELS`. source: hash of its code. dtype, precision: of products, "bfloat16" and "ieee" or "tf32".
    directions: 1 or 2. flags: those of `FLAGS` that are compiled in. hidden, batch, columns: buckets of H, B and D;
    recurrent kernels have no D, that of the input side has no H.
    """

    kernel: str
    source: str
    dtype: str
    precision: str
    directions: int
    flags: tuple[str, ...]
    hidden: int
    batch: int
    columns: int

    def __str__(self) -> str:
        size = f"D{self.columns}" if self.kernel == "moments" else f"H{self.hidden}"
        numbers = "tf32" if self.precision == "tf32" else self.dtype
        parts = [self.kernel, numbers, size, f"B{self.batch}", f"x{self.directions}", *self.flags]
        return f"{' '.join(parts)} @{self.source}"

    def as_json(self) -> dict[str, Any]:
        """Its fields, in JSON's types."""
        return {**self._asdict(), "flags": list(self.flags)}


@dataclass(frozen=True)
class Work:
    """One kernel's work.

    Attributes:
        kernel: one of `KERNELS`.
        hidden, batch: H, which the input side has not (0), and B.
        directions: 1 or 2.
        dtype, precision: of products; "ieee" or "tf32" for float32.
        flags: those of `FLAGS` that are compiled in, sorted.
        columns: D of the input side, 0 for recurrent kernels.
    """

    kernel: str
    hidden: int
    batch: int
    directions: int
    dtype: torch.dtype
    precision: str = "ieee"
    flags: tuple[str, ...] = ()
    columns: int = 0

    @classmethod
    def of_moments(
        cls, columns: int, batch: int, directions: int, dtype: torch.dtype, *, centre: bool, before: bool = False
    ) -> Work:
        """Moments of x [dirs, R, columns]; before: of states [dirs, B + R, columns], of the rows before each step."""
        flags = tuple(name for name, given in (("before", before), ("centre", centre)) if given)
        return cls("moments", 0, batch, directions, dtype, "ieee", flags, columns)

    @property
    def key(self) -> Key:
        """See `Key`."""
        return Key(
            self.kernel,
            source_hash(self.kernel),
            str(self.dtype).removeprefix("torch."),
            self.precision,
            self.directions,
            self.flags,
            hidden_bucket(self.hidden),
            power_bucket(self.batch),
            power_bucket(self.columns) if self.kernel == "moments" else 0,
        )

    @classmethod
    def of_key(cls, key: Key) -> Work:
        """The largest work of a key's buckets."""
        dtype = getattr(torch, key.dtype)
        return cls(key.kernel, key.hidden, key.batch, key.directions, dtype, key.precision, key.flags, key.columns)


def key_of_json(fields: Any) -> Key:
    """A key from its JSON, every field looked at.

    Raises:
        ValueError: it is not one.
    """
    if not isinstance(fields, dict) or not set(Key._fields) <= set(fields):
        raise ValueError("the key lacks fields")
    flags = fields["flags"]
    if fields["kernel"] not in KERNELS:
        raise ValueError(f"kernel: there is no {fields['kernel']!r}")
    if not isinstance(flags, list) or any(flag not in FLAGS[fields["kernel"]] for flag in flags):
        raise ValueError(f"flags: {flags!r} are not those of {fields['kernel']}")
    if not isinstance(fields["source"], str):
        raise ValueError("source: not a text")
    for name, allowed in (("dtype", ("bfloat16", "float16", "float32")), ("precision", ("ieee", "tf32"))):
        if fields[name] not in allowed:
            raise ValueError(f"{name}: {fields[name]!r} is none of {allowed}")
    least = {"directions": 1, "batch": 1, "hidden": 0, "columns": 0}
    least["columns" if fields["kernel"] == "moments" else "hidden"] = 1
    for name, lowest in least.items():
        if type(fields[name]) is not int or not lowest <= fields[name] < (3 if name == "directions" else 1 << 31):
            raise ValueError(f"{name}: {fields[name]!r} is no size")
    values = {name: fields[name] for name in Key._fields}
    return Key(**{**values, "flags": tuple(sorted(flags))})


def layout_of_json(kernel: str, fields: Any) -> Layout:
    """A layout from its JSON, every field looked at.

    Raises:
        ValueError: it is not one.
    """
    kind = LAYOUTS[kernel]
    if not isinstance(fields, dict) or set(fields) != set(kind.__dataclass_fields__):
        raise ValueError(f"a layout of {kernel} has the fields {', '.join(kind.__dataclass_fields__)}")
    for name, value in fields.items():
        wanted = bool if name in ("sequence", "resident", "recompute") else int
        if type(value) is not wanted:
            raise ValueError(f"{name}: {value!r} is no {wanted.__name__}")
        if wanted is int and value > 4096:
            raise ValueError(f"{name}: {value} is out of any bound")
    return kind(**fields)


def layout_as_json(layout: Layout) -> dict[str, Any]:
    """Its fields."""
    return asdict(layout)


def in_words(layout: Layout) -> str:
    """A layout in one line: "sequence, 8 units x 64 rows, inner 64, W_hh stays, 8 warps"."""
    if isinstance(layout, SaveConfig):
        return "recompute" if layout.recompute else "preactivations"
    if isinstance(layout, MomentsConfig):
        return f"{layout.rows} rows x {layout.columns} columns, {layout.warps} warps"
    parts = ["sequence" if layout.sequence else "step", f"{layout.units} units x {layout.batch_tile} rows"]
    if isinstance(layout, BackwardConfig):
        parts.append(f"product {layout.splits} x {layout.groups}")
    stages = f"{layout.stages} stage{'s' * (layout.stages > 1)}"
    parts += [f"inner {layout.inner}", "W_hh stays" if layout.resident else stages]
    return ", ".join([*parts, f"{layout.warps} warps"])
