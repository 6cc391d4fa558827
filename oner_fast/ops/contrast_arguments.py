"""Arguments that mixup_info_nce and sigmoid_loss prepare in the same way before they call raw ops."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from oner_fast.dtypes import statistics_dtype, widest_dtype
from oner_fast.ops import contrast_checks
from oner_fast.ops.collectives import exchanged
from oner_fast.ops.rank_blocks import Ranks, ranks_of
from oner_fast.ops.unit_rows import unit_rows


def ranks_that_call(
    op: str, query: Tensor, key: Tensor, key_other: Tensor | None, mix: Tensor | float, kind_of_ids: int,
    group: dist.ProcessGroup | None,
) -> tuple[Ranks | None, bool]:  # fmt: skip
    """Return the ranks (None without a group), and whether any rank wants the gradient of its keys.

    The ranks tell each other their numbers of rows and their kinds of ids. Every rank raises ValueError where those
    kinds differ.
    """
    if group is None:
        return None, False
    contrast_checks.matrix(op, "query", query)
    own = (key, *(() if key_other is None else (key_other, mix)))
    wanted = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in own)
    sizes, wanting, kinds = exchanged((query.shape[0], wanted, kind_of_ids), query.device, group)
    contrast_checks.ids_of_ranks(op, kinds)
    return ranks_of(sizes, group, query.shape[1] * query.element_size()), any(wanting)


def weight_of_partner(partner: Tensor | None, partner_weight: Tensor | None, query: Tensor) -> Tensor | None:
    """Return the weight of each row's partner (n,), in the dtype of the statistics; None without partners."""
    if partner is None:
        return None
    dtype = statistics_dtype(query)
    return query.new_full(partner.shape, 0.5, dtype=dtype) if partner_weight is None else partner_weight.to(dtype)


def sent(x: Tensor, other: Tensor | None, mix: Tensor, inverse_norm: Tensor | None) -> Tensor:
    """Return the rows (n, D) of the logits as they are sent to other ranks: contiguous, in the dtype of x."""
    if other is None and inverse_norm is None:
        return x.contiguous()
    return unit_rows(x, other, mix, inverse_norm).to(x.dtype).contiguous()


def number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Fill a 0-d tensor on its device; a copy from the host would wait for the device."""
    given = value if isinstance(value, (float, torch.SymInt, torch.SymFloat)) else float(value)
    return torch.full((), given, dtype=dtype, device=device)


def one_number(value: Tensor | float, device: torch.device) -> Tensor:
    """Return a number, or the number of a tensor of shape () or (1,), as a 0-d tensor on `device`."""
    if isinstance(value, Tensor):
        return (value.reshape(()) if value.ndim else value).to(device)
    return number(value, widest_dtype(device), device)


def share_of_other(mix: Tensor | float, query: Tensor) -> Tensor:
    """Return `mix` as a tensor, () or (n,), in the dtype of the statistics."""
    dtype = statistics_dtype(query)
    return mix.to(query.device, dtype) if isinstance(mix, Tensor) else number(mix, dtype, query.device)


def gradient_of_mix(mix: Tensor, like: Tensor, *each_row: Tensor | None) -> Tensor:
    """Add the gradients of the mix of each row (n,), those of the queries and those of the keys.

    None stands for a side that is not mixed. The result has the shape and the dtype of `mix`; `like` (n,) gives the
    zeros where no side is mixed.
    """
    parts = [x for x in each_row if x is not None]
    total = torch.stack(parts).sum(0) if parts else torch.zeros_like(like)
    return (total if mix.ndim else total.sum()).to(mix.dtype)
