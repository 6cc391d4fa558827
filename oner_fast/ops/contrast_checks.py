"""Checks of the arguments of the contrasts, `mixup_info_nce` and `sigmoid_loss`, made before any work is done."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from oner_fast.ops import checks
from oner_fast.ops.values import inside_vmap


def matrix(op: str, name: str, x: Tensor) -> None:
    """Raise unless `x` is a floating tensor (N, D)."""
    checks.floating(op, name, checks.is_tensor(op, name, x))
    checks.shape(op, name, x, "(N, D)", (None, None))


def rows_of_one_dtype(
    query: Tensor, key: Tensor, query_other: Tensor | None, key_other: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Cast the rows of a contrast to their common dtype; return what is no tensor as it is, to be refused."""
    dtype = checks.common_dtype(query, key, query_other, key_other)
    if dtype is None:
        return query, key, query_other, key_other
    query_other, key_other = (None if x is None else x.to(dtype) for x in (query_other, key_other))
    return query.to(dtype), key.to(dtype), query_other, key_other


def arguments(
    op: str,
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor | float,
    query_other: Tensor | None,
    key_other: Tensor | None,
    mix: Tensor | float,
    partner: Tensor | None,
    partner_weight: Tensor | None,
    logit_bias: Tensor | float | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    total: int | None,
) -> None:
    """Check the arguments of `mixup_info_nce` or `sigmoid_loss`; `total` counts the rows of all ranks (None: no group).

    With a group, `matrix` comes first: the ranks tell each other their numbers of rows.
    """
    matrix(op, "query", query)
    rows, width = query.shape
    if rows == 0 and total in (None, 0):
        raise ValueError(f"{op}: query must hold at least one row, got shape {tuple(query.shape)}")
    for name, tensor in (("key", key), ("query_other", query_other), ("key_other", key_other)):
        if tensor is None and name != "key":
            continue
        checks.floating(op, name, checks.is_tensor(op, name, tensor))
        checks.shape(op, name, tensor, "(N, D)", (rows, width))  # type: ignore[arg-type]
    one_number(op, "logit_scale", logit_scale, query)
    if logit_bias is not None:
        one_number(op, "logit_bias", logit_bias, query)
    if isinstance(mix, Tensor):
        if checks.is_tensor(op, "mix", mix).dtype not in checks.FLOATING:
            raise TypeError(f"{op}: mix must be a number or a floating tensor, got {mix.dtype}")
        if mix.ndim:
            checks.shape(op, "mix", mix, "(N,)", (rows,))
        else:
            _same_device_or_cpu(op, "mix", mix, query)
    else:
        checks.number(op, "mix", mix, "a number or a (N,) tensor")
    if partner_weight is not None and partner is None:
        raise ValueError(f"{op}: partner_weight was given without partner")
    if partner is not None:
        checks.shape(op, "partner", checks.is_tensor(op, "partner", partner), "(N,)", (rows,))
        checks.indices(op, "partner", partner, rows if total is None else total)
    if partner_weight is not None:
        if checks.is_tensor(op, "partner_weight", partner_weight).dtype not in checks.FLOATING:
            raise TypeError(f"{op}: partner_weight must be floating, got {partner_weight.dtype}")
        checks.shape(op, "partner_weight", partner_weight, "(N,)", (rows,))
    for name, ids in (("query_ids", query_ids), ("key_ids", key_ids)):
        if ids is not None:
            checks.shape(op, name, ids, "(N,)", (rows,))
    checks.same_device(
        op, "query", query, key=key, query_other=query_other, key_other=key_other, partner=partner,
        partner_weight=partner_weight, mix=mix if isinstance(mix, Tensor) and mix.ndim else None, query_ids=query_ids,
        key_ids=key_ids,
    )  # fmt: skip


def one_number(op: str, name: str, value: Tensor | float, query: Tensor) -> None:
    """Raise unless `value` is a finite number, or a floating tensor of shape () or (1,), whose value is not read."""
    if not isinstance(value, Tensor):
        checks.number(op, name, value, "a number or a tensor of one number")
        return
    if checks.is_tensor(op, name, value).dtype not in checks.FLOATING:
        raise TypeError(f"{op}: {name} must be a number or a floating tensor, got {value.dtype}")
    if value.ndim > 1 or value.numel() != 1:
        raise ValueError(f"{op}: {name} must have shape () or (1,), got {tuple(value.shape)}")
    _same_device_or_cpu(op, name, value, query)


def _same_device_or_cpu(op: str, name: str, value: Tensor, query: Tensor) -> None:
    """Raise ValueError unless a tensor of one number is on the device of the query, or on the CPU."""
    if value.device.type != "cpu":
        checks.same_device(op, "query", query, **{name: value})


def options(
    op: str, normalized: bool, partner: Tensor | None, query_ids: Tensor | None, key_ids: Tensor | None, same: str,
    group: dist.ProcessGroup | None,
) -> None:  # fmt: skip
    """Check the options of `mixup_info_nce` or `sigmoid_loss` before any rank sends anything."""
    checks.flag(op, "normalized", normalized)
    if not isinstance(same, str):
        raise TypeError(f"{op}: same must be 'positive' or 'ignore', got {type(same).__name__}")
    if same not in ("positive", "ignore"):
        raise ValueError(f"{op}: same must be 'positive' or 'ignore', got {same!r}")
    for name, ids in (("query_ids", query_ids), ("key_ids", key_ids)):
        if ids is not None and checks.is_tensor(op, name, ids).dtype != torch.int64:
            raise TypeError(f"{op}: {name} must be int64, got {ids.dtype}; pass {name}.long()")
    if key_ids is not None and query_ids is None:
        raise ValueError(f"{op}: key_ids was given without query_ids; alone, query_ids serves both sides")
    if query_ids is not None and partner is not None:
        raise ValueError(f"{op}: partner and query_ids both say what the targets of a row are; give one of them")
    process_group(op, group)


def process_group(op: str, group: dist.ProcessGroup | None) -> None:
    """Raise unless `group` is None, or a process group outside `torch.vmap`."""
    if group is None:
        return
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{op}: group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")
    if inside_vmap():
        raise ValueError(f"{op}: group= lets ranks exchange rows, which torch.vmap cannot batch; loop over the batch")


_KINDS_OF_IDS = ("no ids", "same='ignore'", "same='positive'")


def kind_of_ids(query_ids: Tensor | None, same: str) -> int:
    """Return the number by which ranks tell each other what they were given."""
    return 0 if query_ids is None else 1 if same == "ignore" else 2


def ids_of_ranks(op: str, kinds: Sequence[int]) -> None:
    """Raise ValueError on every rank unless all were given ids for the same purpose, or none."""
    if len(set(kinds)) > 1:
        raise ValueError(
            f"{op}: every rank must pass query_ids with the same `same`, or none of them; got "
            + ", ".join(f"{_KINDS_OF_IDS[kind]} on rank {rank}" for rank, kind in enumerate(kinds))
        )
