"""Image files without their metadata, which may be damaged where the pixels are not.

Decoders read the metadata of a file on their way to its pixels and stop at what they do not understand. So a JPEG, PNG
or TIFF is reduced to the parts that decide its pixels, and its orientation is read on the side.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from oner_fast.data import orientation

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_PROFILE, _XMP = b"Raw profile type exif", b"XML:com.adobe.xmp"
_LARGEST_TEXT = 1 << 20  # length of a decompressed text chunk, as in Pillow
_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")  # within a scan, 0xFF is followed by 0 or a restart
_APPLICATION = range(0xE0, 0xF0)
_COMMENT, _SCAN, _END = 0xFE, 0xDA, 0xD9
_ALONE = (0x01, 0xD8)  # markers without content
# Tags of a TIFF that decide its pixels: TIFF 6.0, its supplement on JPEG, and the parameters of LERC.
_TIFF_PIXELS = frozenset(
    (254, 256, 257, 258, 259, 262, 263, 266, 273, 277, 278, 279, 280, 281, 284, 290, 291, 292, 293, 317, 320, 322)
    + (323, 324, 325, 338, 339, 340, 341, 347, *range(512, 522), 529, 530, 531, 532, 50674)
)
_AVIF_EXIF = re.compile(rb"(infe[\x02\x03].{3}(?:.{4}|.{6}))Exif", re.DOTALL)


@dataclass(frozen=True)
class ImageFile:
    """The parts of an image file that decide its pixels.

    Attributes:
        data: the file without its metadata.
        orientation: what EXIF or XMP state, 1 to 8; None where they state nothing, or where Pillow reads them.
        scans: passes over a JPEG's pixels; 1 in other formats.
    """

    data: bytes
    orientation: int | None = None
    scans: int = 1


def pixel_part(data: bytes, tick: Callable[[], None]) -> ImageFile:
    """Reduce a file to the parts that decide its pixels. A file of another form is left as it is.

    Args:
        data: an image file of any format.
        tick: called for each part of the file; an exception of it ends the search.
    """
    try:
        if data.startswith(b"\xff\xd8\xff"):
            return _jpeg(data, tick)
        if data.startswith(_PNG):
            return _png(data, tick)
        if data.startswith((b"II", b"MM")):
            return _tiff(data)
    except (struct.error, IndexError):
        pass  # the headers end early, so that the decoder says what is missing
    return ImageFile(data)


def without_avif_exif(data: bytes) -> bytes:
    """Rename the EXIF item of an AVIF file, so that decoders pass over it. Turns stated elsewhere stay."""
    return _AVIF_EXIF.sub(rb"\1free", data)


def _jpeg(data: bytes, tick: Callable[[], None]) -> ImageFile:
    kept = [data[:2]]
    exif, xmp = b"", b""
    place, scans = 2, 0
    while found := _MARKER.search(data, place):
        tick()
        marker = found[1][0]
        start = found.end()
        if marker == _END:
            break
        if marker in _ALONE:
            place = start
            continue
        stop = start + struct.unpack_from(">H", data, start)[0]
        if marker == _SCAN:
            if not scans:
                kept.append(data[found.end() - 2 :])
            scans += 1
        elif not scans and (marker in _APPLICATION or marker == _COMMENT):
            content = data[start + 2 : stop]
            if marker == 0xE1 and content.startswith(b"Exif\0\0"):
                exif += content[6:]
            elif marker == 0xE1 and content.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
                xmp = content
            elif _decides_colours(marker, content):
                kept.append(data[start - 2 : stop])
        elif not scans:
            kept.append(data[start - 2 : stop])
        place = stop
    if not scans:
        return ImageFile(data)
    turned = orientation.from_exif(exif)
    return ImageFile(b"".join(kept), orientation.from_xmp(xmp) if turned is None else turned, scans)


def _decides_colours(marker: int, content: bytes) -> bool:
    """Whether a decoder takes the colour space of a JPEG from this segment."""
    return (marker == 0xE0 and content.startswith(b"JFIF\0") and len(content) >= 14) or (
        marker == 0xEE and content.startswith(b"Adobe") and len(content) >= 12
    )


def _png(data: bytes, tick: Callable[[], None]) -> ImageFile:
    kept: list[bytes | memoryview] = []
    whole = memoryview(data)
    exif: bytes | None = None
    texts: dict[bytes, tuple[bytes, bytes]] = {}
    begin, place = 0, len(_PNG)  # what lies between them is kept
    while place + 8 <= len(data):
        tick()
        length, kind = struct.unpack_from(">I4s", data, place)
        stop = place + 12 + length
        if kind not in _PNG_PIXELS:
            kept.append(whole[begin:place])
            begin = stop
            if kind == b"eXIf":
                exif = data[place + 8 : stop - 4]
            elif kind in (b"tEXt", b"zTXt", b"iTXt"):
                key, _, text = data[place + 8 : stop - 4].partition(b"\0")
                if key in (_PROFILE, _XMP):
                    texts[key] = kind, text
        place = stop
        if kind == b"IEND":
            break
    else:
        place = len(data)  # cut off
    if not kept:
        return ImageFile(data)
    kept.append(whole[begin:place])
    turned = None
    if exif is not None:
        turned = orientation.from_exif(exif)
    elif _PROFILE in texts:
        turned = orientation.from_profile(_text(*texts[_PROFILE]))
    if turned is None and _XMP in texts:
        turned = orientation.from_xmp(_text(*texts[_XMP]))
    return ImageFile(b"".join(kept), turned)


def _text(kind: bytes, content: bytes) -> bytes:
    """Text of a PNG's text chunk, after its key; empty where it cannot be decompressed."""
    if kind == b"tEXt":
        return content
    if kind == b"zTXt":
        compressed, text = True, content[1:]
    else:  # a flag, a method, a language and a translated key come before the text
        compressed, text = content[:1] != b"\0", content[2:].split(b"\0", 2)[-1]
    try:
        return zlib.decompressobj().decompress(text, _LARGEST_TEXT) if compressed else text
    except zlib.error:
        return b""


def _tiff(data: bytes) -> ImageFile:
    """Keep the entries of the first directory that decide the pixels, in their order, and no second directory."""
    found = orientation.directory(data)
    if found is None:
        return ImageFile(data)
    entries = [data[place : place + found.entry_bytes] for place, tag in found.entries if tag in _TIFF_PIXELS]
    big = found.counting == 8
    count = struct.pack(found.order + ("Q" if big else "H"), len(entries))
    room = found.counting + found.entry_bytes * len(found.entries) + (8 if big else 4)
    whole = memoryview(data)
    directory = (count + b"".join(entries)).ljust(room, b"\0")
    kept = b"".join((whole[: found.start], directory, whole[found.start + room :]))
    turned = orientation.from_exif(data)
    if turned is None:
        turned = orientation.from_xmp(_tiff_xmp(data, found))
    return ImageFile(kept, turned)


def _tiff_xmp(data: bytes, found: orientation.Directory) -> bytes:
    for place, tag in found.entries:
        if tag == 700:
            number = "Q" if found.counting == 8 else "I"
            size, start = struct.unpack_from(found.order + 2 * number, data, place + 4)
            return data[start : start + min(size, _LARGEST_TEXT)]
    return b""
