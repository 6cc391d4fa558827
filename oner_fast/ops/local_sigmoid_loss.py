"""local_sigmoid_loss: the part of SigLIP's loss that belongs to this rank's queries, as open_clip returns it.

The public op is `sigmoid_loss`, which returns the loss of the whole batch; this function serves the integrations.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from oner_fast.dtypes import statistics_dtype, widest_dtype
from oner_fast.ops import contrast_checks, sigmoid_over_ranks
from oner_fast.ops.contrast_arguments import number, one_number, ranks_that_call
from oner_fast.ops.implementations import REFERENCE, choose
from oner_fast.ops.library import raw_ops
from oner_fast.ops.rank_blocks import Ranks
from oner_fast.ops.sigmoid_loss import _SigmoidLoss, facts
from oner_fast.ops.sigmoid_over_ranks import Rows
from oner_fast.ops.transforms import Values, differentiable


class _LocalSigmoidLoss(_SigmoidLoss):
    """The same gradients as those of the whole batch, where all ranks hold as many rows; the value is this rank's."""

    @staticmethod
    def compute(query: Tensor, key: Tensor, logit_scale: Tensor, logit_bias: Tensor | None, *rest: Any) -> Values:
        mix, ranks, backend = rest[2], rest[-3], rest[-1]
        assert isinstance(ranks, Ranks)
        rows = Rows(raw_ops(backend), (query, None, mix, None), logit_scale, logit_bias, None, None, None, None, True)
        sums = sigmoid_over_ranks.sums(ranks, rows, key.contiguous())
        loss = sums.sum(dtype=widest_dtype(query.device)) / query.shape[0]
        return loss.to(statistics_dtype(query)), None, None


_local_sigmoid_loss = differentiable("local_sigmoid_loss", _LocalSigmoidLoss)


def local_sigmoid_loss(
    query: Tensor, key: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float | None, group: dist.ProcessGroup
) -> Tensor:
    """Compute -1/n of the sum of log sigmoid over this rank's n queries and the keys of all ranks.

    The rows enter the logits as they are. The gradients are those of the sum of this loss over all ranks for query and
    key, and those of this rank's loss for scale and bias. Every rank must hold as many rows. The implementation that
    `sigmoid_loss` would take serves, and in the place of the reference, which has no such form, the portable one.

    Args:
        query: (n, D) floating-point, at least one row.
        key: (n, D).
        logit_scale: a number or a tensor of shape () or (1,), which may take a gradient.
        logit_bias: the same, or None.
        group: the ranks.

    Returns:
        The loss, 0-d: float32, or float64 where a row is float64.

    Raises:
        ValueError: ranks hold different numbers of rows.
    """
    query, key, _, _ = contrast_checks.rows_of_one_dtype(query, key, None, None)
    op, device, known = facts(query, key)
    chosen = choose(op, device, **known).name
    ranks, keys_wanted = ranks_that_call(op, query, key, None, 0.0, 0, group)
    assert ranks is not None
    if len(set(ranks.sizes)) > 1:
        raise ValueError(f"open_clip's SigLipLoss needs as many rows on every rank, got {list(ranks.sizes)}")
    bias = None if logit_bias is None else one_number(logit_bias, query.device)
    loss: Tensor = _local_sigmoid_loss(
        query, key, one_number(logit_scale, query.device), bias, None, None,
        number(0.0, statistics_dtype(query), query.device), None, None, None, None, True, True, ranks, keys_wanted,
        "portable" if chosen == REFERENCE else chosen,
    )  # fmt: skip
    return loss
