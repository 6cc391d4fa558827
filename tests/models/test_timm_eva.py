"""UTA's student as timm's own model: equal features, and refusal of an `Eva` that only looks like it."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from oner_fast.models.eva import to_timm
from oner_fast.models.files import load_uta
from oner_fast.models.optional_packages import optional_package
from oner_fast.models.timm_eva import check_timm, config_of, load_into_timm, timm_arguments, to_timm_model
from oner_fast.models.uta import UTA, UTA_SIZES, UTAConfig

CONFIG = UTAConfig(40, 8, width=32, depth=2, heads=2, mlp_hidden=43, embed_dim=24, mask_token=True)


def student(config: UTAConfig = CONFIG) -> UTA:
    torch.manual_seed(0)
    model = UTA(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if "norm" in name and "weight" in name else 0.0))
    return model.eval()


def built(config: UTAConfig = CONFIG, **changes: Any) -> Any:
    """Build an `Eva` by hand, with some arguments changed."""
    return optional_package("timm").models.eva.Eva(**{**timm_arguments(config), **changes}).eval()


def pictures(config: UTAConfig = CONFIG) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randint(256, (3, 3, config.image_size, config.image_size), dtype=torch.uint8)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (config.image_mean, config.image_std))
    return images, (images / 255 - mean) / std


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [{}, {"rope_grid": 5}, {"rope_theta": 100.0, "layer_norm_eps": 1e-3}, {"image_mean": (0.5, 0.4, 0.3)}]
)
def test_timms_model_has_the_students_features(changes: dict[str, Any]) -> None:
    ours = student(replace(CONFIG, **changes))
    theirs: Any = to_timm_model(ours)
    images, pixels = pictures(ours.config)
    features = theirs.head(theirs.forward_features(pixels))
    scale = float(features.abs().max())
    assert float((ours(images) - features).abs().max()) < 1e-6 * scale
    assert float((ours.encode_image(images) - theirs(pixels)).abs().max()) < 1e-6 * scale
    again = load_uta(theirs)
    assert again.config == replace(ours.config, mask_token=False)
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in again.state_dict().items())


@torch.no_grad()
def test_another_eva_takes_the_weights_and_is_refused() -> None:
    ours = student()
    images, pixels = pictures()
    wrong = built(ref_feat_shape=(20, 20))
    plain = {name: tensor for name, tensor in ours.state_dict().items() if "mask_token" not in name}
    wrong.load_state_dict(to_timm(plain, replace(CONFIG, mask_token=False)))  # nothing in a state dict tells
    assert float((wrong(pixels) - ours.encode_image(images)).abs().max()) > 1e-3
    told = r"its rotary positions are others: ref_feat_shape is \(20, 20\) and rope_temperature 10000.0, not \(16, 16\)"
    for refused in (lambda: load_uta(wrong, CONFIG), lambda: load_into_timm(wrong, ours)):
        with pytest.raises(ValueError, match=told):
            refused()
    assert load_uta(wrong).config.rope_grid == 20  # with its own configuration it is a student


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no scale": ({"ref_feat_shape": None}, "ref_feat_shape is None"),
    "temperature": ({"rope_temperature": 100.0}, "rope_temperature 100.0"),
    "offset": ({"rope_grid_offset": 0.5}, "its rotary positions are others"),
    "axes": ({"rope_grid_indexing": "xy"}, "its rotary positions are others"),
    "halves": ({"rope_rotate_half": True}, "its rotary positions are others"),
    "none": ({"use_rot_pos_emb": False}, "use_rot_pos_emb is False, not True"),
    "eps": ({"norm_layer": partial(nn.LayerNorm, eps=1e-5)}, "eps of the norms is 1e-05, not 1e-06"),
    "pool": ({"global_pool": "avg"}, "global_pool is avg, not token; use_fc_norm is True, not False"),
    "heads": ({"num_heads": 4}, "num_heads is 4, not 2"),
    "registers": ({"num_reg_tokens": 2}, "number of prefix tokens is 3, not 1"),
    "inner norm": ({"scale_attn_inner": True}, "scale_attn_inner is True, not False"),
    "query norm": ({"qk_norm": True}, "qk_norm is True, not False"),
    "scales": ({"init_values": 1e-5}, "init_values is True, not False"),
    "plain mlp": ({"swiglu_mlp": False}, "swiglu_mlp with scale_mlp is False, not True"),
    "post norm": ({"use_post_norm": True}, "use_post_norm is True, not False"),
    "size": ({"img_size": 48}, "img_size is 48, not 40"),
    "several": ({"depth": 3, "patch_size": 4}, "patch_size is 4, not 8; depth is 3, not 2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_every_other_argument_is_named(case: str) -> None:
    changes, words = WRONG[case]
    with pytest.raises(ValueError, match=words):
        check_timm(built(**changes), CONFIG)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"qkv_fused": True}, {"dynamic_img_size": True}])
def test_arguments_that_change_no_feature_are_taken(changes: dict[str, Any]) -> None:
    ours, theirs = student(), built(**changes)
    load_into_timm(theirs, ours)
    images, pixels = pictures()
    torch.testing.assert_close(theirs(pixels), ours.encode_image(images), rtol=0, atol=1e-5)
    assert config_of(theirs) == replace(CONFIG, mask_token=False)


def test_other_models_are_refused() -> None:
    timm = optional_package("timm")
    for refused in (check_timm, lambda model, _: config_of(model)):
        with pytest.raises(ValueError, match="a student is timm's Eva, got a VisionTransformer"):
            refused(timm.create_model("test_vit"), CONFIG)


@pytest.mark.parametrize("size", UTA_SIZES)
def test_every_size_has_its_hidden_width_in_timm(size: str) -> None:
    config = UTA_SIZES[size]
    arguments = timm_arguments(config)
    assert int(config.width * arguments["mlp_ratio"]) == config.mlp_hidden
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in built(replace(config, depth=1)).state_dict().items()}
        ours = UTA(replace(config, depth=1)).state_dict()
    assert shapes == {name: tensor.shape for name, tensor in to_timm(ours, replace(config, depth=1)).items()}
    assert asdict(config)["rope_grid"] == arguments["ref_feat_shape"][0]
