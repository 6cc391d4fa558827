"""Tell from its first bytes that a file is not what it is called."""

from __future__ import annotations

from typing import NamedTuple


class Compression(NamedTuple):
    """A format of compression: its name, its suffix and the command that undoes it."""

    name: str
    suffix: str
    command: str


_COMPRESSIONS = {
    b"\x1f\x8b": Compression("gzip", "gz", "gzip -d"),
    b"BZh": Compression("bzip2", "bz2", "bzip2 -d"),
    b"\xfd7zXZ\0": Compression("xz", "xz", "xz -d"),
    b"\x28\xb5\x2f\xfd": Compression("zstd", "zst", "zstd -d"),
    b"\x04\x22\x4d\x18": Compression("lz4", "lz4", "lz4 -d"),
}
_LFS_POINTER = b"version https://git-lfs"
_MARKUP = {
    b"<!doctype": "an HTML page",
    b"<html": "an HTML page",
    b"<head": "an HTML page",
    b"<!--": "an HTML page",
    b"<?xml": "an XML text",
}


def compression(start: bytes) -> Compression | None:
    """Name the compression of a file that begins with `start`; None where it has none that is known."""
    return next((found for magic, found in _COMPRESSIONS.items() if start.startswith(magic)), None)


def web_page(start: bytes) -> str:
    """Name the page that begins with `start`, as a store answers in place of a file; "" where it is none."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((what for tag, what in _MARKUP.items() if text.startswith(tag)), "")


def is_lfs_pointer(start: bytes) -> bool:
    """Tell whether a file that begins with `start` is a Git LFS pointer, which names the file's content."""
    return start.removeprefix(b"\xef\xbb\xbf").startswith(_LFS_POINTER)
