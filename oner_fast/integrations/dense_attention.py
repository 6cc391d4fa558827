"""Attention of (B, H, N, Dh) tensors by `varlen_attention`, and the reasons for which PyTorch's must run."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from oner_fast.ops import varlen_attention

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def why_not(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Return why our attention cannot take these (B, H, N, Dh) tensors, or None."""
    for x in (query, key, value):
        if type(x).__name__ == "DTensor":
            return "its tensors are spread over processes"
        if x.layout is not torch.strided or x.is_nested:
            return "a nested or sparse tensor has no rows to pack"
        if x.ndim != 4:
            return f"it has {x.ndim} dimensions, not 4"
        if x.device.type not in ("cpu", "cuda"):
            return f"no kernel runs on {x.device.type}"
        if x.dtype not in _DTYPES:
            return f"no kernel takes {x.dtype}"
    if key.shape[0] != query.shape[0] or key.shape[:3] != value.shape[:3]:
        return "query, key and value broadcast over the batch"
    if value.shape[3] != query.shape[3]:
        return f"values are {value.shape[3]} wide and queries {query.shape[3]}"
    if query.shape[1] % max(key.shape[1], 1):
        return f"{key.shape[1]} heads of keys do not divide {query.shape[1]} heads of queries"
    if torch.jit.is_tracing() or (torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()):
        return "an exported model must not need oner_fast"
    return None


def rows(x: Tensor) -> Tensor:
    """Lay (B, H, N, Dh) out as (B N, H, Dh), without a copy where the strides allow it."""
    return x.transpose(1, 2).flatten(0, 1)


def even_boundaries(batch: int, length: int, device: torch.device) -> Tensor:
    """Return the boundaries of `batch` sequences of `length` rows each: (batch + 1,) int32."""
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * length


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Compute attention of query (B, H, N, Dh) to key and value (B, Hk, Nk, Dh).

    `key_mask` (B, Nk) bool is True where a key is seen. `causal` aligns queries and keys at their ends; then the
    queries are the last N positions of the mask, and one that the mask hides gives 0.

    Returns:
        (B, N, H, Dh) in the dtype of the query.
    """
    batch, heads, length, width = query.shape
    of_query = even_boundaries(batch, length, query.device)
    packed = [rows(x) for x in (query, key, value)]
    if key_mask is None:
        of_key = even_boundaries(batch, key.shape[2], query.device)
        out = varlen_attention(
            *packed, of_query, of_key, max_seqlen_q=length, max_seqlen_k=key.shape[2], causal=causal, scale=scale
        )
        return out.view(batch, length, heads, width)
    kept = key_mask.flatten().nonzero().squeeze(1)
    packed[1:] = [x.index_select(0, kept) for x in packed[1:]]
    of_key = _ends(key_mask)
    bounds = {"max_seqlen_q": length, "max_seqlen_k": key.shape[2]}
    if not causal:
        return varlen_attention(*packed, of_query, of_key, scale=scale, **bounds).view(batch, length, heads, width)
    seen = key_mask[:, -length:]
    asking = seen.flatten().nonzero().squeeze(1)
    packed[0] = packed[0].index_select(0, asking)
    out = varlen_attention(*packed, _ends(seen), of_key, causal=True, scale=scale, **bounds)
    return out.new_zeros(batch * length, heads, width).index_copy(0, asking, out).view(batch, length, heads, width)


def _ends(mask: Tensor) -> Tensor:
    """Return the boundaries (B + 1,) int32 of the rows that `mask` (B, N) keeps."""
    return F.pad(mask.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
