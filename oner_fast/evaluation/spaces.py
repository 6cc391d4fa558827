"""The spaces in which embeddings of OneR can be compared, so that every figure says where it looks.

| space | query | gallery |
|---|---|---|
| `backbone` | the trunk's [CLS] after the final norm | the same |
| `projection` | the student's projection | the same |
| `predictor` | the student's projection through its predictor | the averaged teacher's projection |
| `teacher` | the averaged teacher's projection | the same |
| `max` | the greater figure of `backbone` and `projection` | |

The contrast is computed in `predictor`. Its predictor is on the query side of both modalities, so that the contrast can
be at its least while projections of the two modalities do not meet. `max` is what an author's evaluation script
reports; it has figures of retrieval and of classification, and no gap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from oner_fast.data.batch import TokenizedText
from oner_fast.evaluation.embed import SplitEmbeddings
from oner_fast.evaluation.modality_gap import modality_gap, spread
from oner_fast.evaluation.record import model_digest
from oner_fast.evaluation.retrieval import Matches, Ties, retrieval
from oner_fast.models.contrast import FILE, Contrast, load_contrast
from oner_fast.models.oner import ImageInput, OneR, Pass, TextInput

SPACES = ("backbone", "projection", "predictor", "teacher", "max")
# The embedding of a query and of a gallery item, in each space that is computed.
_SIDES = {
    "backbone": ("backbone", "backbone"),
    "projection": ("projection", "projection"),
    "predictor": ("predicted", "teacher"),
    "teacher": ("teacher", "teacher"),
}
_OF_MAX = ("backbone", "projection")

Columns = dict[str, Tensor]
"""Embeddings (N, E) of the same N items by name: `backbone`, `projection`, `predicted`, `teacher`."""


@dataclass(frozen=True)
class Sides:
    """L2-normalised embeddings of images (N, E) and of texts (M, E) in one space, as queries and as gallery items."""

    image_query: Tensor
    image_item: Tensor
    text_query: Tensor
    text_item: Tensor

    @property
    def gap(self) -> float:
        """The modality gap between queries and gallery items, the mean of the two directions."""
        if self.image_query is self.image_item and self.text_query is self.text_item:
            return modality_gap(self.image_item, self.text_item)
        first = modality_gap(self.image_query, self.text_item)
        return (first + modality_gap(self.image_item, self.text_query)) / 2

    def retrieval(
        self,
        matches: Matches,
        *,
        image_queries: Tensor | None = None,
        text_queries: Tensor | None = None,
        ties: Ties = "miss",
    ) -> dict[str, dict[str, float | int]]:
        """Compute R@k in both directions, in the form of `oner_fast.evaluation.retrieval.retrieval`."""
        find = partial(retrieval, matches=matches, image_queries=image_queries, text_queries=text_queries, ties=ties)
        found = find(self.image_query, self.text_item)
        if self.image_query is self.image_item and self.text_query is self.text_item:
            return found
        return found | {"text_to_image": find(self.image_item, self.text_query)["text_to_image"]}


def computed_spaces(contrast: Contrast | None) -> tuple[str, ...]:
    """Name the spaces that are computed: those of the teacher need one."""
    with_teacher = contrast is not None and contrast.teacher is not None
    return tuple(_SIDES) if with_teacher else _OF_MAX


def sides(image: Columns, text: Columns, space: str) -> Sides:
    """Return the two sides of a space (any but `max`)."""
    query, item = _SIDES[space]
    return Sides(image[query], image[item], text[query], text[item])


def image_columns(tower: OneR, contrast: Contrast | None, images: Tensor) -> Columns:
    """Embed images (B, 3, S, S): float32, L2-normalised, in all columns that the spaces need."""
    return _columns(tower, contrast, Pass("image", image=ImageInput(images)))


def text_columns(tower: OneR, contrast: Contrast | None, text: TokenizedText) -> Columns:
    """Embed packed captions: float32, L2-normalised, in all columns that the spaces need."""
    return _columns(tower, contrast, Pass("text", text=TextInput(text.input_ids, text.cu_seqlens)))


def _columns(tower: OneR, contrast: Contrast | None, single: Pass) -> Columns:
    cls = tower([single], {})[single.name].cls
    found = {"backbone": cls, "projection": tower.project(cls, single.name)}
    if contrast is not None and contrast.teacher is not None:
        found["predicted"] = contrast.predicted({single.name: found["projection"]})[single.name]
        found["teacher"] = contrast.teacher.project_cls(contrast.teacher([single], {}))[single.name]
    return {name: F.normalize(each.float(), dim=-1) for name, each in found.items()}


class SpacesEncoder:
    """A model whose embeddings hold all columns of the spaces beside each other, as one row for each item.

    Args:
        loaded: OneR, from `oner_fast.load`.
        contrast: its predictors and teacher; None where the run keeps none.
        asked: the spaces to report, in the order of `SPACES`.
    """

    def __init__(self, loaded: Any, contrast: Contrast | None, asked: Sequence[str]) -> None:
        self.loaded, self.contrast, self.asked = loaded, contrast, tuple(asked)
        self.tower: OneR = loaded.model
        c = self.tower.config
        widths = {"backbone": c.width, "projection": c.embed_dim, "predicted": c.embed_dim, "teacher": c.embed_dim}
        used = {side for space in computed_spaces(contrast) for side in _SIDES[space]}
        self.widths = {name: width for name, width in widths.items() if name in used}

    def preprocess(self, image: Image.Image) -> Tensor:
        """Convert an image to (3, S, S) uint8."""
        pixels: Tensor = self.loaded.preprocess(image)
        return pixels

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed (B, 3, S, S) uint8: (B, sum of the columns' widths)."""
        return self._row(image_columns(self.tower, self.contrast, images.to(self.tower.cls_token.device)))

    def encode_text(self, texts: list[str]) -> Tensor:
        """Embed B captions: (B, sum of the columns' widths)."""
        text = self.loaded.tokenizer(texts, self.tower.config.max_text_tokens).to(self.tower.cls_token.device)
        return self._row(text_columns(self.tower, self.contrast, text))

    def encode_patches(self, images: Tensor) -> Tensor:
        """Embed patches in the projection: (B, N, E)."""
        patches: Tensor = self.loaded.encode_patches(images)
        return patches

    def columns(self, rows: Tensor) -> Columns:
        """Take rows of this encoder, or means of them, apart: each column L2-normalised again."""
        parts = rows.split(list(self.widths.values()), dim=1)
        return {name: F.normalize(part, dim=-1) for name, part in zip(self.widths, parts, strict=True)}

    def in_projection(self, embedded: SplitEmbeddings) -> SplitEmbeddings:
        """Reduce the embeddings of a split to the projection, in which the main figures are."""
        image, text = self.columns(embedded.image), self.columns(embedded.text)
        return replace(embedded, image=image["projection"], text=text["projection"])

    def _row(self, columns: Columns) -> Tensor:
        return torch.cat([columns[name] for name in self.widths], dim=1)


def open_spaces(run: Path, loaded: Any, asked: Sequence[str] = ()) -> tuple[SpacesEncoder | None, str | None]:
    """Find the spaces of a run's model.

    Args:
        run: the run folder.
        loaded: its model.
        asked: names of `SPACES`; all that the run has by default.

    Returns:
        First the encoder, or None for a model of another kind, which has its one joint space. Second a sentence about
        what is missing from the run for other spaces, or None.

    Raises:
        ValueError: an asked space is unknown, or the run does not have it; or `contrast.safetensors` is damaged or
            belongs to another model.
    """
    if unknown := [name for name in asked if name not in SPACES]:
        raise ValueError(f"unknown space {unknown[0]!r}; known: {', '.join(SPACES)}")
    if not isinstance(getattr(loaded, "model", None), OneR):
        if other := [name for name in asked if name != "projection"]:
            raise ValueError(f"{run} has no space {other[0]!r}: its two towers meet in one space, projection")
        return None, None
    contrast, missing = _contrast(run, loaded.model)
    known = [name for name in SPACES if name in (*computed_spaces(contrast), "max")]
    if absent := [name for name in asked if name not in known]:
        why = missing or "it was trained without a teacher"
        raise ValueError(f"{run} has no space {absent[0]!r} ({why}); it has {', '.join(known)}")
    return SpacesEncoder(loaded, contrast, [name for name in known if name in (asked or known)]), missing


def _contrast(run: Path, tower: OneR) -> tuple[Contrast | None, str | None]:
    """Load predictors and teacher, or say why there are none to load."""
    model = model_digest(run)
    if model is None:
        return None, f"{run} is not finished, so that the spaces predictor and teacher are left out"
    if not (run / FILE).is_file():
        return None, (
            f"{run} has no {FILE}, so that the spaces predictor and teacher are left out; run the training's command "
            "again, which writes it from the last checkpoint"
        )
    found = load_contrast(run / FILE, tower.config, model)
    device = tower.cls_token.device
    for part in (found.predictor, found.text_predictor, found.teacher):
        if part is not None:
            part.to(device)
    return found, None


def space_figures(
    encoder: SpacesEncoder,
    wide: SplitEmbeddings,
    *,
    image_rows: Tensor | None = None,
    text_rows: Tensor | None = None,
    ties: Ties = "miss",
) -> dict[str, dict[str, Any]]:
    """Compute retrieval, gap and spread in each asked space.

    Args:
        encoder: the encoder of `wide`.
        wide: embeddings with all columns.
        image_rows, text_rows: the queries; all by default. The whole other side stays the gallery.
        ties: how equal scores count, as for `oner_fast.evaluation.retrieval.retrieval`.
    """
    image, text = encoder.columns(wide.image), encoder.columns(wide.text)
    found: dict[str, dict[str, Any]] = {}
    for space in computed_spaces(encoder.contrast):
        both = sides(image, text, space)
        scores = both.retrieval(wide.gallery.matches, image_queries=image_rows, text_queries=text_rows, ties=ties)
        part = _rows(both, image_rows, text_rows)
        found[space] = {
            **scores,
            "modality_gap": part.gap,
            "spread": {"image": spread(part.image_query), "text": spread(part.text_query)},
        }
    return _asked(encoder, found)


def class_figures(
    encoder: SpacesEncoder, image: Tensor, classes: Tensor, figures: Callable[[Tensor, Tensor], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Compute the accuracy in each asked space.

    Args:
        encoder: the encoder of the embeddings.
        image: (N, ...) wide embeddings of the images.
        classes: (C, ...) wide embeddings of the classes.
        figures: computes the figures of (N, E) images and (C, E) classes.
    """
    asked, described = encoder.columns(image), encoder.columns(classes)
    found = {}
    for space in computed_spaces(encoder.contrast):
        query, item = _SIDES[space]
        found[space] = figures(asked[query], described[item])
    return _asked(encoder, found)


def gaps(image: Columns, text: Columns) -> dict[str, float]:
    """Compute the modality gap in each space that the columns allow."""
    return {space: sides(image, text, space).gap for space, names in _SIDES.items() if set(names) <= image.keys()}


def _asked(encoder: SpacesEncoder, found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Add the maximum, and keep what was asked for."""
    found = found | {"max": greater(*(found[space] for space in _OF_MAX))}
    return {space: found[space] for space in encoder.asked}


def greater(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Take the greater of each share (and the lesser median rank) of two entries; gap and spread are left out."""
    found: dict[str, Any] = {}
    for name, value in first.items():
        if name in ("modality_gap", "spread"):
            continue
        other = second[name]
        if isinstance(value, Mapping):
            found[name] = greater(value, other)
        else:
            found[name] = min(value, other) if name == "median_rank" else max(value, other)
    return found


def _rows(both: Sides, image: Tensor | None, text: Tensor | None) -> Sides:
    """Keep some rows; sides that were one tensor stay one."""
    kept: dict[int, Tensor] = {}

    def take(rows: Tensor, some: Tensor | None) -> Tensor:
        return kept.setdefault(id(rows), rows if some is None else rows[some])

    return Sides(
        take(both.image_query, image),
        take(both.image_item, image),
        take(both.text_query, text),
        take(both.text_item, text),
    )
