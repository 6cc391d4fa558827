"""mixup_info_nce: the contrastive loss of ITC, XMC, CIC and CMC (OneR), and of CLIP."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from oner_fast.dtypes import statistics_dtype, widest_dtype
from oner_fast.ops import checks, contrast_checks, contrast_over_ranks, reference
from oner_fast.ops.contrast_arguments import (
    gradient_of_mix,
    one_number,
    ranks_that_call,
    sent,
    share_of_other,
    weight_of_partner,
)
from oner_fast.ops.contrast_over_ranks import Rows
from oner_fast.ops.implementations import Facts, register
from oner_fast.ops.library import raw_ops, why_not_cuda, why_not_triton_products
from oner_fast.ops.mixup_info_nce_raw import partner_sums
from oner_fast.ops.rank_blocks import Ranks
from oner_fast.ops.same_ids import SamePairs, same_pairs
from oner_fast.ops.serve import serve
from oner_fast.ops.transforms import Values, differentiable
from oner_fast.ops.unit_rows import through_normalisation


def _column_targets(
    backend: str, partner: Tensor | None, weight: Tensor | None, own: Tensor, shared: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return for each column the weighted sum of the logits of its targets, and the sum of the weights; (n,) each.

    The second is None where a column's only target is its own pair.
    """
    if partner is None or weight is None:
        return own, None
    target, mass = (partner_sums(backend, partner, x, own.shape[0]) for x in (weight * shared, weight))
    return target + (1 - weight) * own, mass + (1 - weight)


def _reciprocal(mass: Tensor) -> Tensor:
    """Return 1 / mass, or 0 where a column has no target."""
    return torch.where(mass == 0, 0.0, 1 / mass)


class _MixupInfoNce:
    """The loss and its gradients.

    Saved are the inputs and O(n) statistics of this rank's rows and columns; backward computes the logits again.
    """

    @staticmethod
    def compute(
        query: Tensor,
        key: Tensor,
        logit_scale: Tensor,
        query_other: Tensor | None,
        key_other: Tensor | None,
        mix: Tensor,
        partner: Tensor | None,
        partner_weight: Tensor | None,
        query_code: Tensor | None,
        key_code: Tensor | None,
        row_share: Tensor | None,
        column_share: Tensor | None,
        symmetric: bool,
        normalized: bool,
        ranks: Ranks | None,
        keys_wanted: bool,
        backend: str,
    ) -> Values:
        raw = raw_ops(backend)
        dtype = statistics_dtype(query)
        query_norm = None if normalized else raw.mixup_inverse_norms(query, query_other, mix)
        key_norm = None if normalized else raw.mixup_inverse_norms(key, key_other, mix)
        weight = weight_of_partner(partner, partner_weight, query)
        query_side = (query, query_other, mix, query_norm)
        same = _same_pairs(query_code, key_code, row_share, column_share)
        column_max = column_sum = column_target = mass = None
        if ranks is None:
            row_max, row_sum, *columns, own, shared = raw.mixup_info_nce_statistics(
                *query_side, key, key_other, mix, key_norm, logit_scale, partner, 0, symmetric, *(same or ())
            )
            if symmetric:
                column_max, column_sum = columns
                column_target, mass = _column_targets(backend, partner, weight, own, shared)
        else:
            rows = Rows(raw, query_side, logit_scale, partner, weight, partial(partner_sums, backend), same)
            of_rows, of_columns = contrast_over_ranks.statistics(
                ranks, rows, sent(key, key_other, mix, key_norm), symmetric
            )
            row_max, row_sum, own, shared = of_rows.maximum, of_rows.total, of_rows.own, of_rows.shared
            if of_columns is not None:
                column_max, column_sum, mass = of_columns.maximum, of_columns.total, of_columns.mass
                column_target = own if of_columns.target is None else of_columns.target
        if row_share is not None and symmetric:
            own = (
                own / 2
            )  # the sum of the targets of both directions; half of it is one logit where a pair stands alone
            column_target = own
        target = own if weight is None else (1 - weight) * own + weight * shared
        # Summed in float64, so that the float32 result does not depend on the order of the sum. Sums are (1,) until the
        # end, since PyTorch's arithmetic fails on the 0-d tensors of an empty batch of torch.vmap.
        widest = widest_dtype(query.device)
        loss = (row_max - target + row_sum.log()).sum(0, keepdim=True, dtype=widest)
        if column_max is not None and column_sum is not None and column_target is not None:
            if mass is not None:
                column_target = column_target * _reciprocal(mass)
            entropy = column_max - column_target + column_sum.log()
            if mass is not None:
                entropy = torch.where(mass == 0, 0.0, entropy)
            loss = (loss + entropy.sum(0, keepdim=True, dtype=widest)) / 2
        if ranks is not None:
            dist.all_reduce(loss, group=ranks.group)
        loss = (loss / (query.shape[0] if ranks is None else ranks.total)).to(dtype).squeeze(0)
        return loss, query_norm, key_norm, row_max, row_sum, column_max, column_sum, mass

    @staticmethod
    def remember(ctx: Any, arguments: Values, results: Values) -> None:
        *tensors, _, _, ctx.ranks, ctx.keys_wanted, ctx.backend = arguments
        ctx.save_for_backward(*tensors, *results[1:])

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> Values:
        (
            query, key, logit_scale, query_other, key_other, mix, partner, partner_weight, query_code, key_code,
            row_share, column_share, query_norm, key_norm, row_max, row_sum, column_max, column_sum, mass,
        ) = ctx.saved_tensors  # fmt: skip
        weight = weight_of_partner(partner, partner_weight, query)
        ranks, need = ctx.ranks, ctx.needs_input_grad
        need_key = need[1] or need[4] or (need[5] and key_other is not None)
        world, total = (1, query.shape[0]) if ranks is None else (ranks.world, ranks.total)
        terms = 1 if column_sum is None else 2
        each = grad.to(row_sum.dtype).unsqueeze(0) * world / (terms * total)
        own_weight, share = (each * terms).expand(query.shape[0]).contiguous(), None
        if weight is not None:
            own_weight = each * (1 - weight)
        if mass is not None:
            share = _reciprocal(mass)
            own_weight = own_weight * (1 + share)
            column_sum = torch.where(mass == 0, math.inf, column_sum)  # so that its exponentials get the weight 0
        same = _same_pairs(query_code, key_code, row_share, column_share)
        if row_share is not None:
            own_weight = each * row_share
        raw, query_side = raw_ops(ctx.backend), (query, query_other, mix, query_norm)
        if ranks is None:
            partner_weight = None if weight is None else each * weight
            if partner_weight is not None and share is not None:
                partner_weight = partner_weight * (1 + share.index_select(0, partner))
            to_query, to_query_other, to_mix, to_key, to_key_other, to_key_mix, to_scale = raw.mixup_info_nce_backward(
                *query_side, key, key_other, mix, key_norm, logit_scale, partner, 0, row_max, each / row_sum,
                column_max, None if column_sum is None else each / column_sum, own_weight, partner_weight, need_key,
                False, *(same.of_backward(each) if same else ()),
            )  # fmt: skip
        else:
            rows = Rows(raw, query_side, logit_scale, partner, weight, partial(partner_sums, ctx.backend), same)
            columns = [x for x in (column_max, column_sum, share) if x is not None]
            found = contrast_over_ranks.gradients(
                ranks, rows, sent(key, key_other, mix, key_norm), torch.stack(columns, dim=1) if columns else None,
                each, row_max, each / row_sum, own_weight, ctx.keys_wanted,
            )  # fmt: skip
            to_query, to_query_other = (x.to(query.dtype) for x in (found.query, found.query_other))
            to_mix, to_scale = found.mix, found.logit_scale
            to_key = to_key_other = to_key_mix = None
            if need_key and found.keys is not None:
                to_key, to_key_other, to_key_mix = through_normalisation(found.keys, key, key_other, mix, key_norm)
        to_each = (to_mix if query_other is not None else None, to_key_mix if key_other is not None else None)
        return (
            to_query if need[0] else None,
            to_key if need[1] else None,
            to_scale.to(logit_scale.dtype) if need[2] else None,
            to_query_other if need[3] else None,
            to_key_other if need[4] else None,
            gradient_of_mix(mix, row_max, *to_each) if need[5] else None,
            *(None,) * 11,
        )


def _same_pairs(
    query_code: Tensor | None, key_code: Tensor | None, row_share: Tensor | None, column_share: Tensor | None
) -> SamePairs | None:
    return None if query_code is None or key_code is None else SamePairs(query_code, key_code, row_share, column_share)


_mixup_info_nce = differentiable("mixup_info_nce", _MixupInfoNce)


def _compiled(
    backend: str,
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor | float,
    *,
    query_other: Tensor | None,
    key_other: Tensor | None,
    mix: Tensor | float,
    partner: Tensor | None,
    partner_weight: Tensor | None,
    symmetric: bool,
    normalized: bool,
    logit_bias: Tensor | float | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    same: str,
    group: dist.ProcessGroup | None,
) -> Tensor:
    kind = contrast_checks.kind_of_ids(query_ids, same)
    ranks, keys_wanted = ranks_that_call("mixup_info_nce", query, key, key_other, mix, kind, group)
    total = None if ranks is None else ranks.total
    contrast_checks.arguments(
        "mixup_info_nce", query, key, logit_scale, query_other, key_other, mix, partner, partner_weight, logit_bias,
        query_ids, key_ids, total,
    )  # fmt: skip
    scale, share = one_number(logit_scale, query.device), share_of_other(mix, query)
    pairs: tuple[Tensor | None, ...] = (None,) * 4
    if query_ids is not None:
        gather, first = (None, 0) if ranks is None else (ranks.gather, ranks.first(ranks.rank))
        pairs = same_pairs(
            query, query_ids, key_ids, positive=same == "positive", symmetric=symmetric, gather=gather, first=first
        )
    loss: Tensor = _mixup_info_nce(
        query, key, scale, query_other, key_other, share, partner, partner_weight, *pairs, symmetric, normalized, ranks,
        keys_wanted, backend,
    )  # fmt: skip
    if isinstance(logit_bias, Tensor):
        # A finite bias makes this factor exactly 1, and takes a gradient of 0. One that is not finite makes the loss
        # and its gradients NaN. Inductor would drop a product with the integer 0, and the NaN with it.
        one = 1 + 0.0 * logit_bias.reshape(1)
        loss = (loss.reshape(1) * one.to(query.device, loss.dtype)).squeeze(0)
    return loss


_shapes = partial(_compiled, "cpp")
register("mixup_info_nce", "reference", reference.mixup_info_nce, preference=-10)
register("mixup_info_nce", "portable", partial(_compiled, "portable"))
register("mixup_info_nce", "cpp", partial(_compiled, "cpp"), devices=("cpu",), preference=100, compiled=True)
# Less preferred than Triton, whose kernels compute backward: the same code then gives forward exactly the same logits.
register(
    "mixup_info_nce", "cuda", partial(_compiled, "cuda"), devices=("cuda",), preference=40, compiled=True,
    reasons=why_not_cuda("mixup_info_nce_statistics", half_alone=True),
)  # fmt: skip


def _why_not_atomic(device: str, **facts: Any) -> list[str]:
    found = why_not_triton_products(device, **facts)
    if torch.are_deterministic_algorithms_enabled():
        found.append("it adds atomically, in no fixed order, and torch.use_deterministic_algorithms(True) is set")
    return found


register(
    "mixup_info_nce", "triton", partial(_compiled, "triton"), devices=("cuda",), on_request=("cpu",), preference=50,
    reasons=why_not_triton_products,
)  # fmt: skip
register(
    "mixup_info_nce", "triton_atomic", partial(_compiled, "triton_atomic"), devices=("cuda",), on_request=("cpu",),
    preference=-1, reasons=_why_not_atomic,
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
    return "mixup_info_nce", query.device.type, {"dtype": dtype}


def mixup_info_nce(
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor | float,
    *,
    query_other: Tensor | None = None,
    key_other: Tensor | None = None,
    mix: Tensor | float = 0.5,
    partner: Tensor | None = None,
    partner_weight: Tensor | None = None,
    symmetric: bool = True,
    normalized: bool = False,
    logit_bias: Tensor | float | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    same: str = "positive",
    group: dist.ProcessGroup | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Compute InfoNCE of two sets of embeddings, optionally mixed, with targets shared with a partner or by ids.

    With normalise(x) = x / |x|, the rows are q = normalise(query), or normalise((1 - mix) query + mix query_other), and
    k likewise. A row with |x| < 1e-12 counts as a row of zeros: it stays zero and takes a gradient of 0. A row whose
    squares overflow makes the loss NaN. The logits are logit_scale * q @ k.T + logit_bias. The loss is the mean over
    rows of the cross-entropy or, where `symmetric`, the mean of that and of the same over columns. No implementation
    but the reference allocates an N x N buffer.

    Rows of different dtypes are cast to the widest of them, to float32 from float16 and bfloat16. Under autocast all
    rows are cast to the autocast dtype, unless one of them is float64. Each gradient comes back in the dtype of its
    tensor.

    Args:
        query: (N, D) float32, float16, bfloat16 or float64; at least one row over all ranks. Row i belongs to pair i.
        key: (N, D).
        logit_scale: 1 / temperature, a finite number or a floating-point tensor of shape () or (1,), which may take a
            gradient.
        query_other: (N, D), mixed into the query.
        key_other: (N, D), mixed into the key.
        mix: the share of the other, a number, a 0-d tensor or (N,), which may take a gradient. OneR uses 1/2.
        partner: (N,) int64 with values in [0, N), for images mixed at the input: the targets of row i are i with the
            weight 1 - partner_weight[i], and partner[i] with partner_weight[i]. With `group`, a global index.
        partner_weight: (N,) floating-point, 0.5 by default. It takes no gradient.
        symmetric: add the cross-entropy over columns. Without it this is MoCo v3's query-to-key form.
        normalized: take the rows, mixed where they are, as q and k themselves. No norm is computed, and gradients are
            not projected. For rows that were normalised before, as open_clip's are, the loss is the same.
        logit_bias: a finite number or a floating-point tensor of shape () or (1,) that is added to every logit. A
            softmax does not change with it, so the loss is the same and the gradient of a tensor is 0. A tensor that
            is not finite makes the loss NaN, and its gradients.
        query_ids: (N,) int64, the ids of the queries, such as hashes of captions. Any value is an id except -1, which
            equals no id. `partner` cannot be given beside it. With `group`, every rank gives ids or none does.
        key_ids: (N,) int64, the ids of the keys; those of the queries by default.
        same: what query i and key j != i are to each other where their ids are equal. With "positive", the targets of a
            row are its own key and all such keys, with equal weights; those of a column likewise. With "ignore", such
            pairs leave the sums of their row and their column; the own pair never does.
        group: compute the loss of the batch that the ranks hold together, in rank order; local N may differ. Every rank
            returns that loss. Gradients are W times the derivative (W ranks), so that the mean that DDP takes is the
            gradient of a single process.
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
    checks.is_tensor("mixup_info_nce", "query", query)
    checks.flag("mixup_info_nce", "symmetric", symmetric)
    contrast_checks.options("mixup_info_nce", normalized, partner, query_ids, key_ids, same, group)
    query, key, query_other, key_other = contrast_checks.rows_of_one_dtype(query, key, query_other, key_other)
    loss: Tensor = serve(facts(query, key), implementation, query, _shapes)(
        query, key, logit_scale, query_other=query_other, key_other=key_other, mix=mix, partner=partner,
        partner_weight=partner_weight, symmetric=symmetric, normalized=normalized, logit_bias=logit_bias,
        query_ids=query_ids, key_ids=key_ids, same=same, group=group,
    )  # fmt: skip
    return loss
