"""Attention of (B, H, N, Dh) tensors by `padded_attention`, and the reasons for which PyTorch's must run."""

from __future__ import annotations

import torch
from torch import Tensor

from oner_fast.integrations.fallback import tell
from oner_fast.ops import padded_attention

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


def leave_to_pytorch(reason: str) -> None:
    """Warn, once for each reason, that PyTorch's attention runs; stay silent inside torch.compile, whose sizes vary."""
    if not torch.compiler.is_compiling():
        tell("this attention", "PyTorch", reason)


def rows(x: Tensor) -> Tensor:
    """Lay (B, H, N, Dh) out as (B N, H, Dh), without a copy where the strides allow it."""
    return x.transpose(1, 2).flatten(0, 1)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute attention of query (B, H, N, Dh) to key and value (B, Hk, Nk, Dh), aligned at the ends where causal.

    `key_mask` (B, Nk) bool is True where a key is seen. A query that sees none gives 0.

    Returns:
        (B, N, H, Dh) in the dtype of the query.
    """
    out = padded_attention(query, key, value, key_mask=key_mask, causal=causal, scale=scale, dropout_p=dropout)
    return out.transpose(1, 2)
