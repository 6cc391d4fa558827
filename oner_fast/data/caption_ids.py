"""Ids of captions and of images: equal ones have equal ids, in every process and on every machine."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable

import torch
from torch import Tensor

NO_CAPTION = -1
"""The id of a caption without a word, which equals no other in `oner_fast.ops.mixup_info_nce`."""


def caption_ids(captions: Iterable[str]) -> Tensor:
    """Return a hash of each caption, (B,) int64: not negative, or `NO_CAPTION` for a caption without a word.

    Captions that differ only in case, in white space or in how Unicode composes a letter are equal (our choice).
    """
    return torch.tensor([_caption_id(each) for each in captions], dtype=torch.int64)


def normalised(caption: str) -> str:
    """Fold the case and the white space of a caption, in Unicode's normal form C."""
    folded = unicodedata.normalize("NFC", caption).casefold()
    return " ".join(unicodedata.normalize("NFC", folded).split())


def _caption_id(caption: str) -> int:
    text = normalised(caption)
    return _hash(text.encode("utf-8", "surrogatepass")) if text else NO_CAPTION


def image_id(encoded: bytes) -> int:
    """Return a hash of an image file, not negative: files of the same bytes have the same."""
    return _hash(encoded)


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1
