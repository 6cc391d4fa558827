"""Learned positions at other sizes than those that they were trained at."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oner_fast.dtypes import statistics_dtype


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
    if positions.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        resampled: Tensor = _Resample.apply(positions, old, grid)
        return resampled
    return _resample(positions, old, grid)


def _resample(positions: Tensor, old: int, grid: int) -> Tensor:
    exact = positions.to(statistics_dtype(positions))
    image = exact.unflatten(0, (old, old)).permute(2, 0, 1).unsqueeze(0)
    image = F.interpolate(image, size=(grid, grid), mode="bicubic", antialias=True)
    return image.squeeze(0).permute(1, 2, 0).flatten(0, 1).to(positions.dtype)


class _Resample(torch.autograd.Function):
    """Resample as `_resample`, with products of matrices for the gradient.

    The gradient of PyTorch's interpolation adds atomically on CUDA, which deterministic algorithms refuse.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(positions: Tensor, old: int, grid: int) -> Tensor:
        return _resample(positions, old, grid)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
        _, ctx.old, ctx.grid = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        wide = grad.to(statistics_dtype(grad)).unflatten(0, (ctx.grid, ctx.grid))
        # [old, grid]: the weight of each old row in each new one. Channel i is a picture whose row i alone is 1.
        rows = torch.eye(ctx.old, dtype=wide.dtype, device=wide.device).unsqueeze(-1).repeat(1, 1, ctx.old)
        size = (ctx.grid, ctx.old)
        weights = F.interpolate(rows.unsqueeze(0), size=size, mode="bicubic", antialias=True)[0, :, :, 0]
        with torch.autocast(wide.device.type, enabled=False):
            found = torch.einsum("ig,jh,ghd->ijd", weights, weights, wide)
        return found.flatten(0, 1).to(grad.dtype), None, None


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
