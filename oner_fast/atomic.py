"""Replace files atomically: after a kill at any moment, either the old file or the new one is there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

SUFFIX = ".tmp"


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file beside `path`, make it durable and rename it to `path`.

    The order is: write, flush, fsync(file), `os.replace`, fsync(directory). A kill at any moment leaves either the old
    file or the new one. Where `write` raises, the temporary file is removed and the exception passes on.

    Args:
        path: the file to make or replace; its folder exists.
        write: called once with the open binary temporary file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}")
    try:
        with open(temporary, "wb") as file:
            _lock(file)
            write(file)
            file.flush()
            os.fsync(file.fileno())
            # Rename the file while it is locked, so that no sweep takes it for a dead writer's.
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(folder: Path) -> None:
    """Make renames and removals inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove the temporary files in `folder` whose writers are dead; returns their paths, sorted.

    A live writer holds a lock on its file, which the kernel drops when the writer ends. A file that cannot be locked is
    left alone.
    """
    removed = []
    for path in sorted(folder.glob(f".*{SUFFIX}")):
        try:
            with open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        except OSError:
            continue
        removed.append(path)
    return removed


def _lock(file: BinaryIO) -> None:
    # Some network file systems have no locks; writing is still atomic on them.
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
