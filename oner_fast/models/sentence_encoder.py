"""A BERT that embeds a sentence as the mean of its tokens.

It fits MiniLM (Wang et al., NeurIPS 2020) in sentence-transformers' version.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

PAD = 0
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)")
_EMBEDDINGS = {
    "embeddings.word_embeddings.weight": "words.weight",
    "embeddings.position_embeddings.weight": "positions.weight",
    "embeddings.token_type_embeddings.weight": "types.weight",
    "embeddings.LayerNorm.weight": "norm.weight",
    "embeddings.LayerNorm.bias": "norm.bias",
}
_PARTS = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "out",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "mlp_norm",
}


class Layer(nn.Module):
    """Attention and MLP, each followed by its norm."""

    def __init__(self, width: int, heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Transform x (B, L, W); mask (B, 1, 1, L) bool is True at the tokens that may be attended to."""
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = self.attention_norm(x + self.out(mixed))
        return self.mlp_norm(x + self.down(F.gelu(self.up(x))))


class SentenceEncoder(nn.Module):
    """Embed ids (B, L) int64, padded with 0, as the mean over the other tokens: (B, width), not normalised.

    The defaults are all-MiniLM-L6-v2's sizes.
    """

    def __init__(
        self,
        vocab_size: int = 30522,
        width: int = 384,
        depth: int = 6,
        heads: int = 12,
        hidden: int = 1536,
        positions: int = 512,
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        self.width = width
        self.words, self.positions, self.types = (nn.Embedding(n, width) for n in (vocab_size, positions, 2))
        self.norm = nn.LayerNorm(width, eps)
        self.layers = nn.ModuleList(Layer(width, heads, hidden, eps) for _ in range(depth))

    def forward(self, ids: Tensor) -> Tensor:
        """Embed sentences; see the class. Raises ValueError where a text is longer than the table of positions."""
        longest = self.positions.num_embeddings
        if ids.dim() != 2 or not 1 <= ids.shape[1] <= longest:
            raise ValueError(f"ids must have shape (B, 1 to {longest}), got {tuple(ids.shape)}")
        kept = ids != PAD
        x = self.words(ids) + self.positions.weight[: ids.shape[1]] + self.types.weight[0]
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, kept[:, None, None])
        weights = kept.unsqueeze(-1).to(x.dtype)
        return (x * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def from_bert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a BERT's state dict to the names of `SentenceEncoder`, without the pooler, which a mean does not need.

    Raises:
        ValueError: it holds a tensor that a BERT lacks.
    """
    found = {}
    for name, tensor in state.items():
        if name.startswith("pooler.") or name == "embeddings.position_ids":
            continue
        layer = _LAYER.fullmatch(name)
        if name in _EMBEDDINGS:
            found[_EMBEDDINGS[name]] = tensor
        elif layer and layer[2] in _PARTS:
            found[f"layers.{layer[1]}.{_PARTS[layer[2]]}.{layer[3]}"] = tensor
        else:
            raise ValueError(f"a BERT has no tensor {name!r}")
    return found
