"""Choose retrieval examples: some drawn by seed, and separately the best and the worst, labelled as such."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from oner_fast.evaluation.composed import ComposedQuery, composed_scores, shuffle_key
from oner_fast.evaluation.embed import SplitEmbeddings
from oner_fast.evaluation.retrieval import match_ranks, top_matches

TOP = 5


@dataclass(frozen=True)
class Hit:
    """One of the top five: an image or a caption, whether it is right, and its cosine with the query."""

    right: bool
    cosine: float
    caption: str
    picture: str | None = None


@dataclass(frozen=True)
class Example:
    """A query with its top five. `rank` is the place of the first right answer, from 1, among `gallery`."""

    caption: str
    hits: list[Hit]
    rank: int
    gallery: int
    picture: str | None = None
    word: str | None = None


@dataclass(frozen=True)
class Panels:
    """Three sets of examples of one direction."""

    drawn: list[Example] = field(default_factory=list)
    best: list[Example] = field(default_factory=list)
    worst: list[Example] = field(default_factory=list)


def choose(
    names: Sequence[str], ranks: Tensor, margins: Tensor, *, seed: int, drawn: int, best: int, worst: int
) -> tuple[list[int], list[int], list[int]]:
    """Choose three disjoint sets of queries.

    Args:
        names: names of the queries; they and the seed alone decide which queries are drawn.
        ranks: (Q,) place of the first right answer, from 0.
        margins: (Q,) cosine of the best right answer minus that of the best wrong one.
        seed: seed of the draw.
        drawn, best, worst: sizes of the sets.

    Returns:
        Rows drawn by seed, those with the largest margin, and those with the last ranks.
    """
    order = sorted(range(len(names)), key=lambda row: (shuffle_key(seed, names[row]), row))
    by_seed = order[:drawn]
    left = [row for row in order if row not in set(by_seed)]
    good = sorted((row for row in left if ranks[row] == 0), key=lambda row: -float(margins[row]))[:best]
    bad = sorted((row for row in left if row not in set(good) and ranks[row] > 0), key=lambda row: -int(ranks[row]))
    return by_seed, good, bad[:worst]


def image_examples(
    embedded: SplitEmbeddings,
    picture: Callable[[int], str],
    *,
    seed: int,
    drawn: int = 6,
    best: int = 3,
    worst: int = 3,
) -> Panels:
    """Choose images with their five nearest captions. `picture` gives the data URI of a row of the split."""
    matches = embedded.gallery.matches
    ranks = match_ranks(embedded.image, embedded.text, matches.image, matches.text)
    right = _table(matches.image, matches.text)
    captions = [several[0] for several in embedded.captions]
    top = top_matches(embedded.image, embedded.text, TOP)
    margins = _margins(embedded.image, embedded.text, matches.image, matches.text)

    def example(row: int) -> Example:
        hits = [
            Hit(column in right[row], score, embedded.gallery.texts[column])
            for score, column in zip(top[0][row].tolist(), top[1][row].tolist(), strict=True)
        ]
        return Example(captions[row], hits, int(ranks[row]) + 1, matches.texts, picture(row))

    names = [f"{caption} {row}" for caption, row in zip(captions, embedded.rows, strict=True)]
    return _panels(choose(names, ranks, margins, seed=seed, drawn=drawn, best=best, worst=worst), example)


def text_examples(
    embedded: SplitEmbeddings,
    picture: Callable[[int], str],
    *,
    seed: int,
    drawn: int = 6,
    best: int = 4,
    worst: int = 2,
) -> Panels:
    """Choose captions with their five nearest images."""
    matches = embedded.gallery.matches
    ranks = match_ranks(embedded.text, embedded.image, matches.text, matches.image)
    right = _table(matches.text, matches.image)
    top = top_matches(embedded.text, embedded.image, TOP)
    margins = _margins(embedded.text, embedded.image, matches.text, matches.image)

    def example(row: int) -> Example:
        hits = [
            Hit(column in right[row], score, embedded.captions[column][0], picture(column))
            for score, column in zip(top[0][row].tolist(), top[1][row].tolist(), strict=True)
        ]
        return Example(embedded.gallery.texts[row], hits, int(ranks[row]) + 1, matches.images)

    return _panels(
        choose(embedded.gallery.texts, ranks, margins, seed=seed, drawn=drawn, best=best, worst=worst), example
    )


def composed_examples(
    embedded: SplitEmbeddings,
    queries: Sequence[ComposedQuery],
    query: Tensor,
    picture: Callable[[int], str],
    *,
    seed: int,
    drawn: int = 6,
    best: int = 2,
) -> Panels:
    """Choose images with an added word, and the five nearest images. `query` (Q, E) holds F(I,T) of the queries."""
    scores = composed_scores(query, embedded.image, queries)
    wrong = scores.clone()
    for number, one in enumerate(queries):
        wrong[number, torch.tensor(one.targets)] = -torch.inf
    reached = torch.stack([scores[number, one.targets].max() for number, one in enumerate(queries)])
    ranks, margins = (wrong >= reached[:, None]).sum(1), reached - wrong.amax(1)
    top = torch.sort(scores, dim=1, descending=True, stable=True)

    def example(number: int) -> Example:
        one = queries[number]
        hits = [
            Hit(column in one.targets, score, embedded.captions[column][0], picture(column))
            for score, column in zip(top.values[number, :TOP].tolist(), top.indices[number, :TOP].tolist(), strict=True)
        ]
        caption, gallery = embedded.captions[one.image][0], scores.shape[1] - 1
        return Example(caption, hits, int(ranks[number]) + 1, gallery, picture(one.image), one.word)

    names = [f"{embedded.captions[one.image][0]} {one.word} {one.image}" for one in queries]
    return _panels(choose(names, ranks, margins, seed=seed, drawn=drawn, best=best, worst=0), example)


def _panels(rows: tuple[list[int], list[int], list[int]], example: Callable[[int], Example]) -> Panels:
    return Panels(*([example(row) for row in part] for part in rows))


def _table(query_row: Tensor, gallery_row: Tensor) -> dict[int, set[int]]:
    table: dict[int, set[int]] = {}
    for query, item in zip(query_row.tolist(), gallery_row.tolist(), strict=True):
        table.setdefault(query, set()).add(item)
    return table


def _margins(query: Tensor, gallery: Tensor, query_row: Tensor, gallery_row: Tensor) -> Tensor:
    """Cosine of the best right item minus that of the best wrong one among the top few; -inf where unknown."""
    right = _table(query_row, gallery_row)
    depth = max(len(items) for items in right.values()) + 1
    scores, rows = top_matches(query, gallery, depth)
    margins = torch.full((len(query),), -torch.inf, dtype=torch.float64)
    for number, (values, items) in enumerate(zip(scores.tolist(), rows.tolist(), strict=True)):
        hit = [value for value, item in zip(values, items, strict=True) if item in right[number]]
        miss = [value for value, item in zip(values, items, strict=True) if item not in right[number]]
        if hit and miss:
            margins[number] = hit[0] - miss[0]
    return margins
