"""Two-dimensional rotary positions: each pair of a head's numbers rotates by an angle that its token's cell decides.

The first half of the pairs turns with the row of the cell, the second half with its column. A pair is two neighbours
(2 i, 2 i + 1), as in EVA-02, so that its weights fit unchanged; one complex product turns a whole head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def rope_angles(
    grid: int, head_dim: int, theta: float = 10000.0, rope_grid: int = 16, device: torch.device | None = None
) -> Tensor:
    """Compute the angle of each pair in each cell of a `grid` x `grid` image: (grid**2, head_dim / 2) float64.

    Cells are in row-major order. Place i of an axis counts as i * rope_grid / grid, so that each resolution spans the
    same angles. Frequency f of the head_dim / 4 of an axis is theta**(-4 f / head_dim). Raises ValueError where
    head_dim is not a multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"rotary positions of two axes need a head_dim that is a multiple of 4, got {head_dim}")
    frequencies = theta ** (-torch.arange(head_dim // 4, dtype=torch.float64, device=device) * 4 / head_dim)
    axis = torch.arange(grid, dtype=torch.float64, device=device) * (rope_grid / grid)
    angles = axis.unsqueeze(1) * frequencies  # [G, Dh / 4]
    shape = (grid, grid, head_dim // 4)
    return torch.cat([angles.unsqueeze(1).expand(shape), angles.unsqueeze(0).expand(shape)], dim=-1).flatten(0, 1)


class RotaryPositions(nn.Module):
    """Table of one rotation for each cell and the identity for [CLS]; a batch gathers those of its tokens.

    The table stays float64 when its module is cast, and is not part of a state dict.
    """

    table: Tensor

    def __init__(self, grid: int, head_dim: int, theta: float = 10000.0, rope_grid: int = 16) -> None:
        super().__init__()
        self.grid, self.head_dim, self.theta, self.rope_grid = grid, head_dim, theta, rope_grid
        self.register_buffer("table", self._table(grid, None), persistent=False)
        self._others: dict[int, Tensor] = {}

    def forward(self, places: Tensor, dtype: torch.dtype, grid: int | None = None) -> Tensor:
        """Gather the rotations for places (T,) int64, 0 for [CLS] and 1 + cell for a patch: (T, Dh / 2).

        The result is complex64, or complex128 for float64. `grid` is the number of cells along a side of the images
        where it is another than the module's own; its table is kept.
        """
        rows = self._table_of(grid or self.grid).index_select(0, places)
        return torch.view_as_complex(rows if dtype == torch.float64 else rows.float())

    def _table_of(self, grid: int) -> Tensor:
        if grid == self.grid:
            return self.table
        if grid not in self._others:
            with torch.inference_mode(False):  # an ordinary tensor, for later calls with gradients too
                self._others[grid] = self._table(grid, self.table.device)
        return self._others[grid]

    def _table(self, grid: int, device: torch.device | None) -> Tensor:
        angles = rope_angles(grid, self.head_dim, self.theta, self.rope_grid, device)
        angles = torch.cat([torch.zeros_like(angles[:1]), angles])
        return torch.stack([angles.cos(), angles.sin()], dim=-1)  # [1 + N, Dh / 2, 2]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryPositions:
        super()._apply(fn, recurse)
        self._others = {}
        # On the module's new device, and in float64 also after a cast.
        self.table = self._table(self.grid, self.table.device)
        return self


def rotate_first(x: Tensor, rotation: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Turn the first `parts` of x (T, P, H, Dh) by rotation (T, Dh / 2), complex.

    Products are float32 for half types. Only the rotation is kept for the gradient.

    Returns:
        The turned part (T, parts, H, Dh), in x's dtype, and the others (T, P - parts, H, Dh), a view.
    """
    if x.requires_grad and torch.is_grad_enabled():
        turned, rest = _RotateFirst.apply(x, rotation, parts)
        return turned, rest
    return _turn(x[:, :parts], rotation), x[:, parts:]


class _RotateFirst(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Tensor, parts: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rotation)
        ctx.parts, ctx.shape = parts, x.shape
        return _turn(x[:, :parts], rotation), x[:, parts:]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        turned, rest = grads
        grad = turned.new_empty(ctx.shape)
        grad[:, : ctx.parts] = _turn(turned, ctx.saved_tensors[0].conj().resolve_conj())
        grad[:, ctx.parts :] = rest
        return grad, None, None


def _turn(x: Tensor, rotation: Tensor) -> Tensor:
    exact = x if x.dtype == torch.float64 else x.float()
    pairs = torch.view_as_complex(exact.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation[:, None, None]).flatten(-2).to(x.dtype)
