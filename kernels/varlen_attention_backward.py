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

from oner_fast.kernels.launch import Compilation, architecture_of
from oner_fast.kernels.varlen_attention import (
    SIZES,
    STRIDES,
    boundaries,
    compilation,
    constants,
    dense,
    extent,
    head_of,
    load_tile,
    log2_scale,
    offsets_of,
    own_tile,
    specialisations,
    store_tile,
    strides,
    tiles,
    vector_of,
)  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def _rows_kernel(
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
def _query_kernel(
    grad, query, key, value, numbers, to_query, cu_seqlens_q, cu_seqlens_k, sequences, queries, keys, heads,
    scale, scale_log2, grad_row, grad_head, query_row, query_head, key_row, key_head, value_row, value_head,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, VEC: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sequence, begin, length, first = own_tile(tl.program_id(0), cu_seqlens_q, sequences, queries, BLOCK_M)
    if (first < 0) | (first >= length):
        return
    head = tl.program_id(1)
    begin_k, length_k = extent(cu_seqlens_k, sequence, keys)
    rows = first + tl.arange(0, BLOCK_M)
    own = rows < length
    offset = length_k - length

    q = head_of(query, begin + first, query_row, head, query_head, VEC)
    g = head_of(grad, begin + first, grad_row, head, grad_head, VEC)
    k = head_of(key, begin_k, key_row, head // GROUP, key_head, VEC)
    v = head_of(value, begin_k, value_row, head // GROUP, value_head, VEC)
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
    plane = queries.to(tl.int64) * heads
    at = numbers + head.to(tl.int64) * queries + begin + rows
    maximum = tl.load(at, mask=own, other=0.0)
    inverse = tl.load(at + plane, mask=own, other=0.0)
    delta = tl.load(at + 2 * plane, mask=own, other=0.0)

    seen = length_k
    last = length_k - 1
    if CAUSAL:
        seen = tl.minimum(first + BLOCK_M + offset, length_k)
        last = tl.minimum(rows + offset, last)[:, None]
    for start in range(0, seen, BLOCK_N):
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
        to_scores = weights * (to_weights - delta[:, None])
        to_scores = tl.where(columns[None, :] <= last, to_scores, 0.0)
        narrow = to_scores.to(k0.dtype)
        acc0 = tl.dot(narrow, k0, acc0, input_precision=PRECISION)
        if D1 > 0:
            acc1 = tl.dot(narrow, k1, acc1, input_precision=PRECISION)
        k += BLOCK_N * VEC * key_row.to(tl.int64)
        v += BLOCK_N * VEC * value_row.to(tl.int64)

    blind = (rows + offset < 0) if CAUSAL else (rows < 0)
    blind, row = (blind | (length_k == 0))[:, None], heads * HEAD_DIM
    factor = scale
    if FACTORED:
        factor = (scale * inverse)[:, None]
    to = head_of(to_query, begin + first, row, head, HEAD_DIM, 1)
    store_tile(to + offsets_of(row, BLOCK_M, D0, 1), tl.where(blind, 0.0, acc0 * factor), own, 0, D0, HEAD_DIM)
    if D1 > 0:
        store_tile(to + offsets_of(row, BLOCK_M, D1, 1), tl.where(blind, 0.0, acc1 * factor), own, D0, D1, HEAD_DIM)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def _key_kernel(
    grad, query, key, value, numbers, to_key, to_value, cu_seqlens_q, cu_seqlens_k, sequences, queries, keys, heads,
    scale, scale_log2,
    grad_row, grad_head, query_row, query_head, key_row, key_head, value_row, value_head,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, VEC: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sequence, begin_k, length_k, first = own_tile(tl.program_id(0), cu_seqlens_k, sequences, keys, BLOCK_N)
    if (first < 0) | (first >= length_k):
        return
    head_k = tl.program_id(1)
    begin, length = extent(cu_seqlens_q, sequence, queries)
    columns = first + tl.arange(0, BLOCK_N)
    own = columns < length_k
    offset = length_k - length
    since = 0
    if CAUSAL:
        since = tl.maximum(first - offset, 0)  # earlier queries see no key of this tile

    k = head_of(key, begin_k + first, key_row, head_k, key_head, VEC)
    v = head_of(value, begin_k + first, value_row, head_k, value_head, VEC)
    k0 = load_tile(k + offsets_of(key_row, BLOCK_N, D0, VEC), own, 0, D0, HEAD_DIM)
    v0 = load_tile(v + offsets_of(value_row, BLOCK_N, D0, VEC), own, 0, D0, HEAD_DIM)
    q0_at, g0_at = offsets_of(query_row, BLOCK_M, D0, VEC), offsets_of(grad_row, BLOCK_M, D0, VEC)
    to_k0, to_v0 = tl.zeros([BLOCK_N, D0], tl.float32), tl.zeros([BLOCK_N, D0], tl.float32)
    if D1 > 0:
        k1 = load_tile(k + offsets_of(key_row, BLOCK_N, D1, VEC), own, D0, D1, HEAD_DIM)
        v1 = load_tile(v + offsets_of(value_row, BLOCK_N, D1, VEC), own, D0, D1, HEAD_DIM)
        q1_at, g1_at = offsets_of(query_row, BLOCK_M, D1, VEC), offsets_of(grad_row, BLOCK_M, D1, VEC)
        to_k1, to_v1 = tl.zeros([BLOCK_N, D1], tl.float32), tl.zeros([BLOCK_N, D1], tl.float32)
    plane = queries.to(tl.int64) * heads
    for member in range(GROUP):
        head = head_k * GROUP + member
        q = head_of(query, begin + since, query_row, head, query_head, VEC)
        g = head_of(grad, begin + since, grad_row, head, grad_head, VEC)
        at = numbers + head.to(tl.int64) * queries + begin
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
                until = tl.where(real, rows + offset, -1)
                weights = tl.where(columns[:, None] <= until[None, :], weights, 0.0)
            else:
                weights = tl.where(real[None, :], weights, 0.0)
            narrow = weights.to(g0.dtype)
            to_v0 = tl.dot(narrow, g0, to_v0, input_precision=PRECISION)
            to_weights = tl.dot(v0, tl.trans(g0), input_precision=PRECISION)
            if D1 > 0:
                g1 = load_tile(g + g1_at, real, D0, D1, HEAD_DIM)
                to_v1 = tl.dot(narrow, g1, to_v1, input_precision=PRECISION)
                to_weights = tl.dot(v1, tl.trans(g1), to_weights, input_precision=PRECISION)
            to_scores = (weights * (to_weights - delta[None, :])).to(q0.dtype)
            to_k0 = tl.dot(to_scores, q0, to_k0, input_precision=PRECISION)
            if D1 > 0:
                to_k1 = tl.dot(to_scores, q1, to_k1, input_precision=PRECISION)
            q += BLOCK_M * VEC * query_row.to(tl.int64)
            g += BLOCK_M * VEC * grad_row.to(tl.int64)

    row = (heads // GROUP) * HEAD_DIM
    k, v = (
        head_of(to_key, begin_k + first, row, head_k, HEAD_DIM, 1),
        head_of(to_value, begin_k + first, row, head_k, HEAD_DIM, 1),
    )
    at = offsets_of(row, BLOCK_N, D0, 1)
    store_tile(k + at, to_k0 * scale, own, 0, D0, HEAD_DIM)
    store_tile(v + at, to_v0, own, 0, D0, HEAD_DIM)
    if D1 > 0:
        at = offsets_of(row, BLOCK_N, D1, 1)
        store_tile(k + at, to_k1 * scale, own, D0, D1, HEAD_DIM)
        store_tile(v + at, to_v1, own, D0, D1, HEAD_DIM)


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
    numbers = query.new_empty((3, heads, rows), dtype=torch.float32)

    tile = tiles("rows", head_dim, query.dtype, architecture)
    _rows_kernel[(triton.cdiv(rows, tile.blocks["BLOCK_M"]), heads)](
        grad, out, statistics.contiguous(), numbers, rows, heads, *strides(grad, vector), *strides(out, vector),
        **{name: shape[name] for name in ("HEAD_DIM", "D0", "D1", "VEC")}, **tile.launch,
    )  # fmt: skip
    between = (
        cu_q, cu_k, sequences, rows, key.shape[0], heads, scale, log2_scale(scale),
        *strides(grad, vector), *strides(query, vector), *strides(key, vector), *strides(value, vector),
    )  # fmt: skip
    if need_query:
        tile = tiles("query", head_dim, query.dtype, architecture)
        _query_kernel[(rows // tile.blocks["BLOCK_M"] + sequences, heads)](
            grad, query, key, value, numbers, to_query, *between, **shape, **tile.launch
        )
    if need_key:
        tile = tiles("key", head_dim, query.dtype, architecture)
        _key_kernel[(key.shape[0] // tile.blocks["BLOCK_N"] + sequences, key.shape[1])](
            grad, query, key, value, numbers, to_key, to_value, *between, **shape, **tile.launch
        )
    return to_query, to_key, to_value


def compilations() -> list[Compilation]:
    """List the three kernels of backward."""
    rows = [compilation(_rows_kernel, "rows", size, torch.bfloat16, False) for size in (64, 96, 256)]
    both = (("query", _query_kernel), ("key", _key_kernel))
    return [*rows, *(compilation(kernel, name, *each) for name, kernel in both for each in specialisations())]
