"""padded_attention in plain PyTorch: the padded batch is dense already."""

from __future__ import annotations

import torch
from torch import Tensor

from oner_fast.ops.portable import attention


def _call(
    query: Tensor, seen: Tensor | None, scale: float, dropped: int, dropout_seed: Tensor | None
) -> attention.Call:
    of_queries = seen if seen is None or seen.ndim == 2 else seen.unsqueeze(1)
    numbers = torch.arange(query.shape[0], device=query.device)
    return attention.Call(of_queries, scale, numbers, dropped, dropout_seed)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor | None,
    scale: float,
    dropped: int = 0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the result (B, N, H, Dh) and the statistics (2, B, N, H): the largest score in base 2 and 1 / sum."""
    return attention.forward(query, key, value, _call(query, seen, scale, dropped, dropout_seed))


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    statistics: Tensor,
    seen: Tensor | None,
    scale: float,
    need_query: bool,
    need_key: bool,
    dropped: int = 0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value; one that is not needed is empty."""
    call = _call(query, seen, scale, dropped, dropout_seed)
    to_query, to_key, to_value = attention.backward(grad, query, key, value, out, statistics, call)
    none = query.new_empty(0)
    return to_query if need_query else none, to_key if need_key else none, to_value if need_key else none
