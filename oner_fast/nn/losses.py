"""Losses with parameters of their own."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from oner_fast.ops import sigmoid_loss


class SigmoidLoss(nn.Module):
    """Compute `oner_fast.ops.sigmoid_loss` with a learnable scale and bias.

    Parameters:
        logit_scale: (), the logarithm of the logits' factor.
        logit_bias: (), added to every logit.

    Args:
        scale: the factor at first, above 0; 10 in SigLIP.
        bias: the bias at first; -10 in SigLIP, so that nearly every pair counts as wrong where nothing is learned.
        same: what pairs with equal ids are, "positive" or "ignore".
        normalized: the rows are normalised already.
        group: compute the loss of the batch that these ranks hold together.

    Raises:
        ValueError: `scale` is not above 0.
    """

    def __init__(
        self,
        scale: float = 10.0,
        bias: float = -10.0,
        *,
        same: str = "positive",
        normalized: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale must be above 0, got {scale}")
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.logit_bias = nn.Parameter(torch.tensor(float(bias)))
        self.same, self.normalized, self.group = same, normalized, group

    def forward(
        self, query: Tensor, key: Tensor, *, query_ids: Tensor | None = None, key_ids: Tensor | None = None
    ) -> Tensor:
        """Compute the loss () of query and key (N, D) with their ids (N,) int64, if any."""
        return sigmoid_loss(
            query, key, self.logit_scale.exp(), self.logit_bias, query_ids=query_ids, key_ids=key_ids, same=self.same,
            normalized=self.normalized, group=self.group,
        )  # fmt: skip
