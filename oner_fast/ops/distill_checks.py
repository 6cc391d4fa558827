"""Checks of the arguments of `oner_fast.ops.distill_info_nce`, made before any work is done."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from oner_fast.ops import checks, contrast_checks

_OP = "distill_info_nce"


def options(symmetric: bool, normalized: bool, group: dist.ProcessGroup | None) -> None:
    """Check the options before any rank sends anything."""
    checks.flag(_OP, "symmetric", symmetric)
    checks.flag(_OP, "normalized", normalized)
    contrast_checks.process_group(_OP, group)


def arguments(
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor | float,
    teacher_query: Tensor,
    teacher_key: Tensor,
    teacher_logit_scale: Tensor | float,
    total: int | None = None,
) -> None:
    """Check the tensors; `total` counts the rows of all ranks (None: no group)."""
    contrast_checks.matrix(_OP, "query", query)
    rows = query.shape[0]
    if rows == 0 and total in (None, 0):
        raise ValueError(f"{_OP}: query must hold at least one row, got shape {tuple(query.shape)}")
    contrast_checks.matrix(_OP, "teacher_query", teacher_query)
    for name, tensor, width in (("key", key, query.shape[1]), ("teacher_key", teacher_key, teacher_query.shape[1])):
        contrast_checks.matrix(_OP, name, tensor)
        checks.shape(_OP, name, tensor, "(N, D)", (rows, width))
    checks.shape(_OP, "teacher_query", teacher_query, "(N, D)", (rows, None))
    contrast_checks.one_number(_OP, "logit_scale", logit_scale, query)
    contrast_checks.one_number(_OP, "teacher_logit_scale", teacher_logit_scale, query)
    checks.same_device(_OP, "query", query, key=key, teacher_query=teacher_query, teacher_key=teacher_key)


def same_dtype(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Cast two sides to their common dtype, by the rule of `mixup_info_nce`; return what is to be refused as it is."""
    dtype = checks.common_dtype(first, second)
    return (first, second) if dtype is None else (first.to(dtype), second.to(dtype))
