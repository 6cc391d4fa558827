"""sigmoid_loss forward: one pass over tiles of logits adds up the terms of each row, without N x N.

There are M query rows and N keys of width D and element size e. A program takes a tile of rows and a part of the column
tiles, and keeps the sums of its rows in registers. There are at most 32 parts, whose sums are added in order. Backward
is in sigmoid_loss_backward.py.

| kernel | FLOPs | reads | writes |
|---|---|---|---|
| `_sums` | 2 M N D | e (M D + N D) from memory; keys from L2 for each row tile | 4 parts M |

A logit takes one exponential and the ten multiply-adds of log(1 + x).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from oner_fast.kernels.launch import Compilation, Configuration, architecture_of, configuration, triton_type
from oner_fast.kernels.mixup_info_nce import parts_of
from oner_fast.kernels.mixup_info_nce_rows import Side, size_class
from oner_fast.kernels.mixup_info_nce_tiles import (
    IGNORED,
    POSITIVE,
    SAME_MARKS,
    WIDEST,
    columns_in,
    columns_of,
    kind_of,
    logits,
    places_of,
    precision_of,
    products,
    same_pairs,
)  # fmt: skip
from oner_fast.kernels.sigmoid_loss_backward import backward
from oner_fast.kernels.sigmoid_loss_tiles import OP, compilation, soft_targets, term

__all__ = ["backward", "compilations", "sums"]

_PROGRAMS = 512  # the number aimed at: a few for each of the 108 multiprocessors of an A100


@triton.jit(do_not_specialize=["rows", "columns", "first_pair", "part_tiles"])
def _sums(
    query, query_stride, query_rest, key, key_stride, key_rest, logit_scale, logit_bias, partner, partner_weight,
    query_code, key_code, out, rows, columns, width, first_pair, part_tiles,
    QUERY_REST: tl.constexpr, KEY_REST: tl.constexpr, BIAS: tl.constexpr, PARTNER: tl.constexpr, SAME: tl.constexpr,
    WHOLE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    row_tile, part = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    first_column, last_column = part * part_tiles * BLOCK_N, min((part + 1) * part_tiles * BLOCK_N, columns)
    row = row_tile + tl.arange(0, BLOCK_M)
    row_here = row < rows
    row_factor = tl.full([BLOCK_M], tl.load(logit_scale).to(tl.float32), tl.float32)
    if QUERY_REST:
        row_factor *= tl.load(query_rest + row, mask=row_here, other=0.0)
    bias = tl.load(logit_bias).to(tl.float32) if BIAS else 0.0
    q_at = places_of(query, query_stride, row_tile, rows, BLOCK_M, BLOCK_K)
    q = columns_of(q_at, width, EVEN, BLOCK_K) if WHOLE else q_at
    own_column = row + first_pair
    if PARTNER:
        partner_column = columns_in(tl.load(partner + row, mask=row_here, other=-1), columns)
        shared = tl.load(partner_weight + row, mask=row_here, other=0.0)
    if SAME:
        row_code = tl.load(query_code + row, mask=row_here, other=-1)
    total = tl.zeros([BLOCK_M], tl.float32)

    for column_tile in range(first_column, last_column, BLOCK_N):
        column = column_tile + tl.arange(0, BLOCK_N)
        column_here = column < columns
        k_at = places_of(key, key_stride, column_tile, columns, BLOCK_N, BLOCK_K)
        k = columns_of(k_at, width, EVEN, BLOCK_K) if WHOLE else k_at
        product = products(q, q_at, k, k_at, width, WHOLE, EVEN, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
        column_factor = tl.load(key_rest + column, mask=column_here, other=0.0) if KEY_REST else column
        tile = logits(product, row_factor[:, None], column_factor[None, :], KEY_REST) + bias  # [BLOCK_M, BLOCK_N]
        if PARTNER:
            at_own = own_column[:, None] == column[None, :]
            at_partner = partner_column[:, None] == column[None, :]
            target = soft_targets(at_own, (1.0 - shared)[:, None], at_partner, shared[:, None])
            terms = term(tile, tl.maximum(tile, 0.0) - target * tile)
        else:
            if SAME:
                column_code = tl.load(key_code + column, mask=column_here, other=-3)
                at_own = own_column[:, None] == column[None, :]
                marked = same_pairs(row_code, column_code, at_own, SAME)
            if SAME == 1:
                tile = tl.where(marked, -tile, tile)
            else:
                first_own = row_tile + first_pair - column_tile
                if (first_own > -BLOCK_M) & (first_own < BLOCK_N):
                    tile = tl.where(own_column[:, None] == column[None, :], -tile, tile)
            terms = term(tile, tl.maximum(tile, 0.0))
            if SAME == 2:
                terms = tl.where(marked, 0.0, terms)
        if column_tile + BLOCK_N > columns:
            terms = tl.where(column_here[None, :], terms, 0.0)
        total += tl.sum(terms, 1)

    tl.store(out + part.to(tl.int64) * rows + row, total, mask=row_here)


def sums(
    query: Tensor,
    query_other: Tensor | None,
    query_mix: Tensor | None,
    query_inverse_norm: Tensor | None,
    key: Tensor,
    key_other: Tensor | None,
    key_mix: Tensor | None,
    key_inverse_norm: Tensor | None,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    partner: Tensor | None,
    partner_weight: Tensor | None,
    first_pair: int,
    query_code: Tensor | None = None,
    key_code: Tensor | None = None,
    positive: bool = True,
) -> Tensor:
    """Launch forward: compute the sum of the terms of each row (M,), in float32."""
    q, q_rest = Side.of(query, query_other, query_mix, query_inverse_norm).operand()
    k, k_rest = Side.of(key, key_other, key_mix, key_inverse_norm).operand()
    (rows, width), columns = q.shape, k.shape[0]
    if not rows or not columns:
        return torch.zeros(rows, dtype=torch.float32, device=query.device)
    size, same = size_class(width, WIDEST[kind_of(q.dtype)]), 0
    if query_code is not None:
        same = POSITIVE if positive else IGNORED
    chosen = _configuration(kind_of(q.dtype), size, same, architecture_of(q))
    tiles = triton.cdiv(rows, chosen.blocks["BLOCK_M"])
    parts, part_tiles = parts_of(triton.cdiv(columns, chosen.blocks["BLOCK_N"]), triton.cdiv(_PROGRAMS, tiles))
    out = torch.empty(parts, rows, dtype=torch.float32, device=query.device)

    def given(x: Tensor | None) -> Tensor:
        return out if x is None else x.contiguous()

    _sums[(tiles, parts)](
        q, q.stride(0), given(q_rest), k, k.stride(0), given(k_rest), logit_scale, given(logit_bias), given(partner),
        given(partner_weight), given(query_code), given(key_code), out, rows, columns, width, first_pair, part_tiles,
        QUERY_REST=q_rest is not None, KEY_REST=k_rest is not None, BIAS=logit_bias is not None,
        PARTNER=partner is not None, SAME=same, WHOLE=size != "deep", EVEN=width % chosen.blocks["BLOCK_K"] == 0,
        PRECISION=precision_of(q), **chosen.launch,
    )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0)


def _configuration(kind: str, size: str, same: int, architecture: int) -> Configuration:
    """Return the tile of the sums; codes have their own where they need more registers."""
    mark = " same" if same and kind == "half" and size == "256" else ""
    return configuration(OP, "sums", f"{kind} {size}{mark}", architecture)


def compilations() -> list[Compilation]:
    """List the kernel of forward for every dtype and class of widths."""
    found = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        element, kind = triton_type(dtype), kind_of(dtype)
        sizes = [str(size) for size in (64, 128, 256) if size <= WIDEST[kind]]
        marks = ("", "partner", "positive", "ignored")
        for size, mark in ((size, mark) for size in (*sizes, "deep") for mark in marks):
            partner, same = mark == "partner", SAME_MARKS.get(mark, 0)
            flags = {
                "QUERY_REST": True, "KEY_REST": True, "BIAS": True, "PARTNER": partner, "SAME": same,
                "WHOLE": size != "deep", "EVEN": True, "PRECISION": precision_of(torch.empty(0, dtype=dtype)),
            }  # fmt: skip
            chosen = _configuration(kind, size, same, 80)
            name = f"sums_{element}_{size}{'_' if mark else ''}{mark}"
            found.append(compilation(name, _sums, flags, chosen, "query key", element))
    return found
