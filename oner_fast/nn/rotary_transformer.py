"""The packed pre-norm transformer in EVA-02's style: rotary positions in attention, SwiGLU with an inner norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from oner_fast import ops
from oner_fast.nn.drop_path import BRANCHES
from oner_fast.nn.linear import Linear, packed_linear
from oner_fast.nn.rope import rotate_first
from oner_fast.nn.swiglu import SwiGLU
from oner_fast.nn.transformer import Kept, init_weights


class RotaryAttention(nn.Module):
    """Multi-head attention within packed sequences, with rotated queries and keys; q and v have a bias, k has none."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got width {width} and heads {heads}")
        self.heads = heads
        self.qkv = Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.out = Linear(width, width)

    def forward(
        self, x: Tensor, rotation: Tensor, cu_seqlens: Tensor, longest: int | None = None, kept: Kept | None = None
    ) -> Tensor:
        """Attend within sequences: (T, D), or (R, D) where `kept` names R rows.

        Args:
            x: (T, D).
            rotation: (T, Dh / 2) complex.
            cu_seqlens: (S + 1,) int32, the boundaries of the sequences.
            longest: an upper bound of their lengths.
            kept: the rows to compute.
        """
        width, weight = x.shape[1], self.qkv.weight
        no_bias = torch.zeros_like(self.q_bias)
        if kept is None:
            projected = packed_linear(x, weight, torch.cat([self.q_bias, no_bias, self.v_bias]))
            turned, rest = rotate_first(projected.unflatten(-1, (3, self.heads, -1)), rotation, 2)
            query, key = turned.unbind(1)
        else:
            wanted = packed_linear(x.index_select(0, kept.rows), weight[:width], self.q_bias)
            wanted = wanted.unflatten(-1, (1, self.heads, -1))
            query = rotate_first(wanted, rotation.index_select(0, kept.rows), 1)[0].squeeze(1)
            projected = packed_linear(x, weight[width:], torch.cat([no_bias, self.v_bias]))
            turned, rest = rotate_first(projected.unflatten(-1, (2, self.heads, -1)), rotation, 1)
            key = turned.squeeze(1)
        mixed = ops.varlen_attention(
            query, key, rest.squeeze(1),
            cu_seqlens if kept is None else kept.cu_seqlens, None if kept is None else cu_seqlens,
            max_seqlen_q=longest, max_seqlen_k=longest,
        )  # fmt: skip
        return self.out(mixed.flatten(1))


class RotaryBlock(nn.Module):
    """Compute x + RotaryAttention(LayerNorm(x)), then x + SwiGLU(LayerNorm(x))."""

    def __init__(self, width: int, heads: int, mlp_hidden: int, eps: float) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width, eps)
        self.attention = RotaryAttention(width, heads)
        self.norm_mlp = nn.LayerNorm(width, eps)
        self.mlp = SwiGLU(width, mlp_hidden, eps)

    def forward(
        self,
        x: Tensor,
        rotation: Tensor,
        cu_seqlens: Tensor,
        longest: int | None = None,
        kept: Kept | None = None,
        factors: Tensor | None = None,
    ) -> Tensor:
        """Compute (T, D) -> (T, D), or (R, D) where `kept` names R rows; for the arguments see `RotaryAttention`.

        `factors` (2, T), without `kept`, multiply the two branches of each token.
        """
        mixed = self.attention(self.norm_attention(x), rotation, cu_seqlens, longest, kept)
        x = (x if kept is None else x.index_select(0, kept.rows)) + _scaled(mixed, factors, 0)
        return x + _scaled(self.mlp(self.norm_mlp(x)), factors, 1)


def _scaled(branch: Tensor, factors: Tensor | None, index: int) -> Tensor:
    return branch if factors is None else branch * factors[index].to(branch.dtype).unsqueeze(1)


class RotaryTrunk(nn.Module):
    """`depth` blocks and a final LayerNorm, for packed tokens (T, D)."""

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        mlp_hidden: int,
        eps: float = 1e-6,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(RotaryBlock(width, heads, mlp_hidden, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps)
        self.grad_checkpointing = grad_checkpointing
        self.apply(init_weights)
        # Branches start smaller the deeper they are, so that each adds the same share to the residual stream.
        for layer, block in enumerate(self.blocks, start=1):
            assert isinstance(block, RotaryBlock)
            for out in (block.attention.out, block.mlp.out):
                with torch.no_grad():
                    out.weight.div_(math.sqrt(2 * layer))

    def forward(
        self,
        x: Tensor,
        rotation: Tensor,
        cu_seqlens: Tensor,
        longest: int | None = None,
        kept: Kept | None = None,
        factors: Tensor | None = None,
    ) -> Tensor:
        """Transform x (T, D), the embedded tokens of all sequences, and apply the final norm: (T, D).

        With `kept`, returns only these R rows, (R, D); the last block computes only keys and values of the others.
        Without it, `factors` (2 * depth, T) may multiply the branches of each token (see `oner_fast.nn.drop_path`).
        """
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            branches = None if factors is None else factors[BRANCHES * index : BRANCHES * (index + 1)]
            given = (x, rotation, cu_seqlens, longest, kept if index == last else None, branches)
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, *given, use_reentrant=False)
            else:
                x = block(*given)
        return self.norm(x)
