"""Checks of the arguments of `oner_fast.ops.distill_info_nce`, made before any work is done."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from oner_fast.ops import checks
from oner_fast.ops.values import inside_vmap

_OP = "distill_info_nce"


def options(symmetric: bool, normalized: bool, group: dist.ProcessGroup | None) -> None:
    """Check the options before any rank sends anything."""
    checks.flag(_OP, "symmetric", symmetric)
    checks.flag(_OP, "normalized", normalized)
    if group is None:
        return
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{_OP}: group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")
    if inside_vmap():
        raise ValueError(f"{_OP}: group= lets ranks exchange rows, which torch.vmap cannot batch; loop over the batch")


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
    checks.matrix(_OP, "query", query)
    rows = query.shape[0]
    if rows == 0 and total in (None, 0):
        raise ValueError(f"{_OP}: query must hold at least one row, got shape {tuple(query.shape)}")
    checks.matrix(_OP, "teacher_query", teacher_query)
    for name, tensor, width in (("key", key, query.shape[1]), ("teacher_key", teacher_key, teacher_query.shape[1])):
        checks.matrix(_OP, name, tensor)
        checks.shape(_OP, name, tensor, "(N, D)", (rows, width))
    checks.shape(_OP, "teacher_query", teacher_query, "(N, D)", (rows, None))
    checks.one_number(_OP, "logit_scale", logit_scale, query)
    checks.one_number(_OP, "teacher_logit_scale", teacher_logit_scale, query)
    checks.same_device(_OP, "query", query, key=key, teacher_query=teacher_query, teacher_key=teacher_key)


def same_dtype(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Cast two sides to their common dtype, by the rule of `mixup_info_nce`; return what is to be refused as it is."""
    dtype = checks.common_dtype(first, second)
    return (first, second) if dtype is None else (first.to(dtype), second.to(dtype))
