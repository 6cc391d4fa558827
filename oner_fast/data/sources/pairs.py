"""`pairs`: a user's own pictures and captions as a dataset, the pictures' bytes as they are."""

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from oner_fast.data.sources.building import Build, default_workers, each, report, versions
from oner_fast.data.sources.concepts import VALIDATION_PERCENT, concept, percentile
from oner_fast.data.sources.progress import progress, say
from oner_fast.data.sources.writer import Sample, Shard, split_record, write_json, write_shard

SHARD = 1024
NAMED = 1000
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Pair:
    """A picture's path, its caption, and the row of its source it stands in."""

    row: int
    image: Path
    name: str
    caption: str


@dataclass(frozen=True)
class _ShardJob:
    path: Path
    done: Path
    pairs: Sequence[Pair]
    resize: int | None
    meta: dict[str, str]


def build_pairs(
    source: str | Path,
    output: str | Path,
    *,
    image_key: str = "filepath",
    caption_key: str = "title",
    separator: str | None = None,
    root: str | Path | None = None,
    resize: int | None = None,
    validation_percent: int = VALIDATION_PERCENT,
    split_by: Literal["concept", "caption"] = "concept",
    licence: str = "unspecified",
    author: str = "unspecified",
    workers: int | None = None,
    limit: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Packs the pairs of a CSV or TSV file, or of a folder with a `.txt` beside each picture; returns `dataset.json`.

    `image_key`, `caption_key`: the columns. `separator`: between columns, found from the header line unless told.
    `root`: where relative paths start. `resize`: pictures whose shorter side is longer are shrunk to it, in pixels; all
    others keep their bytes. `validation_percent`: share of concepts (`split_by` "concept") or captions that go to
    "val". A picture with captions on both sides is in "val" only. Pictures that cannot be decoded and rows without a
    caption are counted and named in `dataset.json`. Raises ValueError for a wrong source or another build in `output`.
    """
    source = Path(source)
    if resize is not None and resize < 8:
        raise ValueError(f"resize is {resize}; it needs at least 8 pixels")
    if not 0 <= validation_percent <= 90:
        raise ValueError(f"validation_percent is {validation_percent}; it must be from 0 to 90")
    if split_by not in ("concept", "caption"):
        raise ValueError(f"unknown split_by {split_by!r}; known: concept, caption")
    if source.is_dir():
        rows, dropped = _folder_pairs(source)
    elif source.is_file():
        rows, dropped = _table_pairs(source, image_key, caption_key, separator, Path(root) if root else source.parent)
    else:
        raise ValueError(f"no pairs at {source}: no such file or folder")
    rows = rows[:limit]
    if not rows:
        raise ValueError(f"no pairs in {source}: " + ("; ".join(dropped[:5]) or "it has no rows"))
    build = Build(
        output,
        "pairs",
        {
            "pairs": _digest(rows),
            "resize": resize,
            "validation_percent": validation_percent,
            "split_by": split_by,
            "licence": licence,
            "author": author,
            "packages": versions("pillow", "webdataset"),
        },
        overwrite,
    )
    if build.finished:
        content = build.dataset()
        report(content, build.output, "was complete already")
        return content
    build.begin()
    say(f"pairs: {len(rows):,} of {source} into {build.output}")
    splits, shared = _split(rows, validation_percent, split_by)
    meta = {"set": source.stem, "licence": licence, "author": author}
    jobs = _jobs(build, splits, resize, meta)
    done = _write(jobs, default_workers() if workers is None else workers)
    corrupt = [line for entry in done.values() for line in entry["corrupt"]]
    for line in [*dropped, *corrupt][:20]:
        say(f"  left out: {line}")
    content = _record(splits, jobs, done)
    if not content["splits"]:
        raise ValueError(f"no picture of {source} can be read: {'; '.join(corrupt[:5])}")
    content["attribution"] = [
        {
            "set": source.stem,
            "title": source.name,
            "author": author,
            "licence": licence,
            "samples": sum(split["samples"] for split in content["splits"].values()),
        }
    ]
    content["dropped"] = {
        "unreadable pictures": len(corrupt),
        "rows without a caption or picture": len(dropped),
        "training captions of validation pictures": shared,
        "named": [*dropped, *corrupt][:NAMED],
    }
    content = build.finish(content)
    report(content, build.output)
    return content


def _table_pairs(
    source: Path, image_key: str, caption_key: str, separator: str | None, root: Path
) -> tuple[list[Pair], list[str]]:
    pairs: list[Pair] = []
    dropped: list[str] = []
    try:
        with source.open(newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            file.seek(0)
            table = csv.DictReader(file, delimiter=separator or ("\t" if "\t" in header else ","))
            columns = list(table.fieldnames or [])
            for key in (image_key, caption_key):
                if key not in columns:
                    raise ValueError(f"no column {key!r} in {source}; it has {', '.join(columns) or 'none'}")
            for i, row in enumerate(table):
                name, caption = (row[image_key] or "").strip(), " ".join((row[caption_key] or "").split())
                if name and caption:
                    pairs.append(Pair(i, root / name, name, caption))
                else:
                    dropped.append(f"row {i + 2}: no {'caption' if name else 'picture'}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8: {error}") from error
    except csv.Error as error:
        raise ValueError(f"{source} cannot be read as a table: {error}") from error
    return pairs, dropped


def _folder_pairs(source: Path) -> tuple[list[Pair], list[str]]:
    pairs: list[Pair] = []
    dropped: list[str] = []
    images = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    for i, image in enumerate(images):
        name = image.relative_to(source).as_posix()
        try:
            caption = " ".join(image.with_suffix(".txt").read_text(encoding="utf-8").split())
        except FileNotFoundError:
            dropped.append(f"{name}: no {image.with_suffix('.txt').name} beside it")
            continue
        except UnicodeDecodeError:
            dropped.append(f"{name}: its caption is not UTF-8")
            continue
        if caption:
            pairs.append(Pair(i, image, name, caption))
        else:
            dropped.append(f"{name}: its caption is empty")
    return pairs, dropped


def _digest(pairs: Sequence[Pair]) -> str:
    digest = hashlib.sha1()
    for pair in pairs:
        digest.update(f"{pair.row}\t{pair.name}\t{pair.caption}\n".encode())
    return digest.hexdigest()


def _split(pairs: Sequence[Pair], percent: int, by: str) -> tuple[dict[str, list[Pair]], int]:
    """The pairs of each split, shuffled; how many training pairs were dropped as their picture validates."""

    def validates(pair: Pair) -> bool:
        return percentile(concept(pair.caption) if by == "concept" else pair.caption) < percent

    val = [pair for pair in pairs if validates(pair)]
    pictures = {pair.image for pair in val}
    rest = [pair for pair in pairs if not validates(pair)]
    train = [pair for pair in rest if pair.image not in pictures]
    splits = {"train": train, "val": val}
    for members in splits.values():
        members.sort(key=lambda pair: (hashlib.sha1(f"{pair.name}\t{pair.caption}".encode()).digest(), pair.row))
    return splits, len(rest) - len(train)


def _jobs(
    build: Build, splits: dict[str, list[Pair]], resize: int | None, meta: dict[str, str]
) -> dict[str, list[_ShardJob]]:
    return {
        name: [
            _ShardJob(
                path := build.output / f"{name}-{start // SHARD:06d}.tar",
                build.work / f"{path.name}.json",
                members[start : start + SHARD],
                resize,
                meta,
            )
            for start in range(0, len(members), SHARD)
        ]
        for name, members in splits.items()
    }


def _write(jobs: dict[str, list[_ShardJob]], workers: int) -> dict[Path, dict[str, Any]]:
    """Writes the shards that are not there yet; what each holds, by its path."""
    every = [job for members in jobs.values() for job in members]
    missing = [job for job in every if not (job.path.exists() and job.done.exists())]
    with progress("packing pairs", sum(len(job.pairs) for job in every)) as advance:
        advance(sum(len(job.pairs) for job in every) - sum(len(job.pairs) for job in missing))
        for count in each(_write_one, missing, workers):
            advance(count)
    return {job.path: json.loads(job.done.read_text(encoding="utf-8")) for job in every}


def _write_one(job: _ShardJob) -> int:
    corrupt: list[str] = []
    captions: set[str] = set()
    shard = write_shard(job.path, _samples(job, captions, corrupt))
    write_json(job.done, {"shard": asdict(shard), "captions": sorted(captions), "corrupt": corrupt})
    return len(job.pairs)


def _samples(job: _ShardJob, captions: set[str], corrupt: list[str]) -> Iterator[Sample]:
    """The readable pairs; adds to `captions` and `corrupt` on the way."""
    for pair in job.pairs:
        try:
            image, extension = _read(pair.image, job.resize)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            corrupt.append(f"{pair.name}: {error.strerror if isinstance(error, OSError) and error.strerror else error}")
            continue
        meta = {"caption": pair.caption, "concept": concept(pair.caption), "name": pair.name, **job.meta}
        captions.add(pair.caption)
        yield Sample(f"{pair.row:09d}", image, extension, meta)


def _read(path: Path, resize: int | None) -> tuple[bytes, str]:
    """A picture's bytes, decoded once to be sure of them, and the extension of its real format."""
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        kind = image.format or ""
        if kind not in EXTENSIONS:
            raise ValueError(f"a {kind} picture; {', '.join(EXTENSIONS)} can be read")
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


def _record(
    splits: dict[str, list[Pair]], jobs: dict[str, list[_ShardJob]], done: dict[Path, dict[str, Any]]
) -> dict[str, Any]:
    record = {}
    for name in splits:
        entries = [entry for job in jobs[name] if (entry := done[job.path])["shard"]["samples"]]
        if not entries:
            continue
        captions = {caption for entry in entries for caption in entry["captions"]}
        shards = [Shard(**entry["shard"]) for entry in entries]
        record[name] = split_record(shards, len(captions), len({concept(caption) for caption in captions}))
    return {"image_size": None, "splits": record}
