"""padded_attention: the flash kernels of `varlen_attention` over sequences that lie in a padded batch.

Queries, keys and values are read where they lie, each by the strides of its rows, heads and samples. A packed copy of
them would cost as many bytes as attention itself moves. Tiles of padded keys are not read, and their gradients are
written as zeros.

FLOPs and bytes are those of `varlen_attention` over the queries and the keys that are no padding. The statistics have 8
bytes for each query and head, and the counts of seen keys under a causal mask 4 for each query.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from oner_fast.kernels.launch import Compilation, architecture_of
from oner_fast.kernels.varlen_attention import (
    Specialisation,
    compilation,
    constants,
    dense,
    draws,
    forward_kernel,
    log2_scale,
    strides,
    tiles,
    vector_of,
)
from oner_fast.kernels.varlen_attention_backward import key_kernel, query_kernel, row_numbers


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor | None,
    scale: float,
    dropped: int = 0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the result (B, N, H, Dh) and float32 statistics (2, B, N, H): the largest score in base 2 and 1 / sum."""
    batch, rows, heads, head_dim = query.shape
    out = query.new_empty(query.shape)
    statistics = query.new_empty((2, batch, rows, heads), dtype=torch.float32)
    if out.numel() == 0 or key.shape[1] == 0:
        return out.zero_(), statistics.zero_()
    query, key, value = dense(query), dense(key), dense(value)
    vector = vector_of(query, key, value)
    tile = tiles("forward", head_dim, query.dtype, architecture_of(query), drops=dropped > 0)
    seed, *rate = draws(dropped, dropout_seed)
    forward_kernel[(batch * triton.cdiv(rows, tile.blocks["BLOCK_M"]), heads)](
        query, key, value, out, statistics, None, None, _counts(seen), seed, batch, rows, key.shape[1], heads,
        log2_scale(scale), *rate, *(number for x in (query, key, value) for number in strides(x, vector, padded=True)),
        NEGATIVE=scale < 0, PADDED=True,
        **constants(head_dim, query.dtype, _is_causal(seen), vector, heads // key.shape[2]), **tile.launch,
    )  # fmt: skip
    return out, statistics


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
    """Return the gradients of query, key and value; one that is not needed is empty and launches no kernel."""
    batch, rows, heads, head_dim = query.shape
    to_query = query.new_empty(query.shape if need_query else (0,))
    to_key = key.new_empty(key.shape if need_key else (0,))
    to_value = value.new_empty(value.shape if need_key else (0,))
    if query.numel() == 0 or key.shape[1] == 0:
        return to_query.zero_(), to_key.zero_(), to_value.zero_()
    # Both are as dense as projections leave them, and rows of all samples then follow each other.
    grad, out = (dense(x.reshape(batch * rows, heads, head_dim)) for x in (grad, out))
    query, key, value = dense(query), dense(key), dense(value)
    vector, architecture = vector_of(grad, out, query, key, value), architecture_of(query)
    numbers = row_numbers(grad, out, statistics.reshape(2, batch * rows, heads), vector)
    shape = constants(head_dim, query.dtype, _is_causal(seen), vector, heads // key.shape[2])
    seed, *rate = draws(dropped, dropout_seed)
    between = (
        None, None, _counts(seen), seed, batch, rows, key.shape[1], heads, scale, log2_scale(scale), *rate,
        *strides(grad, vector)[:2],
        *(number for x in (query, key, value) for number in strides(x, vector, padded=True)),
    )  # fmt: skip
    if need_query:
        tile = tiles("query", head_dim, query.dtype, architecture, drops=dropped > 0)
        query_kernel[(batch * triton.cdiv(rows, tile.blocks["BLOCK_M"]), heads)](
            grad, query, key, value, numbers, to_query, *between, PADDED=True, **shape, **tile.launch
        )
    if need_key:
        tile = tiles("key", head_dim, query.dtype, architecture, drops=dropped > 0)
        key_kernel[(batch * triton.cdiv(key.shape[1], tile.blocks["BLOCK_N"]), key.shape[2])](
            grad, query, key, value, numbers, to_key, to_value, *between, PADDED=True, **shape, **tile.launch
        )
    return to_query, to_key, to_value


def _counts(seen: Tensor | None) -> Tensor | None:
    return None if seen is None else seen.contiguous()


def _is_causal(seen: Tensor | None) -> bool:
    """Return whether each query has a number of its own."""
    return seen is not None and seen.ndim == 2


def specialisations() -> list[Specialisation]:
    """List every kernel that the report compiles."""
    return [(64, torch.bfloat16, False), (128, torch.bfloat16, True), (64, torch.float32, False)]


def compilations() -> list[Compilation]:
    """List forward and both kernels of backward, and those of heads of 64 with dropout under a causal mask."""
    kernels: tuple[tuple[str, Any, dict[str, Any]], ...] = (
        ("forward", forward_kernel, {"NEGATIVE": False}), ("query", query_kernel, {}), ("key", key_kernel, {}),
    )  # fmt: skip
    return [
        compilation(kernel, name, *each, padded=True, drops=drops, **more)
        for name, kernel, more in kernels
        for drops, listed in ((False, specialisations()), (True, [(64, torch.bfloat16, True)]))
        for each in listed
    ]
