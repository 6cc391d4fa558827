"""Count the words of some captions that a tokenizer of other data reads in pieces, or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import torch

from oner_fast.data.tokenizer import Tokenizer

MOST = 50_000
"""Captions that are counted."""
_LONG = 10_000


@dataclass(frozen=True)
class Coverage:
    """Words of some captions by the way in which a tokenizer reads them.

    Attributes:
        captions: number of captions.
        words: number of words in them.
        in_pieces: words that it does not know as a whole, and reads as several pieces.
        unknown: words with a character that it lacks, which become [UNK].
    """

    captions: int
    words: int
    in_pieces: int
    unknown: int

    def __str__(self) -> str:
        words = max(self.words, 1)
        return (
            f"of {self.words:,} words in {self.captions:,} captions, {self.in_pieces:,} ({self.in_pieces / words:.1%}) "
            f"are read in pieces, and {self.unknown:,} ({self.unknown / words:.1%}) become [UNK]"
        )


def coverage(tokenizer: Tokenizer, captions: Iterable[str]) -> Coverage:
    """Count how the tokenizer reads the words of the first `MOST` captions."""
    first, total = iter(islice(captions, MOST)), Coverage(0, 0, 0, 0)
    while some := list(islice(first, 1000)):
        text = tokenizer(some, _LONG)
        caption = torch.arange(len(text)).repeat_interleave(text.lengths)
        sizes = torch.unique_consecutive(caption * _LONG + text.word_ids, return_counts=True)[1]
        total = Coverage(
            total.captions + len(some),
            total.words + len(sizes),
            total.in_pieces + int((sizes > 1).sum()),
            total.unknown + int((text.input_ids == tokenizer.unk_id).sum()),
        )
    return total
