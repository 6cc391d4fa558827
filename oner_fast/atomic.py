"""Replace files atomically: after a kill at any moment, either the old file or the new one is there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

SUFFIX = ".tmp"


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file beside `path`, make it durable and rename it to `path`.

    The order is: write, flush, fsync(file), `os.replace`, fsync(directory). A kill at any moment leaves either the old
    file or the new one. Where `write` raises, the temporary file is removed and the exception passes on.

    Args:
        path: the file to make or replace; its folder exists.
        write: called once with the open binary temporary file.

    Raises:
        OSError: as `replacing`.
    """
    with replacing(path) as file:
        write(file)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` once it is complete and durable, as `write_atomic` describes.

    Raises:
        OSError: a step failed; `filename` is `path`. Where a library turned the system's error into one of its own, as
            `torch.save` does on a full disk, the system's error is raised.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}")
    raw: _Recorder | None = None
    try:
        raw = _Recorder(temporary, "wb")
        with io.BufferedWriter(raw) as file:
            _lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
            # Rename the file while it is locked, so that no sweep takes it for a dead writer's.
            os.replace(temporary, path)
        sync_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        failed = raw.failed if raw is not None else None
        if failed is None and isinstance(error, OSError) and str(error.filename) in ("None", str(temporary)):
            failed = error
        if failed is None or failed.errno is None or isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise OSError(failed.errno, failed.strerror, str(path)) from failed


def sync_directory(folder: Path) -> None:
    """Make renames and removals inside `folder` durable, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no folder
            raise OSError(error.errno, error.strerror, str(folder)) from error
    finally:
        os.close(descriptor)


class _Recorder(io.FileIO):
    """A file that keeps the first error of its writes."""

    failed: OSError | None = None

    def write(self, data: Any) -> int:
        """Write as much of `data` as the system takes."""
        try:
            return super().write(data)
        except OSError as error:
            self.failed = self.failed or error
            raise


def remove_leftovers(folder: Path, name: str = "*") -> list[Path]:
    """Remove the temporary files in `folder` whose writers are dead; returns their paths, sorted.

    `name` limits it to the temporary files of one target.

    A live writer holds a lock on its file, which the kernel drops when the writer ends. A file that cannot be locked is
    left alone.
    """
    removed = []
    for path in sorted(folder.glob(f".{name}.*{SUFFIX}")):
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
