"""Check data sets: recorded checksums, indexes, and that every member of every sample can be read and decoded."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from oner_fast.data.checksums import difference
from oner_fast.data.dataset import CorruptSample, PairDataset
from oner_fast.data.images import decode
from oner_fast.data.listing import ListedShard, read_listing
from oner_fast.data.sources.building import default_workers, each
from oner_fast.data.sources.progress import progress, say
from oner_fast.data.tar_folders import tars_in, unlisted
from oner_fast.data.tar_index import META, TEXT, TarIndex, build_index, stored_index

_CHUNK = 128  # samples that a worker reads at a time
_NAMED_WITH_SAMPLES = ("has no whole image", "have no whole image", "has no caption", "have no caption")


@dataclass(frozen=True)
class _TarJob:
    tar: Path
    record: ListedShard | None


@dataclass(frozen=True)
class _SampleJob:
    index: TarIndex
    captions: bool


@dataclass
class Found:
    """The contents and the damage of a tar, of a part of one, or of all of them.

    Attributes:
        damage: a sentence for each damaged place or sample.
        skipped: a sentence for each rule by which members are left out.
    """

    samples: int = 0
    images: int = 0
    captions: int = 0
    metadata: int = 0
    checksums: int = 0
    damage: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def add(self, other: "Found") -> None:
        """Add what another part holds."""
        for name in ("samples", "images", "captions", "metadata", "checksums"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.damage += other.damage
        self.skipped += other.skipped


def verify_data(paths: Sequence[Path], workers: int | None = None) -> Found:
    """Verify folders and tars; writes nothing.

    Of a folder, every split that its `dataset.json` lists is verified, else every tar in it. A caption may be missing
    where no sample of the tar has one.

    Raises:
        ValueError: there is no tar, or a `dataset.json` is malformed.
    """
    jobs = [job for path in paths for job in _tars(path)]
    if not jobs:
        raise ValueError("no tar to verify; name one or more .tar files, or folders that hold some")
    workers = default_workers() if workers is None else workers
    total = Found(skipped=[sentence for path in paths if path.is_dir() for sentence in _left_out(path)])
    parts: list[_SampleJob] = []
    with progress("checking sums and headers", len(jobs)) as advance:
        for found, index in each(_check_tar, jobs, workers):
            total.add(found)
            if index is not None:
                captions = bool((index.offsets[:, (TEXT, META)] >= 0).any())
                chunks = range(0, len(index), _CHUNK)
                parts += [_SampleJob(index.part(first, first + _CHUNK), captions) for first in chunks]
            advance()
    with progress("decoding samples", total.samples) as advance:
        for part, found in zip(parts, each(_check_samples, parts, workers), strict=True):
            total.add(found)
            advance(len(part.index))
    return total


def verify(paths: Sequence[Path], workers: int | None, named: int, damage_list: Path | None) -> None:
    """Verify folders and tars and print what they hold. Raises ValueError where anything is damaged."""
    found = verify_data(paths, workers)
    say(
        f"{found.samples:,} samples: {found.images:,} images, {found.captions:,} captions and {found.metadata:,} "
        f"metadata can be read; {found.checksums:,} checksums are right"
    )
    for sentence in found.skipped[:named]:
        say(f"  left out by rule: {sentence}")
    for sentence in found.damage[:named]:
        say(f"  damaged: {sentence}")
    if len(found.damage) > named:
        say(f"  damaged: {len(found.damage) - named:,} more; --damage-list FILE writes all")
    if damage_list is not None:
        damage_list.write_text("".join(f"{sentence}\n" for sentence in found.damage), encoding="utf-8")
    if found.damage:
        where = ", ".join(str(path) for path in paths)
        raise ValueError(f"{len(found.damage):,} damaged places in {where}")


def _tars(path: Path) -> list[_TarJob]:
    if path.is_dir():
        listing = read_listing(path)
        if listing is not None:
            return [_TarJob(shard.path, shard) for shards in listing.values() for shard in shards]
        return [_TarJob(tar, None) for tar in tars_in(path).tars]
    return [_TarJob(path, None)]


def _left_out(folder: Path) -> list[str]:
    listing = read_listing(folder)
    if listing is None:
        return tars_in(folder).left_out()
    return unlisted(folder, {shard.path for shards in listing.values() for shard in shards})


def _check_tar(job: _TarJob) -> tuple[Found, TarIndex | None]:
    """Check a tar's sum, headers and index; returns also the index of what it holds now."""
    found = Found()
    name = job.tar.name
    try:
        if job.record is not None:
            why = difference(job.record)
            found.damage += [f"{name}: {why}"] if why else []
            found.checksums = int(not why and job.record.sha256 is not None)
        stored, current = stored_index(job.tar)
        index = build_index(job.tar, job.record.samples if job.record else None, stored)
    except OSError as error:
        found.damage.append(f"{name}: cannot be read ({error.strerror or error})")
        return found, None
    except ValueError as error:
        found.damage.append(str(error))
        return found, None
    if stored is not None and current and not stored.same_samples(index):
        found.damage.append(f"{name}: {TarIndex.file(job.tar).name} is not its index; remove that file")
    if job.record is not None and len(index) > job.record.samples:
        found.damage.append(f"{name}: {len(index)} samples, and dataset.json lists {job.record.samples}")
    found.samples = len(index)
    found.damage += [one for one in index.damage if not one.endswith(_NAMED_WITH_SAMPLES)]
    found.skipped += index.skipped
    return found, index


def _check_samples(job: _SampleJob) -> Found:
    """Read and decode every member of some samples of a tar."""
    found = Found()
    data = PairDataset.of_indexes([job.index])
    there = job.index.offsets >= 0
    for i in np.flatnonzero(there.any(axis=1)).tolist():
        try:
            decode(data.picture(i), data.name(i))
            found.images += 1
        except CorruptSample as error:
            found.damage.append(str(error))
        try:
            found.metadata += bool(data.meta(i) or there[i, META])
            if job.captions:
                data.caption(i)
                found.captions += 1
        except CorruptSample as error:
            found.damage.append(str(error))
    return found
