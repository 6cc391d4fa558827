"""Name and open the splits of a data set, in every form that a training takes: a folder, a tar, a glob, braces."""

from __future__ import annotations

from pathlib import Path

from oner_fast.data.dataset import PairDataset
from oner_fast.data.listing import read_listing
from oner_fast.data.tar_folders import splits_named, tars_in


def exists(data: str) -> bool:
    """Tell whether `data` names a folder, a file, or a pattern that may match files."""
    return Path(data).exists() or any(character in data for character in "*?[{")


def splits_of(data: str, unnamed: str = "train") -> list[str]:
    """List the splits of a data set.

    Args:
        data: a folder, a tar, a glob or a brace pattern of tars.
        unnamed: the name of the only split where neither `dataset.json` nor the tars' names (`<split>-*.tar`) name
            any.

    Raises:
        ValueError: `dataset.json` is malformed.
        OSError: the folder cannot be listed.
    """
    folder = Path(data)
    if not folder.is_dir():
        return [unnamed]
    return list(read_listing(folder) or splits_named(tars_in(folder).tars) or [unnamed])


def open_split(data: str, name: str) -> PairDataset:
    """Open a split that `splits_of` names.

    Raises:
        ValueError: the data have no such split, or no samples.
    """
    folder = Path(data)
    if folder.is_dir() and read_listing(folder) is None and not splits_named(tars_in(folder).tars):
        name = "train"  # of tars that name no split, these are all
    return PairDataset(data, split=name)
