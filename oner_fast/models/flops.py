"""Floating-point operations of a forward of the tower, counted from its definition (a product of M x K and K x N is
2 M N K)."""

from __future__ import annotations

from collections.abc import Iterable

from oner_fast.models.oner import OneRConfig


def trunk_flops(config: OneRConfig, lengths: Iterable[int], key_lengths: Iterable[int] | None = None) -> float:
    """One forward of the trunk over packed sequences of ``lengths`` tokens, which attend to ``key_lengths`` (their
    own where None)."""
    lengths = list(lengths)
    tokens = sum(lengths)
    pairs = sum(q * k for q, k in zip(lengths, lengths if key_lengths is None else key_lengths, strict=True))
    linear = 2 * config.width**2 * (4 + 2 * config.mlp_ratio)
    return config.depth * (linear * tokens + 4 * config.width * pairs)


def embedding_flops(config: OneRConfig, patches: int) -> float:
    """Embedding ``patches`` patches."""
    return 2 * len(config.image_mean) * config.patch_size**2 * config.width * patches


def head_flops(config: OneRConfig, samples: int, predictor_hidden: int = 0) -> float:
    """The projector, and the predictor where ``predictor_hidden`` > 0, on ``samples`` rows."""
    hidden, embed = config.projector_hidden, config.embed_dim
    projector = config.width * hidden + hidden * hidden + hidden * embed
    return 2.0 * samples * (projector + 2 * embed * predictor_hidden)


def contrast_flops(pairs: int, embed_dim: int, symmetric_inputs: int = 1) -> float:
    """Forward of ``symmetric_inputs`` logit matrices of ``pairs`` x ``pairs``."""
    return 2.0 * pairs * pairs * embed_dim * symmetric_inputs
