"""Compare shards with the sizes and SHA-256 sums that their builder recorded in `dataset.json`."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from oner_fast.data.listing import ListedShard, read_listing


def difference(shard: ListedShard) -> str:
    """Say how a shard differs from its record; "" where it does not, or where nothing is recorded.

    Reads the whole file. Raises OSError where it cannot be read.
    """
    size = shard.path.stat().st_size
    if shard.bytes is not None and size != shard.bytes:
        return f"it has {size:,} bytes, and {shard.bytes:,} were recorded"
    if shard.sha256 is not None:
        with shard.path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shard.sha256.lower():
            return f"its sha256 is {found}, and {shard.sha256} was recorded"
    return ""


def check_shards(path: str | Path, split: str, part: int = 0, parts: int = 1) -> Iterator[ListedShard]:
    """Compare the shards of a split with their records, one after the other; yields each that fits.

    Args:
        path: a folder with a `dataset.json`.
        part, parts: check the shards part, part + parts, ... alone.

    Raises:
        ValueError: there is no record of a shard, or a shard differs from it.
        OSError: a shard cannot be read.
    """
    listing = read_listing(Path(path)) if Path(path).is_dir() else None
    if listing is None or split not in listing:
        raise ValueError(
            f"no checksums of split {split!r} are recorded in {path}; `oner-fast data verify` reads every member"
        )
    for shard in listing[split][part::parts]:
        if shard.sha256 is None:
            raise ValueError(
                f"{Path(path) / 'dataset.json'} records no sha256 of {shard.path.name}: `oner-fast data verify` reads "
                "every member instead"
            )
        why = difference(shard)
        if why:
            raise ValueError(
                f"{shard.path} is not the file that was built: {why}; `oner-fast data verify {path}` names what is "
                "damaged, and building or copying the data again repairs it"
            )
        yield shard
