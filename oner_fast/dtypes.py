"""Rules about dtypes that ops and kernels share."""

from __future__ import annotations

import torch


def statistics_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype of sums and statistics over `x`: float32, or float64 for a float64 tensor."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return the widest floating dtype of a device: float64, except on Apple's GPUs, which have none."""
    return torch.float32 if device.type == "mps" else torch.float64
