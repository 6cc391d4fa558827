"""The raw ops of mixup_info_nce: their schemas, and the shapes of what they return.

A side is x (N, D), perhaps another tensor that is mixed into it, the mix, and the inverse norms (N,). Without inverse
norms the rows enter the logits as they are, mixed. Backward returns for each side the gradients of x, of the other and
of the mix of each row. With `key_sums` it returns instead the gradient with respect to the keys of the logits, in the
dtype of statistics: ranks add these up, and the owner of the keys backpropagates through its norms and its mix.

Codes (int32, of M queries and N keys) mark further pairs: those whose codes are equal. Without shares these leave the
sums of their row and their column, unless they are an own pair. With shares they are targets, and so is the own pair:
forward returns for each row the sum of (row_share + column_share) times the logit over its targets, in the place of the
own pair's logit. Backward takes the shares as own_weight and column_share. Partners and codes exclude each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oner_fast.dtypes import statistics_dtype
from oner_fast.ops.library import define, raw_ops

_SIDE = "Tensor {0}, Tensor? {0}_other, Tensor? {0}_mix, "


@define(
    "mixup_inverse_norms(Tensor x, Tensor? other, Tensor? mix) -> Tensor",
    triton="mixup_info_nce.inverse_norms",
    portable=True,
)
def _inverse_norms_shape(x: Tensor, other: Tensor | None, mix: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], dtype=statistics_dtype(x))


@define(
    "mixup_info_nce_statistics("
    + _SIDE.format("query")
    + "Tensor? query_inverse_norm, "
    + _SIDE.format("key")
    + "Tensor? key_inverse_norm, Tensor logit_scale, Tensor? partner, SymInt first_pair, bool columns_too, "
    "Tensor? query_code=None, Tensor? key_code=None, Tensor? row_share=None, Tensor? column_share=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    triton="mixup_info_nce.statistics",
    portable=True,
)
def _statistics_shape(
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
    rows, columns = query.shape[0], key.shape[0] if columns_too else 0
    sizes = (rows, rows, columns, columns, rows, 0 if partner is None else rows)
    return tuple(query.new_empty(size, dtype=statistics_dtype(query)) for size in sizes)


@define(
    "mixup_info_nce_backward("
    + _SIDE.format("query")
    + "Tensor? query_inverse_norm, "
    + _SIDE.format("key")
    + "Tensor? key_inverse_norm, Tensor logit_scale, Tensor? partner, SymInt first_pair, Tensor row_max, "
    "Tensor row_weight, Tensor? column_max, Tensor? column_weight, Tensor own_weight, Tensor? partner_weight, "
    "bool need_key, bool key_sums, Tensor? query_code=None, Tensor? key_code=None, Tensor? column_share=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    triton="mixup_info_nce.backward",
    atomic="mixup_info_nce.backward_with_atomics",
    portable=True,
)
def _backward_shape(
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
    def side(x: Tensor, other: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
        one_a_row = x.new_empty(0 if other is None else x.shape[0], dtype=wide)
        return [
            x.new_empty(x.shape, dtype=dtype),
            x.new_empty(0 if other is None else x.shape, dtype=dtype),
            one_a_row,
        ]

    wide = statistics_dtype(query)
    keys = [query.new_empty(0, dtype=wide) for _ in range(3)]
    if need_key:
        keys = side(key, None, wide) if key_sums else side(key, key_other, key.dtype)
    return (*side(query, query_other, query.dtype), *keys, query.new_empty((), dtype=wide))


@define(
    "mixup_partner_sums(Tensor partner, Tensor values, SymInt columns) -> Tensor",
    triton="mixup_info_nce.partner_sums",
    portable=True,
)
def _partner_sums_shape(partner: Tensor, values: Tensor, columns: int) -> Tensor:
    return values.new_empty(columns)


def partner_sums(backend: str, partner: Tensor, values: Tensor, columns: int) -> Tensor:
    """For each column, sum the values (n,) of the rows whose partner is that column, in a fixed order: (columns,)."""
    if backend == "cpp":
        return values.new_zeros(columns).scatter_add(0, partner, values)
    return raw_ops(backend).mixup_partner_sums(partner, values, columns)
