"""A tile of the logits of a contrast, which forward and backward compute to the same bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from oner_fast.kernels.launch import EXACT, Compilation, Configuration, architecture_of, configuration

OP = "mixup_info_nce"
RANGES = 16  # partial maxima of each kind
POSITIVE, IGNORED = 1, 2  # what pairs with equal codes are; 0: there are no codes
# The widest row whose tile stays in registers while it meets the other side. float32 takes twice the registers and
# three products, which leaves no room for any.
WIDEST = {"half": 256, "float32": 0}


def kind_of(dtype: torch.dtype) -> str:
    """Return the part of a class of shapes that names the dtype."""
    return "float32" if dtype == torch.float32 else "half"


def precision_of(x: Tensor) -> str:
    """Return the precision of products: float32 takes three tf32 products, which err as little as float32 itself."""
    return "tf32x3" if x.dtype == torch.float32 else "ieee"


@triton.jit
def products(
    a, a_at, b, b_at, width,
    WHOLE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute A B^T [BLOCK_A, BLOCK_B].

    WHOLE: `a` and `b` are A and B. Otherwise a_at and b_at point to their first BLOCK_K columns.
    """
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
    """Load BLOCK_K columns, of which `width` exist (all where EVEN); the others are 0."""
    if EVEN:
        found = tl.load(at)
    else:
        found = tl.load(at, mask=(tl.arange(0, BLOCK_K) < width)[None, :], other=0.0)
    return found


@triton.jit
def places_of(x, stride, first, rows, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return pointers to the first BLOCK_K columns of BLOCK rows.

    Rows beyond the last repeat the last row, so that their results are finite where its results are. The caller drops
    them.
    """
    row = tl.minimum(first + tl.arange(0, BLOCK), rows - 1)
    return x + row.to(tl.int64)[:, None] * stride + tl.arange(0, BLOCK_K)[None, :]


@triton.jit
def columns_in(partner, count):
    """Return partners as int32, with -1 for those outside of `count` columns."""
    return tl.where((partner >= 0) & (partner < count), partner, -1).to(tl.int32)


@triton.jit
def same_pairs(row_code, column_code, at_own, SAME: tl.constexpr):
    """Mark in a tile [rows, columns] the targets where SAME is POSITIVE, and the ignored pairs where it is IGNORED."""
    equal = row_code[:, None] == column_code[None, :]
    if SAME == 1:
        marked = equal | at_own
    else:
        marked = equal & ~at_own
    return marked


@triton.jit
def logits(product, query_factor, key_factor, KEY_FACTOR: tl.constexpr):
    """Scale a tile of products: first by the factors of queries, which include logit_scale, then by those of keys."""
    tile = product * query_factor
    if KEY_FACTOR:
        tile = tile * key_factor
    return tile


@triton.jit
def binary(x):
    """Convert logits to base 2 for exp2; the difference of two equal logits stays exactly 0."""
    return x * 1.4426950408889634


@triton.jit(do_not_specialize=["rows", "columns"])
def _largest(
    row_weight, own_weight, partner_weight, column_weight, query_rest, key_rest, out, rows, columns,
    PARTNER: tl.constexpr, COLUMNS: tl.constexpr, QUERY_REST: tl.constexpr, KEY_REST: tl.constexpr,
    RANGES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store [4, RANGES]: bounds of G from rows and columns, and the largest inverse norms."""
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
            of_query = tl.maximum(of_query, tl.load(query_rest + at, mask=at < rows, other=0.0))
    if COLUMNS or KEY_REST:
        for first in range(part * BLOCK_N, columns, step):
            at = first + tl.arange(0, BLOCK_N)
            if COLUMNS:
                bound = tl.abs(tl.load(column_weight + at, mask=at < columns, other=0.0))
                from_columns = tl.maximum(from_columns, bound)
            if KEY_REST:
                of_key = tl.maximum(of_key, tl.load(key_rest + at, mask=at < columns, other=0.0))
    tl.store(out + part, tl.max(from_rows, 0))
    tl.store(out + RANGES + part, tl.max(from_columns, 0))
    tl.store(out + 2 * RANGES + part, tl.max(of_query, 0))
    tl.store(out + 3 * RANGES + part, tl.max(of_key, 0))


@triton.jit
def range_factor(ranges, KIND: tl.constexpr, RANGES: tl.constexpr):
    """Return the factor that scales G times the inverse norms of queries (KIND 2) or keys (3) to at most 2^14."""
    at = tl.arange(0, RANGES)
    bound = tl.max(tl.load(ranges + at), 0) + tl.max(tl.load(ranges + RANGES + at), 0)
    bound = bound * tl.max(tl.load(ranges + KIND * RANGES + at), 0)
    return tl.where(bound > 1e-30, 16384.0 / bound, 1.0)


@dataclass(frozen=True)
class Weights:
    """The parts of G[i, j] = row_weight_i exp(l - row_max_i) + column_weight_j exp(l - column_max_j) - targets."""

    row_max: Tensor
    row_weight: Tensor
    column_max: Tensor | None
    column_weight: Tensor | None
    own_weight: Tensor
    partner: Tensor | None
    partner_weight: Tensor | None
    first_pair: int
    query_code: Tensor | None = None
    key_code: Tensor | None = None
    column_share: Tensor | None = None  # targets subtract own_weight_i + column_share_j

    @property
    def same(self) -> int:
        """The constexpr argument SAME of kernels."""
        return same_of(self.query_code, self.column_share)

    def ranges(self, query_rest: Tensor | None, key_rest: Tensor | None, columns: int) -> Tensor:
        """Compute range_factor's argument, for the inverse norms that G is multiplied by (None for none)."""
        # Zero is the maximum of no numbers, so fewer programs than ranges are enough.
        out = torch.zeros(4 * RANGES, dtype=torch.float32, device=self.row_weight.device)

        def given(x: Tensor | None) -> Tensor:
            return out if x is None else x

        chosen = configuration(OP, "largest", "all", architecture_of(out))
        rows, column_weight = self.row_weight.shape[0], self.column_weight
        if column_weight is not None and self.column_share is not None:
            column_weight = column_weight + self.column_share
        _largest[(min(RANGES, triton.cdiv(max(rows, columns), chosen.blocks["BLOCK_N"])),)](
            self.row_weight, self.own_weight, given(self.partner_weight), given(column_weight), given(query_rest),
            given(key_rest), out, rows, columns, PARTNER=self.partner_weight is not None,
            COLUMNS=self.column_weight is not None, QUERY_REST=query_rest is not None, KEY_REST=key_rest is not None,
            RANGES=RANGES, **chosen.launch,
        )  # fmt: skip
        return out


def same_of(query_code: Tensor | None, column_share: Tensor | None) -> int:
    """Return what pairs with equal codes are."""
    return 0 if query_code is None else IGNORED if column_share is None else POSITIVE


SAME_MARKS = {"": 0, "positive": POSITIVE, "ignored": IGNORED}  # SAME in the names of compilations


_INTEGERS = {
    "rows", "columns", "width", "first_pair", "stripe_tiles", "part_tiles", "query_tiles", "first_row", "last_row",
    "depth", "parts", "count",
}  # fmt: skip


def compilation(
    name: str, kernel: Any, constexprs: dict[str, Any], chosen: Configuration, elements: str = "",
    element: str = "fp32", *, products: bool = False, exact: bool | None = None, op: str = OP,
) -> Compilation:  # fmt: skip
    """Return the kernel as a launch specialises it for dense rows whose width is a multiple of 16.

    `elements` names the pointers to elements of the inputs' dtype. All others except partners and codes are float32.
    Kernels with products round each multiplication and each addition, unless `exact` says otherwise.
    """
    known = {**constexprs, **chosen.blocks}
    signature, divisible = {}, {}
    for argument in kernel.arg_names:
        if argument in _INTEGERS or argument.endswith("stride"):
            signature[argument] = "i32"
            if argument == "width" or argument.endswith("stride"):
                divisible[argument] = 16
        elif argument not in known:
            other = "*i64" if argument == "partner" else "*i32" if argument.endswith("_code") else "*fp32"
            signature[argument] = f"*{element}" if argument in elements.split() else other
    options = {**chosen.options, **EXACT} if (products if exact is None else exact) else chosen.options
    return Compilation(f"{op} {name}", kernel, signature, known, divisible, options, tensor_cores=products)


def compilations() -> list[Compilation]:
    """List the kernel of the largest weights."""
    flags = dict.fromkeys(("PARTNER", "COLUMNS", "QUERY_REST", "KEY_REST"), True)
    return [compilation("largest", _largest, {**flags, "RANGES": RANGES}, configuration(OP, "largest", "all", 80))]
