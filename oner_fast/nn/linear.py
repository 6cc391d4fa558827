"""A linear layer for packed batches, whose number of rows differs at each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TILE = 64


class Linear(nn.Linear):
    """`nn.Linear` with the same parameters and result; in bfloat16 on the CPU its products have few shapes.

    oneDNN compiles and keeps a kernel for each shape of a bfloat16 product, and the number of rows of a packed batch
    differs at each step. Without this layer, more than half of the products' time is compilation, and memory grows at
    each step.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Compute (T, in_features) -> (T, out_features)."""
        return packed_linear(input, self.weight, self.bias)


def packed_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `F.linear` of (T, in_features) as `Linear` does: (T, out_features)."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
    if input.device.type != "cpu" or dtype != torch.bfloat16 or input.ndim != 2 or input.shape[0] <= _TILE:
        return F.linear(input, weight, bias)
    output: Tensor = _TiledLinear.apply(input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return output


class _TiledLinear(torch.autograd.Function):
    """Compute the rows up to a multiple of the tile in one product, and the last, overlapping tile in another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        if bias is None:
            return _by_tiles(x, weight.shape[0], lambda part, out: torch.mm(part, weight.t(), out=out))
        return _by_tiles(x, weight.shape[0], lambda part, out: torch.addmm(bias, part, weight.t(), out=out))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        to_x = to_weight = None
        if ctx.needs_input_grad[0]:
            to_x = _by_tiles(grad, weight.shape[1], lambda part, out: torch.mm(part, weight, out=out))
        if ctx.needs_input_grad[1]:
            to_weight = _weight_gradient(grad, x)
        return to_x, to_weight, grad.sum(dim=0) if ctx.has_bias else None


def _by_tiles(x: Tensor, width: int, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    whole = x.shape[0] - x.shape[0] % _TILE
    out = x.new_empty(x.shape[0], width)
    product(x[:whole], out[:whole])
    if whole < x.shape[0]:
        out[whole:] = product(x[-_TILE:], x.new_empty(_TILE, width))[whole - x.shape[0] :]
    return out


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    whole = x.shape[0] - x.shape[0] % _TILE
    result = grad[:whole].t() @ x[:whole]
    if whole < x.shape[0]:
        # In the second product the rows of the first are zero.
        tail = grad.new_zeros(_TILE, grad.shape[1])
        tail[whole - x.shape[0] :] = grad[whole:]
        result += tail.t() @ x[-_TILE:]
    return result
