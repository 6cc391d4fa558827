"""Captions that a batch holds more than once: their share, and what they are in the contrast."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from oner_fast.data.caption_ids import NO_CAPTION
from oner_fast.train.config.common import SameCaption


def ids_of_captions(ids: Tensor, same_caption: SameCaption) -> dict[str, Any]:
    """Return the arguments of `oner_fast.ops.mixup_info_nce` that say what pairs with the same caption are."""
    return {} if same_caption == "negative" else {"query_ids": ids, "same": same_caption}


def repeated_share(ids: Tensor) -> Tensor:
    """Return the share of pairs, over all ranks, whose caption another pair of the step has: 0-d float32.

    Every rank must call it with as many ids.

    Args:
        ids: `caption_ids` of this rank's pairs, (B,) int64.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        parts = [torch.empty_like(ids) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, ids.contiguous())
        ids = torch.cat(parts)
    found = ids.sort().values
    equal = (found[1:] == found[:-1]) & (found[1:] != NO_CAPTION)
    repeated = torch.zeros_like(found, dtype=torch.bool)
    repeated[1:] |= equal
    repeated[:-1] |= equal
    return repeated.float().mean()
