"""OneR's tower out of PyTorch's own modules; this file imports torch alone, and is copied into exported folders."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainTower(nn.Module):
    """One transformer for images, texts, and images with texts. Embeddings are L2-normalised.

    A sequence is [CLS], the patches row by row where there is an image, and the words where there is a text.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: dict[str, Any]) -> None:
        """Make a tower from what an exported `config.json` holds."""
        super().__init__()
        width, patch = config["width"], config["patch_size"]
        self.cls = nn.Parameter(torch.zeros(width))
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.patch_positions = nn.Parameter(torch.zeros((config["image_size"] // patch) ** 2, width))
        self.words = nn.Embedding(config["vocab_size"], width)
        self.word_positions = nn.Parameter(torch.zeros(config["max_text_tokens"], width))
        self.trunk = _trunk(config)
        self.head = _head(config)
        self.text_trunk = None if config["shared_trunk"] else _trunk(config)
        self.text_head = None if config["shared_head"] else _head(config)
        self.register_buffer("mean", torch.tensor(config["image_mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(config["image_std"]).view(3, 1, 1))

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Embed images (B, 3, S, S), uint8 or floats in [0, 1]: (B, E)."""
        return F.normalize(self.head(self._run(self._image(pixels))[:, 0]), dim=-1)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed texts, ids (B, T) int64 with attention_mask (B, T), 0 where a text has ended: (B, E)."""
        trunk, head = self.text_trunk or self.trunk, self.text_head or self.head
        tokens = self.trunk_input(self._text(input_ids))
        return F.normalize(head(trunk(tokens, src_key_padding_mask=_padding(attention_mask, 1))[:, 0]), dim=-1)

    def encode_image_text(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed pairs of an image and a text in one pass: (B, E)."""
        image = self._image(pixels)
        tokens = self.trunk_input(torch.cat([image, self._text(input_ids)], 1))
        mask = _padding(attention_mask, 1 + image.shape[1])
        return F.normalize(self.head(self.trunk(tokens, src_key_padding_mask=mask)[:, 0]), dim=-1)

    def encode_patches(self, pixels: Tensor) -> Tensor:
        """Project each patch's output: (B, N, E), the grid row by row."""
        return F.normalize(self.head(self._run(self._image(pixels))[:, 1:]), dim=-1)

    def trunk_input(self, tokens: Tensor) -> Tensor:
        """Put [CLS] before tokens (B, T, D): (B, 1 + T, D)."""
        return torch.cat([self.cls.expand(tokens.shape[0], 1, -1), tokens], 1)

    def _run(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.trunk(self.trunk_input(tokens))
        return hidden

    def _image(self, pixels: Tensor) -> Tensor:
        scaled = pixels.to(self.mean.dtype) / 255 if pixels.dtype == torch.uint8 else pixels
        return self.patches((scaled - self.mean) / self.std).flatten(2).transpose(1, 2) + self.patch_positions

    def _text(self, input_ids: Tensor) -> Tensor:
        return self.words(input_ids) + self.word_positions[: input_ids.shape[1]]


def _trunk(config: dict[str, Any]) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        config["width"], config["heads"], config["mlp_width"], 0.0, "gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, config["depth"], nn.LayerNorm(config["width"]), enable_nested_tensor=False)


def _head(config: dict[str, Any]) -> nn.Sequential:
    width, hidden, out = config["width"], config["head_width"], config["embed_dim"]
    if not hidden:
        return nn.Sequential(nn.Linear(width, out))
    first, second = [nn.Linear(width, hidden), nn.LayerNorm(hidden)], [nn.Linear(hidden, hidden), nn.LayerNorm(hidden)]
    return nn.Sequential(*first, nn.GELU(), *second, nn.GELU(), nn.Linear(hidden, out))


def _padding(attention_mask: Tensor, before: int) -> Tensor:
    """Mark the places that no other may attend to (B, before + T), as PyTorch's modules take them."""
    return F.pad(attention_mask == 0, (before, 0), value=False)
