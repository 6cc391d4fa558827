"""sigmoid_loss in plain PyTorch: the logits exist for a few rows at a time, in forward and again in backward.

For N pairs of D numbers it holds two copies of each side in float32 (float64 for float64) beside inputs and results,
and a few buffers of `PART_NUMBERS` numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oner_fast.dtypes import widest_dtype
from oner_fast.ops.portable.mixup_info_nce import Operands


def _targets(given: Operands, part: slice, weight: Tensor | None) -> Tensor:
    """Return the targets of own pairs and of partners, [rows of the part, N]."""
    like = given.queries.new_ones(part.stop - part.start)
    target = given.queries.new_zeros(like.shape[0], given.columns)
    if given.partner is None or weight is None:
        given.add(target, given.own(part), like)
    else:
        given.add(target, given.own(part), like - weight[part])
        given.add(target, given.partner[part], weight[part])
    return target


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
    """Compute forward: the sum of the terms of each row."""
    given = Operands(
        (query, query_other, query_mix, query_inverse_norm), (key, key_other, key_mix, key_inverse_norm), logit_scale,
        partner, first_pair,
    )  # fmt: skip
    found = given.queries.new_zeros(given.rows)
    for part in given.parts():
        logits = given.logits(part)
        if logit_bias is not None:
            logits += logit_bias.to(logits.dtype)
        target = _targets(given, part, partner_weight)
        if query_code is not None and key_code is not None and positive:
            target.masked_fill_(given.marked(part, query_code, key_code, own=True), 1.0)
        # log(1 + exp(l)) - t l, where the difference of the first two terms is exact for targets of 0 and 1.
        terms = logits.clamp(min=0).sub_(target.mul_(logits))
        terms += logits.abs_().neg_().exp_().log1p_()
        if query_code is not None and key_code is not None and not positive:
            terms.masked_fill_(given.marked(part, query_code, key_code, own=False), 0.0)
        found[part] = terms.sum(1)
    return found


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
    """Compute backward: the gradients of x, other and mix of both sides, and those of logit_scale and logit_bias."""
    given = Operands(
        (query, query_other, query_mix, query_inverse_norm), (key, key_other, key_mix, key_inverse_norm), logit_scale,
        partner, first_pair,
    )  # fmt: skip
    wide = given.queries.dtype
    to_queries = given.queries.new_zeros(query.shape)
    to_keys = given.keys.new_zeros(key.shape if need_key else 0)
    to_bias = torch.zeros((), dtype=widest_dtype(query.device), device=query.device)
    for part in given.parts():
        logits = given.logits(part)
        if logit_bias is not None:
            logits += logit_bias.to(wide)
        target = _targets(given, part, partner_weight)
        if query_code is not None and key_code is not None and positive:
            target.masked_fill_(given.marked(part, query_code, key_code, own=True), 1.0)
        # sigmoid(l) - t, without a difference of two numbers near 1.
        gradient = target.neg().add_(1).mul_(logits.sigmoid())
        gradient -= target.mul_(logits.neg_().sigmoid_())
        if query_code is not None and key_code is not None and not positive:
            gradient.masked_fill_(given.marked(part, query_code, key_code, own=False), 0.0)
        gradient *= each.to(wide)
        to_bias += gradient.sum(dtype=to_bias.dtype)
        torch.mm(gradient, given.keys, out=to_queries[part])
        if need_key:
            to_keys.addmm_(gradient.T, given.queries[part])
    return (*given.results(to_queries, to_keys, need_key, key_sums), to_bias.to(wide))
