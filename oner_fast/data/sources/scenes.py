"""`scenes`: several captioned pictures on one canvas, with a caption that names them and their boxes."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
from PIL import Image, ImageChops

from oner_fast import bounded_json
from oner_fast.data.dataset import PairDataset
from oner_fast.data.images import decode
from oner_fast.data.listing import read_listing
from oner_fast.data.sources.building import Build, default_workers, each, report
from oner_fast.data.sources.concepts import concept
from oner_fast.data.sources.progress import progress, say
from oner_fast.data.sources.scene_plans import FEWEST, Placed, plan_scene
from oner_fast.data.sources.writer import Sample, Shard, measure, split_record, write_shard

SHARD = 1024
_KEPT = frozenset({"set", "name", "licence", "author", "tags"})
_INK = 10
"""A pixel belongs to a picture where one of its channels is darker than white by more than this, of 255."""


def build_scenes(
    source: str | Path,
    output: str | Path,
    *,
    train: int = 8192,
    held_out: int = 1024,
    most: int = 4,
    size: int = 128,
    seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Build the dataset `scenes` from another one, or complete it; returns the content of `dataset.json`.

    A scene of a split shows pictures of the same split of `source`, so that concepts that are held out there are held
    out here.

    Args:
        source: the folder of a dataset of pictures on white, such as `pictograms`.
        output: the folder of the new dataset.
        train: number of scenes of the split "train"; 0 for none.
        held_out: number of scenes of each other split.
        most: greatest number of pictures in a scene; the fewest are two.
        size: pixels a side of a scene.
        seed: decides pictures, sides and places.
        workers: processes that compose, one for each processor by default; the bytes do not depend on it.
        overwrite: replace another build in `output`.

    Raises:
        ValueError: an option is out of range, `source` is no dataset, or `output` holds another build.
    """
    source = Path(source)
    for name, value, least, why in (
        ("train", train, 0, "scenes"),
        ("held-out", held_out, 1, "scene of each other split"),
        ("most", most, FEWEST, "pictures in a scene"),
        ("size", size, 32, "pixels a side"),
    ):
        if value < least:
            raise ValueError(f"--{name} must be at least {least} ({why}), got {value}")
    if Path(output).absolute() == source.absolute():
        raise ValueError(f"--source and --output are both {source}; give scenes a folder of their own")
    listed = read_listing(source)
    if listed is None:
        raise ValueError(
            f"{source} has no dataset.json; give the folder of a dataset, as `oner-fast data pictograms` makes"
        )
    counts = {name: train if name == "train" else held_out for name in listed}
    counts = {name: count for name, count in counts.items() if count}
    made_of = {name: [shard.sha256 for shard in listed[name]] for name in counts}
    options = {
        "scenes": counts,
        "most": most,
        "image_size": size,
        "seed": seed,
        "made_of": made_of,
        "packages": {"pillow": PIL.__version__},
    }
    build = Build(output, "scenes", options, overwrite)
    if build.finished:
        content = build.dataset()
        report(content, build.output, "was complete already")
        return content
    say(f"scenes: {sum(counts.values()):,} at {size} pixels from {source} into {build.output}")
    build.begin()
    record = _write(build, source, counts, most, size, seed, default_workers() if workers is None else workers)
    content = build.finish(record)
    report(content, build.output)
    return content


@dataclass(frozen=True)
class _Job:
    """A shard to write: the scenes from `first` on, with the pictures of each."""

    source: Path
    split: str
    path: Path
    first: int
    scenes: tuple[tuple[Placed, ...], ...]
    size: int


def _write(
    build: Build, source: Path, counts: dict[str, int], most: int, size: int, seed: int, workers: int
) -> dict[str, Any]:
    jobs: list[_Job] = []
    distinct: dict[str, tuple[int, int]] = {}
    shown: dict[str, int] = {}
    for name, count in counts.items():
        captions, concepts, sets = _pictures(source, name)
        by_concept: dict[str, list[int]] = {}
        for number, of in enumerate(concepts):
            by_concept.setdefault(of, []).append(number)
        pictures = sorted(by_concept.items())
        scenes = [tuple(plan_scene(pictures, most, size, f"{seed} {name} {i}")) for i in range(count)]
        for first in range(0, count, SHARD):
            path = build.output / f"{name}-{first // SHARD:06d}.tar"
            jobs.append(_Job(source, name, path, first, tuple(scenes[first : first + SHARD]), size))
        for scene in scenes:
            for of in {sets[one.picture] for one in scene}:
                shown[of] = shown.get(of, 0) + 1
        named = {_caption([captions[one.picture] for one in scene])[0] for scene in scenes}
        distinct[name] = (len(named), len({concepts[one.picture] for scene in scenes for one in scene}))
    shards: dict[str, list[Shard]] = {name: [] for name in counts}
    with progress("composing scenes", sum(counts.values())) as advance:
        for job, shard in zip(jobs, each(_write_shard, jobs, workers), strict=True):
            shards[job.split].append(shard)
            advance(len(job.scenes))
    return {
        "image_size": size,
        "splits": {name: split_record(shards[name], *distinct[name]) for name in counts},
        "attribution": _attribution(source, shown),
    }


def _pictures(source: Path, split: str) -> tuple[list[str], list[str], list[str]]:
    """Read the caption, the concept and the set of each picture of a split."""
    data = PairDataset(source, split)
    captions, concepts, sets = [], [], []
    for i in range(len(data)):
        caption, meta = data.caption(i), data.meta(i)
        if meta.get("objects"):
            raise ValueError(
                f"{source} holds scenes already ({data.name(i)}); give --source a dataset of single pictures"
            )
        captions.append(caption)
        concepts.append(str(meta.get("concept") or concept(caption)))
        sets.append(str(meta.get("set", "")))
    return captions, concepts, sets


def _write_shard(job: _Job) -> Shard:
    if job.path.exists():
        return measure(job.path, len(job.scenes))
    return write_shard(job.path, _samples(job))


def _samples(job: _Job) -> Iterator[Sample]:
    data = PairDataset(job.source, job.split)
    for number, scene in enumerate(job.scenes, job.first):
        canvas = Image.new("RGB", (job.size, job.size), "white")
        pairs = [data.read(one.picture) for one in scene]
        caption, spans = _caption([pair.caption for pair in pairs])
        objects: list[dict[str, Any]] = []
        for one, pair, span in zip(scene, pairs, spans, strict=True):
            box = _paste(canvas, decode(pair.image, data.name(one.picture)), one)
            kept = {name: value for name, value in pair.meta.items() if name in _KEPT}
            of = pair.meta.get("concept") or concept(pair.caption)
            objects.append({**kept, "phrase": pair.caption, "span": span, "box": box, "concept": of})
        buffer = io.BytesIO()
        canvas.save(buffer, "PNG", compress_level=3)
        meta = {
            "caption": caption,
            "concept": concept(caption),
            "width": job.size,
            "height": job.size,
            "objects": objects,
            "licence": " AND ".join(_each(objects, "licence")),
            "author": ", ".join(_each(objects, "author")),
        }
        yield Sample(f"{job.split}-{number:06d}", buffer.getvalue(), "png", meta)


def _each(objects: Sequence[dict[str, Any]], name: str) -> list[str]:
    return list(dict.fromkeys(str(one.get(name, "unspecified")) for one in objects))


def _caption(phrases: Sequence[str]) -> tuple[str, list[list[int]]]:
    """Join names as "a, b and c"; returns the caption and the first and last place of each name, the end excluded."""
    text, spans = "", []
    for number, phrase in enumerate(phrases):
        if number:
            text += " and " if number == len(phrases) - 1 else ", "
        spans.append([len(text), len(text) + len(phrase)])
        text += phrase
    return text, spans


def _paste(canvas: Image.Image, picture: Image.Image, placed: Placed) -> list[int]:
    """Paste a picture into its square; returns the box of its ink: left, top, width and height in pixels."""
    longer = max(picture.size)
    width, height = (max(1, round(length * placed.side / longer)) for length in picture.size)
    small = picture.resize((width, height), Image.Resampling.LANCZOS)
    left, top = placed.left + (placed.side - width) // 2, placed.top + (placed.side - height) // 2
    canvas.paste(small, (left, top))
    apart = ImageChops.difference(small, Image.new("RGB", small.size, "white"))
    most = ImageChops.lighter(ImageChops.lighter(*apart.split()[:2]), apart.split()[2])
    ink = most.point([0] * (_INK + 1) + [255] * (255 - _INK)).getbbox() or (0, 0, width, height)
    return [left + ink[0], top + ink[1], ink[2] - ink[0], ink[3] - ink[1]]


def _attribution(source: Path, shown: dict[str, int]) -> list[dict[str, Any]]:
    """Take the attribution of the sets that are shown from the source, with the number of scenes that show each."""
    path = source / "dataset.json"
    listed = bounded_json.load_object(path.read_bytes(), str(path)).get("attribution")
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    kept = [entry | {"samples": shown.get(str(entry.get("set", "")), 0)} for entry in entries]
    return [entry for entry in kept if entry["samples"] or "set" not in entry]
