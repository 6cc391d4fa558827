"""Embed images and captions with a loaded model, batch by batch; a damaged image is left out and named."""

import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor

from oner_fast.data.dataset import PairDataset
from oner_fast.data.images import decode
from oner_fast.data.pixels import read_file
from oner_fast.evaluation.coco import CaptionedImage
from oner_fast.evaluation.retrieval import CaptionGallery, caption_gallery
from oner_fast.evaluation.sharing import gathered, mine, speaks

T = TypeVar("T")
_NAMED = 20  # images whose names are logged

logger = logging.getLogger("oner_fast.evaluation")


class Encoder(Protocol):
    """Methods of a model that evaluation needs; `oner_fast.load` returns such a model."""

    def preprocess(self, image: Image.Image, /) -> Tensor:
        """Convert an image to (3, S, S) uint8."""

    def encode_image(self, images: Any, /) -> Tensor:
        """Embed (B, 3, S, S) uint8: (B, E) float32, L2-normalised."""

    def encode_text(self, texts: list[str], /) -> Tensor:
        """Embed B captions: (B, E) float32, L2-normalised."""

    def encode_patches(self, images: Any, /) -> Tensor:
        """Embed patches of (B, 3, S, S) uint8: (B, N, E) float32, L2-normalised, row by row."""


class JointEncoder(Encoder, Protocol):
    """A model that also embeds an image and words in one pass."""

    def encode_image_text(self, images: Any, texts: list[str], /) -> Tensor:
        """Embed B pairs: (B, E) float32, L2-normalised."""


@dataclass(frozen=True)
class SplitEmbeddings:
    """Embeddings of a split.

    Attributes:
        image: (N, E) embeddings of the images.
        text: (M, E) embeddings of the captions in the gallery.
        gallery: the captions, and how they match the images.
        captions: the captions of each image.
        rows: the place of each image in the data.
        damaged: names of the images that were left out.
        meta: the fields of each image's json; empty for image files.
    """

    image: Tensor
    text: Tensor
    gallery: CaptionGallery
    captions: list[list[str]]
    rows: list[int]
    damaged: list[str]
    meta: list[dict[str, Any]] = field(default_factory=list)


def embed_split(
    loaded: Encoder,
    dataset: PairDataset,
    *,
    batch_size: int = 64,
    limit: int | None = None,
    label: str = "images",
    texts: bool = True,
) -> SplitEmbeddings:
    """Embed a split of a data set; equal captions become one row of the gallery.

    A sample's `also` (in its json) lists captions of images with the same pixels: they are right answers too.

    Args:
        limit: embed this many samples only, evenly spaced.
        texts: False leaves `text` empty, for a model that reads none.

    Raises:
        ValueError: the split has no readable sample.
    """
    rows = spaced(len(dataset), limit)

    image, kept, pairs, damaged = embed_pairs(loaded, dataset, rows, batch_size=batch_size, label=label)
    captions = [[caption] for caption, _ in pairs]
    gallery = caption_gallery(captions, also=[meta.get("also", []) for _, meta in pairs])
    text = embed_texts(loaded, gallery.texts, batch_size=batch_size) if texts else image[:0]
    return SplitEmbeddings(image, text, gallery, captions, kept, damaged, [meta for _, meta in pairs])


def embed_pairs(
    loaded: Encoder, dataset: PairDataset, rows: Sequence[int], *, batch_size: int = 64, label: str = "images"
) -> tuple[Tensor, list[int], list[tuple[str, dict[str, Any]]], list[str]]:
    """Embed the images of some samples.

    Returns:
        (N, E) embeddings; the rows that could be read; the caption and json fields of each; the names of the others.
    """

    def read(row: int) -> tuple[str, bytes, tuple[str, dict[str, Any]]]:
        pair = dataset.read(row)
        return dataset.name(row), pair.image, (pair.caption, pair.meta)

    return _embed_images(loaded, list(rows), read, batch_size, label)


def embed_captioned(loaded: Encoder, images: Sequence[CaptionedImage], *, batch_size: int = 64) -> SplitEmbeddings:
    """Embed image files with several captions each.

    Each caption keeps a row of its own and matches its own image, as in the published COCO protocol.
    """

    def read(row: int) -> tuple[str, bytes, list[str]]:
        path = images[row].path
        return str(path), read_file(path), images[row].captions

    rows = list(range(len(images)))
    image, kept, captions, damaged = _embed_images(loaded, rows, read, batch_size, "images")
    gallery = caption_gallery(captions, distinct=False, equal_captions_match=False)
    text = embed_texts(loaded, gallery.texts, batch_size=batch_size)
    return SplitEmbeddings(image, text, gallery, captions, kept, damaged)


def embed_files(loaded: Encoder, files: Sequence[Any], *, batch_size: int = 64) -> tuple[Tensor, list[int], list[str]]:
    """Embed image files (paths): (N, E) embeddings, the rows that could be read, and the names of the others."""

    def read(row: int) -> tuple[str, bytes, None]:
        return str(files[row]), read_file(files[row]), None

    image, kept, _, damaged = _embed_images(loaded, list(range(len(files))), read, batch_size, "images")
    return image, kept, damaged


def embed_texts(loaded: Encoder, texts: Sequence[str], *, batch_size: int = 64) -> Tensor:
    """Embed captions: (M, E) float32 on the CPU, in batches in the given order."""
    batches = math.ceil(len(texts) / batch_size)
    starts = [number * batch_size for number in mine(batches)]
    with torch.inference_mode():
        parts = [
            loaded.encode_text(list(texts[starts[number] : starts[number] + batch_size])).float().cpu()
            for number in shown(range(len(starts)), "embedding texts")
        ]
    return torch.cat(gathered(parts, batches))


def spaced(count: int, limit: int | None) -> list[int]:
    """Rows 0 to count - 1, or `limit` of them evenly spaced."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit needs to be at least 1, got {limit}")
    if limit is None or limit >= count:
        return list(range(count))
    return [i * count // limit for i in range(limit)]


def _embed_images(
    loaded: Encoder, rows: list[int], read: Callable[[int], tuple[str, bytes, T]], batch_size: int, label: str
) -> tuple[Tensor, list[int], list[T], list[str]]:
    """Embed images; returns embeddings, the rows kept, their other data, and the names of unreadable images."""
    if batch_size < 1:
        raise ValueError(f"batch_size needs to be at least 1, got {batch_size}")

    def prepare(row: int) -> tuple[int, Tensor, T] | str:
        try:
            name, content, beside = read(row)
            return row, loaded.preprocess(decode(content, name)), beside
        except (OSError, ValueError) as error:
            return str(error)

    batches = math.ceil(len(rows) / batch_size)
    starts = [number * batch_size for number in mine(batches)]
    done: list[tuple[Tensor | None, list[tuple[int, T]], list[str]]] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, torch.inference_mode():
        # The next batch is decoded while this one is embedded.
        waiting: list[list[Future[tuple[int, Tensor, T] | str]]] = []
        for number in shown(range(len(starts) + 1), f"embedding {label}"):
            if number < len(starts):
                chunk = rows[starts[number] : starts[number] + batch_size]
                waiting.append([pool.submit(prepare, row) for row in chunk])
            if number == 0:
                continue
            results = [future.result() for future in waiting.pop(0)]
            good = [result for result in results if not isinstance(result, str)]
            pixels = [one for _, one, _ in good]
            done.append(
                (
                    loaded.encode_image(torch.stack(pixels)).float().cpu() if pixels else None,
                    [(row, beside) for row, _, beside in good],
                    [result for result in results if isinstance(result, str)],
                )
            )
    every = gathered(done, batches)
    damaged = [sentence for _, _, sentences in every for sentence in sentences]
    parts = [part for part, _, _ in every if part is not None]
    if not parts:
        raise ValueError(f"none of {len(rows)} images could be read" + (f"; first: {damaged[0]}" if damaged else ""))
    name_left_out(damaged)
    read_rows = [pair for _, pairs, _ in every for pair in pairs]
    return torch.cat(parts), [row for row, _ in read_rows], [beside for _, beside in read_rows], damaged


def name_left_out(damaged: Sequence[str]) -> None:
    """Log what was left out: the first names with their reasons, and how many more there are. Rank 0 alone logs it."""
    if not speaks():
        return
    for sentence in damaged[:_NAMED]:
        logger.warning("left out: %s", sentence)
    if len(damaged) > _NAMED:
        logger.warning("left out: %d more", len(damaged) - _NAMED)


def shown(steps: range, label: str) -> Iterator[int]:
    """Show progress: a bar on a terminal, elsewhere a line every quarter of long work."""
    if not speaks():
        yield from steps
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True)
        yield from track(steps, description=label.capitalize(), console=console, transient=True)
        return
    for number in steps:
        if len(steps) >= 100 and number and number % (len(steps) // 4) == 0:
            print(f"{label}: batch {number} of {len(steps) - 1}", file=sys.stderr, flush=True)
        yield number
