"""One checkpoint file: what is read from it, and whether it is whole.

A checkpoint is torch's zip format, whose members carry a CRC-32 each. A file counts as whole when every checksum is
right and torch can read it.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from oner_fast.format_version import CHECKPOINT, check_format_version

_NAME = re.compile(r"step-(\d{8,})\.pt")
_KINDS = {
    stat.S_ISDIR: "a directory",
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}
_DIRECTORY = 0x10  # the attribute of zip archives from DOS
# Errors of this process or of its machine, which say nothing about the file.
_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EINTR, errno.EAGAIN)


class DamagedCheckpoint(ValueError):
    """A checkpoint file is cut short, has flipped bits, or is not a checkpoint of this library."""


def step_of(name: str) -> int | None:
    """Return the step in the name of a checkpoint, such as `step-00000500.pt`; None for other names."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def load(path: Path | str, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint, with `weights_only=True`: no code in the file can run.

    Returns:
        The state as given to `save`, and `step`.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedCheckpoint: the file is damaged, of another kind, or has the name of another step.
        ValueError: a newer version of oner_fast wrote the file.
    """
    path = Path(path)
    _check_members(path)
    return _read(path, map_location, mapped=False)


def check(path: Path) -> int:
    """Read the whole file once and return the step that it holds; no tensor is kept in memory.

    Raises:
        FileNotFoundError, DamagedCheckpoint, ValueError: as in `load`.
    """
    _check_members(path)
    return int(_read(path, "cpu", mapped=True)["step"])


def looks_whole(path: Path) -> bool:
    """Tell without reading the tensors whether `path` is a regular file with the end record of a zip archive.

    That excludes files cut short, which have no end record, but not those with flipped bits.
    """
    try:
        with _open(path) as file:
            return zipfile.is_zipfile(file)
    except (OSError, ValueError):
        return False


def _read(path: Path, map_location: str | torch.device, mapped: bool) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location=map_location, weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except Exception as error:  # torch raises many kinds
        if isinstance(error, torch.OutOfMemoryError) or (isinstance(error, OSError) and error.errno in _PASSING):
            raise
        raise DamagedCheckpoint(f"{path} cannot be read as a checkpoint: {_first_line(error)}") from error
    if not isinstance(state, dict) or "format" not in state or type(state.get("step")) is not int:
        raise DamagedCheckpoint(f"{path} is not a checkpoint of this library")
    check_format_version(path, state.pop("format"), CHECKPOINT)
    if step_of(path.name) not in (None, state["step"]):  # it would hide those that a run saves later
        raise DamagedCheckpoint(f"{path} holds step {state['step']}, which is not the step of its name")
    return state


def _open(path: Path) -> BinaryIO:
    """Open a regular file, and never wait for the writer of a named pipe."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise DamagedCheckpoint(f"{path} is a symbolic link to a file that does not exist") from None
        raise FileNotFoundError(f"there is no checkpoint {path}") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DamagedCheckpoint(f"{path} is a loop of symbolic links") from None
        raise
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS.items() if test(mode)), "no file")
        raise DamagedCheckpoint(f"{path} is {kind}, where a checkpoint file should be")
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


def _check_members(path: Path) -> None:
    try:
        with _open(path) as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise DamagedCheckpoint(f"{path} is damaged: it is empty")
            with zipfile.ZipFile(file) as archive:
                for member in archive.infolist():
                    # torch stores members as they are, and a compressed one could expand without bound.
                    if member.compress_type:
                        raise DamagedCheckpoint(f"{path} is damaged: its member {member.filename!r} is compressed")
                    # For these torch returns uninitialised memory, without an error.
                    if member.external_attr & _DIRECTORY:
                        raise DamagedCheckpoint(f"{path} is damaged: its member {member.filename!r} is a directory")
                damaged = archive.testzip()
    except (DamagedCheckpoint, FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # zipfile raises many kinds on garbage
        if isinstance(error, OSError) and error.errno in _PASSING:
            raise
        raise DamagedCheckpoint(f"{path} is damaged, cut short or unreadable: {_first_line(error)}") from error
    if damaged is not None:
        raise DamagedCheckpoint(f"{path} is damaged: the checksum of its member {damaged} does not match")


def _first_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
