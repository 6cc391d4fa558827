"""row_info_nce: one direction of the contrast, for this rank's rows against the keys that all ranks hold.

It is what open_clip calls a local loss. The public op is `mixup_info_nce`; this function serves the integrations.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from oner_fast.dtypes import widest_dtype
from oner_fast.ops import contrast_checks
from oner_fast.ops.contrast_arguments import one_number
from oner_fast.ops.implementations import REFERENCE, choose
from oner_fast.ops.library import raw_ops
from oner_fast.ops.mixup_info_nce import facts
from oner_fast.ops.transforms import Values, differentiable


class _RowInfoNce:
    """The loss and its gradients. Saved are the inputs, and the maximum and the sum of each row."""

    @staticmethod
    def compute(query: Tensor, keys: Tensor, logit_scale: Tensor, first_pair: int, backend: str) -> Values:
        row_max, row_sum, _, _, own, _ = raw_ops(backend).mixup_info_nce_statistics(
            query, None, None, None, keys, None, None, None, logit_scale, None, first_pair, False
        )
        entropy = (row_max - own + row_sum.log()).mean(dtype=widest_dtype(query.device))
        return entropy.to(row_sum.dtype), row_max, row_sum

    @staticmethod
    def remember(ctx: Any, arguments: Values, results: Values) -> None:
        *tensors, ctx.first_pair, ctx.backend = arguments
        ctx.save_for_backward(*tensors, *results[1:])

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> Values:
        query, keys, logit_scale, row_max, row_sum = ctx.saved_tensors
        need_query, need_keys, need_scale = ctx.needs_input_grad[:3]
        each = grad.to(row_sum.dtype) / query.shape[0]
        own_weight = each.expand(query.shape[0]).contiguous()
        to_query, _, _, to_keys, _, _, to_scale = raw_ops(ctx.backend).mixup_info_nce_backward(
            query, None, None, None, keys, None, None, None, logit_scale, None, ctx.first_pair, row_max, each / row_sum,
            None, None, own_weight, None, need_keys, True,
        )  # fmt: skip
        return (
            to_query if need_query else None,
            to_keys.to(keys.dtype) if need_keys else None,
            to_scale.to(logit_scale.dtype) if need_scale else None,
            None,
            None,
        )


_row_info_nce = differentiable("row_info_nce", _RowInfoNce)


def row_info_nce(query: Tensor, keys: Tensor, logit_scale: Tensor | float, first_pair: int) -> Tensor:
    """Compute the mean cross-entropy of the rows of logit_scale * query @ keys.T, where row i belongs to a given key.

    The rows enter the logits as they are. Dtypes are cast as by `mixup_info_nce`. The implementation that it would take
    serves, and in the place of the reference, which has no such form, the portable one.

    Args:
        query: (n, D) floating-point, at least one row.
        keys: (N, D) with N >= n.
        logit_scale: a number or a floating-point tensor of shape () or (1,), which may take a gradient.
        first_pair: the key that row 0 belongs to; row i belongs to the key first_pair + i.

    Returns:
        The loss, 0-d: float32, or float64 where a row is float64.
    """
    query, keys, _, _ = contrast_checks.rows_of_one_dtype(query, keys, None, None)
    op, device, known = facts(query, keys)
    chosen = choose(op, device, **known).name
    backend = "portable" if chosen == REFERENCE else chosen
    loss: Tensor = _row_info_nce(query, keys, one_number(logit_scale, query.device), first_pair, backend)
    return loss
