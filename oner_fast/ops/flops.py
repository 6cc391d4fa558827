"""What `torch.utils.flop_counter.FlopCounterMode` counts for the raw ops: their products, each multiply-add as two.

As PyTorch counts its own fused attention: what backward computes again counts, and a causal mask takes nothing away.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils.flop_counter import register_flop_formula


def _score_flops(query: Tensor, key: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None) -> int:
    """Of Q K^T in every sequence. Without values to read (fake and meta tensors), as if all had the same length."""
    tokens, heads, width = query.shape
    if isinstance(cu_seqlens_q, FakeTensor) or cu_seqlens_q.device.type == "meta":
        pairs = tokens * key.shape[0] // max(cu_seqlens_q.shape[0] - 1, 1)
    else:
        lengths_q = cu_seqlens_q.long().diff()
        lengths_k = lengths_q if cu_seqlens_k is None else cu_seqlens_k.long().diff()
        pairs = int((lengths_q * lengths_k).sum())
    return 2 * pairs * heads * width


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, *rest: Any, **out: Any
) -> int:
    """Scores, and what they weigh."""
    return 2 * _score_flops(query, key, cu_seqlens_q, cu_seqlens_k)


def _varlen_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, statistics: Tensor, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None, causal: bool, scale: float, need_query: bool, need_key: bool, **results: Any,
) -> int:  # fmt: skip
    """Scores again and their gradient, then that of query, and those of key and value."""
    return (2 + need_query + 2 * need_key) * _score_flops(query, key, cu_seqlens_q, cu_seqlens_k)


def _mixup_info_nce_statistics(
    query: Tensor, query_other: Tensor | None, query_mix: Tensor | None, query_norm: Tensor, key: Tensor,
    *rest: Any, **out: Any,
) -> int:  # fmt: skip
    """Logits."""
    return 2 * query.shape[0] * key.shape[0] * query.shape[1]


def _mixup_info_nce_backward(
    query: Tensor, query_other: Tensor | None, query_mix: Tensor | None, query_norm: Tensor, key: Tensor,
    *rest: Any, **out: Any,
) -> int:  # fmt: skip
    """Logits again, then the gradient of query and, where asked for, that of key."""
    need_key = bool(rest[-1])
    return (2 + need_key) * 2 * query.shape[0] * key.shape[0] * query.shape[1]


def register() -> None:
    """Make them known to every FlopCounterMode. Once a process, after the ops are defined."""
    for name, formula in (
        ("varlen_attention", _varlen_attention),
        ("varlen_attention_backward", _varlen_attention_backward),
        ("mixup_info_nce_statistics", _mixup_info_nce_statistics),
        ("mixup_info_nce_backward", _mixup_info_nce_backward),
    ):
        register_flop_formula(getattr(torch.ops.oner_fast, name), get_raw=True)(formula)
