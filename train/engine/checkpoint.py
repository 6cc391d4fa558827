"""Checkpoints by step, `step-00000500.pt`, which a kill at any moment cannot spoil."""

from __future__ import annotations

import collections
import contextlib
import logging
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_crc32_options, set_crc32_options

from oner_fast.atomic import remove_leftovers, sync_directory, write_atomic
from oner_fast.format_version import CHECKPOINT
from oner_fast.train.engine.checkpoint_file import DamagedCheckpoint, check, load, looks_whole, step_of
from oner_fast.train.engine.random_state import random_state, set_random_state

__all__ = [
    "DamagedCheckpoint",
    "check",
    "is_name",
    "latest",
    "load",
    "prepare",
    "random_state",
    "save",
    "saved",
    "search",
    "set_aside",
    "set_random_state",
]

_log = logging.getLogger(__name__)
_LEAVES = (type(None), bool, int, float, str, bytes, torch.Tensor, torch.nn.Parameter, torch.Size, torch.device)


def prepare(folder: Path | str) -> None:
    """Make `folder` where needed and remove the temporary files of writers that died; call it once at start."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path in remove_leftovers(folder):
        _log.info("removed %s, left by a writer that died", path.name)


def save(folder: Path | str, step: int, state: dict[str, Any], keep: int, *, damaged: Collection[Path] = ()) -> Path:
    """Write `state` as the checkpoint of `step` and remove the oldest ones.

    Args:
        folder: where the checkpoints lie; made where needed.
        step: the number of finished steps.
        state: string keys; tensors, numbers, strings, None and dicts, lists and tuples of them. The keys
            `step` and `format` are the checkpoint's own.
        keep: how many checkpoints stay, those of the highest steps; the one just written always does. 0: all.
            A file that is cut short or is no file does not count, and stays.
        damaged: further paths in `folder` that do not count.

    Returns:
        The path written. It appears under its name only when whole and on disk.

    Raises:
        TypeError: `state` holds something that could not be loaded again; the text names its place.
        ValueError: a negative step or keep, or a key that is the checkpoint's own.
    """
    folder = Path(folder)
    if step < 0 or keep < 0:
        raise ValueError(f"step and keep must not be negative, got step={step}, keep={keep}")
    taken = {"step", "format"} & state.keys()
    if taken:
        raise ValueError(f"state must not hold the checkpoint's own keys, got {', '.join(sorted(taken))}")
    _check_loadable(state, "state")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    checksums = get_crc32_options()
    # The CRC is what tells a damaged file; someone may have switched it off for speed.
    set_crc32_options(True)
    try:
        write_atomic(path, lambda file: torch.save({**state, "step": step, "format": CHECKPOINT}, file))
    finally:
        set_crc32_options(checksums)
    _prune(folder, keep, path, damaged)
    return path


def saved(folder: Path | str) -> list[Path]:
    """The checkpoints in `folder` by ascending step, whole or damaged; empty where there is no folder."""
    found = []
    folder = Path(folder)
    for path in folder.iterdir() if folder.is_dir() else ():
        step = step_of(path.name)
        if step is not None:
            found.append((step, path))
    return [path for _, path in sorted(found)]


def is_name(name: str) -> bool:
    """Tell whether `name` is that of a checkpoint, such as `step-00000500.pt`."""
    return step_of(name) is not None


def latest(folder: Path | str) -> Path | None:
    """Return the whole checkpoint of the highest step, or None where `folder` holds none. Nothing is changed.

    A damaged one is named in a warning and the next lower step is tried.

    Raises:
        DamagedCheckpoint: there are checkpoints and all are damaged.
    """
    path, damaged = search(folder)
    for reason in damaged.values():
        _log.warning("%s; falling back to an older checkpoint", reason)
    return path


def search(folder: Path | str) -> tuple[Path | None, dict[Path, str]]:
    """Find the whole checkpoint of the highest step, and the damaged ones above it with a sentence about each.

    Raises:
        DamagedCheckpoint: there are checkpoints and all are damaged.
        ValueError: a newer version of oner_fast wrote the highest whole one.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(saved(folder)):
        try:
            check(path)
        except FileNotFoundError:
            continue  # its training removed it meanwhile
        except DamagedCheckpoint as error:
            damaged[path] = str(error)
        else:
            return path, damaged
    if damaged:
        newest = next(iter(damaged.values()))
        raise DamagedCheckpoint(
            f"all {len(damaged)} checkpoints in {folder} are damaged, and none was changed (the newest: {newest}); "
            "`oner-fast checkpoint verify` lists them; --resume none moves them aside and starts afresh"
        )
    return None, damaged


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint to `NAME.damaged`, or `NAME.damaged.2` and so on, and return the new path.

    Raises:
        OSError: the folder cannot be written.
    """
    place, number = path.with_name(f"{path.name}.damaged"), 1
    while os.path.lexists(place):
        number += 1
        place = path.with_name(f"{path.name}.damaged.{number}")
    os.rename(path, place)
    with contextlib.suppress(OSError):
        sync_directory(path.parent)
    return place


def _prune(folder: Path, keep: int, written: Path, damaged: Collection[Path]) -> None:
    if keep == 0:
        return
    whole = [path for path in saved(folder) if path not in damaged and looks_whole(path)]
    old = [path for path in whole[:-keep] if path != written]
    for path in old:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("the old checkpoint %s cannot be removed: %s", path, error.strerror)
    if old:
        sync_directory(folder)


def _check_loadable(value: Any, where: str) -> None:
    # Exact types: numpy's float64 is a float that weights_only=True refuses.
    if type(value) in _LEAVES or isinstance(value, torch.dtype):
        return
    items: Iterable[tuple[Any, Any]]
    if type(value) in (dict, collections.OrderedDict):
        items = value.items()
    elif type(value) in (list, tuple):
        items = enumerate(value)
    else:
        raise TypeError(f"{where}: a checkpoint cannot hold a {type(value).__module__}.{type(value).__qualname__}")
    for key, item in items:
        if type(key) not in (str, int):
            raise TypeError(f"{where}: keys must be str or int, got {key!r}")
        _check_loadable(item, f"{where}[{key!r}]")
