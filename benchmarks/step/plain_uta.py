"""UTA's student in plain PyTorch, written without this library; its parameters have our student's names and shapes.

All images keep the same number of patches, so that no token is padding. Patches are embedded by a convolution and the
hidden ones dropped; attention is scaled_dot_product_attention.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oner_fast.benchmarks.step.baseline_model import wide
from oner_fast.models.uta import UTAConfig


class PatchEmbedding(nn.Module):
    """Embed the kept patches of (B, 3, S, S) uint8 images with their positions: (B, K, D)."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: UTAConfig) -> None:
        super().__init__()
        self.patch = config.patch_size
        self.project = nn.Linear(3 * config.patch_size**2, config.width)
        self.positions = nn.Parameter(torch.empty(config.cells, config.width))
        self.register_buffer("mean", torch.tensor(config.image_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.image_std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor, kept: Tensor) -> Tensor:
        """Embed the patches `kept` (B, K)."""
        pixels = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        weight = self.project.weight.view(-1, 3, self.patch, self.patch)
        tokens = F.conv2d(pixels, weight, self.project.bias, self.patch).flatten(2).transpose(1, 2) + self.positions
        return tokens.gather(1, kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def turned_pairs(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn (B, H, L, Dh) by one complex product with rotation (B, 1, L, Dh / 2), the fastest way in eager code."""
    pairs = torch.view_as_complex(wide(x).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


def turned_halves(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn (B, H, L, Dh) by sines and cosines (2, B, 1, L, Dh), which torch.compile fuses into one loop."""
    swapped = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return (wide(x) * rotation[0] + wide(swapped) * rotation[1]).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention with rotated queries and keys; q and v have a bias."""

    def __init__(self, width: int, heads: int, paired: bool) -> None:
        super().__init__()
        self.heads, self.turn = heads, turned_pairs if paired else turned_halves
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Attend within each of the sequences x (B, L, D)."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        joint = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1))
        query, key, value = joint.permute(2, 0, 3, 1, 4)
        query, key = self.turn(query, rotation), self.turn(key, rotation)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Compute out(LayerNorm(SiLU(gate(x)) * value(x)))."""

    def __init__(self, width: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.gate_value, self.norm = nn.Linear(width, 2 * hidden), nn.LayerNorm(hidden, eps)
        self.out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, L, D)."""
        gate, value = self.gate_value(x).chunk(2, dim=-1)
        return self.out(self.norm(F.silu(gate) * value))


class Block(nn.Module):
    """Compute x + Attention(LayerNorm(x)), then x + SwiGLU(LayerNorm(x)); (B, L, D)."""

    def __init__(self, config: UTAConfig, paired: bool) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(config.width, config.layer_norm_eps)
        self.attention = Attention(config.width, config.heads, paired)
        self.norm_mlp = nn.LayerNorm(config.width, config.layer_norm_eps)
        self.mlp = SwiGLU(config.width, config.mlp_hidden, config.layer_norm_eps)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Transform x (B, L, D)."""
        x = x + self.attention(self.norm_attention(x), rotation)
        return x + self.mlp(self.norm_mlp(x))


class Trunk(nn.Module):
    """Blocks and a final LayerNorm."""

    def __init__(self, config: UTAConfig, paired: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, paired) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, config.layer_norm_eps)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Transform x (B, L, D)."""
        for block in self.blocks:
            x = block(x, rotation)
        return self.norm(x)


class PlainUTA(nn.Module):
    """The student; `prepare` makes the rotations of a batch's kept patches, which stay for all its steps.

    Args:
        config: the sizes.
        paired: turn queries and keys by complex products, for eager code.
    """

    def __init__(self, config: UTAConfig, paired: bool) -> None:
        super().__init__()
        self.config, self.paired = config, paired
        self.patch_embedding = PatchEmbedding(config)
        self.cls_token = nn.Parameter(torch.empty(config.width))
        self.cls_position = nn.Parameter(torch.empty(config.width))
        self.trunk = Trunk(config, paired)
        self.head = nn.Linear(config.width, config.embed_dim)

    def prepare(self, kept: Tensor) -> None:
        """Make the rotations of [CLS], which does not turn, and of the patches `kept` (B, K)."""
        c = self.config
        dim = c.width // c.heads
        frequencies = c.rope_theta ** (-torch.arange(dim // 4, dtype=torch.float64) * 4 / dim)
        row, column = kept // c.grid, kept % c.grid
        angles = torch.cat([at.unsqueeze(-1) * (c.rope_grid / c.grid) * frequencies for at in (row, column)], dim=-1)
        angles = F.pad(angles, (0, 0, 1, 0)).unsqueeze(1)  # [B, 1, 1 + K, Dh / 2]
        made: Any
        if self.paired:
            made = torch.polar(torch.ones_like(angles), angles)
            made = made if self.cls_token.dtype == torch.float64 else made.to(torch.complex64)
        else:
            angles = angles.repeat_interleave(2, dim=-1)
            made = torch.stack([angles.cos(), angles.sin()]).to(self.cls_token.dtype)
        self.rotation: Tensor = made

    def forward(self, images: Tensor, kept: Tensor) -> Tensor:
        """Compute the outputs of [CLS] and of the patches `kept` (B, K): (B, 1 + K, E)."""
        tokens = self.patch_embedding(images, kept)
        first = (self.cls_token + self.cls_position).expand(tokens.shape[0], 1, -1)
        return self.head(self.trunk(torch.cat([first, tokens], dim=1), self.rotation))
