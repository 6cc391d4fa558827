"""mixup_info_nce backward: each side's rows meet recomputed tiles of logits; nothing is added atomically.

G[i, j] = row_weight_i exp(l - row_max_i) + column_weight_j exp(l - column_max_j) - targets is the gradient with respect
to the logits. A program owns a tile of one side's rows. It keeps their sums u = G K (or G^T Q) in registers while it
walks over the other side, and backpropagates them through the normalisation at the end. Both sides share one launch, so
that a batch too small to fill a GPU with one side's tiles has twice as many.

For M query rows and N keys of width D and element size e:

| kernel | FLOPs | reads | writes |
|---|---|---|---|
| `_gradient`, both sides | 4 times 2 M N D | e (M D + N D) | e (M D + N D) + 4 M |
| `_gradient`, ATOMIC | 3 times 2 M N D | e (M D + N D) | e M D, adds 4 N D to memory for each tile of rows |
| `_finish`, the keys where ATOMIC | 8 N D | (4 + e) N D | e N D |

`_gradient` reads both sides once from memory, and the other side again from the L2 cache for each tile of rows.

Rows of more than 256 elements, mixed rows of more than 128, and all float32 rows leave no registers for the sums of a
tile; mixup_info_nce_deep.py handles them.

The range of float16 is too small for G times the inverse norm of a row that was not normalised. `_largest` finds the
largest weight and inverse norm, and G is scaled so that their product is 2^14. bfloat16 and float32 need no scaling.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from oner_fast.kernels import mixup_info_nce_deep as deep
from oner_fast.kernels.launch import Compilation, Configuration, architecture_of, configuration, triton_type
from oner_fast.kernels.mixup_info_nce_rows import (
    Gradients,
    Side,
    along_rows,
    norm_factors,
    size_class,
    store_gradient,
)  # fmt: skip
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
    range_factor,
    same_pairs,
)  # fmt: skip

PART_OF_SUMS = 64  # columns of the sums that go through the normalisation at once


@triton.jit
def _halves(x, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, [BLOCK_M, 2, BLOCK // 2]), (0, 2, 1)))


@triton.jit
def _parts(x, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr):
    """Cut x [BLOCK_M, BLOCK] into up to four parts of PART columns; no number moves between threads."""
    if BLOCK == PART:
        parts = (x,)
    elif BLOCK == 2 * PART:
        parts = _halves(x, BLOCK_M, BLOCK)
    else:
        left, right = _halves(x, BLOCK_M, BLOCK)
        a, b = _halves(left, BLOCK_M, BLOCK // 2)
        c, d = _halves(right, BLOCK_M, BLOCK // 2)
        parts = (a, b, c, d)  # type: ignore[assignment]
    return parts


@triton.jit
def store_tile(
    u, scale, x, x_stride, x_other, x_other_stride, mix, inverse_norm, to_x, to_other, to_mix, dot, first, rows, width,
    DOT: tl.constexpr, UNIT: tl.constexpr, MIXED: tl.constexpr, MIX_EACH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Backpropagate from scale * u, the gradient of the tile of rows of the logits from `first` on, and store it."""
    row = first + tl.arange(0, BLOCK_M)
    row_here = row < rows
    parts = _parts(u, BLOCK_M, BLOCK_K, PART)
    along = tl.zeros([BLOCK_M], tl.float32)
    if DOT or not UNIT:
        for i in tl.static_range(BLOCK_K // PART):
            along += along_rows(
                parts[i], x, x_stride, x_other, x_other_stride, mix, row, row_here, i * PART, width, MIXED, MIX_EACH,
                PART,
            )  # fmt: skip
            tl.debug_barrier()  # x is loaded part by part, and again below, because registers cannot hold it
    along, to_unit = norm_factors(along, scale, inverse_norm, dot, row, row_here, UNIT, DOT)
    mixes = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.static_range(BLOCK_K // PART):
        mixes += store_gradient(
            parts[i], along, to_unit, x, x_stride, x_other, x_other_stride, mix, to_x, to_other, row, row_here,
            i * PART, width, UNIT, MIXED, MIX_EACH, PART,
        )  # fmt: skip
        tl.debug_barrier()
    if MIXED:
        tl.store(to_mix + row, mixes, mask=row_here)


@triton.jit
def _gradient_of(
    owner, owner_stride, owner_rest, owner_high, owner_weight, other, other_stride, other_rest, other_high,
    other_weight, own_weight, partner, partner_weight, owner_code, other_code, owner_share, other_share, logit_scale,
    ranges, x, x_stride, x_other, x_other_stride, mix,
    inverse_norm, to_x, to_other, to_mix, dot, other_sums, owner_first, owners, others, width, first_pair,
    OWNER_IS_QUERY: tl.constexpr, OWNER_REST: tl.constexpr, OTHER_REST: tl.constexpr, OWNER_TERM: tl.constexpr,
    OTHER_TERM: tl.constexpr, PARTNER: tl.constexpr, SAME: tl.constexpr, RANGED: tl.constexpr, RANGES: tl.constexpr,
    UNIT: tl.constexpr, MIXED: tl.constexpr, MIX_EACH: tl.constexpr, ATOMIC: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the tile of owners from owner_first on, against all others."""
    scale = tl.load(logit_scale).to(tl.float32)
    row = tl.minimum(owner_first + tl.arange(0, BLOCK_M), owners - 1)
    row_here = owner_first + tl.arange(0, BLOCK_M) < owners
    a = columns_of(places_of(owner, owner_stride, owner_first, owners, BLOCK_M, BLOCK_K), width, EVEN, BLOCK_K)
    rest = tl.load(owner_rest + row) if OWNER_REST else tl.full([BLOCK_M], 1.0, tl.float32)
    if OWNER_TERM:
        base = binary(tl.load(owner_high + row))
        weight = tl.load(owner_weight + row)
    if SAME:
        own_code = tl.load(owner_code + row)
    if SAME == 1:
        share = tl.load(owner_share + row)
    if OWNER_IS_QUERY:
        own = tl.load(own_weight + row)
        if PARTNER:
            target = columns_in(tl.load(partner + row), others)
            shared = tl.load(partner_weight + row)
    factor = range_factor(ranges, 3 if OWNER_IS_QUERY else 2, RANGES) if RANGED else 1.0
    if ATOMIC:
        adding = rest
        if RANGED:
            adding = adding * range_factor(ranges, 2, RANGES)
        adding = tl.where(row_here, adding, 0.0)
        a_at = places_of(owner, owner_stride, owner_first, owners, BLOCK_M, PART)
    u = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)

    for other_first in range(0, others, BLOCK_N):
        met = other_first + tl.arange(0, BLOCK_N)
        met_here = met < others
        column = tl.minimum(met, others - 1)
        b_at = places_of(other, other_stride, other_first, others, BLOCK_N, BLOCK_K)
        b = columns_of(b_at, width, EVEN, BLOCK_K)  # [BLOCK_N, BLOCK_K]
        product = tl.dot(a, tl.trans(b))
        met_rest = tl.load(other_rest + column) if OTHER_REST else tl.full([BLOCK_N], 1.0, tl.float32)
        if OWNER_IS_QUERY:
            tile = logits(product, (scale * rest)[:, None], met_rest[None, :], OTHER_REST)  # [BLOCK_M, BLOCK_N]
        else:
            tile = logits(product, (scale * met_rest)[None, :], rest[:, None], OWNER_REST)

        powers = binary(tile)
        if OWNER_TERM:
            gradient = tl.exp2(powers - base[:, None]) * weight[:, None]
        if OTHER_TERM:
            met_base = binary(tl.load(other_high + column))
            term = tl.exp2(powers - met_base[None, :]) * tl.load(other_weight + column)[None, :]
            gradient = gradient + term if OWNER_TERM else term
        first_own = owner_first + first_pair - other_first if OWNER_IS_QUERY else owner_first - first_pair - other_first
        if SAME:
            # No pair beyond the rows or columns is an own pair, so that all that are ignored become 0.
            at_own = (first_own + tl.arange(0, BLOCK_M))[:, None] == tl.arange(0, BLOCK_N)[None, :]
            at_own = at_own & row_here[:, None] & met_here[None, :]
            marked = same_pairs(own_code, tl.load(other_code + column), at_own, SAME)
            if SAME == 1:
                shares = share[:, None] + tl.load(other_share + column)[None, :]
                gradient = tl.where(marked, gradient - shares, gradient)
            else:
                gradient = tl.where(marked, 0.0, gradient)
        if (SAME != 1) & (first_own > -BLOCK_M) & (first_own < BLOCK_N):
            at_own = (first_own + tl.arange(0, BLOCK_M))[:, None] == tl.arange(0, BLOCK_N)[None, :]
            if OWNER_IS_QUERY:
                gradient = tl.where(at_own, gradient - own[:, None], gradient)
            else:
                gradient = tl.where(at_own, gradient - tl.load(own_weight + column)[None, :], gradient)
        if PARTNER:
            if OWNER_IS_QUERY:
                gradient = tl.where(target[:, None] == met[None, :], gradient - shared[:, None], gradient)
            else:
                met_target = columns_in(tl.load(partner + column), owners)
                met_shared = tl.load(partner_weight + column)
                gradient = tl.where(met_target[None, :] == row[:, None], gradient - met_shared[None, :], gradient)

        if ATOMIC:
            adds = (gradient * adding[:, None]).to(owner.dtype.element_ty)
            for first in tl.static_range(0, BLOCK_K, PART):
                part = a if BLOCK_K == PART else columns_of(a_at + first, width - first, EVEN, PART)
                v = tl.dot(tl.trans(adds), part)  # [BLOCK_N, PART]
                column_of_v = first + tl.arange(0, PART)
                v_at = other_sums + met.to(tl.int64)[:, None] * width + column_of_v[None, :]
                tl.atomic_add(v_at, v, mask=met_here[:, None] & (column_of_v < width)[None, :], sem="relaxed")
        if RANGED:
            met_rest = met_rest * factor
        met_rest = tl.where(met_here, met_rest, 0.0)
        weighted = (gradient * met_rest[None, :]).to(owner.dtype.element_ty)
        u = tl.dot(weighted, b, u)

    store_tile(
        u / factor, scale, x, x_stride, x_other, x_other_stride, mix, inverse_norm, to_x, to_other, to_mix, dot,
        owner_first, owners, width, OWNER_IS_QUERY, UNIT, MIXED, MIX_EACH, BLOCK_M, BLOCK_K, PART,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "columns", "first_pair", "query_tiles"])
def _gradient(
    query, query_stride, query_rest, row_max, row_weight, key, key_stride, key_rest, column_max, column_weight,
    own_weight, partner, partner_weight, query_code, key_code, column_share, logit_scale, ranges,
    query_x, query_x_stride, query_other, query_other_stride, query_mix, query_norm, to_query, to_query_other,
    to_query_mix, dot,
    key_x, key_x_stride, key_other, key_other_stride, key_mix, key_norm, to_key, to_key_other, to_key_mix, key_sums,
    rows, columns, width, first_pair, query_tiles,
    QUERY_REST: tl.constexpr, KEY_REST: tl.constexpr, QUERY_MIXED: tl.constexpr, KEY_MIXED: tl.constexpr,
    MIX_EACH: tl.constexpr, QUERY_UNIT: tl.constexpr, KEY_UNIT: tl.constexpr, COLUMNS: tl.constexpr,
    PARTNER: tl.constexpr, SAME: tl.constexpr, RANGED: tl.constexpr, RANGES: tl.constexpr, BOTH_SIDES: tl.constexpr,
    ATOMIC: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    if tile < query_tiles:
        _gradient_of(
            query, query_stride, query_rest, row_max, row_weight, key, key_stride, key_rest, column_max, column_weight,
            own_weight, partner, partner_weight, query_code, key_code, own_weight, column_share, logit_scale, ranges,
            query_x, query_x_stride, query_other, query_other_stride, query_mix, query_norm, to_query, to_query_other,
            to_query_mix, dot, key_sums, tile * BLOCK_M, rows, columns, width, first_pair,
            True, QUERY_REST, KEY_REST, True, COLUMNS, PARTNER, SAME, RANGED, RANGES, QUERY_UNIT, QUERY_MIXED, MIX_EACH,
            ATOMIC, EVEN, BLOCK_M, BLOCK_N, BLOCK_K, PART,
        )  # fmt: skip
    elif BOTH_SIDES:
        _gradient_of(
            key, key_stride, key_rest, column_max, column_weight, query, query_stride, query_rest, row_max, row_weight,
            own_weight, partner, partner_weight, key_code, query_code, column_share, own_weight, logit_scale, ranges,
            key_x, key_x_stride, key_other, key_other_stride, key_mix, key_norm, to_key, to_key_other, to_key_mix, dot,
            key_sums, (tile - query_tiles) * BLOCK_M, columns, rows, width, first_pair,
            False, KEY_REST, QUERY_REST, COLUMNS, True, PARTNER, SAME, RANGED, RANGES, KEY_UNIT, KEY_MIXED, MIX_EACH,
            False, EVEN, BLOCK_M, BLOCK_N, BLOCK_K, PART,
        )  # fmt: skip


def _backward(
    atomic: bool,
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
    row_max: Tensor,
    row_weight: Tensor,
    column_max: Tensor | None,
    column_weight: Tensor | None,
    own_weight: Tensor,
    partner_weight: Tensor | None,
    need_key: bool,
    key_sums: bool,
    query_code: Tensor | None = None,
    key_code: Tensor | None = None,
    column_share: Tensor | None = None,
) -> tuple[Tensor, ...]:
    query_side = Side.of(query, query_other, query_mix, query_inverse_norm)
    key_side = Side.of(key, key_other, key_mix, key_inverse_norm)
    to_query, to_key = Gradients.of(query_side, True), Gradients.of(key_side, need_key, key_sums)
    dot = torch.zeros(query.shape[0], dtype=torch.float32, device=query.device)
    weights = Weights(
        row_max.contiguous(), row_weight.contiguous(), column_max, column_weight, own_weight.contiguous(),
        None if partner is None else partner.contiguous(), partner_weight, first_pair,
        *(None if x is None else x.contiguous() for x in (query_code, key_code, column_share)),
    )  # fmt: skip
    if query.shape[0] and key.shape[0]:
        atomic = atomic and need_key
        mixed = query_other is not None or key_other is not None
        launch = partial(_whole, atomic) if keeps_tiles(query, mixed, atomic) else deep.launch
        launch(query_side, key_side, logit_scale, weights, to_query, to_key, dot)
    else:
        for nothing in (to_query.x, to_query.other, to_query.mix, to_key.x, to_key.other, to_key.mix):
            nothing.zero_()
    # Summed in float64, so that the float32 result does not depend on the order of the sum.
    return (
        to_query.x, to_query.other, to_query.mix, to_key.x, to_key.other, to_key.mix,
        dot.sum(dtype=torch.float64).float(),
    )  # fmt: skip


def keeps_tiles(query: Tensor, mixed: bool, atomic: bool) -> bool:
    """Return whether registers hold a tile of rows and its sums, as `_gradient` needs; else the deep kernels run."""
    # Beyond 128 columns no registers are left for mixing or for a third product.
    return query.shape[1] <= min(WIDEST[kind_of(query.dtype)], 128 if atomic or mixed else 256)


def _whole(
    atomic: bool, query: Side, key: Side, logit_scale: Tensor, weights: Weights, to_query: Gradients, to_key: Gradients,
    dot: Tensor,
) -> None:  # fmt: skip
    (q, q_rest), (k, k_rest) = query.operand(), key.operand()
    (rows, width), columns = q.shape, k.shape[0]
    need_key = to_key.x.numel() > 0
    mixed = query.other is not None or key.other is not None
    key_unit, key_mixed = to_key.flags_of(key)
    partner = weights.partner is not None
    chosen = _tiles(size_class(width, 256), mixed, partner, weights.same, atomic, architecture_of(q))
    key_sums = torch.zeros((columns, width) if atomic else (0,), dtype=torch.float32, device=q.device)
    ranges = weights.ranges(q_rest, k_rest, columns) if q.dtype == torch.float16 else None

    def given(x: Tensor | None) -> Tensor:
        return dot if x is None else x

    tiles = triton.cdiv(rows, chosen.blocks["BLOCK_M"])
    key_tiles = triton.cdiv(columns, chosen.blocks["BLOCK_M"]) if need_key and not atomic else 0
    _gradient[(tiles + key_tiles,)](
        q, q.stride(0), given(q_rest), weights.row_max, weights.row_weight, k, k.stride(0), given(k_rest),
        given(weights.column_max), given(weights.column_weight), weights.own_weight, given(weights.partner),
        given(weights.partner_weight), given(weights.query_code), given(weights.key_code), given(weights.column_share),
        logit_scale, given(ranges),
        *query.sources, given(query.inverse_norm), to_query.x, to_query.other, to_query.mix, dot,
        *key.sources, given(key.inverse_norm), to_key.x, to_key.other, to_key.mix, key_sums,
        rows, columns, width, weights.first_pair, tiles,
        QUERY_REST=q_rest is not None, KEY_REST=k_rest is not None, QUERY_MIXED=query.other is not None,
        KEY_MIXED=key_mixed, MIX_EACH=query.flags["MIX_EACH"] or key.flags["MIX_EACH"],
        QUERY_UNIT=query.inverse_norm is None, KEY_UNIT=key_unit, COLUMNS=weights.column_max is not None,
        PARTNER=weights.partner is not None, SAME=weights.same, RANGED=ranges is not None, RANGES=RANGES,
        BOTH_SIDES=key_tiles > 0,
        ATOMIC=atomic, EVEN=width % chosen.blocks["BLOCK_K"] == 0, PART=PART_OF_SUMS, **chosen.exact,
    )  # fmt: skip
    if atomic:
        to_key.finish(key, key_sums, logit_scale, ranges, None)


def _tiles(size: str, mixed: bool, partner: bool, same: int, atomic: bool, architecture: int) -> Configuration:
    """Return the tile; mixed rows have their own, and so have partners and codes: they need more registers."""
    if atomic:
        mark = " same" if same and size == "128" else ""
        return configuration(OP, "gradient_with_atomics", f"half {size}{mark}", architecture)
    mark = " mixed" if mixed else " partner" if partner or same else ""
    return configuration(OP, "gradient", f"half {size}{mark}", architecture)


def backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Compute the gradients with five products of 2 N^2 D, forward included: each side recomputes the logits."""
    return _backward(False, *arguments)


def backward_with_atomics(*arguments: Any) -> tuple[Tensor, ...]:
    """Compute the gradients with four products: the keys' gradient is added atomically, in no fixed order."""
    return _backward(True, *arguments)


def compilations() -> list[Compilation]:
    """List the kernel for half-precision rows: plain, with partners or codes, mixed, atomic, and without norms."""
    found = []
    for dtype in (torch.float16, torch.bfloat16):
        for mark in ("", "partner", "mixed", "atomic", "normalized"):
            sizes = (64, 128) if mark in ("mixed", "atomic") else (64, 128, 256)
            for same in ("",) if mark in ("partner", "normalized") else SAME_MARKS:
                found += [_compilation(dtype, size, mark, same) for size in sizes]
    return found


def _compilation(dtype: torch.dtype, size: int, mark: str, same: str) -> Compilation:
    element, mixed, atomic = triton_type(dtype), mark == "mixed", mark == "atomic"
    unit = mark == "normalized"
    rest = not mixed and not unit
    constexprs = {
        "QUERY_REST": rest, "KEY_REST": rest, "QUERY_MIXED": mixed, "KEY_MIXED": mixed, "MIX_EACH": mixed,
        "QUERY_UNIT": unit, "KEY_UNIT": unit, "COLUMNS": True, "PARTNER": mark == "partner",
        "SAME": SAME_MARKS[same], "RANGED": dtype == torch.float16, "RANGES": RANGES, "BOTH_SIDES": not atomic,
        "ATOMIC": atomic, "EVEN": True, "PART": PART_OF_SUMS,
    }  # fmt: skip
    elements = "query key query_x query_other to_query to_query_other key_x key_other to_key to_key_other"
    chosen = _tiles(str(size), mixed, mark == "partner", SAME_MARKS[same], atomic, 80)
    name = "_".join(part for part in ("gradient", element, str(size), mark, same) if part)
    return compilation(name, _gradient, constexprs, chosen, elements, element, products=True)
