"""Teachers of every kind: token 0 is the CLIP's embedding on any grid, and a loss can use frozen outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from oner_fast.models import teacher as module
from oner_fast.models.clip import CLIPConfig, build_clip, clip_pixels, load_clip, save_clip
from oner_fast.models.optional_packages import optional_package
from oner_fast.models.teacher import Teacher, load_teacher
from oner_fast.models.teacher_image_towers import TimmViT

TEXT = {"context_length": 9, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
CONFIG = CLIPConfig(
    image_size=32,
    patch_size=8,
    vision_width=32,
    vision_layers=2,
    vision_heads=4,
    text_width=16,
    text_layers=1,
    text_heads=2,
    context_length=9,
    embed_dim=20,
)
# The projection is the trunk's own head, or an added one.
TRUNKS = {
    "timm_head": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": None, "image_size": 160},
    "timm_linear": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160},
}


def write_folder(folder: Path, vision: dict[str, Any], preprocess: dict[str, Any] | None = None) -> Path:
    """Save a CLIP with random weights as open_clip does."""
    model_cfg = {"embed_dim": 20, "vision_cfg": vision, "text_cfg": TEXT, "custom_text": "timm_model_name" in vision}
    open_clip = optional_package("open_clip")
    kind = open_clip.model.CustomTextCLIP if model_cfg["custom_text"] else open_clip.CLIP
    torch.manual_seed(0)
    model = kind(**{name: value for name, value in model_cfg.items() if name != "custom_text"})
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    own = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    save_clip(own, build_clip(CONFIG), CONFIG)
    return {"vit": own} | {name: write_folder(tmp_path_factory.mktemp(name), cfg) for name, cfg in TRUNKS.items()}


def images(size: int = 32, count: int = 2) -> torch.Tensor:
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["vit", *TRUNKS])
def test_token_0_is_the_embedding_on_every_grid_and_from_every_size(kind: str, folders: dict[str, Path]) -> None:
    teacher = load_teacher(folders[kind], grid=3)
    assert (teacher.grid, teacher.embed_dim) == (3, 20)
    for size in (teacher.image_size, 40):
        tokens = teacher.tokens(images(size))
        assert tokens.shape == (2, 10, 20) and tokens.dtype == torch.float32
        torch.testing.assert_close(tokens[:, 0], teacher.encode_image(images(size)))
        assert float(tokens.std(dim=1).mean()) > 1e-4  # the patches differ from each other
    # open_clip itself, built for that size, gives the same embedding.
    theirs = (
        optional_package("open_clip")
        .create_model(f"local-dir:{folders[kind]}", force_image_size=teacher.image_size)
        .eval()
    )
    pixels = clip_pixels(images(teacher.image_size), CLIPConfig(image_size=teacher.image_size, patch_size=1))
    with torch.no_grad():
        torch.testing.assert_close(teacher.encode_image(images(teacher.image_size)), theirs.encode_image(pixels))
        ids = optional_package("open_clip").get_tokenizer(f"local-dir:{folders[kind]}")(["a house"])
        torch.testing.assert_close(teacher.encode_text(["a house"]), theirs.encode_text(ids))
    assert teacher.logit_scale == pytest.approx(1 / 0.07)


def test_patch_tokens_pass_the_final_norm_and_the_projection(folders: dict[str, Path]) -> None:
    teacher, (model, config) = load_teacher(folders["vit"]), load_clip(folders["vit"])
    visual: Any = model.visual
    with torch.no_grad():
        hidden = visual.transformer(visual._embeds(clip_pixels(images(), config)))
        torch.testing.assert_close(teacher.tokens(images()), visual.ln_post(hidden) @ visual.proj)
    assert (teacher.grid, teacher.image_size) == (4, 32)


def test_a_teacher_is_frozen_and_a_loss_can_use_its_output(folders: dict[str, Path]) -> None:
    teacher = load_teacher(folders["vit"])
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    holder = torch.nn.Module()
    holder.teacher = teacher
    holder.train()
    assert not any(each.training for each in teacher.modules())
    student = torch.ones(20, requires_grad=True)
    for output in (teacher.tokens(images()), teacher.encode_image(images()), teacher.encode_text(["a", "b"])):
        assert output.grad_fn is None and not output.requires_grad and not output.is_inference()
        (student * output).sum().backward()  # saves the output, which is impossible with an inference tensor


@pytest.mark.parametrize("kind", ["vit", "timm_head"])
def test_bfloat16_is_close_to_float32(kind: str, folders: dict[str, Path]) -> None:
    full, half = (load_teacher(folders[kind], grid=3, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    tokens = half.tokens(images())
    assert tokens.dtype == torch.bfloat16
    assert torch.cosine_similarity(tokens.float(), full.tokens(images()), dim=-1).min() > 0.999
    assert half.encode_text(["a"]).dtype == torch.bfloat16 and half.logit_scale == full.logit_scale


def test_the_fingerprint_changes_with_the_features(folders: dict[str, Path], tmp_path: Path) -> None:
    base = load_teacher(folders["vit"]).fingerprint
    assert len(base) == 64 and load_teacher(f"local-dir:{folders['vit']}").fingerprint == base
    assert load_teacher(folders["vit"], grid=3).fingerprint != base
    assert load_teacher(folders["vit"], dtype=torch.bfloat16).fingerprint != base
    model, config = load_clip(folders["vit"])
    with torch.no_grad():
        model.logit_scale += 1  # not part of the image tower
        save_clip(tmp_path, model, config)
        assert load_teacher(tmp_path).fingerprint == base
        next(model.visual.parameters()).flatten()[0] += 1e-3
    save_clip(tmp_path, model, config)
    assert load_teacher(tmp_path).fingerprint != base


def test_weights_of_a_file_load_into_a_named_model(folders: dict[str, Path], tmp_path: Path) -> None:
    names = tmp_path / "configs"
    names.mkdir()
    model_cfg = json.loads((folders["vit"] / "open_clip_config.json").read_text())["model_cfg"]
    (names / "tiny-of-this-test.json").write_text(json.dumps(model_cfg))
    optional_package("open_clip").add_model_config(names)
    file = folders["vit"] / "open_clip_model.safetensors"
    teacher = load_teacher(f"{file}:tiny-of-this-test")
    assert torch.equal(teacher.tokens(images()), load_teacher(folders["vit"]).tokens(images()))
    with pytest.raises(FileNotFoundError, match="there is no file .*missing.pt"):
        load_teacher(f"{tmp_path}/missing.pt:tiny-of-this-test")


def test_an_image_tower_of_timm_has_no_texts(tmp_path: Path) -> None:
    trunk = optional_package("timm").create_model("test_vit")
    save_file(trunk.state_dict(), tmp_path / "trunk.safetensors")
    teacher = load_teacher(f"{tmp_path}/trunk.safetensors:timm:test_vit", grid=2)
    assert (teacher.image_size, teacher.logit_scale) == (32, 1.0)
    torch.testing.assert_close(teacher.tokens(images(20))[:, 0], teacher.encode_image(images(20)))
    with pytest.raises(ValueError, match="image tower without a text tower"):
        teacher.encode_text(["a"])
    with pytest.raises(ValueError, match="so it has no tokenizer"):
        _ = teacher.tokenizer


def trunk_of(kind: str) -> Any:
    """Build a small timm ViT: with register tokens, with rotary positions (EVA), or distilled."""
    models = optional_package("timm").models
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    if kind == "registers":
        trunk = models.vision_transformer.VisionTransformer(**sizes, num_classes=20, reg_tokens=3)
    elif kind == "eva":
        trunk = models.eva.Eva(**sizes, num_classes=20, global_pool="token", swiglu_mlp=True, use_rot_pos_emb=True)
    else:
        trunk = models.deit.VisionTransformerDistilled(**sizes, num_classes=20)
    trunk.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    return trunk


@pytest.mark.parametrize("kind", ["registers", "eva"])
def test_trunks_with_registers_or_rotary_positions(kind: str) -> None:
    trunk = trunk_of(kind)
    teacher = Teacher(TimmViT(trunk, None, kind), name=kind)
    tokens = teacher.tokens(images())
    assert tokens.shape == (2, 17, 20)
    with torch.no_grad():
        last = trunk.forward_head(trunk.forward_features(images() / 127.5 - 1)[:, -1:])
    torch.testing.assert_close(tokens[:, -1], last)
    resized = Teacher(TimmViT(trunk, None, kind), name=kind, grid=3)
    torch.testing.assert_close(resized.tokens(images())[:, 0], resized.encode_image(images()))


def test_a_distilled_trunk_is_refused() -> None:
    with pytest.raises(ValueError, match="pools by 'distillation token'"):
        TimmViT(trunk_of("distilled"), None, "distilled")


@pytest.mark.parametrize(
    "vision, message",
    [
        (
            {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "pool_type": "avg", "head_width": 16},
            "pools by 'avg'",
        ),
        (
            {"image_size": 32, "width": 64, "layers": 1, "attentional_pool": True, "attn_pooler_heads": 2},
            "by 'attention",
        ),
        ({"image_size": 32, "width": 16, "layers": [1, 1, 1, 1]}, "ModifiedResNet, has no grid of tokens"),
        ({"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": None}, "pools by 'map'"),
        ({"timm_model_name": "test_convnext", "timm_pool": "avg", "timm_proj": "linear"}, "ConvNeXt, has no grid"),
    ],
)
def test_models_without_joint_tokens_are_refused(vision: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_teacher(write_folder(tmp_path, vision))


def test_an_embedding_that_is_not_the_projected_cls_is_refused(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        module.TeacherImageTower, "pooled", lambda self, pixels: self.project(self.hidden(pixels)).mean(1)
    )
    monkeypatch.delattr("oner_fast.models.teacher_image_towers.OpenClipViT.pooled")
    with pytest.raises(ValueError, match="not its projected .CLS. token"):
        load_teacher(folders["vit"])


@pytest.mark.parametrize(
    "source, error, message",
    [
        ("ViT-B-16", ValueError, "must be named with its tag, got 'ViT-B-16'; known: ViT-B-16:openai, "),
        ("ViT-B-16:nothing", ValueError, "got 'ViT-B-16:nothing'"),
        ("ViT-of-nobody:openai", ValueError, "open_clip has no model 'ViT-of-nobody'"),
        ("timm:vit_of_nobody", ValueError, "timm has no model 'vit_of_nobody'"),
        ("runs/nothing", FileNotFoundError, "there is no folder runs/nothing"),
        (Path("nothing"), FileNotFoundError, "there is no folder nothing"),
        (Path("tests"), FileNotFoundError, "tests holds neither open_clip_config.json nor lit_config.json"),
    ],
)
def test_bad_sources_are_refused(source: str | Path, error: type[Exception], message: str, request: Any) -> None:
    if source == Path("tests"):
        source = request.config.rootpath / source
    with pytest.raises(error, match=message):
        load_teacher(source)


def test_tags_trained_with_quickgelu_are_built_with_it() -> None:
    assert module._quick_gelu("ViT-B-16", "openai") and not module._quick_gelu("ViT-B-16", "laion2b_s34b_b88k")


def test_bad_input_is_refused(folders: dict[str, Path]) -> None:
    teacher = load_teacher(folders["vit"])
    with pytest.raises(ValueError, match=r"\(B, 3, S, S\), got \(2, 3, 32, 16\)"):
        teacher.tokens(images()[..., :16])
    with pytest.raises(TypeError, match="uint8, or floats in .* got torch.int64"):
        teacher.tokens(images().long())
    with pytest.raises(TypeError, match="list of strings"):
        teacher.encode_text("a house")
    with pytest.raises(ValueError, match="torch.float32 or torch.bfloat16, got torch.float16"):
        load_teacher(folders["vit"], dtype=torch.float16)
    with pytest.raises(ValueError, match="at least 1 cell a side, got 0"):
        load_teacher(folders["vit"], grid=0)
