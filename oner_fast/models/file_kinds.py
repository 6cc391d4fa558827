"""Tell from its first bytes what a model file is, whatever it is called."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Literal

FileKind = Literal["safetensors", "zip", "pickle"]

_LFS = b"version https://git-lfs.github.com/spec/"
_MARKUP = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")
_OTHERS = {
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"BZh": "compressed with bzip2; unpack it first",
    b"\xfd7zXZ": "compressed with xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first",
    b"GGUF": "a GGUF file, which this library does not read",
    b"\x89HDF": "an HDF5 file, which this library does not read",
    b"\x93NUMPY": "a NumPy array, which this library does not read as a model",
}


def file_kind(path: Path) -> FileKind:
    """Name the kind of a model file: safetensors, torch's zip archive, or torch's older pickle.

    Raises:
        FileNotFoundError: there is no such file, or it is a directory.
        ValueError: the file is none of these; the message says what it is and what to do.
        OSError: the file cannot be read.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no model file {path}") from None
    if stat.S_ISDIR(mode):
        raise FileNotFoundError(f"there is no model file {path}: it is a directory; name a file in it")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is a named pipe or a device, and a model file is needed")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(512)
    if size == 0:
        raise ValueError(f"{path} is empty (0 bytes); copy or download it again")
    if start.startswith(_LFS):
        raise ValueError(f"{path} is a Git LFS pointer; fetch the file with git lfs pull")
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_MARKUP):
        raise ValueError(f"{path} is an HTML or XML page, perhaps of a download that failed; download it again")
    for magic, what in _OTHERS.items():
        if start.startswith(magic):
            raise ValueError(f"{path} is {what}")
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and start[8:9] != b"{":
        return "pickle"
    return "safetensors"
