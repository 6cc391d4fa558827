"""The inputs of a step of CLIP: micro-batches of images, and of token ids where a loader's worker can make them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from oner_fast.data.batch import PairBatch, TokenizedText

Texts = Tensor | TokenizedText
Reader = Callable[[list[str]], Texts]
"""Prepares captions for the text tower, without the tower: a loader's worker calls it, so it can be pickled."""


@dataclass(frozen=True)
class ContrastInput:
    """All that a step computes on.

    Attributes:
        images: (B, 3, S, S) uint8 of each micro-batch.
        texts: the captions of each micro-batch; None where the towers must read them.
        lengths: the tokens of each caption; empty where captions are not packed.
    """

    images: tuple[Tensor, ...]
    texts: tuple[Texts, ...] | None
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class ContrastInputs:
    """Make the `ContrastInput` of a batch on the CPU, in the loader's workers: a step then tokenises nothing."""

    accum_freq: int
    reader: Reader | None

    def __call__(self, batch: PairBatch) -> ContrastInput:
        """Split the batch into micro-batches and read their captions."""
        parts = batch.split(self.accum_freq)
        images = tuple(part.images for part in parts)
        if self.reader is None:
            return ContrastInput(images, None)
        texts = tuple(self.reader(part.captions) for part in parts)
        packed = [text for text in texts if isinstance(text, TokenizedText)]
        return ContrastInput(images, texts, tuple(length for text in packed for length in text.lengths.tolist()))
