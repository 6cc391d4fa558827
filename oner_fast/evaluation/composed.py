"""Retrieval by an image and words together.

A query's embedding is F(I,T), and the gallery's embeddings are F(I).

A query is an image and one word that its caption lacks. Its targets are the images whose captions consist of the words
of the query's caption and the added word. The query's own image is not an answer.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oner_fast.evaluation.retrieval import KS, TIE, chance
from oner_fast.evaluation.splits import words


@dataclass(frozen=True)
class ComposedQuery:
    """An image (row of the split), the added word, and the rows of the images that answer the query."""

    image: int
    word: str
    targets: list[int]


def composed_queries(captions: Sequence[str], *, limit: int = 512, seed: int = 0) -> list[ComposedQuery]:
    """Make every query that the captions allow, at most `limit`, in an order that the seed decides."""
    by_words: dict[frozenset[str], list[int]] = {}
    for row, caption in enumerate(captions):
        by_words.setdefault(frozenset(words(caption)), []).append(row)
    found = []
    for target, rows in by_words.items():
        for word in sorted(target):
            # A number describes an image too little for a fair query.
            if len(target) > 1 and not word.isdigit():
                found += [ComposedQuery(image, word, rows) for image in by_words.get(target - {word}, [])]
    return sorted(found, key=lambda query: shuffle_key(seed, f"{query.image} {query.word}"))[:limit]


def shuffle_key(seed: int, name: str) -> str:
    """Key for sorting names in an order that depends on the seed and the names alone."""
    return hashlib.sha1(f"{seed} {name}".encode()).hexdigest()


def composed_scores(query: Tensor, gallery: Tensor, queries: Sequence[ComposedQuery]) -> Tensor:
    """Compute (Q, N) float64 cosines of (Q, E) query embeddings with an (N, E) gallery; -inf for the query's image."""
    scores = query.double() @ gallery.double().T
    own = torch.tensor([one.image for one in queries], dtype=torch.int64)
    return scores.scatter(1, own[:, None], -torch.inf)


def composed_recall(
    query: Tensor, gallery: Tensor, queries: Sequence[ComposedQuery], *, ks: Sequence[int] = KS
) -> dict[str, float | int]:
    """Compute R@k with chance, in the form of `retrieval.recall`; a tie counts as a miss."""
    if len(query) != len(queries) or not queries:
        raise ValueError(f"need one embedding for each of at least one query, got {len(query)} for {len(queries)}")
    ranks = target_ranks(composed_scores(query, gallery, queries), queries)
    return recall_of_ranks(ranks, queries, len(gallery), ks=ks)


def target_ranks(scores: Tensor, queries: Sequence[ComposedQuery]) -> Tensor:
    """Count, for each row of (Q, N) scores, the images that rank ahead of its best target: (Q,) int64."""
    ranks = torch.empty(len(queries), dtype=torch.int64)
    for number, one in enumerate(queries):
        targets = torch.tensor(one.targets, dtype=torch.int64)
        ahead = scores[number] >= scores[number, targets].max() - TIE
        ahead[targets] = False
        ranks[number] = int(ahead.sum())
    return ranks


def recall_of_ranks(
    ranks: Tensor, queries: Sequence[ComposedQuery], gallery: int, *, ks: Sequence[int] = KS
) -> dict[str, float | int]:
    """Compute R@k with chance from (Q,) ranks in a gallery of that many images, the query's own among them."""
    positives = torch.tensor([len(one.targets) for one in queries])
    candidates = gallery - 1
    result: dict[str, float | int] = {f"R@{k}": int((ranks < k).sum()) / len(ranks) for k in ks}
    result |= {f"chance@{k}": chance(positives, candidates, k) for k in ks}
    return result | {"queries": len(queries), "gallery": candidates}
