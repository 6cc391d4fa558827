"""The names of OneR's parameters in the plain model."""

from __future__ import annotations

_RENAMED = (
    ("patch_embedding.project.", "patch_embedding."),
    ("patch_embedding.positions", "patch_positions"),
    ("patch_embedding.mask_token", "mask_token"),
    ("word_embedding.words.", "word_embedding."),
    ("word_embedding.positions", "word_positions"),
    ("trunk.", ""),
    ("attention.qkv.", "qkv."),
    ("attention.out.", "attention_out."),
    ("mlp.up.", "up."),
    ("mlp.out.", "mlp_out."),
    ("word_head.transform.", "word_transform."),
    ("word_head.norm.", "word_norm."),
    ("word_head.bias", "word_bias"),
)


def plain_name(name: str) -> str:
    """Name of a parameter of `Student` or `OneR` in the plain model."""
    for ours, theirs in _RENAMED:
        name = name.replace(ours, theirs)
    return name
