"""Name and open the splits of a data set, in every form that a training takes: a folder, a tar, a glob, braces."""

from __future__ import annotations

from pathlib import Path

from oner_fast.bounded_json import load_object
from oner_fast.data.dataset import PairDataset
from oner_fast.data.tar_folders import tars_in

LISTING = "dataset.json"


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
    listing = folder / LISTING
    if listing.is_file():
        splits = load_object(listing.read_bytes(), str(listing)).get("splits")
        if not isinstance(splits, dict):
            raise ValueError(f"{listing} lists no splits; build the data again")
        return list(splits)
    return _named_by_tars(folder) or [unnamed]


def open_split(data: str, name: str) -> PairDataset:
    """Open a split that `splits_of` names.

    Raises:
        ValueError: the data have no such split, or no samples.
    """
    folder = Path(data)
    if folder.is_dir() and not (folder / LISTING).is_file() and not _named_by_tars(folder):
        return PairDataset(tars_in(folder).tars or folder, split=name)
    return PairDataset(data, split=name)


def _named_by_tars(folder: Path) -> list[str]:
    """Names before the last dash of the tars in a folder, sorted."""
    return sorted({tar.name.rpartition("-")[0] for tar in tars_in(folder).tars} - {""})
