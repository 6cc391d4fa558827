"""Checkpoints by step, which a kill at any moment cannot spoil.

A checkpoint `step-00000500.pt` is torch's zip format, whose members carry a CRC-32 each: reading the file
once tells whether it is whole.
"""

from __future__ import annotations

import collections
import logging
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_crc32_options, set_crc32_options

from oner_fast.atomic import remove_leftovers, sync_directory, write_atomic
from oner_fast.format_version import CHECKPOINT, check_format_version
from oner_fast.train.engine.random_state import random_state, set_random_state

__all__ = [
    "DamagedCheckpoint",
    "latest",
    "load",
    "prepare",
    "random_state",
    "resolve",
    "save",
    "saved",
    "set_random_state",
]

_log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8,})\.pt")
_LEAVES = (type(None), bool, int, float, str, bytes, torch.Tensor, torch.nn.Parameter, torch.Size, torch.device)


class DamagedCheckpoint(ValueError):
    """A checkpoint file is cut short, has flipped bits, or is not a checkpoint of this library."""


def prepare(folder: Path | str) -> None:
    """Make `folder` where needed and remove the temporary files of writers that died; call it once at start."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path in remove_leftovers(folder):
        _log.info("removed %s, left by a writer that died", path.name)


def save(folder: Path | str, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state` as the checkpoint of `step` and remove the oldest ones.

    Args:
        folder: where the checkpoints lie; made where needed.
        step: the number of finished steps.
        state: string keys; tensors, numbers, strings, None and dicts, lists and tuples of them. The keys
            `step` and `format` are the checkpoint's own.
        keep: how many checkpoints stay, those of the highest steps; the one just written always does. 0: all.

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
    _prune(folder, keep, path)
    return path


def load(path: Path | str, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint, with `weights_only=True`: no code in the file can run.

    Returns:
        The state as given to `save`, and `step`.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedCheckpoint: the file is damaged or of another kind.
        ValueError: a newer version of oner_fast wrote the file.
    """
    path = Path(path)
    _verify(path)
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        raise DamagedCheckpoint(f"{path} cannot be read as a checkpoint: {error}") from error
    if not isinstance(state, dict) or "step" not in state or "format" not in state:
        raise DamagedCheckpoint(f"{path} is not a checkpoint of this library")
    check_format_version(path, state.pop("format"), CHECKPOINT)
    return state


def saved(folder: Path | str) -> list[Path]:
    """The checkpoints in `folder` by ascending step, whole or damaged; empty where there is no folder."""
    found = []
    folder = Path(folder)
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match:
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def latest(folder: Path | str) -> Path | None:
    """The whole checkpoint of the highest step, or None where `folder` holds none.

    A damaged one is named in a warning and the next lower step is tried.

    Raises:
        DamagedCheckpoint: there are checkpoints and all are damaged.
    """
    paths = saved(folder)
    for path in reversed(paths):
        try:
            _verify(path)
        except (DamagedCheckpoint, FileNotFoundError) as error:
            _log.warning("%s; falling back to an older checkpoint", error)
        else:
            return path
    if paths:
        raise DamagedCheckpoint(f"all {len(paths)} checkpoints in {folder} are damaged")
    return None


def resolve(folder: Path | str, resume: str) -> Path | None:
    """Find the checkpoint to continue from; None starts afresh.

    Args:
        folder: the run's checkpoints.
        resume: `latest` (None where there is none yet), `none`, or the path of a checkpoint, of a folder
            of checkpoints or of a run.

    Raises:
        FileNotFoundError: `resume` is a path without a checkpoint.
        DamagedCheckpoint: the checkpoint is damaged.
    """
    if resume == "none":
        return None
    if resume == "latest":
        return latest(folder)
    path = Path(resume)
    if path.is_file():
        _verify(path)
        return path
    inner = path / "checkpoints"
    found = latest(inner if inner.is_dir() else path)
    if found is None:
        raise FileNotFoundError(
            f"resume {resume!r}: no checkpoint there; give latest, none, or the path of a step-*.pt file or a run"
        )
    return found


def _verify(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no checkpoint {path}") from None
    except Exception as error:  # zipfile raises many kinds on garbage
        raise DamagedCheckpoint(f"{path} is damaged, cut short or unreadable: {error}") from error
    if damaged is not None:
        raise DamagedCheckpoint(f"{path} is damaged: the checksum of its member {damaged} does not match")


def _prune(folder: Path, keep: int, written: Path) -> None:
    if keep == 0:
        return
    old = [path for path in saved(folder)[:-keep] if path != written]
    for path in old:
        path.unlink(missing_ok=True)
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
