"""Retrieval between images and captions: R@k in both directions, with chance.

An image may have several captions and a caption several images. A query is a hit when one of its matches is among the
top k. Scores are cosines (dot products of L2-normalised embeddings) in float64. A tie is a miss: at equal scores a
wrong item ranks ahead of a match. A collapsed model, whose embeddings are all equal, therefore gets zero.

For figures that stand beside published ones, `ties="topk"` follows `clip_benchmark`: the scores are one product of all
captions with all images in the embeddings' own dtype, and `torch.topk` orders equal scores.
"""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

TIE = 1e-9  # scores this close are equal: far above float64 rounding, far below any real difference
CHUNK_SCORES = 1 << 22  # number of scores held at once (32 MiB of float64)
KS = (1, 5, 10)
Ties = Literal["miss", "topk"]
"""Rule for equal scores: a wrong item ranks ahead of a right one, or as `torch.topk` orders them."""


@dataclass(frozen=True)
class Matches:
    """Pairs of matching images and captions, by row.

    `image` and `text` are (P,) int64 rows, each pair once; `images` and `texts` are the sizes of the two sets.
    """

    image: Tensor
    text: Tensor
    images: int
    texts: int

    def __post_init__(self) -> None:
        if self.image.shape != self.text.shape or self.image.dim() != 1:
            raise ValueError(
                f"image and text rows need one shape (P,), got {tuple(self.image.shape)} and {tuple(self.text.shape)}"
            )
        for name, rows, size in (("image", self.image, self.images), ("text", self.text, self.texts)):
            if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= size):
                raise ValueError(f"{name} rows need to be in [0, {size}), got {int(rows.min())} to {int(rows.max())}")


@dataclass(frozen=True)
class CaptionGallery:
    """Captions to search (`texts`), and how they match the images that they were written for."""

    texts: list[str]
    matches: Matches


def caption_gallery(
    captions: Sequence[Sequence[str]],
    *,
    also: Sequence[Sequence[str]] | None = None,
    distinct: bool = True,
    equal_captions_match: bool = True,
) -> CaptionGallery:
    """Build the gallery from the captions of each image.

    Args:
        captions: for each image, its captions (at least one).
        also: for each image, further captions that count as right if the gallery contains them; they add no row.
        distinct: give captions that differ in case only one row. Otherwise each caption keeps a row of its own, as in
            the published COCO protocol.
        equal_captions_match: let an image match another image's caption if it differs from its own in case only.
            `distinct` needs it.

    Raises:
        ValueError: an image has no caption, or `distinct` is given without `equal_captions_match`.
    """
    if distinct and not equal_captions_match:
        raise ValueError("distinct=True needs equal_captions_match=True: one row stands for all equal captions")
    texts: list[str] = []
    rows_of: dict[str, list[int]] = {}
    own: list[list[int]] = []
    for number, several in enumerate(captions):
        if not several:
            raise ValueError(f"image {number} has no caption; each image needs at least one")
        rows = []
        for caption in several:
            known = rows_of.setdefault(_fold(caption), [])
            if not (distinct and known):
                known.append(len(texts))
                texts.append(caption)
            rows.append(known[-1])
        own.append(rows)
    if equal_captions_match:
        more = also or [()] * len(captions)
        own = [
            [row for caption in (*several, *others) for row in rows_of.get(_fold(caption), [])]
            for several, others in zip(captions, more, strict=True)
        ]
    pairs = [(image, text) for image, rows in enumerate(own) for text in dict.fromkeys(rows)]
    table = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return CaptionGallery(texts, Matches(table[:, 0].clone(), table[:, 1].clone(), len(own), len(texts)))


def match_ranks(query: Tensor, gallery: Tensor, query_row: Tensor, gallery_row: Tensor) -> Tensor:
    """Rank each query's best match: the number of wrong items that score at least as high.

    Only a chunk of the (Q, G) scores is held at a time.

    Args:
        query: (Q, E) L2-normalised embeddings.
        gallery: (G, E) L2-normalised embeddings.
        query_row, gallery_row: (P,) int64, the matching pairs.

    Returns:
        (Q,) int64 in [0, G); 0 means that a match comes first.

    Raises:
        ValueError: the widths differ, embeddings are not finite, or a query has no match.
    """
    _check(query, gallery)
    order = torch.argsort(query_row, stable=True)
    query_row, gallery_row = query_row[order].to(query.device), gallery_row[order].to(query.device)
    counts = torch.bincount(query_row, minlength=len(query))
    if len(query) and int(counts.min()) == 0:
        raise ValueError(f"query {int(counts.argmin())} has no match in the gallery; leave such queries out")
    ends = torch.cumsum(counts, 0).tolist()
    targets = gallery.double().T
    ranks = torch.empty(len(query), dtype=torch.int64)
    for start, stop in _chunks(len(query), len(gallery)):
        scores = query[start:stop].double() @ targets
        pairs = slice(ends[start - 1] if start else 0, ends[stop - 1])
        rows, columns = query_row[pairs] - start, gallery_row[pairs]
        best = torch.full((stop - start,), -math.inf, dtype=torch.float64, device=query.device)
        best = best.scatter_reduce(0, rows, scores[rows, columns], "amax")
        scores[rows, columns] = -math.inf
        ranks[start:stop] = (scores >= best[:, None] - TIE).sum(1).cpu()
    return ranks


def top_matches(query: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k best gallery items of each query: (Q, k) float64 cosines and (Q, k) int64 rows; ties by lower row."""
    _check(query, gallery)
    k = min(k, len(gallery))
    targets = gallery.double().T
    scores, rows = [], []
    for start, stop in _chunks(len(query), len(gallery)):
        ordered = torch.sort(query[start:stop].double() @ targets, dim=1, descending=True, stable=True)
        scores.append(ordered.values[:, :k].cpu())
        rows.append(ordered.indices[:, :k].cpu())
    if not scores:
        return torch.empty(0, k, dtype=torch.float64), torch.empty(0, k, dtype=torch.int64)
    return torch.cat(scores), torch.cat(rows)


def chance(positives: Tensor, gallery: int, k: int) -> float:
    """Expected score of a random order: the mean over queries of 1 - C(G-p, k) / C(G, k), exactly (hypergeometric).

    `positives` (Q,) holds the number p of matches of each query; `gallery` is G.
    """
    if not positives.numel():
        raise ValueError("chance needs at least one query")
    values, counts = torch.unique(positives, return_counts=True)
    total = 0.0
    for p, count in zip(values.tolist(), counts.tolist(), strict=True):
        missed = math.prod(max(gallery - p - j, 0) / (gallery - j) for j in range(min(k, gallery)))
        total += count * (1.0 - missed)
    return total / int(counts.sum())


def topk_hits(scores: Tensor, query_row: Tensor, gallery_row: Tensor, k: int) -> Tensor:
    """Tell of each query whether `torch.topk` puts a match among its k best: (Q,) bool.

    Args:
        scores: (Q, G).
        query_row, gallery_row: (P,) int64, the matching pairs.
        k: the number of best items; one more than G counts as G.
    """
    return _right(scores, query_row, gallery_row, k).any(1)


def topk_ranks(scores: Tensor, query_row: Tensor, gallery_row: Tensor, k: int) -> Tensor:
    """Rank each query's first match among the k items that one `torch.topk` puts first: (Q,) int64, k for none.

    For the arguments see `topk_hits`.
    """
    right = _right(scores, query_row, gallery_row, k)
    return torch.where(right.any(1), right.int().argmax(1), k).cpu()


def _right(scores: Tensor, query_row: Tensor, gallery_row: Tensor, k: int) -> Tensor:
    """Tell which of the k items that `torch.topk` puts first are matches: (Q, min(k, G)) bool."""
    queries, gallery = scores.shape
    best = torch.topk(scores, min(k, gallery), dim=1).indices
    first = torch.arange(queries, device=scores.device)[:, None] * gallery
    return torch.isin(best + first, (query_row * gallery + gallery_row).to(scores.device))


def recall(
    query: Tensor,
    gallery: Tensor,
    query_row: Tensor,
    gallery_row: Tensor,
    *,
    ks: Sequence[int] = KS,
    scores: Tensor | None = None,
) -> dict[str, float | int]:
    """Compute R@k of one direction; for the arguments see `match_ranks`.

    `scores` (Q, G), where given, decide the hits through `topk_hits`; the median rank counts ties as misses all the
    same.

    Returns:
        {"R@1", ..., "chance@1", ..., "median_rank", "queries", "gallery"}; shares, not per cent. Ranks count from 1.
    """
    ranks = match_ranks(query, gallery, query_row, gallery_row)
    if not len(ranks):
        raise ValueError("recall needs at least one query")
    positives = torch.bincount(query_row.cpu(), minlength=len(query))
    hits = {k: ranks < k if scores is None else topk_hits(scores, query_row, gallery_row, k) for k in ks}
    result: dict[str, float | int] = {f"R@{k}": int(hits[k].sum()) / len(ranks) for k in ks}
    result |= {f"chance@{k}": chance(positives, len(gallery), k) for k in ks}
    return result | {"median_rank": int(ranks.median()) + 1, "queries": len(query), "gallery": len(gallery)}


def retrieval(
    image: Tensor,
    text: Tensor,
    matches: Matches,
    *,
    ks: Sequence[int] = KS,
    image_queries: Tensor | None = None,
    text_queries: Tensor | None = None,
    ties: Ties = "miss",
) -> dict[str, dict[str, float | int]]:
    """Compute R@k in both directions: {"image_to_text": ..., "text_to_image": ...}, each in the form of `recall`.

    Args:
        image: (N, E) L2-normalised.
        text: (M, E) L2-normalised.
        matches: their pairs.
        ks: the values of k.
        image_queries, text_queries: int64 rows of the queries; all by default. The whole other side stays the gallery.
        ties: "miss" ranks a wrong item ahead of a match with the same score. "topk" decides as `clip_benchmark` does,
            and holds all N x M scores at once.
    """
    if len(image) != matches.images or len(text) != matches.texts:
        raise ValueError(
            f"matches are for {matches.images} images and {matches.texts} texts, got {len(image)} and {len(text)}"
        )
    asked_image, image_pairs = _restrict(image_queries, matches.image, matches.images)
    asked_text, text_pairs = _restrict(text_queries, matches.text, matches.texts)
    to_text: Tensor | None = None
    to_image: Tensor | None = None
    if ties == "topk":
        every = text @ image.T  # the product and its order of operands are those of clip_benchmark
        to_text = every.T if image_queries is None else every.T[asked_image]
        to_image = every if text_queries is None else every[asked_text]
    image_columns, text_columns = matches.text[image_pairs[1]], matches.image[text_pairs[1]]
    return {
        "image_to_text": recall(image[asked_image], text, image_pairs[0], image_columns, ks=ks, scores=to_text),
        "text_to_image": recall(text[asked_text], image, text_pairs[0], text_columns, ks=ks, scores=to_image),
    }


def _restrict(queries: Tensor | None, rows: Tensor, size: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Rows of the queries, and for the pairs that they keep, their new row and their place among the pairs."""
    asked = torch.arange(size) if queries is None else queries.cpu()
    place = torch.full((size,), -1, dtype=torch.int64)
    place[asked] = torch.arange(len(asked))
    new = place[rows.cpu()]
    kept = (new >= 0).nonzero().flatten()
    return asked, (new[kept], kept)


def _chunks(queries: int, gallery: int) -> list[tuple[int, int]]:
    size = max(1, CHUNK_SCORES // max(1, gallery))
    return [(start, min(start + size, queries)) for start in range(0, queries, size)]


def _check(query: Tensor, gallery: Tensor) -> None:
    if query.dim() != 2 or gallery.dim() != 2 or query.shape[1] != gallery.shape[1]:
        raise ValueError(f"embeddings need shapes (Q, E) and (G, E), got {tuple(query.shape)}, {tuple(gallery.shape)}")
    for name, rows in (("query", query), ("gallery", gallery)):
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(f"{name} embeddings hold NaN or infinity; they need to be finite")


def _fold(caption: str) -> str:
    return " ".join(unicodedata.normalize("NFC", caption).casefold().split())
