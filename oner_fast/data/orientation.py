"""Orientation of an image, from its EXIF or XMP metadata. Metadata that cannot be read leave an image as it is."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_XMP = re.compile(rb"""tiff:Orientation(?:\s*=\s*["']|\s*>)\s*([1-8])""")
_INTEGERS = {3: "H", 4: "I", 8: "h", 9: "i"}  # types of a TIFF entry that hold whole numbers


@dataclass(frozen=True)
class Directory:
    """First directory of a TIFF file, which is also the form of EXIF metadata.

    Attributes:
        start: offset of its number of entries.
        counting: length in bytes of that number.
        entries: offset of each entry, with its tag, in order.
        entry_bytes: length of an entry.
        order: byte order, as `struct` writes it.
    """

    start: int
    counting: int
    entries: list[tuple[int, int]]
    entry_bytes: int
    order: str


def directory(data: bytes) -> Directory | None:
    """Find the first directory of a TIFF, as far as its entries are there; None where there is none."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return None
    try:
        big = struct.unpack_from(order + "H", data, 2)[0] == 43
        start = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)[0]
        counting, entry_bytes = (8, 20) if big else (2, 12)
        count = struct.unpack_from(order + ("Q" if big else "H"), data, start)[0]
    except (struct.error, OverflowError):
        return None
    first = start + counting
    count = min(count, (len(data) - first) // entry_bytes, 0xFFFF)
    places = range(first, first + count * entry_bytes, entry_bytes)
    entries = [(place, struct.unpack_from(order + "H", data, place)[0]) for place in places]
    return Directory(start, counting, entries, entry_bytes, order)


def from_exif(exif: bytes) -> int | None:
    """Orientation that EXIF metadata state; None where they state none that can be read."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    found = directory(exif)
    if found is None:
        return None
    orientation = None
    for place, tag in found.entries:
        kind = struct.unpack_from(found.order + "H", exif, place + 2)[0] if tag == TAG else None
        if kind in _INTEGERS:
            value = place + (12 if found.entry_bytes == 20 else 8)
            orientation = struct.unpack_from(found.order + _INTEGERS[kind], exif, value)[0]
    return orientation


def from_profile(text: bytes) -> int | None:
    """Orientation from a PNG's text "Raw profile type exif": a name, a length and hexadecimal digits, line by line."""
    try:
        return from_exif(bytes.fromhex("".join(text.decode("latin-1").split("\n")[3:])))
    except ValueError:
        return None


def from_xmp(xmp: bytes) -> int | None:
    """Orientation that XMP metadata state; None where they state none."""
    found = _XMP.search(xmp)
    return int(found[1]) if found else None


def from_info(info: Mapping[str | tuple[int, int], Any]) -> int | None:
    """Orientation from the metadata that Pillow keeps of an image; EXIF goes before XMP."""
    profile, xmp = info.get("Raw profile type exif"), info.get("xmp") or info.get("XML:com.adobe.xmp")
    orientation = None
    if isinstance(exif := info.get("exif"), bytes):
        orientation = from_exif(exif)
    elif isinstance(profile, str):
        orientation = from_profile(profile.encode("latin-1", "replace"))
    if orientation is None and isinstance(xmp, (bytes, str)):
        orientation = from_xmp(xmp if isinstance(xmp, bytes) else xmp.encode("utf-8", "replace"))
    return orientation


def upright(image: Image.Image, orientation: int | None) -> Image.Image:
    """Turn an image upright. An orientation that is not 2 to 8 leaves it as it is."""
    turn = _TURNS.get(orientation or 1)
    return image if turn is None else image.transpose(turn)
