"""sigmoid_loss: the pairwise sigmoid loss of SigLIP, where every pair of the batch is a question of yes or no."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from oner_fast.dtypes import statistics_dtype, widest_dtype
from oner_fast.ops import (
    checks,
    contrast_checks,
    reference,
    sigmoid_loss_raw,  # noqa: F401  # defines the raw ops
    sigmoid_over_ranks,
)
from oner_fast.ops.contrast_arguments import (
    gradient_of_mix,
    one_number,
    ranks_that_call,
    sent,
    share_of_other,
    weight_of_partner,
)
from oner_fast.ops.implementations import Facts, register
from oner_fast.ops.library import raw_ops, why_not_triton_products
from oner_fast.ops.rank_blocks import Ranks
from oner_fast.ops.same_ids import same_pairs
from oner_fast.ops.serve import serve
from oner_fast.ops.sigmoid_over_ranks import Rows
from oner_fast.ops.transforms import Values, differentiable
from oner_fast.ops.unit_rows import through_normalisation

_OP = "sigmoid_loss"


class _SigmoidLoss:
    """The loss and its gradients.

    Saved are the inputs and the inverse norms of this rank's rows; backward computes the logits again.
    """

    @staticmethod
    def compute(
        query: Tensor,
        key: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        query_other: Tensor | None,
        key_other: Tensor | None,
        mix: Tensor,
        partner: Tensor | None,
        partner_weight: Tensor | None,
        query_code: Tensor | None,
        key_code: Tensor | None,
        positive: bool,
        normalized: bool,
        ranks: Ranks | None,
        keys_wanted: bool,
        backend: str,
    ) -> Values:
        raw = raw_ops(backend)
        query_norm = None if normalized else raw.mixup_inverse_norms(query, query_other, mix)
        key_norm = None if normalized else raw.mixup_inverse_norms(key, key_other, mix)
        weight = weight_of_partner(partner, partner_weight, query)
        query_side = (query, query_other, mix, query_norm)
        if ranks is None:
            sums = raw.sigmoid_loss_sums(
                *query_side, key, key_other, mix, key_norm, logit_scale, logit_bias, partner, weight, 0, query_code,
                key_code, positive,
            )  # fmt: skip
        else:
            rows = Rows(raw, query_side, logit_scale, logit_bias, partner, weight, query_code, key_code, positive)
            sums = sigmoid_over_ranks.sums(ranks, rows, sent(key, key_other, mix, key_norm))
        # Summed in float64, so that the float32 result does not depend on the order of the sum. The sum is (1,) until
        # the end, since PyTorch's arithmetic fails on the 0-d tensors of an empty batch of torch.vmap.
        loss = sums.sum(0, keepdim=True, dtype=widest_dtype(query.device))
        if ranks is not None:
            dist.all_reduce(loss, group=ranks.group)
        loss = (loss / (query.shape[0] if ranks is None else ranks.total)).to(statistics_dtype(query)).squeeze(0)
        return loss, query_norm, key_norm

    @staticmethod
    def remember(ctx: Any, arguments: Values, results: Values) -> None:
        *tensors, ctx.positive, _, ctx.ranks, ctx.keys_wanted, ctx.backend = arguments
        ctx.save_for_backward(*tensors, *results[1:])

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> Values:
        (
            query, key, logit_scale, logit_bias, query_other, key_other, mix, partner, partner_weight, query_code,
            key_code, query_norm, key_norm,
        ) = ctx.saved_tensors  # fmt: skip
        weight = weight_of_partner(partner, partner_weight, query)
        ranks, need = ctx.ranks, ctx.needs_input_grad
        need_key = need[1] or need[5] or (need[6] and key_other is not None)
        world, total = (1, query.shape[0]) if ranks is None else (ranks.world, ranks.total)
        each = grad.to(statistics_dtype(query)).unsqueeze(0) * world / total
        raw, query_side = raw_ops(ctx.backend), (query, query_other, mix, query_norm)
        if ranks is None:
            to_query, to_query_other, to_mix, to_key, to_key_other, to_key_mix, to_scale, to_bias = (
                raw.sigmoid_loss_backward(
                    *query_side, key, key_other, mix, key_norm, logit_scale, logit_bias, partner, weight, 0, each,
                    need_key, False, query_code, key_code, ctx.positive,
                )
            )  # fmt: skip
        else:
            rows = Rows(raw, query_side, logit_scale, logit_bias, partner, weight, query_code, key_code, ctx.positive)
            found = sigmoid_over_ranks.gradients(
                ranks, rows, sent(key, key_other, mix, key_norm), each, ctx.keys_wanted
            )
            to_query, to_query_other = (x.to(query.dtype) for x in (found.query, found.query_other))
            to_mix, to_scale, to_bias = found.mix, found.logit_scale, found.logit_bias
            to_key = to_key_other = to_key_mix = None
            if need_key and found.keys is not None:
                to_key, to_key_other, to_key_mix = through_normalisation(found.keys, key, key_other, mix, key_norm)
        to_each = (to_mix if query_other is not None else None, to_key_mix if key_other is not None else None)
        zeros = each.expand(query.shape[0])
        return (
            to_query if need[0] else None,
            to_key if need[1] else None,
            to_scale.to(logit_scale.dtype) if need[2] else None,
            to_bias.to(logit_bias.dtype) if need[3] else None,
            to_query_other if need[4] else None,
            to_key_other if need[5] else None,
            gradient_of_mix(mix, zeros, *to_each) if need[6] else None,
            *(None,) * 9,
        )


_sigmoid_loss = differentiable(_OP, _SigmoidLoss)


def _compiled(
    backend: str,
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    *,
    query_other: Tensor | None,
    key_other: Tensor | None,
    mix: Tensor | float,
    partner: Tensor | None,
    partner_weight: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    same: str,
    normalized: bool,
    group: dist.ProcessGroup | None,
) -> Tensor:
    ranks, keys_wanted = ranks_that_call(
        _OP, query, key, key_other, mix, contrast_checks.kind_of_ids(query_ids, same), group
    )
    total = None if ranks is None else ranks.total
    contrast_checks.arguments(
        _OP, query, key, logit_scale, query_other, key_other, mix, partner, partner_weight, logit_bias, query_ids,
        key_ids, total,
    )  # fmt: skip
    codes: tuple[Tensor | None, ...] = (None, None)
    if query_ids is not None:
        gather, first = (None, 0) if ranks is None else (ranks.gather, ranks.first(ranks.rank))
        found = same_pairs(query, query_ids, key_ids, positive=False, symmetric=False, gather=gather, first=first)
        codes = (found.query_code, found.key_code)
    bias = None if logit_bias is None else one_number(logit_bias, query.device)
    loss: Tensor = _sigmoid_loss(
        query, key, one_number(logit_scale, query.device), bias, query_other, key_other, share_of_other(mix, query),
        partner, partner_weight, *codes, same == "positive", normalized, ranks, keys_wanted, backend,
    )  # fmt: skip
    return loss


_shapes = partial(_compiled, "cpp")
register(_OP, "reference", reference.sigmoid_loss, preference=-10)
register(_OP, "portable", partial(_compiled, "portable"))
register(_OP, "cpp", partial(_compiled, "cpp"), devices=("cpu",), preference=100, compiled=True)
register(
    _OP, "triton", partial(_compiled, "triton"), devices=("cuda",), on_request=("cpu",), preference=50,
    reasons=why_not_triton_products,
)  # fmt: skip


def facts(
    query: Tensor,
    key: Tensor | None = None,
    *rest: Any,
    query_other: Tensor | None = None,
    key_other: Tensor | None = None,
    **options: Any,
) -> Facts:
    """Return the facts of a call with these arguments, by which its implementation is chosen; nothing is computed."""
    dtype = checks.common_dtype(query, key, query_other, key_other) or query.dtype
    return _OP, query.device.type, {"dtype": dtype}


def sigmoid_loss(
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    query_other: Tensor | None = None,
    key_other: Tensor | None = None,
    mix: Tensor | float = 0.5,
    partner: Tensor | None = None,
    partner_weight: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    same: str = "positive",
    normalized: bool = False,
    group: dist.ProcessGroup | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Compute SigLIP's loss of two sets of embeddings, optionally mixed, with targets shared with a partner or by ids.

    The rows q and k are those of `mixup_info_nce`: normalise(query), or normalise((1 - mix) query + mix query_other),
    and k likewise. A row with |x| < 1e-12 counts as a row of zeros: it stays zero and takes a gradient of 0. A row
    whose squares overflow makes the loss NaN. The logits are l = logit_scale * q @ k.T + logit_bias. The loss is
    -1/N sum over i and j of log sigmoid(z l[i, j]), where z is 1 for pairs that belong together and -1 for all others.
    A pair with a target t between 0 and 1 has the term -t log sigmoid(l) - (1 - t) log sigmoid(-l). No implementation
    but the reference allocates an N x N buffer.

    Rows of different dtypes are cast to the widest of them, to float32 from float16 and bfloat16. Under autocast all
    rows are cast to the autocast dtype, unless one of them is float64. Each gradient comes back in the dtype of its
    tensor.

    Args:
        query: (N, D) float32, float16, bfloat16 or float64; at least one row over all ranks. Row i belongs to pair i.
        key: (N, D).
        logit_scale: the factor of the logits itself, not its logarithm: a finite number or a floating-point tensor of
            shape () or (1,), which may take a gradient. SigLIP begins with 10.
        logit_bias: a finite number or a floating-point tensor of shape () or (1,) that is added to every logit, which
            may take a gradient; 0 by default. SigLIP begins with -10.
        query_other: (N, D), mixed into the query.
        key_other: (N, D), mixed into the key.
        mix: the share of the other, a number, a 0-d tensor or (N,), which may take a gradient.
        partner: (N,) int64 with values in [0, N), for images mixed at the input: the target of pair (i, i) is
            1 - partner_weight[i], and partner_weight[i] is added to that of (i, partner[i]). With `group`, a global
            index.
        partner_weight: (N,) floating-point, 0.5 by default. It takes no gradient.
        query_ids: (N,) int64, the ids of the queries, such as hashes of captions. Any value is an id except -1, which
            equals no id. `partner` cannot be given beside it. With `group`, every rank gives ids or none does.
        key_ids: (N,) int64, the ids of the keys; those of the queries by default.
        same: what query i and key j != i are to each other where their ids are equal. With "positive" they belong
            together; with "ignore" they have no term. The own pair always belongs together.
        normalized: take the rows, mixed where they are, as q and k themselves. No norm is computed, and gradients are
            not projected. For rows that were normalised before, as open_clip's are, the loss is the same.
        group: compute the loss of the batch that the ranks hold together, in rank order; local N may differ. Every rank
            returns that loss, divided by the rows of all ranks. Gradients are W times the derivative (W ranks), so
            that the mean that DDP takes is the gradient of a single process.
        implementation: force one by name; see `oner_fast.ops.implementations`.

    Returns:
        The loss, 0-d: float32, or float64 where a row is float64.

    Raises:
        TypeError: a dtype does not fit, or an argument is no tensor.
        ValueError: a shape or device does not fit, `partner_weight` is given without `partner`, `key_ids` without
            `query_ids` or ids beside `partner`, `same` is unknown, or ranks differ in what they give.
        IndexError: a value of `partner` is out of range. On CUDA, values are checked only with `ONER_FAST_DEBUG=1`.
        RuntimeError: the forced implementation cannot run this call.
    """
    checks.is_tensor(_OP, "query", query)
    contrast_checks.options(_OP, normalized, partner, query_ids, key_ids, same, group)
    query, key, query_other, key_other = contrast_checks.rows_of_one_dtype(query, key, query_other, key_other)
    loss: Tensor = serve(facts(query, key), implementation, query, _shapes)(
        query, key, logit_scale, logit_bias, query_other=query_other, key_other=key_other, mix=mix, partner=partner,
        partner_weight=partner_weight, query_ids=query_ids, key_ids=key_ids, same=same, normalized=normalized,
        group=group,
    )  # fmt: skip
    return loss
