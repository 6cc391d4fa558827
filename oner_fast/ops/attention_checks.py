"""Checks of the arguments of `varlen_attention` and `padded_attention`, made before any work is done."""

from __future__ import annotations

import torch
from torch import Tensor

from oner_fast.ops import checks
from oner_fast.ops.values import readable


def _heads(op: str, query: Tensor, key: Tensor, value: Tensor, scale: float | None, *, batched: bool) -> None:
    """Check query, key and value, packed (T, H, Dh) or `batched` (B, H, N, Dh), and the scale of the scores."""
    of_query, of_key = ("(B, H, N, Dh)", "(B, Hk, Nk, Dh)") if batched else ("(T, H, Dh)", "(Tk, Hk, Dh)")
    checks.floating(op, "query", checks.is_tensor(op, "query", query))
    checks.shape(op, "query", query, of_query, (None,) * (4 if batched else 3))
    heads, width = query.shape[1], query.shape[-1]
    if width == 0:
        raise ValueError(f"{op}: the heads of query must hold at least one number, got shape {tuple(query.shape)}")
    checks.floating(op, "key", checks.is_tensor(op, "key", key), query.dtype)
    checks.shape(op, "key", key, of_key, (query.shape[0], None, None, width) if batched else (None, None, width))
    checks.floating(op, "value", checks.is_tensor(op, "value", value), query.dtype)
    checks.shape(op, "value", value, of_key, tuple(key.shape))
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(f"{op}: the heads of key and value must divide the {heads} heads of query, got {key.shape[1]}")
    if scale is not None:
        checks.number(op, "scale", scale)


def varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, scale: float | None
) -> None:
    """Check the tensors and the scale of `oner_fast.ops.varlen_attention`."""
    op = "varlen_attention"
    _heads(op, query, key, value, scale, batched=False)
    checks.same_device(op, "query", query, key=key, value=value, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    checks.cu_seqlens(op, "cu_seqlens_q", checks.is_tensor(op, "cu_seqlens_q", cu_seqlens_q), query.shape[0])
    if cu_seqlens_k is None:
        if key.shape[0] != query.shape[0]:
            checks.cu_seqlens(op, "cu_seqlens_q (which bounds key too)", cu_seqlens_q, key.shape[0])
    else:
        batch = cu_seqlens_q.shape[0] - 1
        checks.cu_seqlens(op, "cu_seqlens_k", checks.is_tensor(op, "cu_seqlens_k", cu_seqlens_k), key.shape[0], batch)


def padded(
    query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None, key_mask: Tensor | None, scale: float | None
) -> None:
    """Check the tensors and the scale of `oner_fast.ops.padded_attention`."""
    op = "padded_attention"
    _heads(op, query, key, value, scale, batched=True)
    batch, keys = key.shape[0], key.shape[2]
    if key_lengths is not None and key_mask is not None:
        raise ValueError(f"{op}: key_lengths and key_mask both say which keys are padding; give one of them")
    if key_lengths is not None:
        if checks.is_tensor(op, "key_lengths", key_lengths).dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: key_lengths must be int32 or int64, got {key_lengths.dtype}")
        checks.shape(op, "key_lengths", key_lengths, "(B,)", (batch,))
    if key_mask is not None:
        if checks.is_tensor(op, "key_mask", key_mask).dtype != torch.bool:
            raise TypeError(f"{op}: key_mask must be bool, True where a key is attended to, got {key_mask.dtype}")
        checks.shape(op, "key_mask", key_mask, "(B, Nk)", (batch, keys))
    checks.same_device(op, "query", query, key=key, value=value, key_lengths=key_lengths, key_mask=key_mask)
    known = None if key_lengths is None else readable(key_lengths)
    if known is not None and known.numel():
        low, high = (int(value) for value in torch.aminmax(known))
        if low < 0 or high > keys:
            raise ValueError(f"{op}: key_lengths must be in [0, {keys}], found {low if low < 0 else high}")


def options(op: str, causal: bool, scale: float | None, **longest: int | None) -> None:
    """Check the options by which an implementation of attention is chosen; `longest` bounds lengths."""
    checks.flag(op, "causal", causal)
    if scale is not None:
        checks.number(op, "scale", scale)
    for name, most in longest.items():
        if most is not None:
            checks.whole(op, name, most)
