"""Name and open the splits of a data set, in every form that a training takes: folders, tars, globs, braces."""

from __future__ import annotations

from pathlib import Path

from oner_fast.data.dataset import PairDataset, sources_of
from oner_fast.data.listing import read_listing
from oner_fast.data.tar_folders import splits_named, tars_in


def is_stream(address: str) -> bool:
    """Tell whether an address names streams: `pipe:COMMAND`, or one with a scheme, such as `https://`."""
    return address.startswith("pipe:") or "://" in address


def exists(data: str) -> bool:
    """Tell whether each source of `data` is a folder, a file, or a pattern that may match files."""
    return not is_stream(data) and all(
        Path(source).exists() or any(character in source for character in "*?[{") for source in sources_of(data)
    )


def splits_of(data: str, unnamed: str = "train") -> list[str]:
    """List the splits of a data set.

    Args:
        data: folders, tars, globs or brace patterns of tars; `::` between two sources.
        unnamed: the name of the only split of a source where neither `dataset.json` nor the tars' names
            (`<split>-*.tar`) name any.

    Raises:
        ValueError: `dataset.json` is malformed.
        OSError: a folder cannot be listed.
    """
    return list(dict.fromkeys(name for source in sources_of(data) for name in _named(source) or [unnamed]))


def open_split(data: str, name: str, unnamed: str | None = None) -> PairDataset:
    """Open a split that `splits_of` names, from all sources that have it.

    Args:
        unnamed: the name of the only split of a source that names none, as for `splits_of`; such a source belongs to
            every split by default.

    Raises:
        ValueError: the data have no such split, or no samples.
    """
    sources = sources_of(data)
    named = {source: _named(source) for source in sources}
    if len(sources) == 1:
        # Of tars in a folder that name no split, "train" are all.
        return PairDataset(data, split=name if named[data] or not Path(data).is_dir() else "train")
    chosen = [source for source in sources if name in (named[source] or [unnamed or name])]
    if not chosen:
        raise ValueError(f"no source in {data} has a split {name!r}")
    return PairDataset([path for source in chosen for path in _parts(source, bool(named[source]))], split=name)


def _parts(source: str, named: bool) -> list[str | Path]:
    """The tars of a folder that names no split; another source as it is."""
    tars = [] if named or not Path(source).is_dir() else tars_in(Path(source)).tars
    return [*tars] or [source]


def _named(source: str) -> list[str]:
    """Name the splits of one source; none where neither a list nor the tars' names name any."""
    folder = Path(source)
    return list(read_listing(folder) or splits_named(tars_in(folder).tars)) if folder.is_dir() else []
