"""Write tar shards in webdataset's format, with the same bytes every time, and the `dataset.json` that lists them."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

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


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` once it is complete and on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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
