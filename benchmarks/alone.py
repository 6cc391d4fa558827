"""Let one process at a time measure in a folder, since two disturb each other and replace each other's files."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Busy(Exception):
    """Another process measures in the folder."""


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder, which is made where it is missing; the kernel lets it go when the process ends, however it does.

    Raises:
        Busy: another process holds it.
        OSError: it cannot be made or opened.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise Busy(f"another process measures in {folder}, and two disturb each other: wait for it") from error
            # Some network file systems have no locks.
        yield
    finally:
        os.close(descriptor)
