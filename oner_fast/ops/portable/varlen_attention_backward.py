"""varlen_attention in plain PyTorch, backward: the weights are computed again, by the products of forward."""

from __future__ import annotations

from torch import Tensor

from oner_fast.ops.portable import attention
from oner_fast.ops.portable.varlen_attention import batches


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    statistics: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float,
    need_query: bool,
    need_key: bool,
    dropped: int = 0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value; one that is not needed is empty."""
    to_query, to_key, to_value = (x.new_zeros(x.shape) for x in (query, key, value))
    for rows_q, rows_k, call in batches(query, cu_seqlens_q, cu_seqlens_k, causal, scale, dropped, dropout_seed):
        found = attention.backward(
            grad[rows_q], query[rows_q], key[rows_k], value[rows_k], out[rows_q], statistics[:, rows_q], call
        )
        to_query[rows_q], to_key[rows_k], to_value[rows_k] = found
    none = query.new_empty(0)
    return to_query if need_query else none, to_key if need_key else none, to_value if need_key else none
