"""Markdown: tables, figures, and text from elsewhere made harmless."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

LIMIT = 160  # characters of a message
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def plain(value: Any, limit: int = LIMIT) -> str:
    """On one line, without control characters, not longer than `limit`."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def escape(value: Any, limit: int = LIMIT) -> str:
    """Text from a record, so that nothing in it is taken for Markdown or HTML."""
    text = plain(value, limit).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|$~])", r"\\\1", text)


def code(value: Any, limit: int = LIMIT, *, in_table: bool = False) -> str:
    """Text from a record in a code span."""
    text = plain(value, limit).replace("`", "'").replace("<!--", "<! --")
    return f"`{text.replace('|', chr(92) + '|') if in_table else text}`"


def number(value: float | None) -> str:
    """Three digits, and all those before the point; a dash for none."""
    if value is None:
        return "–"
    size = abs(value)
    if size >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if size >= 9.995 else f"{value:.2f}" if size >= 1 else f"{value:#.3g}"


def significant(value: float | None) -> str:
    """Three digits, zeros after them; a dash for none."""
    return "–" if value is None else number(float(f"{value:.3g}"))


def decimals(values: Iterable[float]) -> int:
    """As many for all of them as leave the largest three digits."""
    largest = max(map(abs, values), default=0.0)
    return 2 if largest < 9.995 else 1 if largest < 99.95 else 0


def fixed(value: float, places: int) -> str:
    """With so many decimals; what would be nothing then is less than the least that can be shown."""
    text = f"{value:.{places}f}"
    return f"&lt; {10.0**-places:.{places}f}" if value > 0 and not float(text) else text


def rate(value: float, unit: str) -> str:
    """Of something per second, in thousands, millions and so on: 3e12 and "B/s" give 3.00 TB/s."""
    scale, prefix = next((each for each in PREFIXES if value >= each[0] * 0.9995), (1.0, ""))
    return f"{significant(value / scale)} {prefix}{unit}"


def seconds(value: float) -> str:
    """In the unit that suits it."""
    scale, unit = next((each for each in SECONDS if value >= each[0] * 0.9995), SECONDS[-1])
    return f"{significant(value / scale)} {unit}"


def counted(count: int, thing: str) -> str:
    """1 case, 2 cases."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, note: str = "") -> list[str]:
    """Lines of a table, an empty line before and after it.

    Args:
        head, rows: cells, already escaped.
        left: columns that are aligned to the left; figures are to the right.
        note: said above it.
    """
    rule = [":--" if k < left else "--:" for k in range(len(head))]
    lines = [*([f"**{note}**", ""] if note else []), "| " + " | ".join(head) + " |", "|" + "|".join(rule) + "|"]
    return ["", *lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def joined(lines: Iterable[str]) -> str:
    """The lines as a text, one empty line at most between two others."""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
