"""The raw ops of sigmoid_loss: their schemas, and the shapes of what they return.

A side is x (N, D), perhaps another tensor that is mixed into it, the mix, and the inverse norms (N,), as in
`mixup_info_nce_raw`. The own pair of row i is the key first_pair + i. Its target is 1, or 1 minus the weight of the
row's partner, whose target is that weight. Own pairs and partners outside these keys, which may be one block of many,
have no term here.

Codes (int32, of M queries and N keys) mark further pairs: those whose codes are equal. Where `positive`, their target
is 1. Else they have no term, unless they are an own pair. Partners and codes exclude each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oner_fast.dtypes import statistics_dtype
from oner_fast.ops.library import define

_SIDE = "Tensor {0}, Tensor? {0}_other, Tensor? {0}_mix, Tensor? {0}_inverse_norm, "
_LOGITS = (
    _SIDE.format("query")
    + _SIDE.format("key")
    + "Tensor logit_scale, Tensor? logit_bias, Tensor? partner, Tensor? partner_weight, SymInt first_pair, "
)
_PAIRS = "Tensor? query_code=None, Tensor? key_code=None, bool positive=True"


@define(f"sigmoid_loss_sums({_LOGITS}{_PAIRS}) -> Tensor", triton="sigmoid_loss.sums", portable=True)
def _sums_shape(
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
    """Return the sum of the terms of each row: (M,)."""
    return query.new_empty(query.shape[0], dtype=statistics_dtype(query))


@define(
    f"sigmoid_loss_backward({_LOGITS}Tensor each, bool need_key, bool key_sums, {_PAIRS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    triton="sigmoid_loss.backward",
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
    """Return the gradients of x, other and mix of both sides, of logit_scale () and of logit_bias ().

    `each` is the gradient with respect to every term. With `key_sums` the gradient of the keys is with respect to the
    keys of the logits, in the dtype of statistics.
    """

    def side(x: Tensor, other: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
        return [
            x.new_empty(x.shape, dtype=dtype),
            x.new_empty(0 if other is None else x.shape, dtype=dtype),
            x.new_empty(0 if other is None else x.shape[0], dtype=wide),
        ]

    wide = statistics_dtype(query)
    keys = [query.new_empty(0, dtype=wide) for _ in range(3)]
    if need_key:
        keys = side(key, None, wide) if key_sums else side(key, key_other, key.dtype)
    return (*side(query, query_other, query.dtype), *keys, *(query.new_empty((), dtype=wide) for _ in range(2)))
