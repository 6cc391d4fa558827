"""mixup_info_nce forward: one pass over tiles of logits computes the statistics of rows and columns, without N x N.

There are M query rows and N keys of width D and element size e. A program takes a stripe of row tiles and a part of the
column tiles. The statistics are (maximum, sum of exp(logit - maximum)). Row statistics stay in registers along the
columns of the part. Column statistics are merged, tile by tile, into partials of the stripe. There are at most 32
stripes and 32 parts, so that partials are O(M + N). A small kernel merges them in order. Backward is in
mixup_info_nce_backward.py.

| kernel | FLOPs | reads | writes |
|---|---|---|---|
| `_statistics` | 2 M N D | e (M D + N D) from memory; keys from L2 for each row tile | 8 (parts M + stripes N) |
| `_merge` | O(parts M + stripes N) | the partials once | 8 (M + N) |
| `_partner_sums` | 2 M N, no product | 12 M for each block of columns (from the L2 cache) | 4 N |

`_statistics` writes at most 256 (M + N) bytes.

Logits are in base e and rounded once (no fused multiply-add skips that rounding). Backward therefore recomputes
exactly the logit that forward found to be the largest, and a pair with all the probability has a gradient of exactly 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from oner_fast.kernels.launch import Compilation, Configuration, architecture_of, configuration, triton_type
from oner_fast.kernels.mixup_info_nce_backward import backward, backward_with_atomics
from oner_fast.kernels.mixup_info_nce_rows import Side, inverse_norms, size_class
from oner_fast.kernels.mixup_info_nce_tiles import (
    OP,
    POSITIVE,
    SAME_MARKS,
    WIDEST,
    binary,
    columns_in,
    columns_of,
    compilation,
    kind_of,
    logits,
    places_of,
    precision_of,
    products,
    same_of,
    same_pairs,
)  # fmt: skip

__all__ = ["backward", "backward_with_atomics", "compilations", "inverse_norms", "partner_sums", "statistics"]

_LARGEST_PARTS = 32  # the most partials of a row or column
_PROGRAMS = 512  # the number aimed at: a few for each of the 108 multiprocessors of an A100


@triton.jit
def _merged(high, total, other_high, other_total):
    """Merge two pairs of (max, sum of exp(x - max)); a NaN in either sum stays."""
    both = tl.maximum(high, other_high)
    base = binary(both)
    return both, total * tl.exp2(binary(high) - base) + other_total * tl.exp2(binary(other_high) - base)


@triton.jit(do_not_specialize=["rows", "columns", "first_pair", "stripe_tiles", "part_tiles"])
def _statistics(
    query, query_stride, query_rest, key, key_stride, key_rest, logit_scale, partner, query_code, key_code, row_share,
    column_share, row_max, row_sum, column_max, column_sum, own, shared, rows, columns, width, first_pair, stripe_tiles,
    part_tiles,
    QUERY_REST: tl.constexpr, KEY_REST: tl.constexpr, PARTNER: tl.constexpr, SAME: tl.constexpr, COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    stripe, part = tl.program_id(0), tl.program_id(1)
    first_row, last_row = stripe * stripe_tiles * BLOCK_M, min((stripe + 1) * stripe_tiles * BLOCK_M, rows)
    first_column, last_column = part * part_tiles * BLOCK_N, min((part + 1) * part_tiles * BLOCK_N, columns)
    scale = tl.load(logit_scale).to(tl.float32)
    row_max += part.to(tl.int64) * rows
    row_sum += part.to(tl.int64) * rows
    if SAME == 1:
        own += part.to(tl.int64) * rows
    column_max += stripe.to(tl.int64) * columns
    column_sum += stripe.to(tl.int64) * columns

    for row_tile in range(first_row, last_row, BLOCK_M):
        row = row_tile + tl.arange(0, BLOCK_M)
        row_here = row < rows
        q_at = places_of(query, query_stride, row_tile, rows, BLOCK_M, BLOCK_K)
        q = columns_of(q_at, width, EVEN, BLOCK_K) if WHOLE else q_at
        row_factor = tl.full([BLOCK_M], scale, tl.float32)
        if QUERY_REST:
            row_factor *= tl.load(query_rest + row, mask=row_here, other=0.0)
        high = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        own_column = row + first_pair
        if SAME:
            row_code = tl.load(query_code + row, mask=row_here, other=-1)
        if SAME == 1:
            share = tl.load(row_share + row, mask=row_here, other=0.0)
            targets = tl.zeros([BLOCK_M], tl.float32)
        elif part == 0:
            lost = (own_column < 0) | (own_column >= columns)
            tl.store(own + row, tl.zeros([BLOCK_M], tl.float32), mask=row_here & lost)
        if PARTNER:
            partner_column = columns_in(tl.load(partner + row, mask=row_here, other=-1), columns)
            partner_logit = tl.zeros([BLOCK_M], tl.float32)

        for column_tile in range(first_column, last_column, BLOCK_N):
            column = column_tile + tl.arange(0, BLOCK_N)
            column_here = column < columns
            k_at = places_of(key, key_stride, column_tile, columns, BLOCK_N, BLOCK_K)
            k = columns_of(k_at, width, EVEN, BLOCK_K) if WHOLE else k_at
            product = products(q, q_at, k, k_at, width, WHOLE, EVEN, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
            column_factor = tl.load(key_rest + column, mask=column_here, other=0.0) if KEY_REST else column
            tile = logits(product, row_factor[:, None], column_factor[None, :], KEY_REST)  # [BLOCK_M, BLOCK_N]
            if SAME:
                column_code = tl.load(key_code + column, mask=column_here, other=-3)
                at_own = (column[None, :] == own_column[:, None]) & column_here[None, :]
                marked = same_pairs(row_code, column_code, at_own, SAME)
                if SAME == 1:
                    shares = share[:, None] + tl.load(column_share + column, mask=column_here, other=0.0)[None, :]
                    targets += tl.sum(tl.where(marked, tile * shares, 0.0), 1)
                else:
                    tile = tl.where(marked, -1e38, tile)  # the exponential is 0, and no difference of two is NaN
            if (row_tile + BLOCK_M > rows) | (column_tile + BLOCK_N > columns):
                tile = tl.where(row_here[:, None] & column_here[None, :], tile, float("-inf"))

            first_own = row_tile + first_pair - column_tile
            if (SAME != 1) & (first_own > -BLOCK_M) & (first_own < BLOCK_N):
                value = tl.sum(tl.where(column[None, :] == own_column[:, None], tile, 0.0), 1)
                inside = (own_column >= column_tile) & (own_column < min(column_tile + BLOCK_N, columns))
                tl.store(own + row, value, mask=row_here & inside)
            if PARTNER:
                partner_logit += tl.sum(tl.where(column[None, :] == partner_column[:, None], tile, 0.0), 1)

            before = high
            high = tl.maximum(high, tl.max(tile, 1))
            tile_high = tl.max(tile, 0) if COLUMNS else high
            row_base = binary(tl.where(row_here, high, 0.0))
            powers = binary(tile)
            total = total * tl.exp2(binary(before) - row_base) + tl.sum(tl.exp2(powers - row_base[:, None]), 1)
            if COLUMNS:
                column_base = binary(tl.where(column_here, tile_high, 0.0))
                tile_total = tl.sum(tl.exp2(powers - column_base[None, :]), 0)
                if row_tile > first_row:
                    stripe_high = tl.load(column_max + column, mask=column_here, other=0.0)
                    stripe_total = tl.load(column_sum + column, mask=column_here, other=0.0)
                    tile_high, tile_total = _merged(stripe_high, stripe_total, tile_high, tile_total)
                tl.store(column_max + column, tile_high, mask=column_here)
                tl.store(column_sum + column, tile_total, mask=column_here)

        tl.store(row_max + row, high, mask=row_here)
        tl.store(row_sum + row, total, mask=row_here)
        if SAME == 1:
            tl.store(own + row, targets, mask=row_here)
        if PARTNER:
            # The first part also writes the rows whose partner lies in no part.
            mine = (partner_column >= tl.where(part == 0, -1, first_column)) & (partner_column < last_column)
            tl.store(shared + row, partner_logit, mask=row_here & mine)
        if COLUMNS:
            tl.debug_barrier()  # the next row tile reads the partials of this one


@triton.jit(do_not_specialize=["parts", "count"])
def _merge(highs, totals, out_high, out_total, parts, count, BLOCK_N: tl.constexpr):
    at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    here = at < count
    high = tl.load(highs + at, mask=here, other=0.0)
    total = tl.load(totals + at, mask=here, other=0.0)
    for _ in range(1, parts):
        highs += count
        totals += count
        other_high = tl.load(highs + at, mask=here, other=0.0)
        high, total = _merged(high, total, other_high, tl.load(totals + at, mask=here, other=0.0))
    tl.store(out_high + at, high, mask=here)
    tl.store(out_total + at, total, mask=here)


@triton.jit(do_not_specialize=["rows", "columns"])
def _partner_sums(partner, values, out, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, rows, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        target = tl.load(partner + row, mask=row < rows, other=-1)
        value = tl.load(values + row, mask=row < rows, other=0.0)
        sums += tl.where(target[:, None] == column[None, :], value[:, None], 0.0)
    tl.store(out + column, tl.sum(sums, 0), mask=column < columns)


def parts_of(tiles: int, wanted: int) -> tuple[int, int]:
    """Return the number of parts, and the number of tiles in every part except the last; no part is empty."""
    each = triton.cdiv(tiles, max(1, min(tiles, wanted, _LARGEST_PARTS)))
    return triton.cdiv(tiles, each), each


def _merge_parts(highs: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    parts, count = highs.shape
    if parts == 1:
        return highs[0], totals[0]
    high, total = torch.empty_like(highs[0]), torch.empty_like(totals[0])
    chosen = configuration(OP, "merge", "all", architecture_of(highs))
    grid = (triton.cdiv(count, chosen.blocks["BLOCK_N"]),)
    _merge[grid](highs, totals, high, total, parts, count, **chosen.exact)
    return high, total


def statistics(
    query: Tensor,
    query_other: Tensor | None,
    query_mix: Tensor | None,
    query_inverse_norm: Tensor | None,
    key: Tensor,
    key_other: Tensor | None,
    key_mix: Tensor | None,
    key_inverse_norm: Tensor | None,
    logit_scale: Tensor,
    partner: Tensor | None,
    first_pair: int,
    columns_too: bool,
    query_code: Tensor | None = None,
    key_code: Tensor | None = None,
    row_share: Tensor | None = None,
    column_share: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Launch forward: compute the maximum and sum of each row and column, and the logits of own pairs and partners."""
    q, q_rest = Side.of(query, query_other, query_mix, query_inverse_norm).operand()
    k, k_rest = Side.of(key, key_other, key_mix, key_inverse_norm).operand()
    (rows, width), columns = q.shape, k.shape[0]

    def numbers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=query.device)

    if not rows or not columns:
        nothing, none = numbers(rows).fill_(float("-inf")), numbers(columns if columns_too else 0).fill_(float("-inf"))
        zeros = torch.zeros_like(nothing)
        return (
            nothing, zeros, none, torch.zeros_like(none), zeros.clone(), zeros[: 0 if partner is None else rows].clone()
        )  # fmt: skip
    size = size_class(q.shape[1], WIDEST[kind_of(q.dtype)])
    same = same_of(query_code, column_share)
    chosen = _configuration(kind_of(q.dtype), size, partner is not None, same, architecture_of(q))
    stripes, stripe_tiles = parts_of(triton.cdiv(rows, chosen.blocks["BLOCK_M"]), _LARGEST_PARTS)
    parts, part_tiles = parts_of(triton.cdiv(columns, chosen.blocks["BLOCK_N"]), triton.cdiv(_PROGRAMS, stripes))
    row_max, row_sum = numbers(parts, rows), numbers(parts, rows)
    column_max, column_sum = (numbers(stripes, columns if columns_too else 0) for _ in range(2))
    own, shared = numbers(parts if same == POSITIVE else 1, rows), numbers(0 if partner is None else rows)

    def given(x: Tensor | None) -> Tensor:
        return q if x is None else x.contiguous()

    _statistics[(stripes, parts)](
        q, q.stride(0), q if q_rest is None else q_rest, k, k.stride(0), k if k_rest is None else k_rest, logit_scale,
        given(partner), given(query_code), given(key_code), given(row_share), given(column_share), row_max, row_sum,
        column_max, column_sum, own, shared, rows, columns, width, first_pair, stripe_tiles, part_tiles,
        QUERY_REST=q_rest is not None, KEY_REST=k_rest is not None, PARTNER=partner is not None, SAME=same,
        COLUMNS=columns_too,
        WHOLE=size != "deep", EVEN=width % chosen.blocks["BLOCK_K"] == 0, PRECISION=precision_of(q), **chosen.exact,
    )  # fmt: skip
    columns_found = _merge_parts(column_max, column_sum) if columns_too else (column_max[0], column_sum[0])
    return (*_merge_parts(row_max, row_sum), *columns_found, own[0] if len(own) == 1 else own.sum(0), shared)


def _configuration(kind: str, size: str, partner: bool, same: int, architecture: int) -> Configuration:
    """Return the tile of the statistics; partners and codes have their own where they need more registers."""
    mark = ""
    if kind == "half" and size == "deep" and (partner or same):
        mark = " partner"
    elif kind == "half" and size == "256" and same:
        mark = " same"
    return configuration(OP, "statistics", f"{kind} {size}{mark}", architecture)


def partner_sums(partner: Tensor, values: Tensor, columns: int) -> Tensor:
    """For each column, sum the values of the rows whose partner is that column, in the order of rows."""
    out = torch.empty(columns, dtype=values.dtype, device=values.device)
    chosen = configuration(OP, "partner_sums", "all", architecture_of(values))
    _partner_sums[(triton.cdiv(columns, chosen.blocks["BLOCK_N"]),)](
        partner.contiguous(), values.contiguous(), out, partner.shape[0], columns, **chosen.launch
    )
    return out


def compilations() -> list[Compilation]:
    """List the kernels of forward for every dtype and class of widths."""
    found = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        element, kind = triton_type(dtype), kind_of(dtype)
        sizes = [str(size) for size in (64, 128, 256) if size <= WIDEST[kind]]
        marks = ("", "partner", "positive", "ignored")
        for size, mark in ((size, mark) for size in (*sizes, "deep") for mark in marks):
            partner, same = mark == "partner", SAME_MARKS.get(mark, 0)
            flags = {
                "QUERY_REST": True, "KEY_REST": True, "PARTNER": partner, "SAME": same, "COLUMNS": True,
                "WHOLE": size != "deep", "EVEN": True, "PRECISION": precision_of(torch.empty(0, dtype=dtype)),
            }  # fmt: skip
            chosen = _configuration(kind, size, partner, same, 80)
            name = f"statistics_{element}_{size}{'_' if mark else ''}{mark}"
            found.append(compilation(name, _statistics, flags, chosen, "query key", element, products=True))
    for name, kernel in (("merge", _merge), ("partner_sums", _partner_sums)):
        found.append(compilation(name, kernel, {}, configuration(OP, name, "all", 80), exact=name == "merge"))
    return found
