"""Heads: projector and predictor (MoCo v3's shape without batch statistics), masked words, masked patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oner_fast.nn.linear import Linear, packed_linear
from oner_fast.nn.transformer import init_weights


def _mlp(sizes: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
        if index:
            layers += [nn.LayerNorm(inputs), nn.GELU()]
        layers.append(nn.Linear(inputs, outputs))
    return nn.Sequential(*layers)


class Projector(nn.Sequential):
    """Project width - hidden - hidden - embed_dim, with LayerNorm and GELU between; linearly where `hidden` is 0.

    There are no batch statistics, so that packing, accumulation and the number of ranks do not change the result.
    """

    def __init__(self, width: int, hidden: int, embed_dim: int) -> None:
        super().__init__(*_mlp((width, hidden, hidden, embed_dim) if hidden else (width, embed_dim)))


class Predictor(nn.Sequential):
    """Predict embed_dim - hidden - embed_dim, on the student's side only."""

    def __init__(self, embed_dim: int, hidden: int) -> None:
        super().__init__(*_mlp((embed_dim, hidden, embed_dim)))


class MaskedWordHead(nn.Module):
    """Logits over the vocabulary from word tokens; the decoder shares the word embedding's weight, as in BERT."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.transform = Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.apply(init_weights)

    def forward(self, tokens: Tensor, words: Tensor) -> Tensor:
        """Compute logits of tokens (M, D) with the embedding's weight `words` (V, D): (M, V)."""
        return packed_linear(self.norm(F.gelu(self.transform(tokens))), words, self.bias)


class MaskedPatchHead(nn.Linear):
    """One linear map from a token to the normalised pixels of its patch."""

    def __init__(self, width: int, patch_pixels: int) -> None:
        super().__init__(width, patch_pixels)
        init_weights(self)


def normalised_pixels(patches: Tensor, eps: float = 1e-6) -> Tensor:
    """Subtract from each patch (..., C * p * p) its mean and divide by its standard deviation, in float32."""
    patches = patches.float()
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + eps).sqrt()
