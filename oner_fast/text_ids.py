"""Texts in the forms that a loaded model takes: strings, a tensor of ids padded at its end, or packed ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import TypeAlias

import torch
from torch import Tensor

from oner_fast.data.batch import TokenizedText

GivenTexts: TypeAlias = Sequence[str] | Tensor | TokenizedText


class TextTokenizer:
    """Turn texts into one tensor of ids, in the form of open_clip's tokenizers.

    Attributes:
        context_length: number of ids of a text; shorter texts are padded, longer ones cut.
    """

    def __init__(self, encode: Callable[[list[str], int], Tensor], context_length: int, least: int) -> None:
        """Wrap `encode(texts, length)`, which gives (B, length) int64.

        `least` is the smallest length that a caller may ask for.
        """
        self._encode, self.context_length, self._least = encode, context_length, least

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Tokenize one text or several: (B, context_length) int64, on the CPU.

        Args:
            texts: the texts.
            context_length: another number of ids; only OneR takes fewer than its own.

        Raises:
            TypeError: `texts` holds something that is no string.
            ValueError: there is no text, one is not valid Unicode, or the model takes no such `context_length`.
        """
        length = self.context_length if context_length is None else context_length
        if not self._least <= length <= self.context_length:
            raise ValueError(f"context_length must be {self._needed()}, which the model reads, got {length}")
        return self._encode(text_list([texts] if isinstance(texts, str) else texts), length)

    def _needed(self) -> str:
        if self._least == self.context_length:
            return str(self.context_length)
        return f"from {self._least} to {self.context_length}"


def text_list(texts: Sequence[str]) -> list[str]:
    """Return texts as a list.

    Raises:
        TypeError: `texts` is one string, no list, or holds something that is no string; the message says which.
        ValueError: there is no text, or one that is not valid Unicode.
    """
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable) or isinstance(texts, (Set, Mapping)):
        given = "one string" if isinstance(texts, str) else type(texts).__name__
        raise TypeError(f"texts must be a list of strings, got {given}")
    listed = list(texts)
    if not listed:
        raise ValueError("texts must hold at least one text, got none")
    for number, text in enumerate(listed):
        if not isinstance(text, str):
            raise TypeError(f"text {number}: got {type(text).__name__}, need a string")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"text {number}: it holds half a surrogate pair, so it is not valid Unicode")
    return listed


def check_ids(ids: Tensor) -> Tensor:
    """Return ids (B, L) as int64; ValueError or TypeError unless they are whole numbers in two dimensions."""
    if ids.ndim != 2 or 0 in ids.shape:
        raise ValueError(f"tokens need shape (B, L) with at least one text and one id, got {tuple(ids.shape)}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"tokens must be ids of an integer dtype, got {ids.dtype}")
    return ids.long()


def padded(text: TokenizedText, length: int, pad_id: int) -> Tensor:
    """Lay out packed texts of at most `length` ids each as rows (B, length) int64, filled up with `pad_id`."""
    ids = torch.full((len(text), length), pad_id, dtype=torch.int64)
    ids[torch.arange(length) < text.lengths.unsqueeze(1)] = text.input_ids
    return ids


def packed(ids: Tensor, pad_id: int, most: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Remove the padding of ids (B, L): the packed ids (T,) int64, and cu_seqlens (B + 1,) int32.

    Raises:
        ValueError: a text is empty, is longer than `most`, has padding before its end, or an id is no word of the
            model. The message names the text.
        TypeError: the ids are no integers.
    """
    ids = check_ids(ids)
    kept = ids != pad_id
    lengths = kept.sum(1)
    if not bool(lengths.min() > 0):
        raise ValueError(f"text {int(lengths.argmin())} of the tokens holds padding alone")
    if bool(lengths.max() > most):
        raise ValueError(
            f"text {int(lengths.argmax())} of the tokens has {int(lengths.max())} ids, and the model reads {most}"
        )
    if bool((kept[:, 1:] & ~kept[:, :-1]).any()):
        text = int((kept[:, 1:] & ~kept[:, :-1]).any(1).nonzero()[0])
        raise ValueError(f"text {text} of the tokens has the padding {pad_id} before its end; pad at the end")
    words = ids[kept]
    if bool((words < 0).any()) or bool((words >= vocab_size).any()):
        raise ValueError(
            f"the tokens hold ids from {int(words.min())} to {int(words.max())}, and the model embeds 0 to "
            f"{vocab_size - 1}; use its own tokenize"
        )
    return words, torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
