"""Find the training images that are validation images too."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from oner_fast.data.budget import BUDGET
from oner_fast.data.sources.building import each
from oner_fast.data.sources.pair_types import Pair


def shared_images(train: Sequence[Pair], val: Sequence[Pair], workers: int) -> set[Path]:
    """Return the images of `train` that are in `val`: the same file, or another file with the same bytes.

    Only files of equal sizes are read and compared.
    """
    ours, theirs = _sizes(train), _sizes(val)
    equal = set(ours.values()) & set(theirs.values())
    candidates = [image for image, size in ours.items() if size in equal]
    known = set(each(_digest, [image for image, size in theirs.items() if size in equal], workers))
    digests = zip(candidates, each(_digest, candidates, workers), strict=True)
    return {image for image, digest in digests if digest is not None and digest in known}


def _sizes(pairs: Sequence[Pair]) -> dict[Path, int]:
    """Map each image that can be read within the budget to its size in bytes."""
    return {image: size for image in dict.fromkeys(pair.image for pair in pairs) if (size := _size(image))}


def _size(image: Path) -> int:
    """Size of a file in bytes; 0 where it cannot be read within the budget."""
    try:
        status = os.stat(image)
    except (OSError, ValueError):
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) and status.st_size <= BUDGET.image_bytes else 0


def _digest(image: Path) -> bytes | None:
    try:
        with image.open("rb") as file:
            return hashlib.file_digest(file, "sha1").digest()
    except OSError:
        return None
