"""A tile of mixup_info_nce's logits, as forward and backward make it: bit for bit the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from oner_fast.kernels.launch import Compilation, Configuration, architecture_of, configuration

OP = "mixup_info_nce"
RANGES = 16  # partial maxima of each kind
# The widest row of which a tile is kept while it meets the other side. Twice the registers of float32, and its three
# products, leave no room for any.
WIDEST = {"half": 256, "float32": 0}

# Launch options: a fused multiply-add would subtract a maximum from a logit that was not rounded yet.
EXACT = {"enable_fp_fusion": False}


def kind_of(dtype: torch.dtype) -> str:
    return "float32" if dtype == torch.float32 else "half"


def precision_of(x: Tensor) -> str:
    """float32 products are three of tf32, whose error is that of float32; 16-bit operands know only one way."""
    return "tf32x3" if x.dtype == torch.float32 else "ieee"


@triton.jit
def products(
    a, a_at, b, b_at, width,
    WHOLE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A B^T [BLOCK_A, BLOCK_B]. WHOLE: `a` and `b` are A and B; else a_at and b_at are places of their first BLOCK_K
    columns."""
    if WHOLE:
        product = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    else:
        product = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
        for first in range(0, width, BLOCK_K):
            part_of_a = columns_of(a_at + first, width - first, EVEN, BLOCK_K)
            part_of_b = columns_of(b_at + first, width - first, EVEN, BLOCK_K)
            product = tl.dot(part_of_a, tl.trans(part_of_b), product, input_precision=PRECISION)
    return product


@triton.jit
def columns_of(at, width, EVEN: tl.constexpr, BLOCK_K: tl.constexpr):
    """What lies at places of BLOCK_K columns, of which `width` are there (all where EVEN); else 0."""
    if EVEN:
        found = tl.load(at)
    else:
        found = tl.load(at, mask=(tl.arange(0, BLOCK_K) < width)[None, :], other=0.0)
    return found


@triton.jit
def places_of(x, stride, first, rows, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of BLOCK rows' first BLOCK_K columns. Rows beyond the last are the last one again: whatever follows from them is
    as finite as that, and has to be left out by the caller."""
    row = tl.minimum(first + tl.arange(0, BLOCK), rows - 1)
    return x + row.to(tl.int64)[:, None] * stride + tl.arange(0, BLOCK_K)[None, :]


@triton.jit
def columns_in(partner, count):
    """Partners as int32; -1 where they lie outside of `count` columns."""
    return tl.where((partner >= 0) & (partner < count), partner, -1).to(tl.int32)


@triton.jit
def logits(product, query_factor, key_factor, KEY_FACTOR: tl.constexpr):
    """The query's factor, with the scale in it, comes first."""
    tile = product * query_factor
    if KEY_FACTOR:
        tile = tile * key_factor
    return tile


@triton.jit
def binary(x):
    """Logits for exp2. A difference of two is exactly 0 where the logits were equal."""
    return x * 1.4426950408889634


@triton.jit(do_not_specialize=["rows", "columns"])
def _largest(
    row_weight, own_weight, partner_weight, column_weight, query_rest, key_rest, out, rows, columns,
    PARTNER: tl.constexpr, COLUMNS: tl.constexpr, QUERY_REST: tl.constexpr, KEY_REST: tl.constexpr,
    RANGES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """[4, RANGES]: bounds of G from rows and from columns, the largest inverse norms of rows that are not zero."""
    part = tl.program_id(0)
    from_rows = tl.zeros([BLOCK_N], tl.float32)
    from_columns = tl.zeros([BLOCK_N], tl.float32)
    of_query = tl.full([BLOCK_N], 0.0 if QUERY_REST else 1.0, tl.float32)
    of_key = tl.full([BLOCK_N], 0.0 if KEY_REST else 1.0, tl.float32)
    step = tl.num_programs(0) * BLOCK_N
    for first in range(part * BLOCK_N, rows, step):
        at = first + tl.arange(0, BLOCK_N)
        bound = tl.abs(tl.load(row_weight + at, mask=at < rows, other=0.0))
        bound += tl.abs(tl.load(own_weight + at, mask=at < rows, other=0.0))
        if PARTNER:
            bound += tl.abs(tl.load(partner_weight + at, mask=at < rows, other=0.0))
        from_rows = tl.maximum(from_rows, bound)
        if QUERY_REST:
            rest = tl.load(query_rest + at, mask=at < rows, other=0.0)
            of_query = tl.maximum(of_query, tl.where(rest >= 1e12, 0.0, rest))
    if COLUMNS or KEY_REST:
        for first in range(part * BLOCK_N, columns, step):
            at = first + tl.arange(0, BLOCK_N)
            if COLUMNS:
                bound = tl.abs(tl.load(column_weight + at, mask=at < columns, other=0.0))
                from_columns = tl.maximum(from_columns, bound)
            if KEY_REST:
                rest = tl.load(key_rest + at, mask=at < columns, other=0.0)
                of_key = tl.maximum(of_key, tl.where(rest >= 1e12, 0.0, rest))
    tl.store(out + part, tl.max(from_rows, 0))
    tl.store(out + RANGES + part, tl.max(from_columns, 0))
    tl.store(out + 2 * RANGES + part, tl.max(of_query, 0))
    tl.store(out + 3 * RANGES + part, tl.max(of_key, 0))


@triton.jit
def range_factor(ranges, KIND: tl.constexpr, RANGES: tl.constexpr):
    """What brings G times the inverse norms of queries (KIND 2) or keys (3) up to 2^14."""
    at = tl.arange(0, RANGES)
    bound = tl.max(tl.load(ranges + at), 0) + tl.max(tl.load(ranges + RANGES + at), 0)
    bound = bound * tl.max(tl.load(ranges + KIND * RANGES + at), 0)
    return tl.where(bound > 1e-30, 16384.0 / bound, 1.0)


@dataclass(frozen=True)
class Weights:
    """What G[i, j] = row_weight_i exp(l - row_max_i) + column_weight_j exp(l - column_max_j) - targets is made of."""

    row_max: Tensor
    row_weight: Tensor
    column_max: Tensor | None
    column_weight: Tensor | None
    own_weight: Tensor
    partner: Tensor | None
    partner_weight: Tensor | None
    first_pair: int

    def ranges(self, query_rest: Tensor | None, key_rest: Tensor | None, columns: int) -> Tensor:
        """For range_factor, of the inverse norms that G is multiplied by (None: of none)."""
        # Zeros are maxima of nothing: fewer programs than ranges will do.
        out = torch.zeros(4 * RANGES, dtype=torch.float32, device=self.row_weight.device)

        def given(x: Tensor | None) -> Tensor:
            return out if x is None else x

        chosen = configuration(OP, "largest", "all", architecture_of(out))
        rows = self.row_weight.shape[0]
        _largest[(min(RANGES, triton.cdiv(max(rows, columns), chosen.blocks["BLOCK_N"])),)](
            self.row_weight, self.own_weight, given(self.partner_weight), given(self.column_weight), given(query_rest),
            given(key_rest), out, rows, columns, PARTNER=self.partner_weight is not None,
            COLUMNS=self.column_weight is not None, QUERY_REST=query_rest is not None, KEY_REST=key_rest is not None,
            RANGES=RANGES, **chosen.launch,
        )  # fmt: skip
        return out


_INTEGERS = {
    "rows", "columns", "width", "first_pair", "stripe_tiles", "part_tiles", "query_tiles", "first_row", "last_row",
    "depth", "parts", "count",
}  # fmt: skip


def compilation(
    name: str, kernel: Any, constexprs: dict[str, Any], chosen: Configuration, elements: str = "",
    element: str = "fp32", *, products: bool = False, exact: bool = False,
) -> Compilation:  # fmt: skip
    """As a launch would specialise it: dense rows whose width is a multiple of 16. `elements` are the pointers to
    elements of the inputs' dtype; all others but partners are float32."""
    known = {**constexprs, **chosen.blocks}
    signature, divisible = {}, {}
    for argument in kernel.arg_names:
        if argument in _INTEGERS or argument.endswith("stride"):
            signature[argument] = "i32"
            if argument == "width" or argument.endswith("stride"):
                divisible[argument] = 16
        elif argument not in known:
            other = "*i64" if argument == "partner" else "*fp32"
            signature[argument] = f"*{element}" if argument in elements.split() else other
    options = {**chosen.options, **EXACT} if products or exact else chosen.options
    return Compilation(f"{OP} {name}", kernel, signature, known, divisible, options, tensor_cores=products)


def compilations() -> list[Compilation]:
    flags = dict.fromkeys(("PARTNER", "COLUMNS", "QUERY_REST", "KEY_REST"), True)
    return [compilation("largest", _largest, {**flags, "RANGES": RANGES}, configuration(OP, "largest", "all", 80))]
