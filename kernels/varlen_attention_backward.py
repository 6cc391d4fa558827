"""varlen_attention: flash attention backward without atomics, so that the result has the same bits every time.

There are three kernels. `rows` computes delta = sum(dO * O) for each query and head. It stores delta with the maximum
and 1 / sum of forward, head by head, so that a tile reads them in one piece. In `query`, a program owns a tile of
queries, walks over their keys, and writes dQ. In `key`, a program owns a tile of keys. It walks over all queries of all
heads that share the tile, from the first query that sees it, and writes dK and dV. The weights equal those of forward:
exp2 of the same difference, times the same 1 / sum.

FLOPs for each head: 6 Lq Lk Dh in `query` and 8 Lq Lk Dh in `key`, 14 in all, since both recompute the scores and their
gradients. (With atomic additions to a shared dQ there would be ten.) Bytes from DRAM: `rows` reads O, dO and 8 bytes of
statistics for each query and head, and writes 12; `query` reads Q, K, V and dO once and writes dQ; `key` reads them
once and writes dK and dV.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from oner_fast.kernels.attention_dropout import kept
from oner_fast.kernels.attention_rows import (
    extent,
    head_of,
    input_of,
    keys_of,
    load_tile,
    offsets_of,
    store_tile,
    tile_of,
)
from oner_fast.kernels.launch import Compilation, architecture_of
from oner_fast.kernels.varlen_attention import (
    SIZES,
    STRIDES,
    boundaries,
    compilation,
    constants,
    dense,
    draws,
    dropping,
    log2_scale,
    specialisations,
    strides,
    tiles,
    vector_of,
)  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def rows_kernel(
    grad, out, statistics, numbers, queries, heads, grad_row, grad_head, out_row, out_head,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Store numbers [3, H, T]: maximum, 1 / sum and delta."""
    first, head = tl.program_id(0).to(tl.int64) * BLOCK_M, tl.program_id(1)
    rows = first + tl.arange(0, BLOCK_M)
    own = rows < queries
    g, o = head_of(grad, first, grad_row, head, grad_head, VEC), head_of(out, first, out_row, head, out_head, VEC)
    g0 = load_tile(g + offsets_of(grad_row, BLOCK_M, D0, VEC), own, 0, D0, HEAD_DIM)
    o0 = load_tile(o + offsets_of(out_row, BLOCK_M, D0, VEC), own, 0, D0, HEAD_DIM)
    delta = tl.sum(g0.to(tl.float32) * o0.to(tl.float32), 1)
    if D1 > 0:
        g1 = load_tile(g + offsets_of(grad_row, BLOCK_M, D1, VEC), own, D0, D1, HEAD_DIM)
        o1 = load_tile(o + offsets_of(out_row, BLOCK_M, D1, VEC), own, D0, D1, HEAD_DIM)
        delta += tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
    plane = queries.to(tl.int64) * heads
    to = numbers + head.to(tl.int64) * queries + rows
    at = statistics + rows * heads + head
    tl.store(to, tl.load(at, mask=own, other=0.0), mask=own)
    tl.store(to + plane, tl.load(at + plane, mask=own, other=0.0), mask=own)
    tl.store(to + 2 * plane, delta, mask=own)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def query_kernel(
    grad, query, key, value, numbers, to_query, cu_seqlens_q, cu_seqlens_k, seen, seed, sequences, queries, keys, heads,
    scale, scale_log2, dropped, made_up, grad_row, grad_head, query_row, query_head, query_batch,
    key_row, key_head, key_batch, value_row, value_head, value_batch,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, VEC: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sequence, begin, length, first = tile_of(tl.program_id(0), cu_seqlens_q, sequences, queries, BLOCK_M, PADDED)
    if (first < 0) | (first >= length):
        return
    head = tl.program_id(1)
    begin_k, length_k = keys_of(cu_seqlens_k, seen, sequence, queries, keys, PADDED, CAUSAL)
    rows = first + tl.arange(0, BLOCK_M)
    own = rows < length
    offset = length_k - length

    q = input_of(query, sequence, begin, first, query_row, head, query_head, query_batch, VEC, PADDED)
    g = head_of(grad, begin + first, grad_row, head, grad_head, VEC)
    k = input_of(key, sequence, begin_k, 0, key_row, head // GROUP, key_head, key_batch, VEC, PADDED)
    v = input_of(value, sequence, begin_k, 0, value_row, head // GROUP, value_head, value_batch, VEC, PADDED)
    q0 = load_tile(q + offsets_of(query_row, BLOCK_M, D0, VEC), own, 0, D0, HEAD_DIM)
    g0 = load_tile(g + offsets_of(grad_row, BLOCK_M, D0, VEC), own, 0, D0, HEAD_DIM)
    k0_at, v0_at = offsets_of(key_row, BLOCK_N, D0, VEC), offsets_of(value_row, BLOCK_N, D0, VEC)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    # 1 / sum is the same along a row and can be applied to the result; float16 could overflow without it.
    FACTORED: tl.constexpr = query.dtype.element_ty != tl.float16
    if D1 > 0:
        q1 = load_tile(q + offsets_of(query_row, BLOCK_M, D1, VEC), own, D0, D1, HEAD_DIM)
        g1 = load_tile(g + offsets_of(grad_row, BLOCK_M, D1, VEC), own, D0, D1, HEAD_DIM)
        k1_at, v1_at = offsets_of(key_row, BLOCK_N, D1, VEC), offsets_of(value_row, BLOCK_N, D1, VEC)
        acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    every = queries
    if PADDED:
        every = queries * sequences
    plane = every.to(tl.int64) * heads
    at = numbers + head.to(tl.int64) * every + begin + rows
    maximum = tl.load(at, mask=own, other=0.0)
    inverse = tl.load(at + plane, mask=own, other=0.0)
    delta = tl.load(at + 2 * plane, mask=own, other=0.0)

    until = length_k
    last = length_k - 1
    if CAUSAL:
        if PADDED:
            counts = tl.minimum(tl.load(seen + begin.to(tl.int64) + rows, mask=own, other=0), length_k)
            until = tl.max(counts, 0)
            last = (counts - 1)[:, None]
        else:
            until = tl.minimum(first + BLOCK_M + offset, length_k)
            last = tl.minimum(rows + offset, last)[:, None]
    for start in range(0, until, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        real = columns < length_k
        k0 = load_tile(k + k0_at, real, 0, D0, HEAD_DIM)
        v0 = load_tile(v + v0_at, real, 0, D0, HEAD_DIM)
        scores = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        to_weights = tl.dot(g0, tl.trans(v0), input_precision=PRECISION)
        if D1 > 0:
            k1 = load_tile(k + k1_at, real, D0, D1, HEAD_DIM)
            v1 = load_tile(v + v1_at, real, D0, D1, HEAD_DIM)
            scores = tl.dot(q1, tl.trans(k1), scores, input_precision=PRECISION)
            to_weights = tl.dot(g1, tl.trans(v1), to_weights, input_precision=PRECISION)
        weights = tl.math.exp2(scores * scale_log2 - maximum[:, None])
        if not FACTORED:
            weights = weights * inverse[:, None]
        if seed is not None:
            keep = kept(seed, sequence, head, rows, start, dropped, BLOCK_N)
            to_weights = tl.where(keep, to_weights * made_up, 0.0)
        to_scores = weights * (to_weights - delta[:, None])
        to_scores = tl.where(columns[None, :] <= last, to_scores, 0.0)
        narrow = to_scores.to(k0.dtype)
        acc0 = tl.dot(narrow, k0, acc0, input_precision=PRECISION)
        if D1 > 0:
            acc1 = tl.dot(narrow, k1, acc1, input_precision=PRECISION)
        k += BLOCK_N * VEC * key_row.to(tl.int64)
        v += BLOCK_N * VEC * value_row.to(tl.int64)

    blind = (rows + offset < 0) if CAUSAL else (rows < 0)
    if PADDED:
        blind = (counts <= 0) if CAUSAL else (rows < 0)
    blind, row = (blind | (length_k == 0))[:, None], heads * HEAD_DIM
    factor = scale
    if FACTORED:
        factor = (scale * inverse)[:, None]
    to = head_of(to_query, begin + first, row, head, HEAD_DIM, 1)
    store_tile(to + offsets_of(row, BLOCK_M, D0, 1), tl.where(blind, 0.0, acc0 * factor), own, 0, D0, HEAD_DIM)
    if D1 > 0:
        store_tile(to + offsets_of(row, BLOCK_M, D1, 1), tl.where(blind, 0.0, acc1 * factor), own, D0, D1, HEAD_DIM)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def key_kernel(
    grad, query, key, value, numbers, to_key, to_value, cu_seqlens_q, cu_seqlens_k, seen, seed, sequences, queries,
    keys, heads, scale, scale_log2, dropped, made_up, grad_row, grad_head, query_row, query_head, query_batch,
    key_row, key_head, key_batch, value_row, value_head, value_batch,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, VEC: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sequence, begin_k, length_k, first = tile_of(tl.program_id(0), cu_seqlens_k, sequences, keys, BLOCK_N, PADDED)
    if (first < 0) | (first >= length_k):
        return
    head_k = tl.program_id(1)
    columns = first + tl.arange(0, BLOCK_N)
    stored = columns < length_k
    if PADDED:
        begin, length = sequence * queries, queries
        begin_k, length_k = keys_of(cu_seqlens_k, seen, sequence, queries, keys, PADDED, CAUSAL)
    else:
        begin, length = extent(cu_seqlens_q, sequence, queries)
    own = columns < length_k
    offset = length_k - length
    since = first * 0
    if CAUSAL:  # earlier queries see no key of this tile
        if PADDED:
            for start in range(0, length, 128):
                rows = start + tl.arange(0, 128)
                counts = tl.load(seen + begin.to(tl.int64) + rows, mask=rows < length, other=2147483647)
                since += tl.sum((counts <= first).to(tl.int32), 0)
        else:
            since = tl.maximum(first - offset, 0)
    elif PADDED:
        since = tl.where(first < length_k, since, length)  # a tile of padding

    k = input_of(key, sequence, begin_k, first, key_row, head_k, key_head, key_batch, VEC, PADDED)
    v = input_of(value, sequence, begin_k, first, value_row, head_k, value_head, value_batch, VEC, PADDED)
    k0 = load_tile(k + offsets_of(key_row, BLOCK_N, D0, VEC), own, 0, D0, HEAD_DIM)
    v0 = load_tile(v + offsets_of(value_row, BLOCK_N, D0, VEC), own, 0, D0, HEAD_DIM)
    q0_at, g0_at = offsets_of(query_row, BLOCK_M, D0, VEC), offsets_of(grad_row, BLOCK_M, D0, VEC)
    to_k0, to_v0 = tl.zeros([BLOCK_N, D0], tl.float32), tl.zeros([BLOCK_N, D0], tl.float32)
    if D1 > 0:
        k1 = load_tile(k + offsets_of(key_row, BLOCK_N, D1, VEC), own, D0, D1, HEAD_DIM)
        v1 = load_tile(v + offsets_of(value_row, BLOCK_N, D1, VEC), own, D0, D1, HEAD_DIM)
        q1_at, g1_at = offsets_of(query_row, BLOCK_M, D1, VEC), offsets_of(grad_row, BLOCK_M, D1, VEC)
        to_k1, to_v1 = tl.zeros([BLOCK_N, D1], tl.float32), tl.zeros([BLOCK_N, D1], tl.float32)
    every = queries
    if PADDED:
        every = queries * sequences
    plane = every.to(tl.int64) * heads
    for member in range(GROUP):
        head = head_k * GROUP + member
        q = input_of(query, sequence, begin, since, query_row, head, query_head, query_batch, VEC, PADDED)
        g = head_of(grad, begin + since, grad_row, head, grad_head, VEC)
        at = numbers + head.to(tl.int64) * every + begin
        for start in range(since, length, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            real = rows < length
            q0 = load_tile(q + q0_at, real, 0, D0, HEAD_DIM)
            g0 = load_tile(g + g0_at, real, 0, D0, HEAD_DIM)
            maximum = tl.load(at + rows, mask=real, other=0.0)
            inverse = tl.load(at + plane + rows, mask=real, other=0.0)
            delta = tl.load(at + 2 * plane + rows, mask=real, other=0.0)
            scores = tl.dot(k0, tl.trans(q0), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
            if D1 > 0:
                q1 = load_tile(q + q1_at, real, D0, D1, HEAD_DIM)
                scores = tl.dot(k1, tl.trans(q1), scores, input_precision=PRECISION)
            weights = tl.math.exp2(scores * scale_log2 - maximum[None, :]) * inverse[None, :]
            # Rows of zeros after the last query meet keys that may be infinite.
            if CAUSAL:
                if PADDED:
                    until = tl.load(seen + begin.to(tl.int64) + rows, mask=real, other=0) - 1
                else:
                    until = tl.where(real, rows + offset, -1)
                weights = tl.where(columns[:, None] <= until[None, :], weights, 0.0)
            else:
                weights = tl.where(real[None, :], weights, 0.0)
            narrow = weights.to(g0.dtype)
            if seed is not None:
                keep = tl.trans(kept(seed, sequence, head, rows, first, dropped, BLOCK_N))
                narrow = tl.where(keep, weights, 0.0).to(g0.dtype)
            to_v0 = tl.dot(narrow, g0, to_v0, input_precision=PRECISION)
            to_weights = tl.dot(v0, tl.trans(g0), input_precision=PRECISION)
            if D1 > 0:
                g1 = load_tile(g + g1_at, real, D0, D1, HEAD_DIM)
                to_v1 = tl.dot(narrow, g1, to_v1, input_precision=PRECISION)
                to_weights = tl.dot(v1, tl.trans(g1), to_weights, input_precision=PRECISION)
            if seed is not None:
                to_weights = tl.where(keep, to_weights * made_up, 0.0)
            to_scores = (weights * (to_weights - delta[None, :])).to(q0.dtype)
            to_k0 = tl.dot(to_scores, q0, to_k0, input_precision=PRECISION)
            if D1 > 0:
                to_k1 = tl.dot(to_scores, q1, to_k1, input_precision=PRECISION)
            q += BLOCK_M * VEC * query_row.to(tl.int64)
            g += BLOCK_M * VEC * grad_row.to(tl.int64)

    if seed is not None:
        to_v0 = to_v0 * made_up
    if PADDED:  # rows of zeros stand for padding, and had weights
        to_k0, to_v0 = tl.where(own[:, None], to_k0, 0.0), tl.where(own[:, None], to_v0, 0.0)
    row = (heads // GROUP) * HEAD_DIM
    k, v = (
        head_of(to_key, begin_k + first, row, head_k, HEAD_DIM, 1),
        head_of(to_value, begin_k + first, row, head_k, HEAD_DIM, 1),
    )
    at = offsets_of(row, BLOCK_N, D0, 1)
    store_tile(k + at, to_k0 * scale, stored, 0, D0, HEAD_DIM)
    store_tile(v + at, to_v0, stored, 0, D0, HEAD_DIM)
    if D1 > 0:
        if seed is not None:
            to_v1 = to_v1 * made_up
        if PADDED:
            to_k1, to_v1 = tl.where(own[:, None], to_k1, 0.0), tl.where(own[:, None], to_v1, 0.0)
        at = offsets_of(row, BLOCK_N, D1, 1)
        store_tile(k + at, to_k1 * scale, stored, D0, D1, HEAD_DIM)
        store_tile(v + at, to_v1, stored, D0, D1, HEAD_DIM)


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
    """Return the gradients of query, key and value; one that is not needed is empty and launches no kernel."""
    rows, heads, head_dim = query.shape
    to_query = query.new_empty(query.shape if need_query else (0,))
    to_key = key.new_empty(key.shape if need_key else (0,))
    to_value = value.new_empty(value.shape if need_key else (0,))
    if query.numel() == 0 or cu_seqlens_q.shape[0] == 1:
        return to_query.zero_(), to_key.zero_(), to_value.zero_()
    grad, query, key, value, out = (dense(x) for x in (grad, query, key, value, out))
    cu_q, cu_k = boundaries(cu_seqlens_q, cu_seqlens_k)
    sequences, vector, architecture = cu_q.shape[0] - 1, vector_of(grad, query, key, value, out), architecture_of(query)
    shape = constants(head_dim, query.dtype, causal, vector, heads // key.shape[1])
    numbers = row_numbers(grad, out, statistics, vector)
    seed, *rate = draws(dropped, dropout_seed)
    between = (
        cu_q, cu_k, None, seed, sequences, rows, key.shape[0], heads, scale, log2_scale(scale), *rate,
        *strides(grad, vector)[:2], *strides(query, vector), *strides(key, vector), *strides(value, vector),
    )  # fmt: skip
    if need_query:
        tile = tiles("query", head_dim, query.dtype, architecture, drops=dropped > 0)
        query_kernel[(rows // tile.blocks["BLOCK_M"] + sequences, heads)](
            grad, query, key, value, numbers, to_query, *between, PADDED=False, **shape, **tile.launch
        )
    if need_key:
        tile = tiles("key", head_dim, query.dtype, architecture, drops=dropped > 0)
        key_kernel[(key.shape[0] // tile.blocks["BLOCK_N"] + sequences, key.shape[1])](
            grad, query, key, value, numbers, to_key, to_value, *between, PADDED=False, **shape, **tile.launch
        )
    return to_query, to_key, to_value


def row_numbers(grad: Tensor, out: Tensor, statistics: Tensor, vector: int) -> Tensor:
    """Return maximum, 1 / sum and delta, (3, H, T), of `grad` and `out` (T, H, Dh)."""
    rows, heads, head_dim = grad.shape
    numbers = grad.new_empty((3, heads, rows), dtype=torch.float32)
    tile = tiles("rows", head_dim, grad.dtype, architecture_of(grad))
    shape = constants(head_dim, grad.dtype, False, vector, 1)
    rows_kernel[(triton.cdiv(rows, tile.blocks["BLOCK_M"]), heads)](
        grad, out, statistics.contiguous(), numbers, rows, heads, *strides(grad, vector)[:2], *strides(out, vector)[:2],
        **{name: shape[name] for name in ("HEAD_DIM", "D0", "D1", "VEC")}, **tile.launch,
    )  # fmt: skip
    return numbers


def compilations() -> list[Compilation]:
    """List the three kernels of backward."""
    rows = [compilation(rows_kernel, "rows", size, torch.bfloat16, False) for size in (64, 96, 256)]
    both = (("query", query_kernel), ("key", key_kernel))
    return [
        *rows,
        *(compilation(kernel, name, *each) for name, kernel in both for each in specialisations()),
        *(compilation(kernel, name, *each, drops=True) for name, kernel in both for each in dropping()),
    ]
