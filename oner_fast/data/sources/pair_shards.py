"""Write the shards of a user's own pairs, keeping the bytes of the images."""

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from oner_fast import bounded_json
from oner_fast.data.dataset import CorruptSample
from oner_fast.data.picture_formats import SUFFIXES_OF
from oner_fast.data.pixels import read_file, read_picture
from oner_fast.data.sources.building import Build, each
from oner_fast.data.sources.concepts import concept
from oner_fast.data.sources.pair_types import Pair
from oner_fast.data.sources.progress import progress
from oner_fast.data.sources.writer import Sample, Shard, write_json, write_shard

SHARD = 1024
EXTENSIONS = {kind: suffixes[0].removeprefix(".") for kind, suffixes in SUFFIXES_OF.items()}
GREY = ("1", "L", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_SMALLER = {"JPEG": "JPEG", "AVIF": "JPEG", "WEBP": "WEBP"}  # the format of a reduced image; others become PNG

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # of an object in memory, which differs from run to run


@dataclass(frozen=True)
class ShardJob:
    """A shard to write to `path`, whose record goes to `done`, with the metadata of all its samples."""

    path: Path
    done: Path
    pairs: Sequence[Pair]
    resize: int | None
    meta: dict[str, str]


def shard_jobs(
    build: Build, splits: dict[str, list[Pair]], resize: int | None, meta: dict[str, dict[str, str]]
) -> dict[str, list[ShardJob]]:
    """Divide the pairs of each split into shards of `SHARD` samples; `meta` holds the metadata of each split."""
    return {
        name: [
            ShardJob(
                path := build.output / f"{name}-{start // SHARD:06d}.tar",
                build.work / f"{path.name}.json",
                members[start : start + SHARD],
                resize,
                meta[name],
            )
            for start in range(0, len(members), SHARD)
        ]
        for name, members in splits.items()
    }


def write_shards(jobs: dict[str, list[ShardJob]], workers: int) -> dict[Path, dict[str, Any]]:
    """Write the shards that are not there yet; returns the record of each shard by its path."""
    every = [job for members in jobs.values() for job in members]
    records = {job.path: record for job in every if (record := _record(job)) is not None}
    missing = [job for job in every if job.path not in records]
    with progress("packing pairs", sum(len(job.pairs) for job in every)) as advance:
        advance(sum(len(job.pairs) for job in every) - sum(len(job.pairs) for job in missing))
        for count in each(_write_one, missing, workers):
            advance(count)
    for job in missing:
        record = _record(job)
        if record is None:
            raise ValueError(f"{job.path} was removed while the data set was built; run the command again")
        records[job.path] = record
    return {job.path: records[job.path] for job in every}


def _record(job: ShardJob) -> dict[str, Any] | None:
    """Return the record of a shard that an earlier run wrote; None where it is not there, or is not this shard's."""
    try:
        record = bounded_json.load_object(job.done.read_bytes(), str(job.done))
        shard = Shard(**record["shard"])
        texts = [*record["captions"], *record["corrupt"]]
        fits = shard.file == job.path.name and shard.bytes == job.path.stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if fits and all(isinstance(text, str) for text in texts) else None


def _write_one(job: ShardJob) -> int:
    corrupt: list[str] = []
    captions: set[str] = set()
    shard = write_shard(job.path, _samples(job, captions, corrupt))
    write_json(job.done, {"shard": asdict(shard), "captions": sorted(captions), "corrupt": corrupt})
    return len(job.pairs)


def _samples(job: ShardJob, captions: set[str], corrupt: list[str]) -> Iterator[Sample]:
    """Yield the readable pairs, adding to `captions` and `corrupt`."""
    for pair in job.pairs:
        try:
            image, extension = _read_image(pair.image, job.resize)
        except CorruptSample as error:
            corrupt.append(f"{pair.name}: {_ADDRESS.sub('', error.why)}")
            continue
        except (OSError, ValueError) as error:
            corrupt.append(f"{pair.name}: {error.strerror if isinstance(error, OSError) and error.strerror else error}")
            continue
        meta = {"caption": pair.caption, "concept": concept(pair.caption), "name": pair.name, **job.meta}
        captions.add(pair.caption)
        yield Sample(f"{pair.row:09d}", image, extension, meta)


def _read_image(path: Path, resize: int | None) -> tuple[bytes, str]:
    """Read an image's bytes, decoding them once as a check, and the extension of its actual format.

    An image whose shorter side is longer than `resize` is stored as the loader shows it, only smaller.
    """
    data = read_file(path)
    picture = read_picture(data, str(path))
    kind, image = picture.format, picture.rgb
    if resize is None or min(image.size) <= resize:
        return data, EXTENSIONS[kind]
    scale = resize / min(image.size)
    size = (max(resize, round(image.width * scale)), max(resize, round(image.height * scale)))
    small = image.resize(size, Image.Resampling.BICUBIC)
    if picture.mode in GREY:  # a third of the bytes, and the same pixels
        small = small.convert("L")
    buffer = io.BytesIO()
    kind = _SMALLER.get(kind, "PNG")
    small.save(buffer, kind, **({} if kind == "PNG" else {"quality": 92}))
    return buffer.getvalue(), EXTENSIONS[kind]
