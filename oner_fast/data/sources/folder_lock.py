"""Let one process at a time build in a folder."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

_held: dict[Path, int] = {}  # descriptors of the folders that this process holds


def hold(folder: Path) -> None:
    """Hold a folder until `release`, or until this process and its workers end; nothing where there is no folder.

    Raises:
        ValueError: another process holds it.
    """
    key = folder.absolute()
    if key in _held or not folder.is_dir():
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # some network file systems have no locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another process builds in {folder}; wait until it ends, or choose another --output"
                ) from None
    except ValueError:
        os.close(descriptor)
        raise
    _held[key] = descriptor


def release(folder: Path) -> None:
    """Let other processes build in the folder."""
    descriptor = _held.pop(folder.absolute(), None)
    if descriptor is not None:
        os.close(descriptor)
