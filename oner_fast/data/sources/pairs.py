"""`pairs`: build a dataset from a user's own images and captions."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from oner_fast.data.sources.building import Build, default_workers, report, versions
from oner_fast.data.sources.concepts import VALIDATION_PERCENT, concept, percentile
from oner_fast.data.sources.pair_shards import ShardJob, shard_jobs, write_shards
from oner_fast.data.sources.pair_sources import Columns, Found, Pair, digest, read_source
from oner_fast.data.sources.progress import say
from oner_fast.data.sources.writer import Shard, split_record

NAMED = 1000


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
    """Pack the pairs of a CSV or TSV file, or of a folder with a `.txt` beside each image.

    An image with captions in both splits goes to "val" only. Images that cannot be decoded and rows without a caption
    are counted and named in `dataset.json`.

    Args:
        source: a CSV or TSV file with a header line, or a folder.
        output: the folder of the dataset.
        image_key: the column of image paths.
        caption_key: the column of captions.
        separator: the character between columns; found from the header line by default.
        root: the folder where relative image paths start; the folder of the file by default.
        resize: shrink images to this shorter side, in pixels; smaller images keep their bytes.
        validation_percent: percentage of concepts or captions (see `split_by`) that goes to "val".
        licence: written into every sample.
        author: written into every sample.
        workers: processes that read and check images; one for each processor by default.
        limit: take only this many pairs, the first ones.
        overwrite: replace another build in `output`.

    Returns:
        The content of `dataset.json`.

    Raises:
        ValueError: an option is out of range, `source` holds no readable pair, or `output` holds another build.
    """
    source = Path(source)
    _check_options(resize, validation_percent, split_by)
    columns = Columns(image_key, caption_key, separator)
    found = _some_pairs(source, columns, Path(root) if root else source.parent, limit)
    options = {
        "pairs": digest(found.pairs),
        "resize": resize,
        "validation_percent": validation_percent,
        "split_by": split_by,
        "licence": licence,
        "author": author,
        "packages": versions("pillow", "webdataset"),
    }
    build = Build(output, "pairs", options, overwrite)
    if build.finished:
        content = build.dataset()
        report(content, build.output, "was complete already")
        return content
    build.begin()
    say(f"pairs: {len(found.pairs):,} of {source} into {build.output}")
    content = _pack(build, source, found, default_workers() if workers is None else workers)
    report(content, build.output)
    return content


def _check_options(resize: int | None, validation_percent: int, split_by: str) -> None:
    if resize is not None and resize < 8:
        raise ValueError(f"resize is {resize}; it needs at least 8 pixels")
    if not 0 <= validation_percent <= 90:
        raise ValueError(f"validation_percent is {validation_percent}; it must be from 0 to 90")
    if split_by not in ("concept", "caption"):
        raise ValueError(f"unknown split_by {split_by!r}; known: concept, caption")


def _some_pairs(source: Path, columns: Columns, root: Path, limit: int | None) -> Found:
    """Read at most `limit` pairs. Raises ValueError where there are none."""
    found = read_source(source, columns, root)
    pairs = found.pairs[:limit]
    if not pairs:
        raise ValueError(f"no pairs in {source}: " + ("; ".join(found.dropped[:5]) or "it has no rows"))
    return Found(pairs, found.dropped)


def _pack(build: Build, source: Path, found: Found, workers: int) -> dict[str, Any]:
    """Split the pairs, write their shards and finish the build; returns the content of `dataset.json`."""
    options = build.options
    splits, shared = _split(found.pairs, options["validation_percent"], options["split_by"])
    meta = {"set": source.stem, "licence": options["licence"], "author": options["author"]}
    jobs = shard_jobs(build, splits, options["resize"], meta)
    done = write_shards(jobs, workers)
    corrupt = [line for entry in done.values() for line in entry["corrupt"]]
    for line in [*found.dropped, *corrupt][:20]:
        say(f"  left out: {line}")
    content = _record(splits, jobs, done)
    if not content["splits"]:
        raise ValueError(f"no image of {source} can be read: {'; '.join(corrupt[:5])}")
    content["attribution"] = [_attribution(source, meta, content["splits"])]
    content["dropped"] = {
        "unreadable pictures": len(corrupt),
        "rows without a caption or picture": len(found.dropped),
        "training captions of validation pictures": shared,
        "named": [*found.dropped, *corrupt][:NAMED],
    }
    return build.finish(content)


def _attribution(source: Path, meta: dict[str, str], splits: dict[str, Any]) -> dict[str, Any]:
    return {
        "set": meta["set"],
        "title": source.name,
        "author": meta["author"],
        "licence": meta["licence"],
        "samples": sum(split["samples"] for split in splits.values()),
    }


def _split(pairs: Sequence[Pair], percent: int, by: str) -> tuple[dict[str, list[Pair]], int]:
    """Split and shuffle the pairs; also count the training pairs dropped because their image is in "val"."""

    def validates(pair: Pair) -> bool:
        return percentile(concept(pair.caption) if by == "concept" else pair.caption) < percent

    val = [pair for pair in pairs if validates(pair)]
    images = {pair.image for pair in val}
    rest = [pair for pair in pairs if not validates(pair)]
    train = [pair for pair in rest if pair.image not in images]
    splits = {"train": train, "val": val}
    for members in splits.values():
        members.sort(key=lambda pair: (hashlib.sha1(f"{pair.name}\t{pair.caption}".encode()).digest(), pair.row))
    return splits, len(rest) - len(train)


def _record(
    splits: dict[str, list[Pair]], jobs: dict[str, list[ShardJob]], done: dict[Path, dict[str, Any]]
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
