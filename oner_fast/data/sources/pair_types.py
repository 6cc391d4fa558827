"""The pairs of a user's source, and what is left out of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from oner_fast.data import tar_scan
from oner_fast.data.budget import BUDGET

NO_CAPTION = "pictures without a caption"
NO_PICTURE = "captions without a picture"
LONG_CAPTION = f"captions over {BUDGET.caption_bytes:,} bytes"

MISSING = frozenset({"", "nan", "none", "null", "na", "n/a", "<na>"})
"""Captions and paths, in lower case, that programs write where there is none."""


@dataclass(frozen=True)
class Pair:
    """An image and its caption.

    `row` numbers the pair in its source, `image` is the path to read, and `name` is that path as the source gives it,
    with bytes that are not UTF-8 written as `\\xe9`.
    """

    row: int
    image: Path
    name: str
    caption: str


@dataclass(frozen=True)
class LeftOut:
    """A row, file or folder of the source that gives no pair: the rule that it breaks, and one line that names it."""

    rule: str
    line: str


@dataclass(frozen=True)
class Found:
    """The pairs of a source, and all that was left out of it."""

    pairs: list[Pair]
    left_out: list[LeftOut]


def digest(pairs: Sequence[Pair]) -> str:
    """SHA-1, in hexadecimal, of the rows, names and captions."""
    found = hashlib.sha1()
    for pair in pairs:
        found.update(f"{pair.row}\t{pair.name}\t{pair.caption}\n".encode())
    return found.hexdigest()


def plain_caption(text: str) -> str:
    """Join the words of `text` by single blanks; one of `MISSING`, in any case, is no caption and gives ""."""
    caption = " ".join(text.split())
    return "" if caption.lower() in MISSING else caption


def is_too_long(caption: str) -> bool:
    """Tell whether a caption is over the budget of one sample."""
    return len(caption) * 4 > BUDGET.caption_bytes and len(caption.encode()) > BUDGET.caption_bytes


def printable(path: str | os.PathLike[str]) -> str:
    """Write a path as text: bytes that are not UTF-8 as `\\xe9`, and control characters as `\\n`."""
    return tar_scan.printable(os.fsencode(path).decode("utf-8", "backslashreplace"))
