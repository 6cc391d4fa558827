"""sigmoid_loss backward: each side's rows meet recomputed tiles of logits; nothing is added atomically.

G[i, j] = sigmoid(l) - target is the gradient with respect to the logits, but for a factor that all share. As in
mixup_info_nce_backward.py, a program owns a tile of one side's rows and keeps their sums u = G K (or G^T Q) in
registers while it walks over the other side. Both sides share one launch. Programs of queries also add up the rows of
G, for the gradient of the bias.

For M query rows and N keys of width D and element size e:

| kernel | FLOPs | reads | writes |
|---|---|---|---|
| `_gradient`, both sides | 4 times 2 M N D | e (M D + N D) | e (M D + N D) + 8 M |
| `_tiles`, then `_multiply` twice | 3 times 2 M N D | e (M D + N D) and e M N, for each chunk of rows | e M N |

Rows of more than 256 elements, mixed rows of more than 128, and all float32 rows leave no registers for the sums of a
tile. `_tiles` stores G for them, for a chunk of rows at a time, as mixup_info_nce_deep.py describes; its products are
that module's.

Numbers of G are at most 1, and small where most pairs are told apart. In float16 they are scaled to at most 2^14, or
those of a trained model would lose their digits below 2^-14. So are their products with the inverse norms of rows that
were not normalised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from oner_fast.kernels.launch import Compilation, Configuration, architecture_of, configuration, triton_type
from oner_fast.kernels.mixup_info_nce_backward import PART_OF_SUMS, keeps_tiles, store_tile
from oner_fast.kernels.mixup_info_nce_deep import multiply_chunks
from oner_fast.kernels.mixup_info_nce_rows import Gradients, Side, size_class
from oner_fast.kernels.mixup_info_nce_tiles import (
    IGNORED,
    POSITIVE,
    RANGES,
    SAME_MARKS,
    WIDEST,
    columns_in,
    columns_of,
    kind_of,
    logits,
    places_of,
    precision_of,
    products,
    range_factor,
    same_pairs,
)  # fmt: skip
from oner_fast.kernels.sigmoid_loss_tiles import OP, compilation, sigmoid, soft_gradient, soft_targets


@triton.jit
def _gradient_of(
    owner, owner_stride, owner_rest, other, other_stride, other_rest, partner, partner_weight, owner_code, other_code,
    logit_scale, logit_bias, each, ranges, x, x_stride, x_other, x_other_stride, mix, inverse_norm, to_x, to_other,
    to_mix, dot, row_sums, owner_first, owners, others, width, first_pair,
    OWNER_IS_QUERY: tl.constexpr, OWNER_REST: tl.constexpr, OTHER_REST: tl.constexpr, BIAS: tl.constexpr,
    PARTNER: tl.constexpr, SAME: tl.constexpr, RANGED: tl.constexpr, RANGES: tl.constexpr, UNIT: tl.constexpr,
    MIXED: tl.constexpr, MIX_EACH: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the tile of owners from owner_first on, against all others."""
    scale = tl.load(logit_scale).to(tl.float32)
    bias = tl.load(logit_bias).to(tl.float32) if BIAS else 0.0
    row = tl.minimum(owner_first + tl.arange(0, BLOCK_M), owners - 1)
    row_here = owner_first + tl.arange(0, BLOCK_M) < owners
    a = columns_of(places_of(owner, owner_stride, owner_first, owners, BLOCK_M, BLOCK_K), width, EVEN, BLOCK_K)
    row_factor = tl.full([BLOCK_M], scale, tl.float32)
    if OWNER_REST:
        row_factor *= tl.load(owner_rest + row)
    if SAME:
        own_code = tl.load(owner_code + row)
    if PARTNER and OWNER_IS_QUERY:
        target_column = columns_in(tl.load(partner + row), others)
        weight = tl.load(partner_weight + row)
    factor = range_factor(ranges, 3 if OWNER_IS_QUERY else 2, RANGES) if RANGED else 1.0
    u = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    for other_first in range(0, others, BLOCK_N):
        met = other_first + tl.arange(0, BLOCK_N)
        met_here = met < others
        column = tl.minimum(met, others - 1)
        b_at = places_of(other, other_stride, other_first, others, BLOCK_N, BLOCK_K)
        b = columns_of(b_at, width, EVEN, BLOCK_K)  # [BLOCK_N, BLOCK_K]
        product = tl.dot(a, tl.trans(b))
        met_rest = tl.load(other_rest + column) if OTHER_REST else tl.full([BLOCK_N], 1.0, tl.float32)
        tile = logits(product, row_factor[:, None], met_rest[None, :], OTHER_REST) + bias  # [BLOCK_M, BLOCK_N]
        first_own = owner_first + first_pair - other_first if OWNER_IS_QUERY else owner_first - first_pair - other_first
        at_own = (first_own + tl.arange(0, BLOCK_M))[:, None] == tl.arange(0, BLOCK_N)[None, :]
        near_own = (first_own > -BLOCK_M) & (first_own < BLOCK_N)
        if PARTNER:
            if OWNER_IS_QUERY:
                at_partner = target_column[:, None] == met[None, :]
                target = soft_targets(at_own, (1.0 - weight)[:, None], at_partner, weight[:, None])
            else:
                met_target = columns_in(tl.load(partner + column), owners)
                met_weight = tl.load(partner_weight + column)
                at_partner = met_target[None, :] == row[:, None]
                target = soft_targets(at_own, (1.0 - met_weight)[None, :], at_partner, met_weight[None, :])
            gradient = soft_gradient(tile, target)
        elif SAME == 1:
            marked = same_pairs(own_code, tl.load(other_code + column), at_own, SAME)
            gradient = sigmoid(tl.where(marked, -tile, tile))
            gradient = tl.where(marked, -gradient, gradient)
        else:
            if near_own:
                tile = tl.where(at_own, -tile, tile)
            gradient = sigmoid(tile)
            if near_own:
                gradient = tl.where(at_own, -gradient, gradient)
            if SAME == 2:
                at_own = at_own & row_here[:, None] & met_here[None, :]
                marked = same_pairs(own_code, tl.load(other_code + column), at_own, SAME)
                gradient = tl.where(marked, 0.0, gradient)
        if OWNER_IS_QUERY:
            total += tl.sum(tl.where(met_here[None, :], gradient, 0.0), 1)
        if RANGED:
            met_rest = met_rest * factor
        met_rest = tl.where(met_here, met_rest, 0.0)
        weighted = (gradient * met_rest[None, :]).to(owner.dtype.element_ty)
        u = tl.dot(weighted, b, u)

    if OWNER_IS_QUERY:
        tl.store(row_sums + owner_first + tl.arange(0, BLOCK_M), total, mask=row_here)
    store_tile(
        u / factor, scale * tl.load(each), x, x_stride, x_other, x_other_stride, mix, inverse_norm, to_x, to_other,
        to_mix, dot, owner_first, owners, width, OWNER_IS_QUERY, UNIT, MIXED, MIX_EACH, BLOCK_M, BLOCK_K, PART,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "columns", "first_pair", "query_tiles"])
def _gradient(
    query, query_stride, query_rest, key, key_stride, key_rest, partner, partner_weight, query_code, key_code,
    logit_scale, logit_bias, each, ranges,
    query_x, query_x_stride, query_other, query_other_stride, query_mix, query_norm, to_query, to_query_other,
    to_query_mix, dot, row_sums,
    key_x, key_x_stride, key_other, key_other_stride, key_mix, key_norm, to_key, to_key_other, to_key_mix,
    rows, columns, width, first_pair, query_tiles,
    QUERY_REST: tl.constexpr, KEY_REST: tl.constexpr, QUERY_MIXED: tl.constexpr, KEY_MIXED: tl.constexpr,
    MIX_EACH: tl.constexpr, QUERY_UNIT: tl.constexpr, KEY_UNIT: tl.constexpr, BIAS: tl.constexpr,
    PARTNER: tl.constexpr, SAME: tl.constexpr, RANGED: tl.constexpr, RANGES: tl.constexpr, BOTH_SIDES: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    if tile < query_tiles:
        _gradient_of(
            query, query_stride, query_rest, key, key_stride, key_rest, partner, partner_weight, query_code, key_code,
            logit_scale, logit_bias, each, ranges, query_x, query_x_stride, query_other, query_other_stride, query_mix,
            query_norm, to_query, to_query_other, to_query_mix, dot, row_sums, tile * BLOCK_M, rows, columns, width,
            first_pair,
            True, QUERY_REST, KEY_REST, BIAS, PARTNER, SAME, RANGED, RANGES, QUERY_UNIT, QUERY_MIXED, MIX_EACH, EVEN,
            BLOCK_M, BLOCK_N, BLOCK_K, PART,
        )  # fmt: skip
    elif BOTH_SIDES:
        _gradient_of(
            key, key_stride, key_rest, query, query_stride, query_rest, partner, partner_weight, key_code, query_code,
            logit_scale, logit_bias, each, ranges, key_x, key_x_stride, key_other, key_other_stride, key_mix, key_norm,
            to_key, to_key_other, to_key_mix, dot, row_sums, (tile - query_tiles) * BLOCK_M, columns, rows, width,
            first_pair,
            False, KEY_REST, QUERY_REST, BIAS, PARTNER, SAME, RANGED, RANGES, KEY_UNIT, KEY_MIXED, MIX_EACH, EVEN,
            BLOCK_M, BLOCK_N, BLOCK_K, PART,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first_row", "last_row", "columns", "first_pair"])
def _tiles(
    query, query_stride, query_rest, key, key_stride, key_rest, partner, partner_weight, query_code, key_code,
    logit_scale, logit_bias, ranges, out, tile_sums, first_row, last_row, columns, width, first_pair,
    QUERY_REST: tl.constexpr, KEY_REST: tl.constexpr, BIAS: tl.constexpr, PARTNER: tl.constexpr, SAME: tl.constexpr,
    RANGED: tl.constexpr, RANGES: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write one tile [BLOCK_M, BLOCK_N] of G for the rows from first_row to last_row, and its sum."""
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
    bias = tl.load(logit_bias).to(tl.float32) if BIAS else 0.0
    tile = logits(product, row_factor[:, None], column_factor[None, :], KEY_REST) + bias

    at_own = (row + first_pair)[:, None] == column[None, :]
    if PARTNER:
        target_column = columns_in(tl.load(partner + row, mask=row_here, other=-1), columns)
        weight = tl.load(partner_weight + row, mask=row_here, other=0.0)
        at_partner = target_column[:, None] == column[None, :]
        gradient = soft_gradient(tile, soft_targets(at_own, (1.0 - weight)[:, None], at_partner, weight[:, None]))
    else:
        if SAME:
            row_code = tl.load(query_code + row, mask=row_here, other=-1)
            column_code = tl.load(key_code + column, mask=column_here, other=-3)
            marked = same_pairs(row_code, column_code, at_own, SAME)
        together = marked if SAME == 1 else at_own
        gradient = sigmoid(tl.where(together, -tile, tile))
        gradient = tl.where(together, -gradient, gradient)
        if SAME == 2:
            gradient = tl.where(marked, 0.0, gradient)
    here = row_here[:, None] & column_here[None, :]
    tl.store(
        tile_sums + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.where(here, gradient, 0.0))
    )
    if RANGED:
        gradient *= range_factor(ranges, 2, RANGES)
    at = out + (row - first_row).to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(at, gradient.to(out.dtype.element_ty), mask=here)


@dataclass(frozen=True)
class Terms:
    """The bias, the targets, and the gradient with respect to every term."""

    logit_scale: Tensor
    logit_bias: Tensor | None
    partner: Tensor | None
    partner_weight: Tensor | None
    first_pair: int
    query_code: Tensor | None
    key_code: Tensor | None
    positive: bool
    each: Tensor

    @property
    def same(self) -> int:
        """The constexpr argument SAME of kernels."""
        return 0 if self.query_code is None else POSITIVE if self.positive else IGNORED

    @property
    def pairs(self) -> tuple[Tensor, ...]:
        """The arguments of kernels from `partner` to `logit_bias`."""
        given = (self.partner, self.partner_weight, self.query_code, self.key_code)
        here = [self.each if x is None else x.contiguous() for x in given]
        return (*here, self.logit_scale, self.each if self.logit_bias is None else self.logit_bias)

    @property
    def flags(self) -> dict[str, int]:
        """The constexpr arguments of kernels."""
        return {"BIAS": self.logit_bias is not None, "PARTNER": self.partner is not None, "SAME": self.same}


def backward(
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
    each: Tensor,
    need_key: bool,
    key_sums: bool,
    query_code: Tensor | None = None,
    key_code: Tensor | None = None,
    positive: bool = True,
) -> tuple[Tensor, ...]:
    """Launch backward: compute the gradients of both sides, of the scale and of the bias."""
    query_side = Side.of(query, query_other, query_mix, query_inverse_norm)
    key_side = Side.of(key, key_other, key_mix, key_inverse_norm)
    to_query, to_key = Gradients.of(query_side, True), Gradients.of(key_side, need_key, key_sums)
    dot = torch.zeros(query.shape[0], dtype=torch.float32, device=query.device)
    terms = Terms(
        logit_scale, logit_bias, partner, partner_weight, first_pair, query_code, key_code, positive, each.contiguous()
    )
    if query.shape[0] and key.shape[0]:
        mixed = query_other is not None or key_other is not None
        launch = _whole if keeps_tiles(query, mixed, atomic=False) else _deep
        sums = launch(query_side, key_side, terms, to_query, to_key, dot)
    else:
        sums = dot
        for nothing in (to_query.x, to_query.other, to_query.mix, to_key.x, to_key.other, to_key.mix):
            nothing.zero_()
    # Summed in float64, so that the float32 result does not depend on the order of the sum.
    to_scale, to_bias = ((x.sum(dtype=torch.float64) * each.double()).float().reshape(()) for x in (dot, sums))
    return to_query.x, to_query.other, to_query.mix, to_key.x, to_key.other, to_key.mix, to_scale, to_bias


def _whole(query: Side, key: Side, terms: Terms, to_query: Gradients, to_key: Gradients, dot: Tensor) -> Tensor:
    """Compute the gradients of rows whose sums stay in registers; return the sums of the rows of G."""
    (q, q_rest), (k, k_rest) = query.operand(), key.operand()
    (rows, width), columns = q.shape, k.shape[0]
    key_unit, key_mixed = to_key.flags_of(key)
    mixed = query.other is not None or key.other is not None
    chosen = _configuration(size_class(width, 256), mixed, terms.partner is not None, terms.same, architecture_of(q))
    ranges = _ranges(q, q_rest, k_rest) if q.dtype == torch.float16 else None
    row_sums = torch.empty_like(dot)

    def given(x: Tensor | None) -> Tensor:
        return dot if x is None else x

    tiles = triton.cdiv(rows, chosen.blocks["BLOCK_M"])
    key_tiles = triton.cdiv(columns, chosen.blocks["BLOCK_M"]) if to_key.x.numel() else 0
    _gradient[(tiles + key_tiles,)](
        q, q.stride(0), given(q_rest), k, k.stride(0), given(k_rest), *terms.pairs, terms.each, given(ranges),
        *query.sources, given(query.inverse_norm), to_query.x, to_query.other, to_query.mix, dot, row_sums,
        *key.sources, given(key.inverse_norm), to_key.x, to_key.other, to_key.mix,
        rows, columns, width, terms.first_pair, tiles,
        QUERY_REST=q_rest is not None, KEY_REST=k_rest is not None, QUERY_MIXED=query.other is not None,
        KEY_MIXED=key_mixed, MIX_EACH=query.flags["MIX_EACH"] or key.flags["MIX_EACH"],
        QUERY_UNIT=query.inverse_norm is None, KEY_UNIT=key_unit, **terms.flags, RANGED=ranges is not None,
        RANGES=RANGES, BOTH_SIDES=key_tiles > 0, EVEN=width % chosen.blocks["BLOCK_K"] == 0, PART=PART_OF_SUMS,
        **chosen.launch,
    )  # fmt: skip
    return row_sums


def _deep(query: Side, key: Side, terms: Terms, to_query: Gradients, to_key: Gradients, dot: Tensor) -> Tensor:
    """Compute the gradients of wide rows, for which G is stored in parts; return the sums of all tiles of G."""
    (q, q_rest), (k, k_rest) = query.operand(), key.operand()
    width, columns = q.shape[1], k.shape[0]
    kind = kind_of(q.dtype)
    size = size_class(width, WIDEST[kind])
    chosen = configuration(OP, "sums", f"{kind} {size}", architecture_of(q))
    ranges = _ranges(q, None, None) if q.dtype == torch.float16 else None
    sums: list[Tensor] = []

    def given(x: Tensor | None) -> Tensor:
        return dot if x is None else x

    def tiles(first: int, last: int, gradient: Tensor) -> None:
        grid = (triton.cdiv(last - first, chosen.blocks["BLOCK_M"]), triton.cdiv(columns, chosen.blocks["BLOCK_N"]))
        sums.append(torch.empty(grid, dtype=torch.float32, device=q.device))
        _tiles[grid](
            q, q.stride(0), given(q_rest), k, k.stride(0), given(k_rest), *terms.pairs, given(ranges), gradient,
            sums[-1], first, last, columns, width, terms.first_pair,
            QUERY_REST=q_rest is not None, KEY_REST=k_rest is not None, **terms.flags, RANGED=ranges is not None,
            RANGES=RANGES, WHOLE=size != "deep", EVEN=width % chosen.blocks["BLOCK_K"] == 0, PRECISION=precision_of(q),
            **chosen.launch,
        )  # fmt: skip

    scale = terms.logit_scale.float() * terms.each
    multiply_chunks((query, q, q_rest), (key, k, k_rest), scale, ranges, to_query, to_key, dot, tiles)
    return torch.cat([x.flatten() for x in sums])


def _ranges(q: Tensor, q_rest: Tensor | None, k_rest: Tensor | None) -> Tensor:
    """Compute range_factor's argument: numbers of G are at most 1, and are multiplied by these inverse norms."""
    out = torch.zeros(4, RANGES, dtype=torch.float32, device=q.device)
    out[0] = 1.0
    for kind, rest in ((2, q_rest), (3, k_rest)):
        out[kind] = 1.0 if rest is None else rest.amax()
    return out


def _configuration(size: str, mixed: bool, partner: bool, same: int, architecture: int) -> Configuration:
    """Return the tile; mixed rows have their own, and so have partners and codes: they need more registers."""
    mark = " mixed" if mixed else " partner" if partner or same else ""
    return configuration(OP, "gradient", f"half {size}{mark}", architecture)


def compilations() -> list[Compilation]:
    """List the kernels for rows in registers (plain, partners, codes, mixed, without norms) and for wide rows."""
    found = []
    for dtype in (torch.float16, torch.bfloat16):
        for mark in ("", "partner", "mixed", "normalized"):
            sizes = (64, 128) if mark == "mixed" else (64, 128, 256)
            for same in ("",) if mark in ("partner", "normalized") else SAME_MARKS:
                found += [_compilation(dtype, size, mark, same) for size in sizes]
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        element, kind, precision = triton_type(dtype), kind_of(dtype), precision_of(torch.empty(0, dtype=dtype))
        for mark, same_pair in SAME_MARKS.items():
            flags = {
                "QUERY_REST": True, "KEY_REST": True, "BIAS": True, "PARTNER": not same_pair, "SAME": same_pair,
                "RANGED": dtype == torch.float16, "RANGES": RANGES, "WHOLE": False, "EVEN": True,
                "PRECISION": precision,
            }  # fmt: skip
            chosen = configuration(OP, "sums", f"{kind} deep", 80)
            name = f"tiles_{element}{'_' if mark else ''}{mark}"
            found.append(compilation(name, _tiles, flags, chosen, "query key out", element))
    return found


def _compilation(dtype: torch.dtype, size: int, mark: str, same: str) -> Compilation:
    element, mixed, unit = triton_type(dtype), mark == "mixed", mark == "normalized"
    rest = not mixed and not unit
    constexprs = {
        "QUERY_REST": rest, "KEY_REST": rest, "QUERY_MIXED": mixed, "KEY_MIXED": mixed, "MIX_EACH": mixed,
        "QUERY_UNIT": unit, "KEY_UNIT": unit, "BIAS": True, "PARTNER": mark == "partner", "SAME": SAME_MARKS[same],
        "RANGED": dtype == torch.float16, "RANGES": RANGES, "BOTH_SIDES": True, "EVEN": True, "PART": PART_OF_SUMS,
    }  # fmt: skip
    elements = "query key query_x query_other to_query to_query_other key_x key_other to_key to_key_other"
    chosen = _configuration(str(size), mixed, mark == "partner", SAME_MARKS[same], 80)
    name = "_".join(part for part in ("gradient", element, str(size), mark, same) if part)
    return compilation(name, _gradient, constexprs, chosen, elements, element)
