"""Markdown: tables, folded parts, figures, and text from elsewhere made harmless."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

LIMIT = 160  # characters of a message


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
    """Three digits; a dash for none."""
    if value is None:
        return "–"
    size = abs(value)
    if size >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if size >= 9.995 else f"{value:.2f}" if size >= 1 else f"{value:.3g}"


def mebibytes(value: float | None) -> str:
    """Of a number of bytes."""
    return number(None if value is None else value / 2**20)


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


def details(title: str, lines: Iterable[str]) -> list[str]:
    """A part that readers open if they want it."""
    return ["", "<details>", f"<summary>{title}</summary>", "", *lines, "", "</details>", ""]


def joined(lines: Iterable[str]) -> str:
    """The lines as a text, one empty line at most between two others."""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
