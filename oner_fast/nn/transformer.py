"""The packed pre-norm transformer: all sequences of a step in one (T, D) tensor, without padding."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from oner_fast import ops
from oner_fast.nn.linear import Linear, packed_linear


class Sequences(NamedTuple):
    """Sequences of a packed (T, D) tensor, and the keys that each attends to.

    Sequence i attends to the rows `key_rows[cu_seqlens_k[i]:cu_seqlens_k[i + 1]]` of the same layer's input, with
    `key_rows` (T,) int64 and `cu_seqlens_k` (S + 1,). Where both are None, each sequence attends to itself. `longest`
    is an upper bound of all lengths, known to the host; without it, implementations that need one are not chosen.
    """

    cu_seqlens: Tensor
    key_rows: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    longest: int | None = None


class Kept(NamedTuple):
    """Rows to compute in the last block.

    `rows` (R,) int64 are ascending, and `cu_seqlens` (S + 1,) int32 are their boundaries by sequence.
    """

    rows: Tensor
    cu_seqlens: Tensor


class Attention(nn.Module):
    """Multi-head attention within packed sequences; (T, D) -> (T, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got width {width} and heads {heads}")
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)

    def forward(self, x: Tensor, sequences: Sequences, kept: Kept | None = None) -> Tensor:
        """Attend from x (T, D) to the keys that `sequences` gives: (T, D), or (R, D) where `kept` names R rows."""
        cu_seqlens_q, cu_seqlens_k = sequences.cu_seqlens, sequences.cu_seqlens_k
        if kept is None:
            query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        else:
            width, weight, bias = x.shape[1], self.qkv.weight, self.qkv.bias
            query = packed_linear(x.index_select(0, kept.rows), weight[:width], bias[:width])
            query = query.unflatten(-1, (self.heads, -1))
            key, value = packed_linear(x, weight[width:], bias[width:]).unflatten(-1, (2, self.heads, -1)).unbind(1)
            cu_seqlens_q, cu_seqlens_k = kept.cu_seqlens, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        if sequences.key_rows is not None:
            key, value = key.index_select(0, sequences.key_rows), value.index_select(0, sequences.key_rows)
        longest = sequences.longest
        mixed = ops.varlen_attention(
            query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=longest, max_seqlen_k=longest
        )
        return self.out(mixed.flatten(1))


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = Linear(width, hidden)
        self.activation = nn.GELU()
        self.out = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Compute (T, D) -> (T, D)."""
        return self.out(self.activation(self.up(x)))


class Block(nn.Module):
    """Compute x + Attention(LayerNorm(x)), then x + Mlp(LayerNorm(x))."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, sequences: Sequences, kept: Kept | None = None) -> Tensor:
        """Compute (T, D) -> (T, D), or (R, D) where `kept` names R rows."""
        mixed = self.attention(self.norm_attention(x), sequences, kept)
        x = (x if kept is None else x.index_select(0, kept.rows)) + mixed
        return x + self.mlp(self.norm_mlp(x))


class Trunk(nn.Module):
    """The one trunk: `depth` blocks and a final LayerNorm, for packed tokens (T, D) of any modality."""

    def __init__(
        self, width: int, depth: int, heads: int, mlp_ratio: float = 4.0, grad_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.grad_checkpointing = grad_checkpointing
        self.apply(init_by_fan_in)
        # Residual branches start small, so that the sum of 2 x depth branches keeps the scale of the input.
        for module in self.modules():
            if isinstance(module, (Attention, Mlp)):
                init_by_fan_in(module.out, 1 / math.sqrt(2 * depth))

    def forward(self, x: Tensor, sequences: Sequences, kept: Kept | None = None) -> Tensor:
        """Transform x (T, D), the embedded tokens of all sequences, and apply the final norm: (T, D).

        With `kept`, returns only these R rows, (R, D); the last block computes only keys and values of the others.
        """
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            wanted = kept if index == last else None
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, sequences, wanted, use_reentrant=False)
            else:
                x = block(x, sequences, wanted)
        return self.norm(x)


def init_by_fan_in(module: nn.Module, gain: float = 1.0) -> None:
    """Set the weight of a linear map to truncated normal of standard deviation gain / sqrt(fan-in), its bias to zero.

    An output then varies as an input does, at any width. 0.02 is that value at a width of 2,500, and a third of it at
    256, where towers learn far slower (our choice; docs/decisions/059).
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=gain / math.sqrt(module.in_features))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_weights(module: nn.Module) -> None:
    """Set linear and embedding weights to truncated normal 0.02, and biases to zero."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
