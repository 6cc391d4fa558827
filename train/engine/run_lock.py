"""One training at a time writes into a run's folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from oner_fast import bounded_json
from oner_fast.train.engine.distributed import World, on_main

FILE = "run.lock"
_RECORD = 10_000  # most bytes of the record in it
# What a file system without locks answers.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_log = logging.getLogger(__name__)
_held: dict[int, tuple[Path, os.stat_result]] = {}
"""The folders of the runs that this process holds, and their inodes, by the descriptor of the lock."""


class RunInUse(ValueError):
    """Another training writes into this run's folder."""


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of the run in `folder` while inside; make the folder where needed.

    The lock belongs to the process: it ends with it, also by SIGKILL. `run.lock` in the folder says who holds it.
    It is removed at the end, and so is a folder that was made for it and is still empty. On a file system without
    locks a warning says that nothing keeps a second training out.

    Raises:
        RunInUse: another training holds the lock; the message says which.
        OSError: the folder cannot be made or written.
    """
    made = _make(folder)
    try:
        descriptor = _acquire(folder / FILE)
    except BaseException:
        _remove_empty(made)
        raise
    try:
        _held[descriptor] = folder, os.stat(folder)
        _write_holder(descriptor)
        yield
    finally:
        # It goes before the lock does: a process that opens it later finds that the name is gone, and makes another.
        try:
            if not lost(folder):  # the file there is another training's
                os.unlink(folder / FILE)
        except OSError as error:
            _log.warning("%s cannot be removed (%s); it locks nothing any more", folder / FILE, error.strerror)
        _held.pop(descriptor, None)
        os.close(descriptor)
        _remove_empty(made)


def lost(folder: Path) -> bool:
    """Tell whether `folder` no longer is that of the run whose lock this process holds for it.

    The folder was then moved or removed, and another one may have its place. One whose lock file alone was removed is
    not lost. Without a lock for `folder` the answer is False.
    """
    held = next(((lock, before) for lock, (place, before) in _held.items() if place == folder), None)
    if held is None:
        return False
    lock, before = held
    try:
        if os.path.lexists(folder / FILE):
            # Some network file systems number their files anew; the record tells them apart.
            same = os.path.samestat(os.fstat(lock), os.stat(folder / FILE))
            return not same and (folder / FILE).read_bytes() != os.pread(lock, _RECORD, 0)
        return not os.path.samestat(before, os.stat(folder))
    except FileNotFoundError:
        return True
    except OSError:  # nothing is known about the folder; the write that follows says why
        return False


@contextmanager
def single_writer(folder: Path, world: World) -> Iterator[None]:
    """Let rank 0 hold the lock of the run while inside; where it cannot, every rank raises its error."""
    with contextlib.ExitStack() as held:
        on_main(world, lambda: held.enter_context(run_lock(folder)))
        yield


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise RunInUse(
                        f"{path.parent} is in use by {_holder(path)}; stop that training first, or give another "
                        "--run-dir"
                    ) from None
                if error.errno not in _NO_LOCKS:
                    raise
                before = f"; {FILE} there names {_holder(path)}" if path.stat().st_size else ""
                _log.warning(
                    "the file system of %s has no locks (%s), so nothing keeps a second training out of this folder%s",
                    path.parent,
                    error.strerror,
                    before,
                )
                return descriptor
            # The holder before may have removed the file between the opening and the locking of it.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _write_holder(descriptor: int) -> None:
    about = {
        "host": platform.node(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join(sys.orig_argv)[:1000],
    }
    # Who holds it is a courtesy; a full disk must not stop the run here.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(about) + "\n").encode(), 0)


def _holder(path: Path) -> str:
    try:
        about = bounded_json.load_object(path.read_bytes(), str(path), max_bytes=_RECORD)
    except (OSError, ValueError):
        return "another training"
    return (
        f"process {about.get('pid')} on {about.get('host')}, which began {about.get('since')} ({about.get('command')})"
    )


def _make(folder: Path) -> list[Path]:
    """Make a folder and its parents; return those made, the innermost first."""
    missing = []
    for place in (folder, *folder.parents):
        if place.exists():
            break
        if place.is_symlink():
            raise FileNotFoundError(
                f"{place} is a symbolic link to {os.readlink(place)}, which does not exist; make that folder, or give "
                "another --run-dir"
            )
        missing.append(place)
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _close_in_child() -> None:
    # A loader's worker would keep the lock for as long as it outlives a killed training.
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
