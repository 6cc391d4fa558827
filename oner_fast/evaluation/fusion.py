"""Ways to fuse an image and words to one query, compared on composed queries.

The query embeddings are of the image F(I), of the words F(T), and of both in one pass F(I,T). A weighted sum of their
cosines with the gallery ranks it as the same sum of the embeddings does.

| name | scores |
|---|---|
| `mean` | F(I) + F(T) |
| `sum` | F(I) + F(T) + F(I,T) |
| `standardised` | F(I) + F(T), each with mean 0 and variance 1 over the gallery |
| `weighted` | weights for all three, standardised |
| `shift` | F(I) + D, where D is the mean of F(C T) - F(C) over training captions C |
| `weighted_shift` | F(I) + w D |

Cosines between two images spread far more than those between words and an image, so that in `mean` the image decides
nearly alone; standardising gives both the same say. Words alone are also a caption of their own, of another thing than
the image; the shift D is how they change a caption that is there already.

The weights of each half of the queries are those that are best on the other half, by the mean of R@1, R@5 and R@10. The
three of `weighted` are tenths that sum to one; w is one of `SHIFTS`. The halves share no answer.
"""

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from oner_fast.evaluation.composed import (
    ComposedQuery,
    composed_recall,
    composed_scores,
    recall_of_ranks,
    shuffle_key,
    target_ranks,
)
from oner_fast.evaluation.embed import Encoder, embed_texts
from oner_fast.evaluation.retrieval import KS

STEPS = 10
SHIFTS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
PROBES = 32
"""Training captions over which the shift of a word is averaged."""


def composed_figures(
    image: Tensor,
    text: Tensor,
    both: Tensor,
    gallery: Tensor,
    queries: Sequence[ComposedQuery],
    asked_for: Sequence[str],
    shift: Tensor | None = None,
) -> dict[str, Any]:
    """Compute R@k of composed queries by F(I,T), with `image_only`, `text_only` and the `fusions` beside.

    Takes what `fused_figures` takes.
    """
    return {
        **composed_recall(both, gallery, queries),
        "image_only": composed_recall(image, gallery, queries),
        "text_only": composed_recall(text, gallery, queries),
        "fusions": fused_figures(image, text, both, gallery, queries, asked_for, shift),
    }


def fused_figures(
    image: Tensor,
    text: Tensor,
    both: Tensor,
    gallery: Tensor,
    queries: Sequence[ComposedQuery],
    asked_for: Sequence[str],
    shift: Tensor | None = None,
) -> dict[str, dict[str, Any]]:
    """Compute R@k of each fusion, in the form of `composed.composed_recall`.

    Args:
        image: (Q, E) F(I) of the queries' images.
        text: (Q, E) F(T) of their words.
        both: (Q, E) F(I,T).
        gallery: (N, E) F(I).
        queries: the Q queries.
        asked_for: what each query asks for, the same text for the same answers: (Q,). It decides the halves.
        shift: (Q, E) `word_shifts`; without it the fusions by the shift are left out.

    Returns:
        {name: figures}; where weights were chosen, `weights` holds those of each half.
    """
    plain = [composed_scores(part, gallery, queries) for part in (image, text, both)]
    even = [standardised(scores) for scores in plain]
    half = halves(asked_for)
    found: dict[str, dict[str, Any]] = {
        "mean": _figures(plain[0] + plain[1], queries),
        "sum": _figures(plain[0] + plain[1] + plain[2], queries),
        "standardised": _figures(even[0] + even[1], queries),
    }
    tenths = [steps for steps in itertools.product(range(STEPS + 1), repeat=3) if sum(steps) == STEPS]
    thirds = [[step / STEPS for step in steps] for steps in tenths]
    found["weighted"] = _chosen([(weights, _weighted(even, weights)) for weights in thirds], queries, half)
    if shift is not None:
        shifted = {
            weight: composed_scores(F.normalize(image + weight * shift, dim=-1), gallery, queries) for weight in SHIFTS
        }
        found["shift"] = _figures(shifted[1.0], queries)
        found["weighted_shift"] = _chosen([([weight], scores) for weight, scores in shifted.items()], queries, half)
    return found


def probe_captions(captions: Iterable[str], *, count: int = PROBES) -> list[str]:
    """Draw distinct captions, over which the shift of a word is averaged; the captions alone decide which."""
    return sorted(set(captions), key=lambda caption: shuffle_key(0, f"probe {caption}"))[:count]


def word_shifts(loaded: Encoder, added: Sequence[str], probes: Sequence[str], *, batch_size: int = 64) -> Tensor | None:
    """Compute how each added text moves a caption: (Q, E), the mean of F(caption + text) - F(caption) over `probes`.

    None where there are no probes.
    """
    if not probes:
        return None
    texts = list(dict.fromkeys(added))
    longer = [f"{caption} {text}" for text in texts for caption in probes]
    before = embed_texts(loaded, probes, batch_size=batch_size)
    after = embed_texts(loaded, longer, batch_size=batch_size).reshape(len(texts), len(probes), -1)
    moved = (after - before).mean(1)
    place = {text: row for row, text in enumerate(texts)}
    return moved[[place[text] for text in added]]


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


def _weighted(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Add up scores with weights; what is -inf in all of them stays."""
    closed = parts[0].isinf()
    total = torch.zeros_like(parts[0])
    for weight, part in zip(weights, parts, strict=True):
        total += weight * part.masked_fill(closed, 0.0)  # 0 times -inf would be NaN
    return total.masked_fill(closed, -torch.inf)


def _chosen(
    tried: Sequence[tuple[list[float], Tensor]], queries: Sequence[ComposedQuery], half: Tensor
) -> dict[str, Any]:
    """Compute the figures of the best of some weights, which each half of the queries chooses for the other."""
    every = torch.stack([target_ranks(scores, queries) for _, scores in tried])  # [W, Q]
    gain = torch.stack([(every < k).double() for k in KS]).mean(0)
    ranks = torch.empty(len(queries), dtype=torch.int64)
    weights = []
    for own in (half, ~half):
        learnt = ~own if bool((~own).any()) else own  # where all queries ask for one thing, there is one half
        best = int(gain[:, learnt].mean(1).argmax())
        ranks[own] = every[best, own]
        weights.append(tried[best][0])
    return {**recall_of_ranks(ranks, queries, tried[0][1].shape[1]), "weights": weights}
