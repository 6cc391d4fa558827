"""OneR's training step in plain PyTorch, written without this library.

Captions are padded with key-padding masks. Images, texts and pairs take one pass each, attention is
scaled_dot_product_attention, and the logits are N x N.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oner_fast.models.oner import OneRConfig


class Masks(NamedTuple):
    """Masked inputs of a pass.

    Attributes:
        word_ids: (B, L) padded with 0.
        word_rows: (M,) int64, places of the words to predict among the B L places.
        patches: (B, N) bool, the masked patches.
        patch_rows: (P,) int64, their places among the B N places.
    """

    word_ids: Tensor
    word_rows: Tensor
    patches: Tensor
    patch_rows: Tensor


class Batch(NamedTuple):
    """A padded batch.

    Attributes:
        images: (B, 3, S, S) uint8.
        word_ids: (B, L) unmasked, padded with 0.
        padding: (B, L) bool, True at words.
        single, joint: the masks of the single passes and of the pair pass.
    """

    images: Tensor
    word_ids: Tensor
    padding: Tensor
    single: Masks
    joint: Masks


def wide(x: Tensor) -> Tensor:
    """Widen half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


class Block(nn.Module):
    """Compute x + Attention(LayerNorm(x)), then x + Mlp(LayerNorm(x)); (B, L, D)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.mlp_out = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Transform x (B, L, D); `mask` (B, 1, 1, L) bool is True at the keys that may be attended to."""
        query, key, value = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.attention_out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp_out(F.gelu(self.up(self.norm_mlp(x))))


def _head(sizes: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
        if index:
            layers += [nn.LayerNorm(inputs), nn.GELU()]
        layers.append(nn.Linear(inputs, outputs))
    return nn.Sequential(*layers)


class Tower(nn.Module):
    """One transformer for images, texts and pairs, and its projection head."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: OneRConfig) -> None:
        super().__init__()
        width, patch = config.width, config.patch_size
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch)
        self.patch_positions = nn.Parameter(torch.empty((config.image_size // patch) ** 2, width))
        self.mask_token = nn.Parameter(torch.empty(width))
        self.cls_token = nn.Parameter(torch.empty(width))
        self.word_embedding = nn.Embedding(config.vocab_size, width)
        self.word_positions = nn.Parameter(torch.empty(config.max_text_tokens, width))
        hidden = int(width * config.mlp_ratio)
        self.blocks = nn.ModuleList(Block(width, config.heads, hidden) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        inner = (config.projector_hidden, config.projector_hidden) if config.projector_hidden else ()
        self.head = _head((width, *inner, config.embed_dim))
        self.register_buffer("mean", torch.tensor(config.image_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.image_std).view(-1, 1, 1), persistent=False)

    def embed_patches(self, images: Tensor) -> Tensor:
        """Embed patches of (B, 3, S, S) uint8 without positions: (B, N, D)."""
        pixels = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        return self.patch_embedding(pixels).flatten(2).transpose(1, 2)

    def place_patches(self, tokens: Tensor, masked: Tensor | None = None) -> Tensor:
        """Put the mask token where `masked` (B, N) is True, and add positions: (B, N, D)."""
        if masked is not None:
            tokens = torch.where(masked.unsqueeze(-1), self.mask_token.to(tokens.dtype), tokens)
        return tokens + self.patch_positions

    def embed_words(self, word_ids: Tensor) -> Tensor:
        """Embed words (B, L): (B, L, D)."""
        return self.word_embedding(word_ids) + self.word_positions[: word_ids.shape[1]]

    def encode(self, *parts: Tensor, padding: Tensor | None = None) -> Tensor:
        """Pass [CLS] and `parts` (B, *, D) through the blocks: (B, 1 + ..., D).

        `padding` (B, L) bool is True at words and belongs to the last part.
        """
        x = torch.cat([self.cls_token.expand(parts[0].shape[0], 1, -1), *parts], dim=1)
        mask = None
        if padding is not None:
            seen = padding.new_ones(x.shape[0], x.shape[1] - padding.shape[1])
            mask = torch.cat([seen, padding], dim=1)[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


class PlainModel(nn.Module):
    """The student: the tower, a predictor, and the heads of masked words and patches."""

    def __init__(self, config: OneRConfig, predictor_hidden: int) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.tower = Tower(config)
        self.predictor = _head((config.embed_dim, predictor_hidden, config.embed_dim))
        self.word_transform, self.word_norm = nn.Linear(config.width, config.width), nn.LayerNorm(config.width)
        self.word_bias = nn.Parameter(torch.empty(config.vocab_size))
        self.patch_head = nn.Linear(config.width, 3 * config.patch_size**2)

    def forward(self, batch: Batch, keys: tuple[Tensor, Tensor], logit_scale: float) -> dict[str, Tensor]:
        """Compute the losses by name, each a mean."""
        tower, padding, count = self.tower, batch.padding, batch.single.patches.shape[1]
        patches = tower.embed_patches(batch.images)
        single, joint = batch.single, batch.joint
        image = tower.encode(tower.place_patches(patches, single.patches))
        text = tower.encode(tower.embed_words(single.word_ids), padding=padding)
        placed = tower.place_patches(patches, joint.patches)
        pair = tower.encode(placed, tower.embed_words(joint.word_ids), padding=padding)
        query = [self.predictor(tower.head(each[:, 0])) for each in (image, text, pair)]
        key_image, key_text = keys
        itc = _info_nce(query[0], key_text, logit_scale) + _info_nce(query[1], key_image, logit_scale)
        words = [(text[:, 1:], single), (pair[:, 1 + count :], joint)]
        pixels = [(image[:, 1:], single), (pair[:, 1 : 1 + count], joint)]
        return {
            "itc": itc / 2,
            "cmc": _info_nce(query[2], (key_image + key_text) / 2, logit_scale),
            "mlm": self._masked_words(batch.word_ids, words),
            "mim": self._masked_patches(batch.images, pixels),
        }

    def compile_losses(self) -> None:
        """Compile the masked losses, whose decoder and targets have element-wise work to fuse."""
        self._masked_words = torch.compile(self._masked_words, dynamic=False)  # type: ignore[method-assign]
        self._masked_patches = torch.compile(self._masked_patches, dynamic=False)  # type: ignore[method-assign]

    def _masked_words(self, word_ids: Tensor, passes: list[tuple[Tensor, Masks]]) -> Tensor:
        """Compute the cross-entropy of the masked words alone: only their outputs reach the decoder."""
        hidden = torch.cat([_chosen(outputs, masks.word_rows) for outputs, masks in passes])
        ids = torch.cat([word_ids.flatten().index_select(0, masks.word_rows) for _, masks in passes])
        hidden = self.word_norm(F.gelu(self.word_transform(hidden)))
        return F.cross_entropy(wide(F.linear(hidden, self.tower.word_embedding.weight, self.word_bias)), ids)

    def _masked_patches(self, images: Tensor, passes: list[tuple[Tensor, Masks]]) -> Tensor:
        """Compute the mean absolute error of the normalised pixels of the masked patches alone."""
        size = self.patch_size
        pixels = F.pixel_unshuffle(images.to(self.tower.mean.dtype) / 255, size).flatten(2).transpose(1, 2)
        variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
        target = (pixels - mean) / (variance + 1e-6).sqrt()
        hidden = torch.cat([_chosen(outputs, masks.patch_rows) for outputs, masks in passes])
        targets = torch.cat([_chosen(target, masks.patch_rows) for _, masks in passes])
        return F.l1_loss(wide(self.patch_head(hidden)), targets)


def _chosen(tokens: Tensor, rows: Tensor) -> Tensor:
    return tokens.flatten(0, 1).index_select(0, rows)


def _info_nce(query: Tensor, key: Tensor, logit_scale: float) -> Tensor:
    """Compute MoCo v3's loss, over rows only."""
    query, key = F.normalize(wide(query), dim=-1), F.normalize(wide(key), dim=-1)
    return F.cross_entropy(logit_scale * query @ key.T, torch.arange(query.shape[0], device=query.device))


@torch.no_grad()
def teacher_keys(teacher: Tower, batch: Batch) -> tuple[Tensor, Tensor]:
    """Project F(I) and F(T) of the unmasked batch."""
    image = teacher.encode(teacher.place_patches(teacher.embed_patches(batch.images)))
    text = teacher.encode(teacher.embed_words(batch.word_ids), padding=batch.padding)
    return teacher.head(image[:, 0]), teacher.head(text[:, 0])
