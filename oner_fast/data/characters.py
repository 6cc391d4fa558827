"""Choose the characters of a word-piece vocabulary, so that rare ones cannot take the place of words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

INNER = "##"
"""The beginning of a piece that is not the first of its word."""


def pieces_of(word: str) -> Iterator[str]:
    """Yield the pieces of one character each that spell `word`: "cat" gives "c", "##a" and "##t"."""
    yield word[0]
    for character in word[1:]:
        yield INNER + character


@dataclass(frozen=True)
class Characters:
    """The pieces of one character that a vocabulary holds.

    Attributes:
        kept: those that begin words, then those within words, each in the order of their code points.
        left_out: how often each other piece occurs.
        words: number of words.
        words_left_out: number of words with a piece that is left out.
        needed: number of most frequent pieces that spell at least half of the words.
    """

    kept: tuple[str, ...]
    left_out: Mapping[str, int]
    words: int
    words_left_out: int
    needed: int

    @classmethod
    def choose(cls, words: Mapping[str, int], vocab_size: int) -> Characters:
        """Choose the pieces for a vocabulary of `vocab_size` from words, which are given with their numbers.

        All are kept where they take at most a quarter of the vocabulary. Else the most frequent ones take at most that
        quarter, and each must be worth its place: it occurs at least twice, and as often as half of the words' mean
        share of a place. Of equally frequent pieces the one with the smaller code points comes first.
        """
        counts: Counter[str] = Counter()
        for word, number in words.items():
            for piece in pieces_of(word):
                counts[piece] += number
        ranked = sorted(counts, key=lambda piece: (-counts[piece], piece))
        total = sum(words.values())
        limit = len(ranked)
        if limit > vocab_size // 4:
            least = max(2.0, total / (2 * max(vocab_size, 1)))
            limit = min(vocab_size // 4, sum(number >= least for number in counts.values()))
        rank = {piece: i for i, piece in enumerate(ranked)}
        spelt: Counter[int] = Counter()  # words by the number of most frequent pieces that they need
        for word, number in words.items():
            spelt[1 + max(rank[piece] for piece in pieces_of(word))] += number
        needed = covered = 0
        for pieces in sorted(spelt):
            if 2 * covered < total:
                covered, needed = covered + spelt[pieces], pieces
        kept = sorted(ranked[:limit], key=lambda piece: (len(piece) > len(INNER), piece))
        missing = sum(number for pieces, number in spelt.items() if pieces > limit)
        return cls(tuple(kept), {piece: counts[piece] for piece in ranked[limit:]}, total, missing, needed)

    def cover(self, word: str) -> bool:
        """Tell whether every character of `word`, one of the words chosen from, is kept."""
        return not any(piece in self.left_out for piece in pieces_of(word))

    def report(self, vocab_size: int) -> str:
        """Say in one sentence what is left out."""
        return (
            f"{len(self.left_out):,} of {len(self.kept) + len(self.left_out):,} pieces of one character are left out, "
            f"since they take at most a quarter of {vocab_size:,} (--tokenizer-vocab); {self.words_left_out:,} of "
            f"{self.words:,} words become [UNK]"
        )
