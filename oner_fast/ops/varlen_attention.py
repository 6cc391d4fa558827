"""Attention within the sequences of a packed batch: plain, cross (OneR's F(Q|C)) and causal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from oner_fast.ops import checks, reference
from oner_fast.ops.by_length import attend_by_length
from oner_fast.ops.implementations import choose, register


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """softmax(scale Q K^T) V, sequence i of the query attending to sequence i of the key; empty sequences are legal.

    Args:
        query: (T, H, Dh) float32, float16, bfloat16 or float64; under autocast it is cast to the autocast dtype.
        key, value: (Tk, Hk, Dh); Hk divides H (grouped queries).
        cu_seqlens_q, cu_seqlens_k: (S + 1,) int32, from 0 to T and Tk; without cu_seqlens_k, cu_seqlens_q serves both.
        max_seqlen_q, max_seqlen_k: upper bounds of the lengths, hints only.
        causal: aligned bottom-right. A query that sees no key gives 0 and takes no gradient.
        scale: Dh**-0.5 by default.
        implementation: force one by name; see ``oner-fast doctor``.

    Returns:
        (T, H, Dh).

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value is not as above.
    """
    checks.is_tensor("varlen_attention", "query", query)
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    serving = choose("varlen_attention", device, implementation, dtype=query.dtype, causal=causal)
    return serving.function(
        query, key, value, cu_seqlens_q, cu_seqlens_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, causal=causal, scale=scale,
    )  # fmt: skip


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """PyTorch's fused attention, once for each length."""
    checks.varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, scale)
    grouped = query.shape[1] != key.shape[1]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)

    # Half-precision flash attention on the CPU is slower than its float32 one at these lengths.
    dtype = query.dtype
    if query.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
        query, key, value = query.float(), key.float(), value.float()
    with torch.autocast(query.device.type, enabled=False):
        return attend_by_length(attend, query, key, value, cu_seqlens_q, cu_seqlens_k).to(dtype)


def _why_not_sdpa(device: str, **facts: object) -> list[str]:
    return ["causal masks of unequal lengths are aligned top-left by PyTorch"] if facts.get("causal") else []


register("varlen_attention", "reference", reference.varlen_attention)
register("varlen_attention", "sdpa", _sdpa, preference=10, reasons=_why_not_sdpa)
