"""A student at another resolution or patch size: what is resampled, and what stays equal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from oner_fast.models.files import load_uta
from oner_fast.models.resampling import resample_patches, resample_positions
from oner_fast.models.uta import UTA, UTAConfig, resampled

CONFIG = UTAConfig(16, 4, width=16, depth=2, heads=2, mlp_hidden=12, embed_dim=5)


def student() -> UTA:
    torch.manual_seed(0)
    return UTA(CONFIG).double().eval()


def test_larger_patches_embed_an_enlarged_image_as_before() -> None:
    model = student()
    larger = resampled(model, image_size=28, patch_size=7)
    assert larger.config == replace(CONFIG, image_size=28, patch_size=7) and not larger.training
    patches = torch.rand(2, 3, 4, 4, 4, 4, dtype=torch.float64)  # [B, C, row, column, h, w]
    enlarged = F.interpolate(patches.flatten(0, 3).unsqueeze(1), size=(7, 7), mode="bilinear", antialias=True)
    enlarged = enlarged.view(2, 3, 4, 4, 7, 7)
    small, large = (
        each.permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 4 * each.shape[-1], -1) for each in (patches, enlarged)
    )
    torch.testing.assert_close(larger(large), model(small), rtol=1e-9, atol=1e-9)


def test_smaller_patches_embed_as_closely_as_any_weight_can() -> None:
    weight = torch.randn(5, 3 * 8 * 8, dtype=torch.float64)
    reduced = resample_patches(weight, 3, 4)
    assert reduced.shape == (5, 48)
    pixels = torch.eye(64, dtype=torch.float64).view(64, 1, 8, 8)
    shrink = F.interpolate(pixels, size=(4, 4), mode="bilinear", antialias=True).flatten(1)  # one row a pixel
    missing = weight.view(-1, 64).t() - shrink @ reduced.view(-1, 16).t()
    assert missing.abs().max() > 0.1
    torch.testing.assert_close(shrink.t() @ missing, torch.zeros(16, 15, dtype=torch.float64), rtol=0, atol=1e-12)
    assert resample_patches(weight, 3, 8) is weight
    with pytest.raises(ValueError, match=r"weight must have shape \(D, 3 \* p \* p\), got \(5, 50\)"):
        resample_patches(torch.randn(5, 50), 3, 4)


def test_another_resolution_resamples_positions_alone() -> None:
    model = student()
    larger = resampled(model, image_size=24)
    before, after = model.state_dict(), larger.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["patch_embedding.positions"]
    table = torch.cat([before["cls_position"].unsqueeze(0), before["patch_embedding.positions"]]).unsqueeze(0)
    assert torch.equal(after["patch_embedding.positions"], resample_positions(table, 6)[0, 1:])
    assert larger(torch.zeros(1, 3, 24, 24, dtype=torch.uint8)).shape == (1, 37, 5)
    same = resampled(model, image_size=16)
    assert all(torch.equal(before[name], value) for name, value in same.state_dict().items())
    with pytest.raises(ValueError, match="multiple of patch_size 4, got 18"):
        resampled(model, image_size=18)


def test_loading_with_other_sizes_resamples_too() -> None:
    model = student().float()
    config = replace(CONFIG, image_size=21, patch_size=7)
    loaded, copy = load_uta(model.state_dict(), config), resampled(model, image_size=21, patch_size=7)
    for name, value in copy.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
