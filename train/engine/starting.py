"""Leave nothing behind where a training fails before it has saved anything."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from oner_fast.train.engine.metrics import FILE
from oner_fast.train.engine.run_lock import lost

CHECKPOINTS = "checkpoints"


@contextlib.contextmanager
def nothing_left_by_a_failed_start(folder: Path, enabled: bool) -> Iterator[None]:
    """Remove what the run wrote, if it raises before it has logged a step or saved anything.

    Files that were there before stay.

    Args:
        folder: the run's folder, which no other training writes into meanwhile.
        enabled: give `world.is_main`; the other ranks write nothing.
    """
    before = set(folder.iterdir()) if folder.is_dir() else set()
    try:
        yield
    except BaseException:
        if enabled and folder.is_dir() and not lost(folder) and not _has_results(folder):
            for path in set(folder.iterdir()) - before:
                _remove(path)
        raise


def _has_results(folder: Path) -> bool:
    log = folder / FILE
    logged = log.is_file() and log.stat().st_size > 0
    return logged or any((folder / CHECKPOINTS).glob("step-*")) or any(folder.glob("*.safetensors"))


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
