"""`pairs`: build a dataset from a user's own images and captions."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from oner_fast.data.sources.building import Build, default_workers, report, versions
from oner_fast.data.sources.concepts import SPLIT_RULE, VALIDATION_PERCENT, concept, percentile
from oner_fast.data.sources.pair_overlap import resembling_images, shared_images
from oner_fast.data.sources.pair_shards import ShardJob, shard_jobs, write_shards
from oner_fast.data.sources.pair_sources import Columns, read_source
from oner_fast.data.sources.pair_types import LeftOut, Pair, digest, printable
from oner_fast.data.sources.progress import say
from oner_fast.data.sources.tables import separator_of
from oner_fast.data.sources.writer import Shard, split_record

NAMED = 1000
SHOWN = 20
UNREADABLE = "unreadable pictures"
SHARED = "training captions of validation pictures"
NEAR = "training captions of pictures nearly equal to a validation picture"


def build_pairs(
    source: str | Path,
    output: str | Path,
    *,
    val: str | Path | None = None,
    image_key: str = "filepath",
    caption_key: str = "title",
    separator: str | None = None,
    root: str | Path | None = None,
    resize: int | None = None,
    validation_percent: int | None = None,
    split_by: Literal["concept", "caption"] = "concept",
    licence: str = "unspecified",
    author: str = "unspecified",
    workers: int | None = None,
    limit: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Pack the pairs of a CSV or TSV file, or of a folder with a `.txt` beside each image.

    An image with captions in both splits goes to "val" only, whether its file has one name or several, is copied, or is
    nearly equal to one in "val", such as a smaller copy. Everything that gives no pair is counted by its rule in
    `dataset.json` and named in `left-out.txt`.

    Args:
        source: a CSV or TSV file with a header line, or a folder.
        output: the folder of the dataset.
        val: a file or folder whose pairs are "val"; those of `source` are then all "train". Images with the bytes of a
            validation image are left out of "train".
        image_key: the column of image paths.
        caption_key: the column of captions.
        separator: the character between columns, or its name (see `tables.separator_of`); found from the header line
            by default.
        root: the folder where relative image paths start; the folder of the file by default.
        resize: shrink images to this shorter side, in pixels; smaller images keep their bytes.
        validation_percent: percentage of concepts or captions (see `split_by`) that goes to "val"; 8 by default. Not
            with `val`.
        licence: written into every sample.
        author: written into every sample.
        workers: processes that read and check images; one for each processor by default.
        limit: take only this many pairs of each source, the first ones.
        overwrite: replace another build in `output`.

    Returns:
        The content of `dataset.json`.

    Raises:
        ValueError: an option is out of range, a source holds no readable pair, or `output` holds another build.
    """
    percent = _percent(validation_percent, val is not None)
    _check_options(resize, split_by, limit)
    columns = Columns(image_key, caption_key, None if separator is None else separator_of(separator))
    workers = default_workers() if workers is None else workers
    sources = _read(Path(source), None if val is None else Path(val), columns, Path(root) if root else None, limit)
    options = {
        "pairs": digest(sources.train),
        "split_rule": SPLIT_RULE,
        "resize": resize,
        "validation_percent": percent,
        "split_by": split_by,
        "licence": licence,
        "author": author,
        "packages": versions("pillow", "webdataset"),
    }
    if sources.val is not None:
        options["val_pairs"] = digest(sources.val)
    build = Build(output, "pairs", options, overwrite)
    if build.finished:
        content = build.dataset()
        report(content, build.output, "was complete already")
        return content
    build.begin()
    say(f"pairs: {len(sources.train):,} of {source} into {build.output}")
    if sources.val is not None:
        say(f"pairs: {len(sources.val):,} of {val} for validation")
    given = {"csv_img_key": image_key, "csv_caption_key": caption_key, "csv_separator": separator, "limit": limit}
    content = _pack(build, sources, given, workers)
    report(content, build.output)
    return content


@dataclass(frozen=True)
class _Sources:
    """The pairs to train on, those to validate on (None: a part of the others), and what was left out of both."""

    paths: dict[str, Path]
    train: list[Pair]
    val: list[Pair] | None
    left_out: list[LeftOut]


def _percent(validation_percent: int | None, has_val: bool) -> int:
    if has_val and validation_percent is not None:
        raise ValueError("--val gives the validation pairs, and --validation-percent would draw others: give only one")
    percent = VALIDATION_PERCENT if validation_percent is None else validation_percent
    if not 0 <= percent <= 90:
        raise ValueError(f"validation_percent is {percent}; it must be from 0 to 90")
    return 0 if has_val else percent


def _check_options(resize: int | None, split_by: str, limit: int | None) -> None:
    if resize is not None and resize < 8:
        raise ValueError(f"resize is {resize}; it needs at least 8 pixels")
    if split_by not in ("concept", "caption"):
        raise ValueError(f"unknown split_by {split_by!r}; known: concept, caption")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")


def _read(source: Path, val: Path | None, columns: Columns, root: Path | None, limit: int | None) -> _Sources:
    train = read_source(source, columns, root, limit)
    if val is None:
        return _Sources({"train": source, "val": source}, train.pairs, None, train.left_out)
    other = read_source(val, columns, root, limit)
    first = 1 + max(pair.row for pair in train.pairs)  # so that every key is another
    pairs = [replace(pair, row=first + pair.row) for pair in other.pairs]
    left_out = [replace(one, line=f"{printable(val.name)}: {one.line}") for one in other.left_out]
    return _Sources({"train": source, "val": val}, train.pairs, pairs, train.left_out + left_out)


def _pack(build: Build, sources: _Sources, given: dict[str, Any], workers: int) -> dict[str, Any]:
    """Split the pairs, write their shards and finish the build; returns the content of `dataset.json`."""
    options = build.options
    splits, shared = _split(sources, options["validation_percent"], options["split_by"], workers)
    names = {split: (printable(path.stem), printable(path.name)) for split, path in sources.paths.items()}
    common = {"licence": options["licence"], "author": options["author"]}
    jobs = shard_jobs(build, splits, options["resize"], {name: {"set": names[name][0], **common} for name in splits})
    done = write_shards(jobs, workers)
    corrupt = [LeftOut(UNREADABLE, line) for entry in done.values() for line in entry["corrupt"]]
    left_out = [*sources.left_out, *shared, *corrupt]
    for one in left_out[:SHOWN]:
        say(f"  left out: {one.line}")
    if len(left_out) > SHOWN:
        say(f"  left out: {len(left_out) - SHOWN:,} more; {build.output / 'left-out.txt'} names all")
    content = _record(splits, jobs, done)
    for name in ("train", "val") if sources.val is not None else ("",):
        if name not in content["splits"] and (name or not content["splits"]):
            build.abandon()
            why = "; ".join(one.line for one in [*corrupt, *shared][:5])
            raise ValueError(f"no image of {sources.paths[name or 'train']} can be {_use(name, splits)}: {why}")
    content["attribution"] = _attribution(names, common, content["splits"])
    content["given"] = {"train": names["train"][1], "val": None if sources.val is None else names["val"][1], **given}
    content["dropped"] = _dropped(left_out)
    build.write_left_out([f"{one.rule}: {one.line}" for one in left_out])
    return build.finish(content)


def _use(name: str, splits: dict[str, list[Pair]]) -> str:
    return "read" if not name or splits[name] else "trained on"


def _dropped(left_out: Sequence[LeftOut]) -> dict[str, Any]:
    """Count what was left out by its rule, and name the first of it."""
    counts = Counter({UNREADABLE: 0, SHARED: 0, NEAR: 0})
    counts.update(one.rule for one in left_out)
    return {**dict(sorted(counts.items())), "named": [one.line for one in left_out[:NAMED]]}


def _attribution(
    names: dict[str, tuple[str, str]], common: dict[str, str], splits: dict[str, Any]
) -> list[dict[str, Any]]:
    samples: Counter[tuple[str, str]] = Counter()
    for split, record in splits.items():
        samples[names[split]] += record["samples"]
    return [
        {"set": stem, "title": title, "author": common["author"], "licence": common["licence"], "samples": count}
        for (stem, title), count in samples.items()
    ]


def _split(sources: _Sources, percent: int, by: str, workers: int) -> tuple[dict[str, list[Pair]], list[LeftOut]]:
    """Split and shuffle the pairs; also return the training pairs left out because their image is in "val"."""

    def validates(pair: Pair) -> bool:
        return percentile(concept(pair.caption) if by == "concept" else pair.caption) < percent

    if sources.val is None:
        val = [pair for pair in sources.train if validates(pair)]
        rest = [pair for pair in sources.train if not validates(pair)]
    else:
        val, rest = list(sources.val), sources.train
    shared = {pair.image for pair in val} | shared_images(rest, val, workers)
    others = [pair for pair in rest if pair.image not in shared]
    near = resembling_images(others, val, workers)
    splits = {"train": [pair for pair in others if pair.image not in near], "val": val}
    names = {pair.image: pair.name for pair in reversed(val)}
    for members in splits.values():
        members.sort(key=lambda pair: (hashlib.sha1(f"{pair.name}\t{pair.caption}".encode()).digest(), pair.row))
    return splits, [
        LeftOut(SHARED, f"{pair.name}: {pair.caption[:60]!r} is not trained on, since its image is in val")
        for pair in rest
        if pair.image in shared
    ] + [
        LeftOut(
            NEAR,
            f"{pair.name}: {pair.caption[:60]!r} is not trained on, since its image resembles "
            f"{names[near[pair.image]]} in val",
        )
        for pair in others
        if pair.image in near
    ]


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
