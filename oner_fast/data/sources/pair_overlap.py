"""Find the training images that are validation images too, or nearly equal to one."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from oner_fast.data.budget import BUDGET
from oner_fast.data.images import decode
from oner_fast.data.pixels import read_file
from oner_fast.data.sources.building import each
from oner_fast.data.sources.near_equal import Fingerprint, fingerprint, near_equal
from oner_fast.data.sources.pair_types import Pair
from oner_fast.data.sources.progress import progress

SMALLEST = 64
"""Side, in pixels, down to which a JPEG is decoded for its fingerprint."""


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


def resembling_images(train: Sequence[Pair], val: Sequence[Pair], workers: int) -> dict[Path, Path]:
    """Return the images of `train` that are nearly equal to one of `val`, and the first such image of `val`.

    Every image is decoded once for it. One that cannot be read resembles none.
    """
    ours, theirs = ([*dict.fromkeys(pair.image for pair in pairs)] for pairs in (train, val))
    if not ours or not theirs:
        return {}
    images = [*ours, *theirs]
    found: dict[Path, Fingerprint] = {}
    with progress("comparing images", len(images)) as advance:
        for image, made in zip(images, each(_fingerprint, images, workers), strict=True):
            advance()
            if made is not None:
                found[image] = made
    ours, theirs = ([image for image in side if image in found] for side in (ours, theirs))
    near = near_equal([found[image] for image in ours], [found[image] for image in theirs])
    return {ours[mine]: theirs[other] for mine, other in near.items()}


def _fingerprint(image: Path) -> Fingerprint | None:
    try:
        return fingerprint(decode(read_file(image), str(image), side=SMALLEST))
    except (OSError, ValueError):
        return None


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
