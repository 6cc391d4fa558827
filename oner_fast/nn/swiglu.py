"""SwiGLU with a LayerNorm before its output projection, as in EVA-02."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oner_fast.nn.linear import Linear


class SwiGLU(nn.Module):
    """Compute out(LayerNorm(SiLU(gate(x)) * value(x))), with biases; (T, D) -> (T, D).

    Gate and value are one product: the first `hidden` rows of `gate_value` belong to the gate.
    """

    def __init__(self, width: int, hidden: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.gate_value = Linear(width, 2 * hidden)
        self.norm = nn.LayerNorm(hidden, eps)
        self.out = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Compute (T, D) -> (T, D)."""
        return self.out(self.norm(silu_gate(self.gate_value(x))))


def silu_gate(gate_value: Tensor) -> Tensor:
    """Multiply SiLU of the first half of (T, 2 F) by the second half: (T, F). Only the input is kept for gradients."""
    if gate_value.requires_grad and torch.is_grad_enabled():
        gated: Tensor = _SiluGate.apply(gate_value)
        return gated
    gate, value = gate_value.chunk(2, dim=-1)
    return F.silu(gate) * value


class _SiluGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_value: Tensor) -> Tensor:
        ctx.save_for_backward(gate_value)
        gate, value = gate_value.chunk(2, dim=-1)
        return F.silu(gate).mul_(value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_value,) = ctx.saved_tensors
        gate, value = gate_value.chunk(2, dim=-1)
        to_gate_value = torch.empty_like(gate_value)
        to_gate, to_value = to_gate_value.chunk(2, dim=-1)
        to_value.copy_(F.silu(gate).mul_(grads[0]))
        to_gate.copy_(torch.ops.aten.silu_backward(grads[0] * value, gate))
        return to_gate_value
