"""Resample a vision transformer's learned positions and patch embedding to another grid and another patch size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from oner_fast.nn.positions import resample_grid


def resample_positions(positions: Tensor, grid: int) -> Tensor:
    """Resample learned positions (1, 1 + N, D), [CLS] first, to `grid` cells a side: (1, 1 + grid**2, D).

    The cells are resampled by `oner_fast.nn.positions.resample_grid`. Raises ValueError where N is not a square.
    """
    old = round((positions.shape[1] - 1) ** 0.5) if positions.ndim == 3 else 0
    if positions.ndim != 3 or 1 + old**2 != positions.shape[1]:
        raise ValueError(f"pos_embed must have shape (1, 1 + N, D) of a square grid, got {tuple(positions.shape)}")
    return torch.cat([positions[:, :1], resample_grid(positions[0, 1:], grid).unsqueeze(0)], dim=1)


def resample_patches(weight: Tensor, channels: int, patch_size: int) -> Tensor:
    """Resample a patch embedding's weight (D, C * p * p) to another patch size q: (D, C * q * q).

    The new weight gives a patch that was resized from p to q pixels the embedding that the old weight gives the patch
    before (FlexiViT's pseudo-inverse of the bilinear resizing, in float64): exactly where q >= p, and in the least
    squares over patches of independent pixels where q < p. A patch of that size is returned as it is. Raises ValueError
    where the weight is not one of square patches.
    """
    old = round((weight.shape[1] / channels) ** 0.5) if weight.ndim == 2 else 0
    if weight.ndim != 2 or channels * old**2 != weight.shape[1]:
        raise ValueError(f"weight must have shape (D, {channels} * p * p), got {tuple(weight.shape)}")
    if old == patch_size:
        return weight
    pixels = torch.eye(old**2, dtype=torch.float64, device=weight.device).view(old**2, 1, old, old)
    resized = F.interpolate(pixels, size=(patch_size, patch_size), mode="bilinear", antialias=True).flatten(1)
    # Row i of `resized` is pixel i after the resizing, so that resized @ new = old for each filter.
    filters = weight.double().view(-1, old**2) @ torch.linalg.pinv(resized).t()
    return filters.view(len(weight), -1).to(weight.dtype)
