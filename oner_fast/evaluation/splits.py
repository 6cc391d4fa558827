"""Split validation captions by vocabulary: every word occurs in training captions, or at least one is new."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def words(caption: str) -> list[str]:
    """Words of a caption, lower-cased, in order: runs of letters and digits, with apostrophes inside."""
    return _WORD.findall(unicodedata.normalize("NFC", caption).lower())


def vocabulary(captions: Iterable[str]) -> set[str]:
    """Every word of the given captions."""
    return {word for caption in captions for word in words(caption)}


def split_by_words(captions: Sequence[str], seen: set[str]) -> tuple[list[int], list[int]]:
    """Rows of the captions whose words are all in `seen`, and rows of the others."""
    known: list[int] = []
    new: list[int] = []
    for row, caption in enumerate(captions):
        (known if all(word in seen for word in words(caption)) else new).append(row)
    return known, new
