"""`oner_fast.load` of CLIPs that open_clip and transformers saved: the same embeddings, and refusals by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import oner_fast
from oner_fast.loaded_towers import LoadedTowers
from oner_fast.models import hugging_face_clip
from oner_fast.models.clip import CLIPConfig, build_clip, open_clip_config, save_clip
from oner_fast.models.files import load_uta
from oner_fast.models.optional_packages import optional_package
from oner_fast.models.teacher import is_fetched, is_teacher, load_teacher
from oner_fast.models.uta import UTAConfig

CLIP = CLIPConfig(
    image_size=16, patch_size=8, vision_width=32, vision_layers=2, vision_heads=2, text_width=16, text_layers=1,
    text_heads=2, context_length=12, embed_dim=12,
)  # fmt: skip
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
NAME, OTHER = "tiny-of-the-loading-tests", "other-of-the-loading-tests"
WORDS = ["a house", "dog"]


def images(size: int) -> torch.Tensor:
    return torch.randint(256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP in open_clip's folder, whose sizes open_clip knows as a model of a name."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder, build_clip(CLIP), CLIP)
    configs = tmp_path_factory.mktemp("configs")
    for name, config in ((NAME, CLIP), (OTHER, replace(CLIP, embed_dim=14))):
        (configs / f"{name}.json").write_text(json.dumps(open_clip_config(config)["model_cfg"]))
    optional_package("open_clip").add_model_config(configs)
    return folder


def same(found: Any, expected: Any) -> None:
    ids = torch.tensor([[49406, 5, 49407] + [0] * 9])  # a tokenizer takes long to make
    assert torch.equal(found.encode_image(images(16)), expected.encode_image(images(16)))
    assert torch.equal(found.text._text.encode_text(ids), expected.text._text.encode_text(ids))
    assert torch.equal(found.encode_patches(images(16)), expected.encode_patches(images(16)))
    assert torch.equal(found.logit_scale, expected.logit_scale)


def test_files_of_open_clip_load_by_the_name_of_their_model(clip: Path, tmp_path: Path) -> None:
    expected, state = oner_fast.load(clip), load_file(clip / "open_clip_model.safetensors")
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({"epoch": 3, "name": "mine", "state_dict": wrapped, "optimizer": {"state": {}}}, tmp_path / "epoch_3.pt")
    torch.save(state, tmp_path / "plain.bin")
    save_file(state, tmp_path / "weights.safetensors")
    for file in ("epoch_3.pt", "plain.bin", "weights.safetensors"):
        same(oner_fast.load(f"{tmp_path / file}:{NAME}"), expected)
        with pytest.raises(ValueError, match=rf"{file} holds the weights of a CLIP without .*{file}:MODEL; .*{NAME}"):
            oner_fast.load(tmp_path / file)
    with pytest.raises(ValueError, match=rf"plain\.bin:{OTHER} cannot be loaded as a CLIP: .*text_projection"):
        oner_fast.load(f"{tmp_path}/plain.bin:{OTHER}")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing\.pt"):
        oner_fast.load(f"{tmp_path}/nothing.pt:{NAME}")


def test_folders_of_open_clip_load_whatever_lies_beside(clip: Path, tmp_path: Path) -> None:
    state = load_file(clip / "open_clip_model.safetensors")
    shutil.copy(clip / "open_clip_config.json", tmp_path)
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    same(oner_fast.load(tmp_path), oner_fast.load(clip))
    same(oner_fast.load(f"local-dir:{tmp_path}"), oner_fast.load(clip))
    # Such a folder of the hub holds transformers' files too.
    save_file({"anything": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    same(oner_fast.load(tmp_path), oner_fast.load(clip))


@pytest.mark.parametrize(
    ("vision", "reason"),
    [
        (
            {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "pool_type": "avg", "head_width": 16},
            "pools by 'avg'",
        ),
        (
            {"image_size": 32, "patch_size": 8, "width": 64, "layers": 1, "attentional_pool": True,
             "attn_pooler_heads": 2, "attn_pooler_queries": 4},
            "pools by 'attention'",
        ),
        ({"image_size": 32, "width": 16, "layers": [1, 1, 1, 1]}, "ModifiedResNet, has no grid of tokens"),
    ],
)  # fmt: skip
def test_clips_that_are_no_teachers_are_evaluated_all_the_same(
    vision: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    open_clip = optional_package("open_clip")
    config = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": TEXT}
    torch.manual_seed(0)
    model = open_clip.CLIP(**config).eval()
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    loaded = oner_fast.load(tmp_path)
    pixels = (images(32) / 255 - 0.5) / 0.25
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode_image(images(32), normalize=False), model.encode_image(pixels))
    assert loaded.preprocess.squash and loaded.preprocess.bilinear and loaded.encode_text(WORDS).shape == (2, 12)
    for refused in (lambda: loaded.encode_patches(images(32)), lambda: load_teacher(tmp_path)):
        with pytest.raises(ValueError, match=reason):
            refused()


def test_names_that_are_fetched_are_passed_to_open_clip(monkeypatch: pytest.MonkeyPatch, clip: Path) -> None:
    open_clip = optional_package("open_clip")
    asked: list[tuple[str, dict[str, Any]]] = []
    real, config = open_clip.create_model, open_clip_config(CLIP)["model_cfg"]

    def create(name: str, **options: Any) -> Any:
        asked.append((name, options))
        return real(f"local-dir:{clip}")

    monkeypatch.setattr(open_clip, "create_model", create)
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: config)
    assert oner_fast.load("hf-hub:someone/clip").encode_image(images(16)).shape == (2, 12)
    assert oner_fast.load("ViT-B-32:openai").encode_image(images(16)).shape == (2, 12)
    assert [name for name, _ in asked] == ["hf-hub:someone/clip", "ViT-B-32"]
    assert asked[1][1]["pretrained"] == "openai" and asked[1][1]["force_quick_gelu"]
    config["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    with pytest.raises(ValueError, match="hf-hub:someone/clip asks to run code of its tokenizer"):
        oner_fast.load("hf-hub:someone/clip")
    assert len(asked) == 2


def test_an_eva02_clip_loads_whole_and_is_no_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_clip, timm = optional_package("open_clip"), optional_package("timm")

    def build(pretrained: bool = False, **options: Any) -> Any:
        trunk = timm.models.eva.Eva(
            img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, qkv_fused=False, mlp_ratio=4 * 2 / 3,
            swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True, use_rot_pos_emb=True, ref_feat_shape=(16, 16),
            num_classes=options["num_classes"], global_pool=options["global_pool"],
        )  # fmt: skip
        trunk.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
        return trunk

    build.__name__ = name = "eva02_of_the_loading_tests"
    monkeypatch.setitem(timm.models._registry._model_entrypoints, name, build)
    vision = {"image_size": 32, "timm_model_name": name, "timm_pool": "token", "timm_proj": None}
    config = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": TEXT}
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(**config).eval()
    assert "visual.trunk.blocks.1.attn.norm.weight" in model.state_dict()
    about = {"mean": [0.5] * 3, "std": [0.25] * 3}
    written = {"model_cfg": config | {"custom_text": True}, "preprocess_cfg": about}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(written))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    loaded = oner_fast.load(tmp_path)
    with torch.no_grad():
        expected = model.encode_image((images(32) / 255 - 0.5) / 0.25)
    torch.testing.assert_close(loaded.encode_image(images(32), normalize=False), expected)
    assert loaded.encode_patches(images(32)).shape == (2, 16, 12)
    assert load_teacher(tmp_path, grid=3).tokens(images(24)).shape == (2, 10, 12)
    student = UTAConfig(32, 8, width=32, depth=2, heads=2, mlp_hidden=85, embed_dim=12)
    with pytest.raises(ValueError, match="norm inside attention .*Load such a CLIP whole, by the name of its model"):
        load_uta(tmp_path / "open_clip_model.safetensors", student)


# Folders of transformers


def tokenizer_files(folder: Path, words: int = 54) -> None:
    """Write a tokenizer of single letters."""
    transformers = hugging_face_clip.transformers_package()
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for letter in "abcdefghijklmnopqrstuvwxyz":
        vocabulary |= {letter: len(vocabulary), f"{letter}</w>": len(vocabulary) + 1}
    assert len(vocabulary) == words
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)


TOWER = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
HF_TEXT = {**TOWER, "vocab_size": 54, "hidden_size": 16, "max_position_embeddings": 9}
HF_VISION = {**TOWER, "hidden_size": 16, "image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """A CLIP and a SigLIP that transformers saved, with the model of each."""
    transformers = hugging_face_clip.transformers_package()
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(text_config={**HF_TEXT, **ends}, vision_config=HF_VISION, projection_dim=12)
    )
    siglip = transformers.SiglipModel(
        transformers.SiglipConfig(text_config={**HF_TEXT, **ends}, vision_config=HF_VISION)
    )
    found = {}
    for kind, model in (("clip", clip), ("siglip", siglip)):
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        tokenizer_files(folder)
        found[kind] = (folder, model.eval())
    about = {"do_center_crop": True, "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    about |= {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "resample": 3}
    (found["clip"][0] / "preprocessor_config.json").write_text(json.dumps(about))
    return found


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_transformers_folders_give_its_embeddings(kind: str, hugging_face: dict[str, tuple[Path, Any]]) -> None:
    folder, model = hugging_face[kind]
    loaded, tokenizer = oner_fast.load(folder), hugging_face_clip.transformers_package().AutoTokenizer
    own = {"clip": ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)), "siglip": ((0.5,) * 3, (0.5,) * 3)}[kind]
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in own)
    options = {"padding": "max_length", "max_length": 9, "truncation": True, "return_tensors": "pt"}
    ids = tokenizer.from_pretrained(folder)(WORDS, **options).input_ids
    with torch.no_grad():
        image = model.get_image_features((images(32) / 255 - mean) / std).pooler_output
        text = model.get_text_features(ids).pooler_output
    torch.testing.assert_close(loaded.encode_image(images(32), normalize=False), image)
    assert torch.equal(loaded.tokenize(WORDS), ids) and loaded.tokenize.context_length == 9
    torch.testing.assert_close(loaded.encode_text(WORDS, normalize=False), text)
    torch.testing.assert_close(loaded.encode_text(ids, normalize=False), text)
    torch.testing.assert_close(loaded.logit_scale, model.logit_scale.detach().reshape(()))
    assert loaded.preprocess.squash == (kind == "siglip")
    if kind == "siglip":
        torch.testing.assert_close(loaded.logit_bias, model.logit_bias.detach().reshape(()))
    assert is_teacher(folder) and not is_fetched(str(folder))


def test_a_clip_of_transformers_is_a_teacher_on_every_grid(hugging_face: dict[str, tuple[Path, Any]]) -> None:
    folder, model = hugging_face["clip"]
    teacher = load_teacher(folder)
    tokens = teacher.tokens(images(32))
    assert tokens.shape == (2, 17, 12)
    torch.testing.assert_close(tokens[:, 0], teacher.encode_image(images(32)))
    smaller = load_teacher(folder, grid=3)
    torch.testing.assert_close(smaller.tokens(images(24))[:, 0], smaller.encode_image(images(24)))
    assert smaller.tokens(images(24)).shape == (2, 10, 12) and smaller.fingerprint != teacher.fingerprint
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    with torch.no_grad():
        vision = model.vision_model((images(32) / 255 - mean) / std).last_hidden_state
        last = model.visual_projection(model.vision_model.post_layernorm(vision))
    torch.testing.assert_close(tokens, last)
    torch.testing.assert_close(oner_fast.load(folder).encode_patches(images(32), normalize=False), last[:, 1:])


def test_an_attention_pooled_teacher_is_refused_by_name_and_reason(
    hugging_face: dict[str, tuple[Path, Any]],
) -> None:
    folder, _ = hugging_face["siglip"]
    with pytest.raises(ValueError, match=f"{folder}: its image tower pools by 'attention', so that no token of it"):
        load_teacher(folder)
    with pytest.raises(ValueError, match="pools by 'attention'"):
        oner_fast.load(folder).encode_patches(images(32))


def changed(folder: Path, target: Path, **changes: Any) -> Path:
    """Copy a folder with some entries of its configuration changed; None removes one."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        tower, _, key = name.partition("__")
        (config[tower] if key else config)[key or tower] = value
    (target / "config.json").write_text(json.dumps(config))
    return target


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "type": ({"model_type": "blip"}, "names the type 'blip', and clip or siglip is needed"),
    "depth": ({"text_config__num_hidden_layers": 10**6}, "asks for num_hidden_layers 1,000,000 of the text tower"),
    "context": ({"text_config__max_position_embeddings": 5000}, "asks for max_position_embeddings 5,000"),
    "width": ({"vision_config__hidden_size": 10**9}, "asks for hidden_size 1,000,000,000 of the vision tower"),
    "another width": ({"vision_config__hidden_size": 32}, "has shape"),
    "heads": ({"text_config__num_attention_heads": 3}, "no model has these sizes"),
    "activation": ({"text_config__hidden_act": "os.system"}, "no model has these sizes"),
    "tower": ({"text_config": [1]}, "'text_config' must be an object"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_folders_that_do_not_fit_are_refused(
    case: str, hugging_face: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    changes, words = REFUSED[case]
    with pytest.raises(ValueError, match=words) as found:
        oner_fast.load(changed(hugging_face["clip"][0], tmp_path, **changes))
    assert str(tmp_path) in str(found.value)


def test_no_entry_of_a_folder_names_code_or_a_model(hugging_face: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("raise SystemExit('ran')\n")
    folder = changed(
        hugging_face["clip"][0],
        tmp_path,
        auto_map={"AutoModel": "code.Model", "AutoConfig": "code.Config"},
        attn_implementation="someone/kernels",
        text_config__attn_implementation="someone/kernels",
        vision_config___attn_implementation="someone/kernels",
    )
    loaded, expected = oner_fast.load(folder), oner_fast.load(hugging_face["clip"][0])
    assert torch.equal(loaded.encode_image(images(32)), expected.encode_image(images(32)))
    assert torch.equal(loaded.encode_text(WORDS), expected.encode_text(WORDS))


def test_weights_may_be_in_parts_or_pickled(hugging_face: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    folder, _ = hugging_face["clip"]
    expected, state = oner_fast.load(folder).encode_image(images(32)), load_file(folder / "model.safetensors")
    names = sorted(state)
    index = {name: f"part-{place % 2}.safetensors" for place, name in enumerate(names)}

    def fresh(name: str) -> Path:
        target = changed(folder, tmp_path / name)
        (target / "model.safetensors").unlink()
        return target

    parts = fresh("parts")
    for file in set(index.values()):
        save_file({name: state[name] for name in names if index[name] == file}, parts / file)
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert torch.equal(oner_fast.load(parts).encode_image(images(32)), expected)
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../clip/model.safetensors"}}))
    with pytest.raises(ValueError, match="names '../clip/model.safetensors', and a safetensors file beside it"):
        oner_fast.load(parts)
    pickled = fresh("pickled")
    old = state | {"text_model.embeddings.position_ids": torch.arange(9)[None]}
    torch.save(old, pickled / "pytorch_model.bin")
    assert torch.equal(oner_fast.load(pickled).encode_image(images(32)), expected)
    with pytest.raises(FileNotFoundError, match="holds config.json but neither model.safetensors"):
        oner_fast.load(fresh("none"))


BAD_PREPROCESS: list[tuple[dict[str, Any], str]] = [
    ({"size": {"shortest_edge": 40}}, "resized to {'shortest_edge': 40}, and 32 px"),
    ({"size": {"longest_edge": 32}}, "and 32 px, the model's own size, is needed"),
    ({"resample": 0}, "Pillow's method 0, and 2 or 3 is needed"),
    ({"image_mean": [0.5]}, r"image_mean must be three numbers, got \[0.5\]"),
    ({"image_std": [0.5, 0, 0.5]}, "image_std must be above 0"),
]


@pytest.mark.parametrize(("values", "words"), BAD_PREPROCESS)
def test_preprocessing_that_is_not_read_is_refused(
    values: dict[str, Any], words: str, hugging_face: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    folder = changed(hugging_face["clip"][0], tmp_path)
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=words):
        oner_fast.load(folder)


def test_a_tokenizer_that_does_not_fit_is_named(
    hugging_face: dict[str, tuple[Path, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = changed(hugging_face["siglip"][0], tmp_path)
    loaded = oner_fast.load(folder)
    monkeypatch.setattr(hugging_face_clip, "MAX_TOKENIZER", 10)
    with pytest.raises(ValueError, match=r"tokenizer.*json has [\d,]+ bytes, and at most 10 are read"):
        loaded.tokenize(WORDS)
    monkeypatch.undo()
    for file in [path for path in folder.iterdir() if "token" in path.name]:
        file.unlink()
    with pytest.raises(ValueError, match=f"{folder} holds no tokenizer: tokenizer.json, vocab.json, spiece.model are"):
        oner_fast.load(folder).tokenize(WORDS)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{folder} holds no tokenizer that transformers can load"):
        oner_fast.load(folder).tokenize(WORDS)
    tokenizer_files(folder)
    small: Callable[..., Any] = hugging_face_clip.FolderTokenizer
    model = oner_fast.load(folder)
    assert isinstance(model, LoadedTowers)
    tokenizer = small(model.text.tokenizer._tokenizer, 9, 5, "here")
    with pytest.raises(ValueError, match="the tokenizer in here gives the id .*, and the model embeds 5 words"):
        tokenizer(WORDS)
