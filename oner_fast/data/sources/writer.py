"""Write tar shards in webdataset's format, with the same bytes every time, and the `dataset.json` that lists them."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from oner_fast.atomic import replacing

FORMAT = 1
OWNER = "oner_fast"


@dataclass(frozen=True)
class Sample:
    """One pair.

    `key` has no dot, `image` is a file in the format of `extension`, and `meta` is the content of KEY.json.
    """

    key: str
    image: bytes
    extension: str
    meta: dict[str, Any]

    def members(self) -> dict[str, Any]:
        """Members of the sample, as webdataset's writer takes them."""
        return {
            "__key__": self.key,
            self.extension: self.image,
            "txt": self.meta["caption"].encode(),
            "json": json.dumps(self.meta, ensure_ascii=False, sort_keys=True).encode(),
        }


@dataclass(frozen=True)
class Shard:
    """Entry of a shard in `dataset.json`."""

    file: str
    samples: int
    bytes: int
    sha256: str


def write_shard(path: Path, samples: Iterable[Sample]) -> Shard:
    """Write `samples` to the tar `path`, through a temporary file that is synced to the disk and then renamed."""
    # Imported here, since it imports torch, which takes seconds and which a finished build does not need.
    from webdataset.writer import TarWriter

    count = 0
    with replacing(path) as file, TarWriter(file, encoder=False, mtime=0, user=OWNER, group=OWNER) as tar:
        for sample in samples:
            tar.write(sample.members())
            count += 1
    return measure(path, count)


def measure(path: Path, samples: int) -> Shard:
    """Describe a shard that is on the disk."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Shard(path.name, samples, path.stat().st_size, digest)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON, atomically."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def split_record(shards: list[Shard], captions: int, concepts: int) -> dict[str, Any]:
    """Entry of a split in `dataset.json`, with the numbers of distinct captions and concepts."""
    return {
        "samples": sum(shard.samples for shard in shards),
        "captions": captions,
        "concepts": concepts,
        "shards": [asdict(shard) for shard in shards],
    }
