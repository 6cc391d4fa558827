"""The two-tower CLIP: open_clip loads its folder and gives equal embeddings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from oner_fast.models.clip import (
    CLIPConfig,
    build_clip,
    clip_pixels,
    clip_tokenizer,
    load_clip,
    open_clip_config,
    save_clip,
)
from oner_fast.models.clip_packed import encode_image, encode_text, pack_tokens
from oner_fast.models.optional_packages import optional_package

CONFIG = CLIPConfig(
    image_size=32,
    patch_size=8,
    vision_width=32,
    vision_layers=2,
    vision_heads=4,
    text_width=24,
    text_layers=1,
    text_heads=2,
    context_length=9,
    embed_dim=20,
)
TEXTS = ["a red house", "two dogs, and a very long story that does not end within nine tokens"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder, build_clip(CONFIG), CONFIG)
    return folder


def images(size: int = 32, count: int = 3) -> torch.Tensor:
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_open_clip_loads_the_folder_and_gives_equal_embeddings(folder: Path) -> None:
    open_clip = optional_package("open_clip")
    ours, config = load_clip(folder)
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    assert config == CONFIG
    pixels = clip_pixels(images(), config)
    assert torch.equal(ours.encode_image(pixels), theirs.eval().encode_image(pixels))
    ids = clip_tokenizer(config)(TEXTS)
    assert ids.shape == (2, 9) and torch.equal(ids, tokenizer(TEXTS))
    assert torch.equal(ours.encode_text(ids), theirs.encode_text(ids))
    normalise = preprocess.transforms[-1]
    torch.testing.assert_close(normalise(images().float() / 255), pixels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_towers_equal_open_clips(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = build_clip(CONFIG)
    ids = clip_tokenizer(CONFIG)(TEXTS)
    text = pack_tokens(ids)
    assert text.lengths.tolist() == [5, 9] and text.input_ids[4] == text.input_ids[13] == ids.max()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found = [encode_image(model, images(count=2), CONFIG), encode_text(model, text)]
        wanted = [model.encode_image(clip_pixels(images(count=2), CONFIG)), model.encode_text(ids)]
    if dtype != torch.float32:
        assert all(each.dtype == dtype for each in found)
        assert all(
            torch.cosine_similarity(a.float(), b.float()).min() > 0.999 for a, b in zip(found, wanted, strict=True)
        )
        return
    gradients = []
    for outputs in (found, wanted):
        torch.testing.assert_close(outputs, wanted, rtol=1e-4, atol=1e-5)
        model.zero_grad()
        torch.cat(outputs).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == dict(model.named_parameters()).keys() - {"logit_scale"}
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: n + m)
    with pytest.raises(ValueError, match=r"\(B, 3, 32, 32\), got \(3, 3, 16, 16\)"):
        encode_image(model, images(16), CONFIG)


def test_pixels_may_be_bytes_or_fractions() -> None:
    torch.testing.assert_close(clip_pixels(images().float() / 255, CONFIG), clip_pixels(images(), CONFIG))
    with pytest.raises(ValueError, match=r"\(B, 3, 32, 32\), got \(3, 3, 16, 16\)"):
        clip_pixels(images(16), CONFIG)


def test_the_towers_learn() -> None:
    torch.manual_seed(0)
    model = build_clip(CONFIG)
    image, text, scale = model(clip_pixels(images(count=2), CONFIG), clip_tokenizer(CONFIG)(TEXTS))
    F.cross_entropy(scale * image @ text.T, torch.arange(2)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    "values, message",
    [
        ({"image_size": 30}, "multiple of patch_size, got 30 and 8"),
        ({"vision_heads": 5}, "vision_width must be a multiple of vision_heads, got 32 and 5"),
        ({"text_heads": 5}, "text_width must be a multiple of text_heads"),
        ({"embed_dim": 0}, "embed_dim must be at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(values: dict[str, int], message: str) -> None:
    sizes = {"image_size": 32, "patch_size": 8, "vision_width": 32, "vision_heads": 4, "text_width": 24}
    with pytest.raises(ValueError, match=message):
        CLIPConfig(**(sizes | values))


def test_folders_without_a_clip_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no open_clip_config.json"):
        load_clip(tmp_path)
    (tmp_path / "open_clip_model.safetensors").write_bytes((folder / "open_clip_model.safetensors").read_bytes())
    other = open_clip_config(CONFIG)
    other["model_cfg"]["embed_dim"] = 21
    (tmp_path / "open_clip_config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="does not fit the configuration beside it"):
        load_clip(tmp_path)
    other["model_cfg"]["vision_cfg"]["pool_type"] = "avg"
    (tmp_path / "open_clip_config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="holds settings that a two-tower CLIP"):
        load_clip(tmp_path)
    del other["model_cfg"]["vision_cfg"]["patch_size"]
    (tmp_path / "open_clip_config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="lacks 'patch_size'"):
        load_clip(tmp_path)
