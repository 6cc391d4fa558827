"""Ways to fuse an image and words to one query, compared on composed queries.

All of them work on the cosines of three query embeddings with the gallery: of the image F(I), of the words F(T), and of
both in one pass F(I,T). A weighted sum of cosines ranks the gallery as the same sum of the embeddings does.

| name | scores |
|---|---|
| `mean` | F(I) + F(T) |
| `sum` | F(I) + F(T) + F(I,T) |
| `standardised` | F(I) + F(T), each with mean 0 and variance 1 over the gallery |
| `weighted` | weights for all three, standardised; each half of the queries uses those chosen on the other half |

Cosines between two images spread far more than those between words and an image, so that in `mean` the image decides
nearly alone; standardising gives both the same say. The weights are chosen by the mean reciprocal rank among all that
are tenths and sum to one. The halves share no words of their targets.
"""

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from oner_fast.evaluation.composed import ComposedQuery, composed_recall, composed_scores, recall_of_ranks, target_ranks

STEPS = 10
FUSIONS = ("mean", "sum", "standardised", "weighted")


def composed_figures(
    image: Tensor,
    text: Tensor,
    both: Tensor,
    gallery: Tensor,
    queries: Sequence[ComposedQuery],
    asked_for: Sequence[str],
) -> dict[str, Any]:
    """Compute R@k of composed queries by F(I,T), with `image_only`, `text_only` and the `fusions` beside.

    Takes what `fused_figures` takes.
    """
    return {
        **composed_recall(both, gallery, queries),
        "image_only": composed_recall(image, gallery, queries),
        "text_only": composed_recall(text, gallery, queries),
        "fusions": fused_figures(image, text, both, gallery, queries, asked_for),
    }


def fused_figures(
    image: Tensor,
    text: Tensor,
    both: Tensor,
    gallery: Tensor,
    queries: Sequence[ComposedQuery],
    asked_for: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Compute R@k of each fusion, in the form of `composed.composed_recall`.

    Args:
        image: (Q, E) F(I) of the queries' images.
        text: (Q, E) F(T) of their words.
        both: (Q, E) F(I,T).
        gallery: (N, E) F(I).
        queries: the Q queries.
        asked_for: what each query asks for, the same text for the same answers: (Q,). It decides the halves.

    Returns:
        {name: figures}; those of `weighted` hold `weights`, one (image, text, both) for each half.
    """
    plain = [composed_scores(part, gallery, queries) for part in (image, text, both)]
    even = [standardised(scores) for scores in plain]
    found: dict[str, dict[str, Any]] = {
        "mean": _figures(plain[0] + plain[1], queries),
        "sum": _figures(plain[0] + plain[1] + plain[2], queries),
        "standardised": _figures(even[0] + even[1], queries),
    }
    weights, ranks = _weighted(even, queries, halves(asked_for))
    figures: dict[str, Any] = dict(recall_of_ranks(ranks, queries, len(gallery)))
    return found | {"weighted": figures | {"weights": weights}}


def standardised(scores: Tensor) -> Tensor:
    """Give each row of (Q, N) scores mean 0 and variance 1; -inf stays. A row of equal scores becomes 0."""
    open_ = scores.isfinite()
    count = open_.sum(1, keepdim=True)
    mean = scores.masked_fill(~open_, 0.0).sum(1, keepdim=True) / count
    apart = (scores - mean).masked_fill(~open_, 0.0)
    deviation = (apart.square().sum(1, keepdim=True) / count).sqrt()
    return (apart / deviation.clamp_min(1e-12)).masked_fill(~open_, -torch.inf)


def halves(names: Sequence[str]) -> Tensor:
    """Split queries by what they ask for: (Q,) bool, the same for the same names."""
    return torch.tensor([hashlib.sha1(f"half {name}".encode()).digest()[0] % 2 == 1 for name in names])


def _figures(scores: Tensor, queries: Sequence[ComposedQuery]) -> dict[str, Any]:
    return dict(recall_of_ranks(target_ranks(scores, queries), queries, scores.shape[1]))


def _weighted(
    parts: Sequence[Tensor], queries: Sequence[ComposedQuery], half: Tensor
) -> tuple[list[list[float]], Tensor]:
    """Rank each half of the queries with the weights that are best on the other half; (Q,) int64 ranks."""
    tenths = [steps for steps in itertools.product(range(STEPS + 1), repeat=3) if sum(steps) == STEPS]
    open_ = parts[0].isfinite()
    finite = [part.masked_fill(~open_, 0.0) for part in parts]  # 0 times -inf would be NaN
    tried = []
    for steps in tenths:
        total = sum(weight * part for weight, part in zip(steps, finite, strict=True))
        assert isinstance(total, Tensor)
        tried.append(target_ranks((total / STEPS).masked_fill(~open_, -torch.inf), queries))
    every = torch.stack(tried)  # [W, Q]
    gain = 1 / (every + 1).double()
    ranks = torch.empty(len(queries), dtype=torch.int64)
    chosen = []
    for own in (half, ~half):
        learnt = ~own if bool((~own).any()) else own  # one query alone has no other half
        best = int(gain[:, learnt].mean(1).argmax())
        ranks[own] = every[best, own]
        chosen.append([steps / STEPS for steps in tenths[best]])
    return chosen, ranks
