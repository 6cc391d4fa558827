"""List the members of a tar, header by header. Damage, at which `tarfile` would stop, is reported and skipped."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
OWNER = b"oner_fast"  # owner of a member whose time of change is its sample's number in the tar, plus 1
_ZERO = bytes(BLOCK)
_FIRST_CHUNK, _CHUNK = 1 << 12, 1 << 20
_CHECKSUM = slice(148, 156)
_OCTAL = frozenset(b"01234567")
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL, _SPARSE = b"L", b"K", b"x", b"g", b"S"
_EXTENSIONS = (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL)
_FORMS = {b"0": "file", b"\0": "file", b"7": "file", b"1": "hard link", b"2": "symbolic link", b"5": "folder"}
_FORMS |= {_SPARSE: "sparse file", b"3": "device", b"4": "device", b"6": "fifo"}
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
_LARGEST_EXTENSION = 1 << 20  # a long name or a PAX record is small; a damaged size is not
_DIGITS = 19  # of the largest number in a PAX header that can be an offset


@dataclass(frozen=True)
class Member:
    """A member of a tar.

    Attributes:
        name: its path; bytes that are not UTF-8 stand as surrogates.
        offset: first byte of its data, right after its header, in bytes.
        size: length of its data in bytes.
        whole: whether the tar holds all of its data.
        form: "file", "folder", "symbolic link", "hard link", "sparse file", "device", "fifo" or "unknown kind".
        checksum: CRC-32 of its 512 bytes of header.
        number: number of its sample in the tar, where oner_fast wrote the tar; else -1.
    """

    name: str
    offset: int
    size: int
    whole: bool
    form: str = "file"
    checksum: int = 0
    number: int = -1


@dataclass(frozen=True)
class Damage:
    """A damaged place in a tar: the bytes from `offset` to `end` hold no member that can be read."""

    offset: int
    why: str
    end: int


@dataclass
class _Header:
    name: str
    size: int
    kind: bytes
    number: int


@dataclass
class _Extensions:
    """The name, size and form of a member by the headers before it."""

    name: str | None = None
    size: int | None = None
    form: str | None = None
    broken: str = ""


def members(file: BinaryIO, size: int) -> Iterator[Member | Damage]:
    """Yield the members of a tar of `size` bytes, and its damage, in order.

    Handles ustar, GNU (long names, large sizes) and PAX (path, size). After a damaged header the scan continues at the
    next block that is a header with a correct checksum. Every size is compared with the file before it is used, and
    the position grows with every header.
    """
    position = 0
    extensions = _Extensions()
    while position + BLOCK <= size:
        file.seek(position)
        block = file.read(BLOCK)
        start = position + BLOCK
        if len(block) < BLOCK:  # the file became shorter while it was read
            break
        if block == _ZERO:
            following = _next_header(file, start, size)
            if following is None:
                return
            yield Damage(
                position, f"end marker or zeroed bytes, with {size - following} bytes of tar after them", following
            )
            position, extensions = following, _Extensions()
            continue
        try:
            header = _parse(block)
            if header.kind in _EXTENSIONS:
                _extend(extensions, header, file, size - start)
                length = header.size
            else:
                if extensions.broken:
                    raise ValueError(extensions.broken)
                length = header.size if extensions.size is None else extensions.size
        except ValueError as error:
            following = _next_header(file, start, size)
            yield Damage(position, f"header is damaged ({error})", size if following is None else following)
            if following is None:
                return
            position, extensions = following, _Extensions()
            continue
        if header.kind not in _EXTENSIONS:
            name = header.name if extensions.name is None else extensions.name
            form = extensions.form or _FORMS.get(header.kind, "unknown kind")
            if header.kind in _WITHOUT_DATA:
                length = 0
            elif header.kind == _SPARSE:
                start = _after_sparse_map(file, block, start, size)
            if form == "file" and name.endswith("/"):
                form = "folder"
            whole = start + length <= size
            yield Member(name, start, length, whole, form, zlib.crc32(block), header.number)
            extensions = _Extensions()
            if not whole:  # the end of the tar is lost, or this size is wrong
                following = _next_header(file, start, size)
                if following is None:
                    yield Damage(size, "tar is cut off: no end marker", size)
                    return
                yield Damage(start, f"a size of {length} bytes passes the end of the tar at {size}", following)
                position = following
                continue
        position = start + -(-length // BLOCK) * BLOCK
    yield Damage(min(position, size), "tar is cut off: no end marker", size)


def _parse(block: bytes) -> _Header:
    """Parse a header. Raises ValueError where the checksum or a number is wrong."""
    stated = _number(block[_CHECKSUM], "checksum")
    actual = sum(block) - sum(block[_CHECKSUM]) + 8 * ord(" ")
    if stated != actual:
        raise ValueError(f"checksum {actual}, stated {stated}")
    name = block[:100].split(b"\0", 1)[0]
    number = -1
    if block[257:263] == b"ustar\0":
        prefix = block[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
        if block[265:297].split(b"\0", 1)[0] == OWNER:
            number = _number(block[136:148], "time") - 1
    return _Header(name.decode("utf-8", "surrogateescape"), _number(block[124:136], "size"), block[156:157], number)


def _number(field: bytes, what: str) -> int:
    """Value of a field: octal digits, or GNU's binary form. Raises ValueError for anything else."""
    if field[0] & 0x80:  # for numbers too large for octal
        value = int.from_bytes(field[1:], "big") + ((field[0] & 0x3F) << 8 * (len(field) - 1))
        if field[0] & 0x40:
            raise ValueError(f"{what} is negative")
        if value >> 62:
            raise ValueError(f"{what} is larger than any file")
        return value
    text = field.split(b"\0", 1)[0].strip(b" ")
    if not _OCTAL.issuperset(text):
        raise ValueError(f"{what} {text.decode('ascii', 'backslashreplace')!r} is no octal number")
    return int(text, 8) if text else 0


def _extend(extensions: _Extensions, header: _Header, file: BinaryIO, left: int) -> None:
    """Read a header that speaks of the next member. Raises ValueError where the tar does not hold all of it."""
    if header.size > left:
        raise ValueError(f"its {header.size} bytes of name or records pass the end of the tar")
    if header.kind in (_LONG_LINK, _PAX_GLOBAL):  # neither gives a member its name or size
        return
    if header.size > _LARGEST_EXTENSION:
        extensions.broken = f"the name or records before it have {header.size} bytes"
        return
    content = file.read(header.size)
    if header.kind == _LONG_NAME:
        extensions.name = content.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
        return
    try:
        records = _records(content)
        if "size" in records:
            extensions.size = _decimal(records["size"].encode("ascii", "replace"))
    except ValueError as error:
        extensions.broken = str(error)
        return
    extensions.name = records.get("path", extensions.name)
    if any(key.startswith("GNU.sparse.") for key in records):
        extensions.form = "sparse file"
        extensions.name = records.get("GNU.sparse.name", extensions.name)


def _records(content: bytes) -> dict[str, str]:
    """Parse the `length key=value` records of a PAX header. Raises ValueError for a malformed one."""
    records: dict[str, str] = {}
    position = 0
    while position < len(content):
        space = content.find(b" ", position, position + _DIGITS + 1)
        length = _decimal(content[position : max(space, position)])
        end = position + length
        if end > len(content) or end <= space + 1 or content[end - 1 : end] != b"\n":
            raise ValueError(f"the PAX records before it are malformed at their byte {position}")
        key, _, value = content[space + 1 : end - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        position = end
    return records


def _decimal(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > _DIGITS:
        shown = digits[: _DIGITS + 1].decode("ascii", "backslashreplace")
        raise ValueError(f"the PAX records before it have the number {shown!r}")
    return int(digits)


def _after_sparse_map(file: BinaryIO, block: bytes, position: int, size: int) -> int:
    """Offset after the blocks that continue the map of a GNU sparse member."""
    more = block[482] != 0
    while more and position + BLOCK <= size:
        file.seek(position)
        more = file.read(BLOCK)[504:505] not in (b"", b"\0")
        position += BLOCK
    return position


def _next_header(file: BinaryIO, position: int, size: int) -> int | None:
    """Offset of the next block that is a header, or None."""
    length = _FIRST_CHUNK
    while position + BLOCK <= size:
        file.seek(position)
        chunk = file.read(length)
        for start in range(0, len(chunk) - BLOCK + 1, BLOCK):
            if chunk[start + 257 : start + 262] == b"ustar":
                try:
                    _parse(chunk[start : start + BLOCK])
                except ValueError:
                    continue
                return position + start
        position += max(BLOCK, len(chunk) // BLOCK * BLOCK)
        length = min(4 * length, _CHUNK)
    return None
