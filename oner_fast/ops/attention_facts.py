"""Facts of a call of the attention ops before it is computed, and reasons why Triton's kernels cannot take one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oner_fast.ops import library
from oner_fast.ops.values import under_autocast


def autocast_dtype(query: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast asks for, or None where it leaves the query as it is."""
    if not under_autocast(query) or query.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(query.device.type)


def why_not_triton(device: str, **facts: Any) -> list[str]:
    """List every reason why Triton's attention cannot take a call on `device` with these facts."""
    found = library.why_not_triton(device)
    if facts.get("dtype") == torch.float64:
        found.append("takes float32, float16 and bfloat16: no float64 enters its tensor cores")
    head_dim = facts.get("head_dim") or 0
    if head_dim > 256:
        found.append(f"takes head dimensions up to 256, not {head_dim}: a tile must fit on the chip")
    elif head_dim > 128 and facts.get("dtype") == torch.float32:
        found.append(f"takes head dimensions of float32 up to 128, not {head_dim}: a tile must fit in registers")
    return found
