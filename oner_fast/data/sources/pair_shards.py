"""Write the shards of a user's own pairs, keeping the bytes of the images."""

import io
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from oner_fast import bounded_json
from oner_fast.data.budget import BUDGET
from oner_fast.data.sources.building import Build, each
from oner_fast.data.sources.concepts import concept
from oner_fast.data.sources.pair_types import Pair
from oner_fast.data.sources.progress import progress
from oner_fast.data.sources.writer import Sample, Shard, write_json, write_shard

SHARD = 1024
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
EXTENSIONS |= {"PPM": "ppm", "AVIF": "avif"}

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # the address of an object in memory, which differs from run to run


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
        except UnidentifiedImageError:  # Pillow's own message contains an address in memory
            corrupt.append(f"{pair.name}: not an image of a known format")
            continue
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            corrupt.append(f"{pair.name}: {_ADDRESS.sub('', why)}")
            continue
        meta = {"caption": pair.caption, "concept": concept(pair.caption), "name": pair.name, **job.meta}
        captions.add(pair.caption)
        yield Sample(f"{pair.row:09d}", image, extension, meta)


def _read_file(path: Path) -> bytes:
    """Read a regular file that is not empty and within the budget; others raise ValueError."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # a fifo does not block
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if not status.st_size:
            raise ValueError("it is empty: it has no bytes")
        if status.st_size > BUDGET.image_bytes:
            raise ValueError(f"a file of {status.st_size:,} bytes; at most {BUDGET.image_bytes:,} are read")
        return file.read()


def _read_image(path: Path, resize: int | None) -> tuple[bytes, str]:
    """Read an image's bytes, decoding them once as a check, and the extension of its actual format."""
    data = _read_file(path)
    with Image.open(io.BytesIO(data)) as image:
        kind = image.format or ""
        if kind not in EXTENSIONS:
            raise ValueError(f"a {kind} image; only {', '.join(EXTENSIONS)} can be read")
        image.load()
        if resize is None or min(image.size) <= resize:
            return data, EXTENSIONS[kind]
        scale = resize / min(image.size)
        size = (max(resize, round(image.width * scale)), max(resize, round(image.height * scale)))
        lossy = kind in ("JPEG", "WEBP")
        colour = image if image.mode in ("RGB", "RGBA", "L") else image.convert("RGB" if lossy else "RGBA")
        small = colour.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    if lossy:
        small.save(buffer, kind, quality=92)
        return buffer.getvalue(), EXTENSIONS[kind]
    small.save(buffer, "PNG")
    return buffer.getvalue(), "png"
