"""Learned positions at other sizes than those that they were trained at."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def resample_grid(positions: Tensor, grid: int) -> Tensor:
    """Resample the positions (N, D) of a square grid, row-major, to `grid` cells a side: (grid**2, D).

    The resampling is bicubic with antialiasing, in float32 at least. A grid of that size is returned as it is.

    Raises:
        ValueError: N is not a square.
    """
    old = round(positions.shape[0] ** 0.5)
    if positions.ndim != 2 or old**2 != positions.shape[0]:
        raise ValueError(f"positions must have shape (N, D) of a square grid, got {tuple(positions.shape)}")
    if old == grid:
        return positions
    exact = positions if positions.dtype == torch.float64 else positions.float()
    image = exact.unflatten(0, (old, old)).permute(2, 0, 1).unsqueeze(0)
    image = F.interpolate(image, size=(grid, grid), mode="bicubic", antialias=True)
    return image.squeeze(0).permute(1, 2, 0).flatten(0, 1).to(positions.dtype)


def lengthen(positions: Tensor, count: int) -> Tensor:
    """Return the positions (L, D) of `count` words: (count, D).

    The rows that there are keep their values, as a word's position counts from the start of the text. Further rows
    repeat the last one, and learn from there.
    """
    kept = positions[:count]
    return torch.cat([kept, kept[-1:].expand(count - len(kept), -1)])


class ResampledGrids:
    """A table of positions at other grids than its own, kept until the table changes."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, tuple[int, torch.device, torch.dtype], Tensor]] = {}

    def __call__(self, positions: Tensor, grid: int) -> Tensor:
        """Return `resample_grid(positions, grid)`; without a gradient to take, from memory where it is there."""
        if (torch.is_grad_enabled() and positions.requires_grad) or not isinstance(positions, nn.Parameter):
            return resample_grid(positions, grid)
        if torch.compiler.is_compiling() or positions.is_inference():
            return resample_grid(positions, grid)
        state = (positions._version, positions.device, positions.dtype)
        kept = self._kept.get(grid)
        if kept is None or kept[0] is not positions or kept[1] != state:
            # An ordinary tensor, so that later calls with gradients may use it too.
            with torch.inference_mode(False), torch.no_grad():
                kept = self._kept[grid] = (positions, state, resample_grid(positions, grid))
        return kept[2]
