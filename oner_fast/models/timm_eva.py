"""UTA's student as timm's `Eva`: the arguments with which timm computes the same, and a check of a given `Eva`.

A state dict of `Eva` does not say how its rotary positions are scaled, nor the eps of its norms. One that was built
with other arguments takes the weights all the same, and gives other features.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from oner_fast.models.eva import to_timm
from oner_fast.models.optional_packages import optional_package
from oner_fast.models.uta import UTA, UTAConfig
from oner_fast.nn.rope import rope_angles

_CLOSE = 1e-4  # by which sines of the same angles, computed in float32, may differ


def timm_arguments(config: UTAConfig) -> dict[str, Any]:
    """Return the arguments with which `timm.models.eva.Eva` computes a student of this configuration."""
    return {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": len(config.image_mean),
        "num_classes": config.embed_dim,
        "global_pool": "token",
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "qkv_fused": False,
        # timm cuts width * mlp_ratio to a whole number; the half keeps it from falling below the one meant.
        "mlp_ratio": (config.mlp_hidden + 0.5) / config.width,
        "swiglu_mlp": True,
        "scale_mlp": True,
        "scale_attn_inner": False,
        "use_rot_pos_emb": True,
        "ref_feat_shape": (config.rope_grid, config.rope_grid),
        "rope_temperature": config.rope_theta,
        "norm_layer": partial(nn.LayerNorm, eps=config.layer_norm_eps),
    }


def to_timm_model(student: UTA) -> nn.Module:
    """Build timm's `Eva` with the student's weights, in evaluation mode: its features are the student's.

    Images must be normalised by the configuration's mean and standard deviation, which its `pretrained_cfg` holds.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    config = student.config
    model: Any = optional_package("timm").models.eva.Eva(**timm_arguments(config))
    load_into_timm(model, student)
    model.pretrained_cfg = model.default_cfg = {
        "input_size": (len(config.image_mean), config.image_size, config.image_size),
        "mean": config.image_mean,
        "std": config.image_std,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "num_classes": config.embed_dim,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    return model.eval().to(student.cls_token.device)  # type: ignore[no-any-return]


def load_into_timm(model: nn.Module, student: UTA) -> None:
    """Load the student's weights into an `Eva` that someone else built; ValueError as `check_timm`."""
    config = student.config
    check_timm(model, config)
    plain = {name: tensor for name, tensor in student.state_dict().items() if "mask_token" not in name}
    state: dict[str, Any] = to_timm(plain, replace(config, mask_token=False))
    if any(name.endswith("qkv.weight") for name in model.state_dict()):
        state = _fused(state)
    model.load_state_dict(state)


def check_timm(model: nn.Module, config: UTAConfig) -> None:
    """Raise ValueError unless a model of timm computes what a student of this configuration does.

    The message lists the arguments that differ, with the values that are there and that are needed.
    """
    eva: Any = model
    if type(model).__name__ != "Eva":
        raise ValueError(f"a student is timm's Eva, got a {type(model).__name__}; build it with timm_arguments(config)")
    attention = eva.blocks[0].attn
    found = {
        "img_size": (_side(eva.patch_embed.img_size), config.image_size),
        "patch_size": (_side(eva.patch_embed.patch_size), config.patch_size),
        "num_classes": (eva.num_classes, config.embed_dim),
        "global_pool": (eva.global_pool, "token"),
        "embed_dim": (eva.embed_dim, config.width),
        "depth": (len(eva.blocks), config.depth),
        "num_heads": (attention.num_heads, config.heads),
        "number of prefix tokens": (eva.num_prefix_tokens, 1),
        "swiglu_mlp with scale_mlp": (_is_swiglu(eva.blocks[0].mlp), True),
        "scale_attn_inner": (not isinstance(attention.norm, nn.Identity), False),
        "qk_norm": (not isinstance(attention.q_norm, nn.Identity), False),
        "gated attention": (getattr(attention, "gate", None) is not None, False),
        "init_values": (getattr(eva.blocks[0], "gamma_1", None) is not None, False),
        "use_post_norm": (type(eva.blocks[0]).__name__ != "EvaBlock", False),
        "use_pre_transformer_norm": (not isinstance(eva.norm_pre, nn.Identity), False),
        "use_fc_norm": (not isinstance(eva.fc_norm, nn.Identity), False),
        "eps of the norms": (getattr(eva.norm, "eps", None), config.layer_norm_eps),
        "use_rot_pos_emb": (eva.rope is not None, True),
    }
    wrong = [f"{name} is {there}, not {needed}" for name, (there, needed) in found.items() if there != needed]
    if not wrong and not _turns_alike(eva, config):
        shape, theta = getattr(eva.rope, "ref_feat_shape", None), getattr(eva.rope, "temperature", None)
        wrong = [
            f"its rotary positions are others: ref_feat_shape is {shape} and rope_temperature {theta}, not "
            f"{(config.rope_grid, config.rope_grid)} and {config.rope_theta}"
        ]
    if wrong:
        raise ValueError(
            f"this Eva would take the weights and give other features: {'; '.join(wrong)}; build it with "
            "oner_fast.models.timm_eva.timm_arguments(config)"
        )


def config_of(model: nn.Module) -> UTAConfig:
    """Read the configuration of a student from timm's `Eva`; mean and deviation are its `pretrained_cfg`'s, or CLIP's.

    Raises:
        ValueError: it computes what no student does; the message lists the arguments.
    """
    if type(model).__name__ != "Eva":
        raise ValueError(f"a student is timm's Eva, got a {type(model).__name__}")
    eva: Any = model
    about = getattr(eva, "pretrained_cfg", None) or {}
    mlp, usual = eva.blocks[0].mlp, UTAConfig()
    reference = getattr(eva.rope, "ref_feat_shape", None) or eva.patch_embed.grid_size
    config = UTAConfig(
        image_size=_side(eva.patch_embed.img_size),
        patch_size=_side(eva.patch_embed.patch_size),
        width=eva.embed_dim,
        depth=len(eva.blocks),
        heads=eva.blocks[0].attn.num_heads,
        mlp_hidden=mlp.fc2.in_features,
        embed_dim=eva.num_classes,
        rope_theta=float(getattr(eva.rope, "temperature", usual.rope_theta)),
        rope_grid=_side(tuple(reference)),
        layer_norm_eps=getattr(eva.norm, "eps", usual.layer_norm_eps),
        image_mean=tuple(about.get("mean") or usual.image_mean),
        image_std=tuple(about.get("std") or usual.image_std),
    )
    check_timm(model, config)
    return config


def _turns_alike(eva: Any, config: UTAConfig) -> bool:
    """Whether its rotary positions are the student's: the sines and cosines of each cell."""
    rope, grid = eva.rope, config.grid
    if getattr(rope, "rotate_half", False) or getattr(eva, "rope_mixed", False):
        return False
    try:
        table = rope.get_embed([grid, grid]).detach().double().cpu()
    except (TypeError, AssertionError, RuntimeError):
        return False
    head = config.width // config.heads
    angles = rope_angles(grid, head, config.rope_theta, config.rope_grid).repeat_interleave(2, 1)
    wanted = torch.cat([angles.sin(), angles.cos()], 1)
    return table.shape == wanted.shape and bool((table - wanted).abs().max() < _CLOSE)


def _is_swiglu(mlp: Any) -> bool:
    return all(hasattr(mlp, name) for name in ("fc1_g", "fc1_x", "norm", "fc2")) and not isinstance(
        mlp.norm, nn.Identity
    )


def _side(size: int | tuple[int, int]) -> int:
    """Return the side of a square; 0, which no configuration has, where it is none."""
    sides = {size} if isinstance(size, int) else set(size)
    return sides.pop() if len(sides) == 1 else 0


def _fused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join the projections of query, key and value, as `Eva` holds them with `qkv_fused=True`."""
    joined = {}
    for name, tensor in state.items():
        if name.endswith("attn.q_proj.weight"):
            block = name.removesuffix("q_proj.weight")
            joined[f"{block}qkv.weight"] = torch.cat([state[f"{block}{part}_proj.weight"] for part in "qkv"])
        elif name.endswith(("attn.q_proj.bias", "attn.v_proj.bias")):
            joined[name.replace("_proj.bias", "_bias")] = tensor
        elif not name.endswith(("attn.k_proj.weight", "attn.v_proj.weight")):
            joined[name] = tensor
    return joined
