"""Of which record a plot is: a line of text inside the picture, which can be read without matplotlib."""

from __future__ import annotations

import struct
from pathlib import Path

KEY = "Description"
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def description(name: str, fingerprint: str) -> str:
    """What a plot of this name says of itself."""
    return f"{name} of the record {fingerprint}"


def described(path: Path) -> str:
    """What the picture says of itself; empty if it says nothing or is no PNG."""
    content = path.read_bytes()
    at = len(_SIGNATURE)
    if not content.startswith(_SIGNATURE):
        return ""
    while at + 8 <= len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        key, _, text = content[at + 8 : at + 8 + length].partition(b"\0")
        if kind == b"tEXt" and key == KEY.encode():
            return text.decode("latin-1")
        at += 12 + length  # length, kind and checksum
    return ""
