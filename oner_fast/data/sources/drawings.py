"""Build a dataset from drawings: render, drop blank and equal images, split by concept, shuffle, write shards."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oner_fast.atomic import replacing
from oner_fast.data.images import decode
from oner_fast.data.sources.building import Build, each, report
from oner_fast.data.sources.concepts import concept, split_of
from oner_fast.data.sources.near_equal import Fingerprint, fingerprint, near_equal
from oner_fast.data.sources.progress import progress, say
from oner_fast.data.sources.rendering import Picture, render
from oner_fast.data.sources.writer import Sample, Shard, measure, split_record, write_shard

NEAR = "nearly equal to a validation image"
PART = 256
SHARD = 2048


@dataclass(frozen=True)
class IconSet:
    """Origin of a set of drawings, with the attribution that must accompany them."""

    name: str
    title: str
    author: str
    licence: str
    url: str


@dataclass(frozen=True)
class Drawing:
    """An image to draw. `svg` is markup or the path of a file; `tags` are other words for it, kept in its json."""

    icon_set: IconSet
    name: str
    svg: str | Path
    caption: str
    tags: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Key of the sample in its shard."""
        return f"{self.icon_set.name}-{self.name}".replace("/", "-").replace(".", "-")


@dataclass
class _Kept:
    drawing: Drawing
    place: tuple[int, int]
    also: list[str]

    @property
    def name(self) -> str:
        return f"{self.drawing.icon_set.name} {self.drawing.name}"


def build_drawings(
    build: Build, drawings: Sequence[Drawing], size: int, workers: int, style: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Build the dataset of `drawings` at `size` pixels a side; returns the content of `dataset.json`.

    The sets named in `style` make the split "style" and are never in "train" or "val". A drawing that is nearly equal
    to one of another split is left out of "train" (see `near_equal`). An interrupted call loses at most the part that
    it was drawing; the next call continues there and writes the same bytes.
    """
    build.begin()
    parts = [drawings[start : start + PART] for start in range(0, len(drawings), PART)]
    _render_parts(build.work, parts, len(drawings), size, workers)
    kept, dropped, failed, left_out = _choose(build.work, parts)
    if not kept:
        raise ValueError(f"none of {len(drawings)} drawings gave an image: {'; '.join(failed[:5])}")
    for line in failed[:10]:
        say(f"  cannot be drawn: {line}")
    by_split, near = _split(build.work, kept, style, workers)
    dropped[NEAR] = len(near)
    splits = _write_splits(build, by_split)
    record = {
        "image_size": size,
        "splits": splits,
        "attribution": _attribution([one for one in kept if one.place not in near]),
        "dropped": {**dropped, "failed": failed},
    }
    build.write_left_out([*left_out, *near.values()])
    content = build.finish(record)
    report(content, build.output)
    return content


def _render_parts(work: Path, parts: Sequence[Sequence[Drawing]], total: int, size: int, workers: int) -> None:
    missing = [i for i in range(len(parts)) if not _part(work, i).exists()]
    jobs = [(tuple(drawing.svg for drawing in parts[i]), size) for i in missing]
    done = each(_render_part, jobs, workers)
    with progress("drawing images", total) as advance:
        advance(total - sum(len(svgs) for svgs, _ in jobs))
        for i, pictures in zip(missing, done, strict=True):
            _save_part(_part(work, i), pictures)
            advance(len(pictures))


def _render_part(job: tuple[Sequence[str | Path], int]) -> list[Picture]:
    svgs, size = job
    return [render(svg, size) for svg in svgs]


def _part(work: Path, i: int) -> Path:
    return work / f"part-{i:05d}"


def _save_part(path: Path, pictures: Sequence[Picture]) -> None:
    """Write one line of JSON with the length, digest, blankness and error of each image, then the images' bytes."""
    head = [(len(picture.png), picture.digest, picture.blank, picture.error) for picture in pictures]
    with replacing(path) as file:
        file.write(json.dumps(head).encode() + b"\n")
        for picture in pictures:
            file.write(picture.png)


def _load_part(path: Path) -> list[Picture]:
    with path.open("rb") as file:
        head = json.loads(file.readline())
        return [Picture(file.read(length), digest, blank, error) for length, digest, blank, error in head]


def _choose(work: Path, parts: Sequence[Sequence[Drawing]]) -> tuple[list[_Kept], dict[str, int], list[str], list[str]]:
    """Choose the drawings to keep: of images with equal pixels the first, whose `also` lists the others' captions.

    Also returns how many were left out by which rule, why drawings failed, and one line for each that was left out.
    """
    first: dict[str, _Kept] = {}
    dropped = {"blank": 0, "equal pixels": 0, "not drawable": 0}
    failed: list[str] = []
    left_out: list[str] = []
    for i, part in enumerate(parts):
        for j, (drawing, picture) in enumerate(zip(part, _load_part(_part(work, i)), strict=True)):
            name = f"{drawing.icon_set.name} {drawing.name}"
            if picture.error:
                dropped["not drawable"] += 1
                failed.append(f"{name}: {picture.error}")
                left_out.append(f"not drawable: {failed[-1]}")
            elif picture.blank:
                dropped["blank"] += 1
                left_out.append(f"blank: {name}")
            elif picture.digest in first:
                dropped["equal pixels"] += 1
                twin = first[picture.digest]
                left_out.append(f"equal pixels: {name}, as {twin.name}")
                if drawing.caption not in (twin.drawing.caption, *twin.also):
                    twin.also.append(drawing.caption)
            else:
                first[picture.digest] = _Kept(drawing, (i, j), [])
    return list(first.values()), dropped, failed, left_out


def _split(
    work: Path, kept: Sequence[_Kept], style: frozenset[str], workers: int
) -> tuple[dict[str, list[_Kept]], dict[tuple[int, int], str]]:
    """Split the drawings, and leave those out of "train" that are nearly equal to a drawing of another split.

    Also returns the place of each that is left out, with a line about it.
    """
    by_split: dict[str, list[_Kept]] = {"train": [], "val": []}
    for one in kept:
        drawing = one.drawing
        name = "style" if drawing.icon_set.name in style else split_of(drawing.caption)
        by_split.setdefault(name, []).append(one)
    of_part: dict[int, list[int]] = {}
    for one in kept:
        of_part.setdefault(one.place[0], []).append(one.place[1])
    jobs = [(_part(work, i), members) for i, members in of_part.items()]
    prints: dict[tuple[int, int], Fingerprint] = {}
    with progress("comparing images", len(kept)) as advance:
        for (i, members), found in zip(of_part.items(), each(_fingerprints, jobs, workers), strict=True):
            prints |= {(i, j): one for j, one in zip(members, found, strict=True)}
            advance(len(members))
    train, others = by_split["train"], [one for name, members in by_split.items() if name != "train" for one in members]
    near = near_equal([prints[one.place] for one in train], [prints[one.place] for one in others])
    by_split["train"] = [one for number, one in enumerate(train) if number not in near]
    lines = {train[mine].place: f"{NEAR}: {train[mine].name}, as {others[other].name}" for mine, other in near.items()}
    return by_split, lines


def _fingerprints(job: tuple[Path, Sequence[int]]) -> list[Fingerprint]:
    path, members = job
    pictures = _load_part(path)
    return [fingerprint(decode(pictures[j].png)) for j in members]


def _write_splits(build: Build, by_split: dict[str, list[_Kept]]) -> dict[str, Any]:
    splits = {}
    with progress("writing shards", sum(map(len, by_split.values()))) as advance:
        for name, members in ((name, members) for name, members in by_split.items() if members):
            # the order depends on the keys alone, so that each shard mixes the sets
            members.sort(key=lambda one: (hashlib.sha1(one.drawing.key.encode()).digest(), one.drawing.key))
            shards: list[Shard] = []
            for start in range(0, len(members), SHARD):
                chunk = members[start : start + SHARD]
                path = build.output / f"{name}-{len(shards):06d}.tar"
                shards.append(measure(path, len(chunk)) if path.exists() else write_shard(path, _samples(build, chunk)))
                advance(len(chunk))
            captions = {one.drawing.caption for one in members}
            splits[name] = split_record(shards, len(captions), len({concept(caption) for caption in captions}))
    return splits


def _samples(build: Build, members: Sequence[_Kept]) -> Iterator[Sample]:
    wanted: dict[int, None] = dict.fromkeys(one.place[0] for one in members)
    pictures = {i: _load_part(_part(build.work, i)) for i in wanted}
    for one in members:
        drawing, (i, j) = one.drawing, one.place
        meta: dict[str, Any] = {
            "caption": drawing.caption,
            "concept": concept(drawing.caption),
            "set": drawing.icon_set.name,
            "name": drawing.name,
            "licence": drawing.icon_set.licence,
            "author": drawing.icon_set.author,
        }
        if drawing.tags:
            meta["tags"] = list(drawing.tags)
        if one.also:
            meta["also"] = one.also
        yield Sample(drawing.key, pictures[i][j].png, "png", meta)


def _attribution(kept: Sequence[_Kept]) -> list[dict[str, Any]]:
    counts: dict[IconSet, int] = {}
    for one in kept:
        counts[one.drawing.icon_set] = counts.get(one.drawing.icon_set, 0) + 1
    return [
        {
            "set": icon_set.name,
            "title": icon_set.title,
            "author": icon_set.author,
            "licence": icon_set.licence,
            "url": icon_set.url,
            "samples": samples,
        }
        for icon_set, samples in counts.items()
    ]
