"""The files that a build may write or remove in its folder: bare names in that folder and nothing else."""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any

WORK = ".build"
LEFT_OUT = "left-out.txt"

_SHARD = re.compile(r"(?:train|val|style)-\d{6}\.tar")
_OURS = re.compile(
    rf"\.?({_SHARD.pattern}(\.index\.npz)?|dataset\.json|{re.escape(LEFT_OUT)})(\.\d+(-[0-9a-f]{{8}})?(\.tmp)?)?"
)
_WORKING = re.compile(rf"\.?({_SHARD.pattern}\.json|options\.json|part-\d{{5}})(\.\d+(-[0-9a-f]{{8}})?\.tmp)?")


def shard_name(name: Any, where: str) -> str:
    """Return the name of a shard that a record lists.

    Raises:
        ValueError: a build could not have given that name, such as one with a folder; the message names `where`.
    """
    if not isinstance(name, str) or not _SHARD.fullmatch(name):
        raise ValueError(f"{where} lists the shard {name!r}, which no build of oner_fast writes; is it damaged?")
    return name


def remove(path: Path) -> None:
    """Remove a file or a link, not what the link leads to; folders stay."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)


def remove_build(folder: Path, *, unfinished: bool = False) -> None:
    """Remove the files of a build from `folder`, or only those that a writer left unfinished."""
    for path in _named(folder, _OURS):
        if path.name.startswith(".") or not unfinished:
            remove(path)


def remove_stale_shards(folder: Path, listed: set[str]) -> None:
    """Remove the shards that are not listed."""
    for path in _named(folder, _SHARD):
        if path.name not in listed:
            remove(path)


def remove_work(folder: Path, *, unfinished: bool = False) -> None:
    """Remove the working files of a build from `folder`/.build, and that folder where nothing else is in it.

    Raises:
        ValueError: `.build` is a link, which is not followed, or a file.
    """
    work = working_folder(folder)
    if not work.exists():
        return
    for path in _named(work, _WORKING):
        if path.name.startswith(".") or not unfinished:
            remove(path)
    if not unfinished and not any(work.iterdir()):
        work.rmdir()


def working_folder(folder: Path) -> Path:
    """Return `folder`/.build. Raises ValueError where that is a link or a file."""
    work = folder / WORK
    try:
        mode = work.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return work
    if not stat.S_ISDIR(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "a file"
        raise ValueError(f"{work} is {kind}, and a build keeps its working files there; remove it")
    return work


def _named(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    return [path for path in folder.iterdir() if pattern.fullmatch(path.name)]
