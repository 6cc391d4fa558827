"""Write tar shards in webdataset's format, with the same bytes every time, and the `dataset.json` that lists them."""

import hashlib
import io
import json
import tarfile
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

    def members(self) -> dict[str, bytes]:
        """Bytes of each member of the sample, by its extension, sorted."""
        members = {
            self.extension: self.image,
            "json": json.dumps(self.meta, ensure_ascii=False, sort_keys=True).encode(),
            "txt": self.meta["caption"].encode(),
        }
        return dict(sorted(members.items()))


@dataclass(frozen=True)
class Shard:
    """Entry of a shard in `dataset.json`."""

    file: str
    samples: int
    bytes: int
    sha256: str


def write_shard(path: Path, samples: Iterable[Sample]) -> Shard:
    """Write `samples` to the tar `path`, through a temporary file that is synced to the disk and then renamed.

    The time of change of a member is its sample's number in the tar, plus 1, in seconds after 1970. So every header
    says which sample it belongs to, and a damaged tar without an index keeps the numbers of its samples.
    """
    count = 0
    with replacing(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for count, sample in enumerate(samples, 1):
            for extension, data in sample.members().items():
                member = tarfile.TarInfo(f"{sample.key}.{extension}")
                member.size, member.mode, member.mtime = len(data), 0o444, count
                member.uname = member.gname = OWNER
                tar.addfile(member, io.BytesIO(data))
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
