"""varlen_attention in plain PyTorch, forward: sequences of one pair of lengths are a dense batch.

The lengths are read on the host.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from oner_fast.dtypes import statistics_dtype
from oner_fast.ops.by_length import groups_of
from oner_fast.ops.portable import attention


def batches(
    query: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, causal: bool, scale: float, dropped: int,
    dropout_seed: Tensor | None,
) -> Iterator[tuple[Tensor, Tensor, attention.Call]]:  # fmt: skip
    """Yield the packed rows of the queries (S, Lq) and of the keys (S, Lk) of each pair of lengths, and their call."""
    device = query.device
    ends_q = cu_seqlens_q.tolist()
    ends_k = ends_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    lengths = [tuple(b - a for a, b in zip(ends, ends[1:], strict=False)) for ends in (ends_q, ends_k)]
    for group in groups_of(*lengths):
        lq, lk = group.length_q, group.length_k
        if lq and lk:
            rows_q, rows_k = (
                torch.tensor([ends[s] for s in group.sequences], device=device).unsqueeze(1)
                + torch.arange(length, device=device)
                for ends, length in ((ends_q, lq), (ends_k, lk))
            )
            seen = (torch.arange(lq, device=device) + lk - lq + 1).clamp(min=0).unsqueeze(0) if causal else None
            numbers = torch.tensor(group.sequences, device=device)
            yield rows_q, rows_k, attention.Call(seen, scale, numbers, dropped, dropout_seed)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float,
    dropped: int = 0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the result (T, H, Dh) and the statistics (2, T, H): the largest score in base 2 and 1 / sum."""
    out = query.new_zeros(query.shape)
    statistics = query.new_zeros((2, *query.shape[:2]), dtype=statistics_dtype(query))
    for rows_q, rows_k, call in batches(query, cu_seqlens_q, cu_seqlens_k, causal, scale, dropped, dropout_seed):
        found = attention.forward(query[rows_q], key[rows_k], value[rows_k], call)
        out[rows_q], statistics[:, rows_q] = found
    return out, statistics
