"""UTA's weights in the layouts of EVA, timm and open_clip: equal outputs, and exact round trips."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from oner_fast.models.eva import from_eva, from_timm, layout_of, to_eva, to_timm
from oner_fast.models.files import UTA_FORMAT, load_model, load_uta, save_uta, uta_config_from_dict
from oner_fast.models.optional_packages import optional_package
from oner_fast.models.resampling import resample_positions
from oner_fast.models.uta import UTA, UTAConfig

CONFIG = UTAConfig(32, 8, width=32, depth=2, heads=2, mlp_hidden=40, embed_dim=24, rope_grid=16)


def random_weights(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if "norm" in name and "weight" in name else 0.0))
    return model.eval()


def student(config: UTAConfig = CONFIG) -> UTA:
    model = random_weights(UTA(config))
    assert isinstance(model, UTA)
    return model


def timm_eva(**changes: Any) -> nn.Module:
    """Build timm's class as its eva02_base_patch16_clip_224, but small and without a norm in attention."""
    optional_package("timm")
    from timm.models.eva import Eva

    arguments: dict[str, Any] = dict(
        img_size=CONFIG.image_size, patch_size=CONFIG.patch_size, embed_dim=CONFIG.width, depth=CONFIG.depth,
        num_heads=CONFIG.heads, mlp_ratio=CONFIG.mlp_hidden / CONFIG.width, num_classes=CONFIG.embed_dim,
        qkv_fused=False, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=False, use_rot_pos_emb=True,
        ref_feat_shape=(CONFIG.rope_grid, CONFIG.rope_grid), global_pool="token",
        norm_layer=partial(nn.LayerNorm, eps=CONFIG.layer_norm_eps),
    )  # fmt: skip
    return random_weights(Eva(**{**arguments, **changes}))


def pictures(size: int = CONFIG.image_size) -> tuple[Tensor, Tensor]:
    """Make three images, as bytes and in the form that timm takes."""
    images = torch.randint(256, (3, 3, size, size), dtype=torch.uint8)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (CONFIG.image_mean, CONFIG.image_std))
    return images, (images / 255 - mean) / std


def outputs_of(model: Any, pixels: Tensor) -> Tensor:
    return model.head(model.forward_features(pixels))  # type: ignore[no-any-return]


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("changes", [{}, {"qkv_fused": True}, {"img_size": 48}])
@torch.no_grad()
def test_timms_model_gives_the_same_outputs(changes: dict[str, Any]) -> None:
    theirs = timm_eva(**changes)
    size = changes.get("img_size", CONFIG.image_size)
    ours = load_uta(theirs.state_dict(), UTAConfig(**{**asdict(CONFIG), "image_size": size}))
    images, pixels = pictures(size)
    torch.testing.assert_close(ours(images), outputs_of(theirs, pixels), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.encode_image(images), theirs(pixels), rtol=0, atol=1e-5)
    if not changes.get("qkv_fused"):
        equal(to_timm(ours.state_dict(), ours.config), theirs.state_dict())


@torch.no_grad()
def test_open_clips_tower_gives_the_same_outputs() -> None:
    open_clip, timm = optional_package("open_clip"), optional_package("timm")
    name = "uta_tiny_of_a_test"

    def build(pretrained: bool = False, **arguments: Any) -> nn.Module:
        return timm_eva(**{key: value for key, value in arguments.items() if key in ("num_classes", "global_pool")})

    build.__name__ = name
    timm.models._registry._model_entrypoints[name] = build
    try:
        clip = open_clip.CustomTextCLIP(
            CONFIG.embed_dim,
            {"image_size": CONFIG.image_size, "timm_model_name": name, "timm_pool": "token", "timm_proj": None},
            {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
        ).eval()
    finally:
        del timm.models._registry._model_entrypoints[name]
    state = clip.state_dict()
    assert "visual.trunk.blocks.1.mlp.fc1_g.weight" in state and "logit_scale" in state
    images, pixels = pictures()
    torch.testing.assert_close(
        load_uta(state, CONFIG).encode_image(images), clip.encode_image(pixels), rtol=0, atol=1e-5
    )
    model = student()
    clip.visual.trunk.load_state_dict(to_timm(model.state_dict(), CONFIG))
    torch.testing.assert_close(model.encode_image(images), clip.encode_image(pixels), rtol=0, atol=1e-5)


@torch.no_grad()
def test_timm_reads_the_released_layout() -> None:
    """timm's own filter of EVA checkpoints and our conversion give the same state dict."""
    optional_package("timm")
    from timm.models.eva import checkpoint_filter_fn

    model, theirs = student(), timm_eva()
    state = to_eva(model.state_dict(), CONFIG)
    assert {"blocks.0.attn.q_bias", "blocks.0.mlp.w1.weight", "blocks.0.mlp.ffn_ln.bias"} < state.keys()
    assert state["patch_embed.proj.weight"].shape == (32, 3, 8, 8) and state["pos_embed"].shape == (1, 17, 32)
    theirs.load_state_dict(checkpoint_filter_fn({f"visual.{name}": each for name, each in state.items()}, theirs))
    images, pixels = pictures()
    torch.testing.assert_close(model(images), outputs_of(theirs, pixels), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mask_token", [False, True])
@pytest.mark.parametrize(("there", "back"), [(to_eva, from_eva), (to_timm, from_timm)])
def test_round_trips_are_exact(there: Any, back: Any, mask_token: bool) -> None:
    config = UTAConfig(**{**asdict(CONFIG), "mask_token": mask_token})
    state = student(config).state_dict()
    converted = there(state, config)
    assert ("mask_token" in converted) == mask_token
    equal(back(converted, config), dict(state))
    for prefix in ("visual.", "visual.trunk.", "trunk."):
        noise = {"logit_scale": torch.zeros(()), "text.positional_embedding": torch.zeros(2)}
        named = {f"{prefix}{name}": each for name, each in converted.items()} | noise
        named[f"{prefix}rope.freqs_cos"] = torch.zeros(3)
        equal(back(named, config), dict(state))
        equal(load_uta(named, config).state_dict(), dict(state))
    fused = dict(converted)
    gate, value, both = ("w1", "w2", "w12") if there is to_eva else ("fc1_g", "fc1_x", "fc1")
    for kind in ("weight", "bias"):
        halves = [fused.pop(f"blocks.1.mlp.{each}.{kind}") for each in (gate, value)]
        fused[f"blocks.1.mlp.{both}.{kind}"] = torch.cat(halves)
    equal(back(fused, config), dict(state))


def test_weights_that_do_not_fit_are_named() -> None:
    state = to_eva(student().state_dict(), CONFIG)
    lacking = {name: each for name, each in state.items() if "blocks.1.mlp.w2" not in name}
    with pytest.raises(ValueError, match=r"missing blocks.1.mlp.w2.bias, blocks.1.mlp.w2.weight; unknown none"):
        load_uta(lacking, CONFIG)
    with pytest.raises(ValueError, match="unknown blocks.7.thing"):
        load_uta({**state, "blocks.7.thing": torch.zeros(1)}, CONFIG)
    with pytest.raises(ValueError, match="norm inside attention"):
        load_uta(timm_eva(scale_attn_inner=True).state_dict(), CONFIG)
    with pytest.raises(ValueError, match=r"patch_embed.proj.weight must have shape \(32, 3, 16, 16\)"):
        load_uta(state, UTAConfig(**{**asdict(CONFIG), "patch_size": 16}))
    with pytest.raises(ValueError, match=r"do not fit the configuration(.|\n)*head.weight"):
        load_uta(state, UTAConfig(**{**asdict(CONFIG), "embed_dim": 7}))
    with pytest.raises(ValueError, match="in no layout known here.*weight"):
        layout_of({"weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="pass config"):
        load_uta(state)


def test_positions_of_another_grid_are_resampled() -> None:
    optional_package("timm")
    from timm.layers import resample_abs_pos_embed

    positions = torch.randn(1, 17, 32)
    for grid in (3, 6):
        theirs = resample_abs_pos_embed(positions, [grid, grid], [4, 4])
        torch.testing.assert_close(resample_positions(positions, grid), theirs)
    assert torch.equal(resample_positions(positions, 4), positions)
    with pytest.raises(ValueError, match="square grid"):
        resample_positions(torch.randn(1, 16, 32), 4)
    model = student()
    larger = UTAConfig(**{**asdict(CONFIG), "image_size": 48})
    expected = resample_positions(to_eva(model.state_dict(), CONFIG)["pos_embed"], 6)[0]
    for state in (dict(model.state_dict()), to_eva(model.state_dict(), CONFIG), to_timm(model.state_dict(), CONFIG)):
        loaded = load_uta(state, larger)
        assert torch.equal(loaded.patch_embedding.positions, expected[1:])
        assert torch.equal(loaded.cls_position, expected[0])


def test_a_file_of_ours_holds_its_configuration(tmp_path: Path) -> None:
    model = student(UTAConfig(**{**asdict(CONFIG), "mask_token": True, "grad_checkpointing": True}))
    path = tmp_path / "deep" / "student.safetensors"
    save_uta(path, model, {"teacher": "a CLIP"})
    before = path.read_bytes()
    again = load_uta(path)
    assert again.config == model.config and not again.training
    equal(dict(again.state_dict()), dict(model.state_dict()))
    save_uta(path, again, {"teacher": "a CLIP"})
    assert path.read_bytes() == before
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == UTA_FORMAT and metadata["teacher"] == "a CLIP"
    assert load_uta(path, CONFIG).patch_embedding.mask_token is None
    with pytest.raises(ValueError, match="may not hold format"):
        save_uta(path, model, {"format": "mine"})
    with pytest.raises(ValueError, match="not a model of oner_fast: its format is 'oner_fast.uta'"):
        load_model(path)
    with pytest.raises(ValueError, match="unknown model settings size; known: depth"):
        uta_config_from_dict({"size": 1})
    assert uta_config_from_dict(json.loads(json.dumps(asdict(CONFIG)))) == CONFIG


def test_files_of_other_libraries_load(tmp_path: Path) -> None:
    model = student()
    expected = dict(model.state_dict())
    save_file(to_timm(expected, CONFIG), tmp_path / "timm.safetensors")
    equal(dict(load_uta(tmp_path / "timm.safetensors", CONFIG).state_dict()), expected)
    half = {f"module.visual.{name}": each.half() for name, each in to_eva(expected, CONFIG).items()}
    torch.save({"epoch": 3, "state_dict": half}, tmp_path / "uta.pt")
    loaded = load_uta(str(tmp_path / "uta.pt"), CONFIG)
    equal(dict(loaded.state_dict()), {name: each.half().float() for name, each in expected.items()})
    for name in ("none.pt", "none.safetensors"):
        with pytest.raises(FileNotFoundError, match="there is no model file"):
            load_uta(tmp_path / name, CONFIG)
