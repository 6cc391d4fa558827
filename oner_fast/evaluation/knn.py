"""Weighted k-NN on frozen features: the k most similar training images vote (DINO's protocol).

A vote weighs exp((cosine - 1) / temperature). The search is exact; only a block of the (Q, N) cosines is held at a
time.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from oner_fast.evaluation.classifier import check_features

K = 20
TEMPERATURE = 0.07
QUERY_BLOCK, TRAIN_BLOCK = 1024, 16384  # 64 MiB of float32 cosines


def knn_scores(
    train: Tensor, labels: Tensor, query: Tensor, classes: int, *, k: int = K, temperature: float = TEMPERATURE
) -> Tensor:
    """Sum the votes of each query's neighbours.

    Args:
        train: (N, E) features of any length.
        labels: (N,) int64 in [0, classes).
        query: (Q, E) features.
        classes: number of classes.
        k: neighbours of a query; all N where there are fewer.
        temperature: divides the cosines.

    Returns:
        (Q, classes) float32, the sum of the weights of each class's neighbours.

    Raises:
        ValueError: shapes, labels, k or temperature do not fit, or features are not finite.
    """
    check_features(train, labels, classes)
    if query.dim() != 2 or query.shape[1] != train.shape[1]:
        raise ValueError(f"query needs shape (Q, {train.shape[1]}), got {tuple(query.shape)}")
    if k < 1 or temperature <= 0:
        raise ValueError(f"k must be at least 1 and temperature above 0, got k={k}, temperature={temperature}")
    train, query = F.normalize(train.float(), dim=1), F.normalize(query.float(), dim=1)
    votes = torch.zeros(len(query), classes, device=query.device)
    for start in range(0, len(query), QUERY_BLOCK):
        cosines, rows = _nearest(query[start : start + QUERY_BLOCK], train, min(k, len(train)))
        votes[start : start + QUERY_BLOCK].scatter_add_(1, labels[rows], ((cosines - 1) / temperature).exp())
    return votes


def _nearest(query: Tensor, train: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k nearest rows of `train`: (q, k) cosines and (q, k) int64 rows."""
    cosines = query.new_empty(len(query), 0)
    rows = torch.empty(len(query), 0, dtype=torch.int64, device=query.device)
    for start in range(0, len(train), TRAIN_BLOCK):
        block = query @ train[start : start + TRAIN_BLOCK].T
        best = block.topk(min(k, block.shape[1]), dim=1)
        cosines = torch.cat([cosines, best.values], dim=1)
        rows = torch.cat([rows, best.indices + start], dim=1)
        cosines, places = cosines.topk(min(k, cosines.shape[1]), dim=1)
        rows = rows.gather(1, places)
    return cosines, rows
