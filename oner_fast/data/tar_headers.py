"""List the members of a tar, header by header. Damage, at which `tarfile` would stop, is reported and skipped."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
_ZERO = bytes(BLOCK)
_CHUNK = 1 << 20
_CHECKSUM = slice(148, 156)
_REGULAR = (b"0", b"\0", b"7")
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", b"x", b"g"
_LARGEST_EXTENSION = 1 << 20  # a long name or a PAX record is small; a damaged size is not


@dataclass(frozen=True)
class Member:
    """A regular file in a tar: its name, the offset and size of its bytes, and whether the tar holds all of them."""

    name: str
    offset: int
    size: int
    whole: bool


@dataclass(frozen=True)
class Damage:
    """A damaged place in a tar."""

    offset: int
    why: str


def members(file: BinaryIO, size: int) -> Iterator[Member | Damage]:
    """Yield the regular members of a tar of `size` bytes, and its damage, in order.

    Handles ustar, GNU (long names, large sizes) and PAX (path, size). After a damaged header the scan continues at the
    next block that is a header with a correct checksum.
    """
    position, ended = 0, False
    long_name: str | None = None
    pax: dict[str, str] = {}
    while position + BLOCK <= size:
        file.seek(position)
        header = file.read(BLOCK)
        if header == _ZERO:
            following = _next_header(file, position + BLOCK, size)
            if following is None:
                ended = True
                break
            yield Damage(position, f"end marker or zeroed bytes, with {size - following} bytes of tar after them")
            position, long_name, pax = following, None, {}
            continue
        try:
            name, length, kind = _parse(header)
        except ValueError as error:
            yield Damage(position, f"header is damaged ({error})")
            following = _next_header(file, position + BLOCK, size)
            long_name, pax = None, {}
            if following is None:
                ended = True
                break
            position = following
            continue
        start = position + BLOCK
        if kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL):
            content = file.read(min(length, _LARGEST_EXTENSION))
            if kind == _LONG_NAME:
                long_name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif kind == _PAX:
                pax = _records(content)
        else:
            name = pax.get("path", long_name if long_name is not None else name)
            if pax.get("size", "").isdecimal():
                length = int(pax["size"])
            long_name, pax = None, {}
            if kind in _REGULAR and not name.endswith("/"):
                yield Member(name, start, length, start + length <= size)
        position = start + -(-length // BLOCK) * BLOCK
    if not ended:
        yield Damage(min(position, size), "tar is cut off: no end marker")


def _parse(header: bytes) -> tuple[str, int, bytes]:
    """Name, size and type of a header. Raises ValueError where the checksum or a number is wrong."""
    stated = _number(header[_CHECKSUM])
    actual = sum(header) - sum(header[_CHECKSUM]) + 8 * ord(" ")
    if stated != actual:
        raise ValueError(f"checksum {actual}, stated {stated}")
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", "surrogateescape"), _number(header[124:136]), header[156:157]


def _number(digits: bytes) -> int:
    if digits[0] & 0x80:  # GNU's binary form, for numbers too large for octal
        value = int.from_bytes(digits[1:], "big") + ((digits[0] & 0x7F) << 8 * (len(digits) - 1))
        if value >> 62:
            raise ValueError("a number larger than any file")
        return value
    text = digits.strip(b"\0 ").decode("ascii", "replace")
    return int(text, 8) if text else 0


def _records(content: bytes) -> dict[str, str]:
    """Parse the `length key=value` records of a PAX header, up to the first malformed one."""
    records: dict[str, str] = {}
    while content:
        length, _, _ = content.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(content):
            break
        key, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        content = content[int(length) :]
    return records


def _next_header(file: BinaryIO, position: int, size: int) -> int | None:
    """Offset of the next block that is a header, or None."""
    while position + BLOCK <= size:
        file.seek(position)
        chunk = file.read(_CHUNK)
        for start in range(0, len(chunk) - BLOCK + 1, BLOCK):
            if chunk[start + 257 : start + 262] == b"ustar":
                try:
                    _parse(chunk[start : start + BLOCK])
                except ValueError:
                    continue
                return position + start
        position += max(BLOCK, len(chunk) // BLOCK * BLOCK)
    return None
