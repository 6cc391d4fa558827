"""Count the floating-point operations that a forward pass needs; (M x K) times (K x N) is 2 M N K."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from oner_fast.models.clip import CLIPConfig
from oner_fast.models.oner import OneRConfig
from oner_fast.models.uta import UTAConfig


def trunk_flops(
    config: OneRConfig,
    lengths: Iterable[int],
    key_lengths: Iterable[int] | None = None,
    wanted: Iterable[float] | None = None,
) -> float:
    """Count one forward of the trunk over packed sequences of `lengths` tokens.

    They attend to `key_lengths` (their own where None). The last block computes only `wanted` outputs of each sequence
    (all where None).
    """
    queries = list(lengths)
    keys = queries if key_lengths is None else list(key_lengths)
    outputs = queries if wanted is None else list(wanted)

    def block(rows: Sequence[float]) -> float:
        linear = sum(queries) * 2 + sum(rows) * (2 + 2 * config.mlp_ratio)  # keys and values; the rest
        pairs = sum(q * k for q, k in zip(rows, keys, strict=True))
        return 2 * config.width**2 * linear + 4 * config.width * pairs

    return (config.depth - 1) * block(queries) + block(outputs)


def embedding_flops(config: OneRConfig, patches: int) -> float:
    """Count the embedding of `patches` patches."""
    return 2 * len(config.image_mean) * config.patch_size**2 * config.width * patches


def head_flops(config: OneRConfig, samples: int, predictor_hidden: int = 0) -> float:
    """Count the projector, and the predictor where `predictor_hidden` > 0, on `samples` rows."""
    hidden, embed = config.projector_hidden, config.embed_dim
    projector = config.width * hidden + hidden * hidden + hidden * embed if hidden else config.width * embed
    return 2.0 * samples * (projector + 2 * embed * predictor_hidden)


def contrast_flops(pairs: int, embed_dim: int, symmetric_inputs: int = 1) -> float:
    """Count the forward of `symmetric_inputs` logit matrices of `pairs` x `pairs`."""
    return 2.0 * pairs * pairs * embed_dim * symmetric_inputs


def clip_flops(config: CLIPConfig, text_lengths: Sequence[int]) -> float:
    """Count one forward of both towers over pairs whose captions have `text_lengths` tokens, start and end included.

    The last block of each tower computes only the token that is pooled. Attention over texts is causal.
    """
    c, images = config, [1 + config.grid**2] * len(text_lengths)
    total = 0.0
    for width, layers, lengths, causal in (
        (c.vision_width, c.vision_layers, images, False),
        (c.text_width, c.text_layers, text_lengths, True),
    ):
        for length in lengths:
            seen = length * (length + 1) / 2 if causal else length**2
            total += (layers - 1) * (24 * width**2 * length + 4 * width * seen)
            total += 2 * width**2 * (2 * length + 10) + 4 * width * length + 2 * width * c.embed_dim
    patches = c.grid**2 * len(text_lengths)
    return total + 2 * len(c.image_mean) * c.patch_size**2 * c.vision_width * patches


def uta_flops(config: UTAConfig, tokens_per_sample: Iterable[int], patches: int | None = None) -> float:
    """Count one forward of UTA's student over images that give `tokens_per_sample` tokens each, [CLS] included.

    Each token's output is projected. `patches` is the number of embedded patches: by default all tokens but [CLS],
    fewer where mask tokens replace some.
    """
    c, lengths = config, list(tokens_per_sample)
    tokens, pairs = sum(lengths), sum(length**2 for length in lengths)
    block = 2 * tokens * (4 * c.width**2 + 3 * c.width * c.mlp_hidden) + 4 * c.width * pairs
    embedded = tokens - len(lengths) if patches is None else patches
    embedding = 2 * len(c.image_mean) * c.patch_size**2 * c.width * embedded
    return float(c.depth * block + embedding + 2 * tokens * c.width * c.embed_dim)
