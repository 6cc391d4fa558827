"""Data that an evaluation or a report reads: every form that a training takes, with their splits."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from oner_fast import bounded_json
from oner_fast.data.dataset import PairDataset

TRAIN = "train"
_USUAL = {TRAIN, "val", "valid", "validation", "dev", "test", "style"}  # names of splits before the number of a tar


@dataclass(frozen=True)
class Source:
    """Image-text pairs in one or more places.

    Attributes:
        places: folders, tars, globs or brace patterns, as they were given.
        splits: names of the splits, in order; tars without names of splits are one split.
        whole: whether the tars carry no names of splits, so that every split is all of them.
    """

    places: tuple[str, ...]
    splits: tuple[str, ...]
    whole: bool

    @property
    def name(self) -> str:
        """The places in one line."""
        return " ".join(self.places)

    @property
    def folder(self) -> Path | None:
        """The folder of the data set, where it is one with a `dataset.json`."""
        place = Path(self.places[0])
        return place if len(self.places) == 1 and (place / "dataset.json").is_file() else None

    def open(self, split: str) -> PairDataset:
        """Open a split. Raises ValueError where the data lack it."""
        if self.whole:
            return PairDataset([tar for place in self.places for tar in _tars(place)])
        return PairDataset(list(self.places), split=split)

    def held_out(self, asked: Sequence[str] = ()) -> list[str]:
        """Return the splits to evaluate: those asked for, or all but `train`.

        Raises:
            ValueError: a split is unknown, or there is nothing held out and nothing was asked for.
        """
        if unknown := [name for name in asked if name not in self.splits]:
            raise ValueError(f"{self.name} has no split {unknown[0]!r}; it has {', '.join(self.splits)}")
        found = list(asked) or [name for name in self.splits if name != TRAIN]
        if not found:
            raise ValueError(
                f"{self.name} has only a train split, so that nothing is held out; give other data with --data, or "
                "evaluate what the model was trained on with --split train"
            )
        return found


def open_source(places: Sequence[str | Path], *, whole_as: str = "val") -> Source:
    """Find the splits of the data in `places`.

    Args:
        places: dataset folders, folders of tars, tars, globs or brace patterns.
        whole_as: the name of the split that tars without names of splits form.

    Raises:
        FileNotFoundError: there is nothing at one of the places.
        ValueError: a `dataset.json` cannot be read.
    """
    given = tuple(str(place) for place in places)
    found = [_splits(place) for place in given]
    if any(splits is None for splits in found):
        return Source(given, (whole_as,), whole=True)
    names = [name for name in found[0] or () if all(name in (splits or ()) for splits in found)]
    if not names:
        raise ValueError(f"{', '.join(given)} have no split in common")
    return Source(given, tuple(names), whole=False)


def _splits(place: str) -> tuple[str, ...] | None:
    """Names of the splits in a place; None where its tars carry none."""
    path = Path(place)
    if path.is_dir():
        listing = path / "dataset.json"
        if listing.is_file():
            splits = bounded_json.load_object(listing.read_bytes(), str(listing)).get("splits")
            if not isinstance(splits, dict) or not splits:
                raise ValueError(f"{listing} lists no splits; build the data again")
            return tuple(splits)
        tars = _tars(place)
        if not tars:
            raise FileNotFoundError(
                f"{place} holds neither dataset.json nor tars; build the data with `oner-fast data`"
            )
        named = {tar.name.rsplit("-", 1)[0] for tar in tars}
        return tuple(sorted(named)) if named <= _USUAL else None
    if not path.exists() and not _is_pattern(place):
        raise FileNotFoundError(f"no data at {place}; give its folder, tars or a pattern of tars with --data")
    return None


def _is_pattern(place: str) -> bool:
    return glob.has_magic(place) or "{" in place


def _tars(place: str) -> list[Path]:
    path = Path(place)
    return sorted(path.glob("*.tar")) if path.is_dir() else [path]
