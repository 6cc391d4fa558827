"""Differentiable exchanges between the ranks of a process group (gloo or NCCL)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return gather_rows_without_gradient(rows, sizes, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        gradient = grads[0].contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        rank = dist.get_rank(ctx.group)
        start = sum(ctx.sizes[:rank])
        return gradient[start : start + ctx.sizes[rank]].clone(), None, None


class _SumLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.world = dist.get_world_size(group)
        total = share.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # DDP divides by the number of ranks W, so each rank returns W times its share.
        return grads[0] * ctx.world, None


_alike: ContextVar[bool] = ContextVar("ranks_alike", default=False)


@contextmanager
def ranks_alike() -> Iterator[None]:
    """Inside, take the ranks of a group to call each op alike: as many rows, ids or none, gradients or none.

    That holds for the ranks of a training, whose batches are of one size. Ops with `group` then tell each other nothing
    beforehand, for which the host would wait for the device. Ranks that do differ wait for each other, or fail in a
    collective; with `ONER_FAST_DEBUG=1` they are compared, and the error says what differs.
    """
    before = _alike.set(True)
    try:
        yield
    finally:
        _alike.reset(before)


def exchanged(numbers: Sequence[int], device: torch.device, group: dist.ProcessGroup) -> list[tuple[int, ...]]:
    """Exchange a few integers that every rank of `group` has, and return for each of them its value on every rank.

    The host waits for the device, except within `ranks_alike`.
    """
    debugging = os.environ.get("ONER_FAST_DEBUG", "0") == "1"
    if _alike.get() and not debugging:
        return [(number,) * dist.get_world_size(group) for number in numbers]
    found = [torch.zeros(len(numbers), dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, torch.tensor(numbers, dtype=torch.int64, device=device), group=group)
    by_rank = [tuple(each.tolist()) for each in found]
    if _alike.get() and len(set(by_rank)) > 1:
        raise ValueError(f"the ranks must call alike within ranks_alike, got (rows, ...) of {by_rank} by rank")
    return list(zip(*by_rank, strict=True))


def gather_rows_without_gradient(rows: Tensor, sizes: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
    """Concatenate the ranks' (n_r, ...) tensors in rank order; local sizes may differ."""
    largest = max(sizes)
    if min(sizes) == largest:
        found = rows.new_empty((sum(sizes), *rows.shape[1:]))
        dist.all_gather_into_tensor(found, rows.contiguous(), group=group)
        return found
    padded = rows.new_zeros((largest, *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def gather_rows(rows: Tensor, sizes: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
    """Concatenate the ranks' (n_r, ...) tensors in rank order, with a gradient.

    The gradient of a rank's rows is the sum over the ranks that used them.
    """
    gathered: Tensor = _GatherRows.apply(rows, sizes, group)
    return gathered


def sum_loss(share: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum the ranks' shares of a loss; the gradient is W times that of the share (W ranks), as DDP's mean needs."""
    total: Tensor = _SumLoss.apply(share, group)
    return total
