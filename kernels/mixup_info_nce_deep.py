"""mixup_info_nce backward for rows too wide for registers to hold their sums: G is stored for a chunk of query rows.

A chunk has R = max(512, 2 D) rows. G (R x N, in the inputs' dtype) is therefore at most twice the size of the keys, or
512 N elements. Chunks follow each other, and the keys' sums add them in order. The result is deterministic, with four
products of 2 M N D, forward included.

| kernel | FLOPs over all chunks | reads | writes |
|---|---|---|---|
| `_tiles` | 2 M N D | e (M D + N D) for each chunk | e M N |
| `_multiply`, queries' sums | 2 M N D | e M N, and the unit keys for each chunk | 4 M D |
| `_multiply`, keys' sums | 2 M N D | e M N, e M D, and 4 N D for each chunk | 4 N D for each chunk |
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from oner_fast.kernels.launch import Compilation, architecture_of, configuration, triton_type
from oner_fast.kernels.mixup_info_nce_rows import Gradients, Side, size_class
from oner_fast.kernels.mixup_info_nce_tiles import (
    OP,
    RANGES,
    SAME_MARKS,
    WIDEST,
    Weights,
    binary,
    columns_in,
    columns_of,
    compilation,
    kind_of,
    logits,
    places_of,
    precision_of,
    products,
    range_factor,
    same_pairs,
)  # fmt: skip

_CHUNK = 512  # the least number of rows of a chunk


@triton.jit(do_not_specialize=["first_row", "last_row", "columns", "first_pair"])
def _tiles(
    query, query_stride, query_rest, row_max, row_weight, key, key_stride, key_rest, column_max, column_weight,
    own_weight, partner, partner_weight, query_code, key_code, column_share, logit_scale, ranges, out, first_row,
    last_row, columns, width, first_pair,
    QUERY_REST: tl.constexpr, KEY_REST: tl.constexpr, COLUMNS: tl.constexpr, PARTNER: tl.constexpr, SAME: tl.constexpr,
    RANGED: tl.constexpr, RANGES: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write one tile [BLOCK_M, BLOCK_N] of G for the rows from first_row to last_row."""
    row_tile, column_tile = first_row + tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    row, column = row_tile + tl.arange(0, BLOCK_M), column_tile + tl.arange(0, BLOCK_N)
    row_here, column_here = row < last_row, column < columns
    q_at = places_of(query, query_stride, row_tile, last_row, BLOCK_M, BLOCK_K)
    k_at = places_of(key, key_stride, column_tile, columns, BLOCK_N, BLOCK_K)
    q = columns_of(q_at, width, EVEN, BLOCK_K) if WHOLE else q_at
    k = columns_of(k_at, width, EVEN, BLOCK_K) if WHOLE else k_at
    product = products(q, q_at, k, k_at, width, WHOLE, EVEN, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    row_factor = tl.full([BLOCK_M], tl.load(logit_scale).to(tl.float32), tl.float32)
    if QUERY_REST:
        row_factor *= tl.load(query_rest + row, mask=row_here, other=0.0)
    column_factor = tl.load(key_rest + column, mask=column_here, other=0.0) if KEY_REST else column
    powers = binary(logits(product, row_factor[:, None], column_factor[None, :], KEY_REST))

    base = binary(tl.load(row_max + row, mask=row_here, other=0.0))
    weight = tl.load(row_weight + row, mask=row_here, other=0.0)
    gradient = tl.exp2(powers - base[:, None]) * weight[:, None]
    if COLUMNS:
        base = binary(tl.load(column_max + column, mask=column_here, other=0.0))
        weight = tl.load(column_weight + column, mask=column_here, other=0.0)
        gradient += tl.exp2(powers - base[None, :]) * weight[None, :]
    own = tl.load(own_weight + row, mask=row_here, other=0.0)
    at_own = (row + first_pair)[:, None] == column[None, :]
    if SAME:
        row_code = tl.load(query_code + row, mask=row_here, other=-1)
        column_code = tl.load(key_code + column, mask=column_here, other=-3)
        marked = same_pairs(row_code, column_code, at_own, SAME)
        if SAME == 1:
            shares = own[:, None] + tl.load(column_share + column, mask=column_here, other=0.0)[None, :]
            gradient = tl.where(marked, gradient - shares, gradient)
        else:
            gradient = tl.where(marked, 0.0, gradient)
    if SAME != 1:
        gradient = tl.where(at_own, gradient - own[:, None], gradient)
    if PARTNER:
        target = columns_in(tl.load(partner + row, mask=row_here, other=-1), columns)
        shared = tl.load(partner_weight + row, mask=row_here, other=0.0)
        gradient = tl.where(target[:, None] == column[None, :], gradient - shared[:, None], gradient)
    if RANGED:
        gradient *= range_factor(ranges, 2, RANGES)
    at = out + (row - first_row).to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(at, gradient.to(out.dtype.element_ty), mask=row_here[:, None] & column_here[None, :])


@triton.jit(do_not_specialize=["rows", "depth"])
def _multiply(
    a, a_stride, b, out, rows, depth, width,
    TRANSPOSED: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute out (rows, width) = or += A B; `a` holds A (rows, depth) or its transpose, `b` holds B (depth, width)."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_here, column_here = row < rows, column < width
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, depth, BLOCK_K):
        step = first + tl.arange(0, BLOCK_K)
        here = step < depth
        if TRANSPOSED:
            a_at = a + step.to(tl.int64)[:, None] * a_stride + row[None, :]
            left = tl.trans(tl.load(a_at, mask=here[:, None] & row_here[None, :], other=0.0))
        else:
            a_at = a + row.to(tl.int64)[:, None] * a_stride + step[None, :]
            left = tl.load(a_at, mask=row_here[:, None] & here[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        b_at = b + step.to(tl.int64)[:, None] * width + column[None, :]
        right = tl.load(b_at, mask=here[:, None] & column_here[None, :], other=0.0)
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    at = out + row.to(tl.int64)[:, None] * width + column[None, :]
    mask = row_here[:, None] & column_here[None, :]
    if ADD:
        sums += tl.load(at, mask=mask, other=0.0)
    tl.store(at, sums, mask=mask)


def multiply(a: Tensor, b: Tensor, out: Tensor, *, transposed: bool, add: bool) -> None:
    """Write A B to `out` (rows, width), or add it; where `transposed`, `a` is the transpose of A."""
    rows, width = out.shape
    chosen = configuration(OP, "multiply", kind_of(b.dtype), architecture_of(b))
    _multiply[(triton.cdiv(rows, chosen.blocks["BLOCK_M"]), triton.cdiv(width, chosen.blocks["BLOCK_N"]))](
        a, a.stride(0), b, out, rows, b.shape[0], width, TRANSPOSED=transposed, ADD=add, PRECISION=precision_of(b),
        **chosen.exact,
    )  # fmt: skip


def launch(
    query: Side, key: Side, logit_scale: Tensor, weights: Weights, to_query: Gradients, to_key: Gradients, dot: Tensor
) -> None:
    """Compute the gradients of both sides, and the dot product of each query row with its sums."""
    (q, q_rest), (k, k_rest) = query.operand(), key.operand()
    width, columns = q.shape[1], k.shape[0]
    ranges = weights.ranges(None, None, columns) if q.dtype == torch.float16 else None
    kind = kind_of(q.dtype)
    size = size_class(width, WIDEST[kind])
    chosen = configuration(OP, "statistics", f"{kind} {size}", architecture_of(q))

    def given(x: Tensor | None) -> Tensor:
        return dot if x is None else x

    def tiles(first: int, last: int, gradient: Tensor) -> None:
        grid = (triton.cdiv(last - first, chosen.blocks["BLOCK_M"]), triton.cdiv(columns, chosen.blocks["BLOCK_N"]))
        _tiles[grid](
            q, q.stride(0), given(q_rest), weights.row_max, weights.row_weight, k, k.stride(0), given(k_rest),
            given(weights.column_max), given(weights.column_weight), weights.own_weight, given(weights.partner),
            given(weights.partner_weight), given(weights.query_code), given(weights.key_code),
            given(weights.column_share), logit_scale, given(ranges), gradient, first, last, columns, width,
            weights.first_pair,
            QUERY_REST=q_rest is not None, KEY_REST=k_rest is not None, COLUMNS=weights.column_max is not None,
            PARTNER=weights.partner is not None, SAME=weights.same, RANGED=ranges is not None, RANGES=RANGES,
            WHOLE=size != "deep", EVEN=width % chosen.blocks["BLOCK_K"] == 0, PRECISION=precision_of(q),
            **chosen.exact,
        )  # fmt: skip

    multiply_chunks((query, q, q_rest), (key, k, k_rest), logit_scale, ranges, to_query, to_key, dot, tiles)


Operand = tuple[Side, Tensor, Tensor | None]  # a side, and what its `operand` returned


def multiply_chunks(
    query: Operand, key: Operand, scale: Tensor, ranges: Tensor | None, to_query: Gradients, to_key: Gradients,
    dot: Tensor, tiles: Callable[[int, int, Tensor], None],
) -> None:  # fmt: skip
    """Compute the gradients of both sides from G, which exists for a chunk of query rows at a time.

    `tiles(first, last, out)` writes G for these rows (last - first, N); `scale` times its products with the other side
    is the gradient of a side's rows of the logits.
    """
    (query_side, q, q_rest), (key_side, k, k_rest) = query, key
    (rows, width), columns, device = q.shape, k.shape[0], q.device
    q_unit = q.contiguous() if q_rest is None else query_side.unit_rows()
    k_unit = k.contiguous() if k_rest is None else key_side.unit_rows()
    chunk = min(rows, max(_CHUNK, 2 * width))
    gradient = torch.empty(chunk, columns, dtype=q.dtype, device=device)
    query_sums = torch.empty(rows, width, dtype=torch.float32, device=device)
    key_sums = torch.empty((columns, width) if to_key.x.numel() else (0, width), dtype=torch.float32, device=device)
    for first in range(0, rows, chunk):
        last = min(first + chunk, rows)
        tiles(first, last, gradient)
        multiply(gradient, k_unit, query_sums[first:last], transposed=False, add=False)
        if to_key.x.numel():
            multiply(gradient, q_unit[first:last], key_sums, transposed=True, add=first > 0)
    to_query.finish(query_side, query_sums, scale, ranges, dot)
    if to_key.x.numel():
        to_key.finish(key_side, key_sums, scale, ranges, None)


def compilations() -> list[Compilation]:
    """List the kernels for wide rows of every dtype."""
    found = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        element, kind, precision = triton_type(dtype), kind_of(dtype), precision_of(torch.empty(0, dtype=dtype))
        for mark, same in SAME_MARKS.items():
            flags = {
                "QUERY_REST": True, "KEY_REST": True, "COLUMNS": True, "PARTNER": not same, "SAME": same,
                "RANGED": dtype == torch.float16, "RANGES": RANGES, "WHOLE": False, "EVEN": True,
                "PRECISION": precision,
            }  # fmt: skip
            chosen = configuration(OP, "statistics", f"{kind} deep", 80)
            name = f"tiles_{element}{'_' if mark else ''}{mark}"
            found.append(compilation(name, _tiles, flags, chosen, "query key out", element, products=True))
        for transposed in (False, True):
            flags = {"TRANSPOSED": transposed, "ADD": transposed, "PRECISION": precision}
            name = f"multiply_{element}{'_transposed' if transposed else ''}"
            chosen = configuration(OP, "multiply", kind, 80)
            found.append(compilation(name, _multiply, flags, chosen, "a b", element, products=True))
    return found
