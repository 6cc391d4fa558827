"""Compute classification accuracy from scores, beside that of chance and of always choosing the most frequent class."""

from typing import Any

import torch
from torch import Tensor

from oner_fast.evaluation.retrieval import Ties, chance, topk_ranks


def score_accuracy(scores: Tensor, labels: Tensor, *, ties: Ties = "miss") -> dict[str, Any]:
    """Compute the top-1 and top-5 accuracy of (N, C) scores for (N,) int64 labels.

    A wrong class with the same score as the right class ranks ahead of it, unless `ties` is "topk": then one
    `torch.topk` orders them, as in `clip_benchmark`. `majority` is the accuracy of always predicting the most frequent
    label.

    Returns:
        {"top1", "top5", "chance@1", "chance@5", "majority", "images", "classes"}; shares, not per cent. With "topk",
        "ties" too.

    Raises:
        ValueError: shapes or labels do not fit, there is no image, or scores are NaN.
    """
    if scores.dim() != 2 or labels.shape != scores.shape[:1] or not len(scores):
        raise ValueError(
            f"need scores (N, C) and labels (N,) with N > 0, got {(*scores.shape,)} and {(*labels.shape,)}"
        )
    check_labels(labels, scores.shape[1])
    if bool(scores.isnan().any()):
        raise ValueError("the scores hold NaN")
    if ties == "topk":
        ranks = topk_ranks(scores, torch.arange(len(labels)), labels.cpu(), 5)
    else:
        ranks = (scores >= scores.gather(1, labels[:, None])).sum(1) - 1
    one = torch.ones(1, dtype=torch.int64)
    return {
        "top1": int((ranks < 1).sum()) / len(ranks),
        "top5": int((ranks < 5).sum()) / len(ranks),
        "chance@1": chance(one, scores.shape[1], 1),
        "chance@5": chance(one, scores.shape[1], 5),
        "majority": int(labels.bincount().max()) / len(labels),
        "images": len(scores),
        "classes": scores.shape[1],
        **({"ties": ties} if ties != "miss" else {}),
    }


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise ValueError unless each label is in [0, classes)."""
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise ValueError(f"labels need to be in [0, {classes}), got {int(labels.min())} to {int(labels.max())}")


def check_features(features: Tensor, labels: Tensor, classes: int) -> None:
    """Raise ValueError unless features (N, E) are finite and each has one label in [0, classes)."""
    if features.dim() != 2 or labels.shape != features.shape[:1] or not len(features):
        raise ValueError(
            f"need features (N, E) and labels (N,) with N > 0, got {(*features.shape,)} and {(*labels.shape,)}"
        )
    if not bool(torch.isfinite(features).all()):
        raise ValueError("the features hold NaN or infinity; they need to be finite")
    check_labels(labels, classes)
