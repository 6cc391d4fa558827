"""Convert OneR's tower to the configuration and the weights of `PlainTower`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from oner_fast.export.hub.plain_tower import PlainTower
from oner_fast.models.oner import OneR, OneRConfig

_KEPT = (
    "image_size", "patch_size", "width", "depth", "heads", "vocab_size", "max_text_tokens", "embed_dim",
    "shared_trunk", "shared_head", "image_mean", "image_std",
)  # fmt: skip
_TRUNK = {
    "norm_attention": "norm1",
    "norm_mlp": "norm2",
    "attention.qkv.": "self_attn.in_proj_",
    "attention.out": "self_attn.out_proj",
    "mlp.up": "linear1",
    "mlp.out": "linear2",
    "blocks": "layers",
}
_REST = {
    "cls_token": "cls",
    "patch_embedding.project": "patches",
    "patch_embedding.positions": "patch_positions",
    "word_embedding.words": "words",
    "word_embedding.positions": "word_positions",
}


def plain_config(config: OneRConfig) -> dict[str, Any]:
    """List the sizes that `PlainTower` takes."""
    values = asdict(config)
    sizes = {"mlp_width": int(config.width * config.mlp_ratio), "head_width": config.projector_hidden}
    kept = {name: list(value) if isinstance(value, tuple) else value for name in _KEPT for value in [values[name]]}
    return kept | sizes


def plain_state(tower: OneR) -> dict[str, Tensor]:
    """Name the weights as `PlainTower` does: float32, contiguous, on the CPU. The mask token is left out."""
    state = {}
    for name, tensor in tower.state_dict().items():
        if name == "patch_embedding.mask_token":
            continue
        for ours, theirs in (_TRUNK if "trunk." in name else _REST).items():
            name = name.replace(ours, theirs)
        if name == "patches.weight":
            tensor = tensor.unflatten(1, (3, tower.config.patch_size, tower.config.patch_size))
        state[name] = tensor.detach().float().cpu().contiguous()
    for name, values in (("mean", tower.config.image_mean), ("std", tower.config.image_std)):
        state[name] = torch.tensor(values).view(3, 1, 1)
    return state


def plain_tower(tower: OneR) -> PlainTower:
    """Make the `PlainTower` that computes what `tower` computes, in evaluation mode, without gradients."""
    plain = PlainTower(plain_config(tower.config))
    plain.load_state_dict(plain_state(tower))
    return plain.eval().requires_grad_(False)
