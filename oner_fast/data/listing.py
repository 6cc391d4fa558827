"""Read `dataset.json`, the list of a folder's shards, which may come from anyone."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from oner_fast import bounded_json

NAME = "dataset.json"
FORMAT = 1
_MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class ListedShard:
    """A shard as `dataset.json` lists it: its path, and what is recorded of it, None where nothing is."""

    path: Path
    samples: int
    bytes: int | None
    sha256: str | None


def read_listing(folder: Path) -> dict[str, list[ListedShard]] | None:
    """Read the shards of each split from a folder's `dataset.json`; None where the folder has none.

    Raises:
        ValueError: the file is not a list of shards inside the folder, or a newer oner_fast wrote it; one sentence that
            names the file.
        OSError: it cannot be read.
    """
    file = folder / NAME
    if not file.is_file():
        return None
    if file.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes, and at most {_MAX_BYTES:,} are read")
    return parse_listing(file.read_bytes(), file)


def parse_listing(data: bytes, file: Path) -> dict[str, list[ListedShard]]:
    """Parse the bytes of a `dataset.json` at `file`. Raises ValueError as `read_listing` does."""
    content = bounded_json.load_object(data, str(file))
    version = content.get("format", 0)
    if _count(version) is None or version > FORMAT:
        raise ValueError(f"{file} has format {version!r}, and this oner_fast reads up to {FORMAT}: update oner_fast")
    splits = content.get("splits")
    if not isinstance(splits, dict) or not splits:
        raise ValueError(f"{file} lists no splits; build the data again, or remove it and let the tars' names decide")
    return {name: _shards(split, file, name) for name, split in splits.items()}


def _shards(split: Any, file: Path, name: str) -> list[ListedShard]:
    entries = split.get("shards") if isinstance(split, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"{file} has no list of shards for split {name!r}; build the data again")
    return [_shard(entry, file, name) for entry in entries]


def _shard(entry: Any, file: Path, split: str) -> ListedShard:
    if not isinstance(entry, dict):
        raise ValueError(f"{file} lists a shard of split {split!r} that is a {type(entry).__name__}, not an object")
    name, samples = entry.get("file"), _count(entry.get("samples"))
    if not isinstance(name, str) or not _inside(name):
        raise ValueError(f"{file} lists a shard called {bounded_json.shown(name)}; a shard is a file inside the folder")
    if samples is None:
        raise ValueError(
            f"{file} lists {bounded_json.shown(entry.get('samples'))} samples in {name}; a whole number is needed"
        )
    size, digest = _count(entry.get("bytes")), entry.get("sha256")
    return ListedShard(file.parent / name, samples, size, digest if isinstance(digest, str) else None)


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62 else None
