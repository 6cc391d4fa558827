"""Tell from its first bytes what a model file is, whatever it is called."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Literal

from oner_fast.foreign_content import compression, is_lfs_pointer, web_page

FileKind = Literal["safetensors", "zip", "pickle"]

_OTHERS = {
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
    if is_lfs_pointer(start):
        raise ValueError(f"{path} is a Git LFS pointer; fetch the file with git lfs pull")
    if web_page(start):
        raise ValueError(f"{path} is an HTML or XML page, perhaps of a download that failed; download it again")
    if packed := compression(start):
        raise ValueError(f"{path} is compressed with {packed.name}; unpack it first")
    for magic, what in _OTHERS.items():
        if start.startswith(magic):
            raise ValueError(f"{path} is {what}")
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and start[8:9] != b"{":
        return "pickle"
    return "safetensors"
