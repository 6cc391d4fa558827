"""Find pictures that are nearly equal: the same drawing or photo at another size, or in another file format.

A fingerprint holds 512 bits, which say where a 16 x 16 grey version grows clearly brighter to the right and downwards
(a difference hash), and the colours of an 8 x 8 version. Two pictures are nearly equal where at most `BITS` bits differ
and no colour of a cell differs by more than `COLOURS` of its range. A picture with fewer than `EDGES` bits set is too
plain to be recognised by them, and resembles none. docs/decisions/044 has the measurements behind these numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BITS = 16
COLOURS = 0.08
EDGES = 8
_SIDE = 16
_BRIGHTER = 8  # of 255: less is the noise of a JPEG's flat parts
_CHUNK = 512
_SET = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.int64)  # set bits of each byte


@dataclass(frozen=True)
class Fingerprint:
    """Fingerprint of a picture: 64 bytes of bits, and 192 bytes of colours (8 x 8 RGB)."""

    bits: bytes
    colours: bytes


def fingerprint(image: Image.Image) -> Fingerprint:
    """Compute the fingerprint of an RGB picture of any size."""
    grey = image.convert("L")
    across = np.asarray(grey.resize((_SIDE + 1, _SIDE), Image.Resampling.BOX), dtype=np.int16)
    down = np.asarray(grey.resize((_SIDE, _SIDE + 1), Image.Resampling.BOX), dtype=np.int16)
    bits = [(across[:, 1:] - across[:, :-1]).ravel(), (down[1:] - down[:-1]).ravel()]
    coarse = image.convert("RGB").resize((_SIDE // 2, _SIDE // 2), Image.Resampling.BOX)
    return Fingerprint(np.packbits(np.concatenate(bits) > _BRIGHTER).tobytes(), coarse.tobytes())


def near_equal(pictures: Sequence[Fingerprint], others: Sequence[Fingerprint]) -> dict[int, int]:
    """Find the pictures that are nearly equal to one of the others.

    Pictures are compared whose numbers of set bits differ by at most `BITS`, 512 with thousands at once: 10,000 with
    1,000 take less than a second, and a million with 10,000 some minutes.

    Returns:
        The place of each such picture, and the place of the first other one that it resembles.
    """
    if not pictures or not others:
        return {}
    ours, our_colours = _arrays(pictures)
    theirs, their_colours = _arrays(others)
    mine, counts = (_SET[bits].sum(1) for bits in (ours, theirs))
    order = np.argsort(counts, kind="stable")
    counts, unpacked = counts[order], np.unpackbits(theirs[order], axis=1).astype(np.float32)
    sorted_rows = np.argsort(mine, kind="stable")
    found: dict[int, int] = {}
    for start in range(0, len(pictures), _CHUNK):
        rows = sorted_rows[start : start + _CHUNK]
        first = int(np.searchsorted(counts, mine[rows[0]] - BITS))
        end = int(np.searchsorted(counts, mine[rows[-1]] + BITS, side="right"))
        both = np.unpackbits(ours[rows], axis=1).astype(np.float32) @ unpacked[first:end].T
        apart = mine[rows, None] + counts[None, first:end] - 2 * both
        alike = (apart <= BITS) & (mine[rows, None] >= EDGES) & (counts[None, first:end] >= EDGES)
        for row, column in np.argwhere(alike).tolist():
            picture, place = int(rows[row]), int(order[first + column])
            if np.abs(our_colours[picture] - their_colours[place]).max() <= 255 * COLOURS:
                found[picture] = min(place, found.get(picture, place))
    return dict(sorted(found.items()))


def _arrays(pictures: Sequence[Fingerprint]) -> tuple[NDArray[np.uint8], NDArray[np.int16]]:
    """Return the packed bits (N, 64), and the colours (N, 192) from 0 to 255."""
    bits, colours = (
        np.frombuffer(b"".join(parts), np.uint8).reshape(len(pictures), -1)
        for parts in zip(*((one.bits, one.colours) for one in pictures), strict=True)
    )
    return bits, colours.astype(np.int16)
