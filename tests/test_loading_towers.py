"""`oner_fast.load` and `oner-fast eval` for two towers: a CLIP, and UTA's student with its teacher's text tower."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import oner_fast
from oner_fast.evaluation.cli import main
from oner_fast.models.clip import CLIPConfig, build_clip, clip_pixels, clip_tokenizer, load_clip, save_clip
from oner_fast.models.files import save_uta
from oner_fast.models.uta import UTA, UTAConfig
from oner_fast.train.engine import checkpoint

CLIP = CLIPConfig(
    image_size=16, patch_size=8, vision_width=32, vision_layers=1, vision_heads=2, text_width=16, text_layers=1,
    text_heads=2, context_length=8, embed_dim=12,
)  # fmt: skip
STUDENT = UTAConfig(24, 8, width=32, depth=2, heads=2, mlp_hidden=40, embed_dim=12)
TEXTS = ["a red square", "blue"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CLIP in `clip` and a student aligned to it in `uta`."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("runs")
    save_clip(root / "clip", build_clip(CLIP), CLIP)
    save_uta(root / "uta" / "model.safetensors", UTA(STUDENT), {"teacher": str(root / "clip")})
    return root


def pictures(size: int) -> torch.Tensor:
    return torch.randint(256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def unit(found: torch.Tensor) -> bool:
    ones = torch.ones(found.shape[:-1])
    return found.dtype == torch.float32 and not found.requires_grad and torch.allclose(found.norm(dim=-1), ones)


def test_a_clip_folder_gives_both_towers(runs: Path) -> None:
    loaded = oner_fast.load(runs / "clip")
    clip, _ = load_clip(runs / "clip")
    pixels = pictures(16)
    with torch.no_grad():
        image, text = clip.encode_image(clip_pixels(pixels, CLIP)), clip.encode_text(clip_tokenizer(CLIP)(TEXTS))
    torch.testing.assert_close(loaded.encode_image(pixels), F.normalize(image, dim=-1))
    torch.testing.assert_close(loaded.encode_text(TEXTS), F.normalize(text, dim=-1))
    patches = loaded.encode_patches(pixels)
    assert patches.shape == (2, 4, 12) and unit(patches) and unit(loaded.encode_image(pixels))
    wide = loaded.preprocess(Image.new("RGBA", (40, 20), (0, 0, 0, 0)))
    assert wide.shape == (3, 16, 16) and wide.unique().tolist() == [255]
    assert not hasattr(loaded, "encode_image_text")


def test_images_are_taken_in_every_form(runs: Path, tmp_path: Path) -> None:
    for name in ("clip", "uta"):
        loaded = oner_fast.load(runs / name)
        pixels = pictures(loaded.image_size)
        arrays = pixels.permute(0, 2, 3, 1).numpy()
        file = tmp_path / "a.png"
        Image.fromarray(arrays[0]).save(file)
        both = loaded.encode_image(pixels)
        torch.testing.assert_close(loaded.encode_image(arrays), both)
        torch.testing.assert_close(loaded.encode_image(list(pixels)), both)
        torch.testing.assert_close(loaded.encode_image([file, Image.fromarray(arrays[1])]), both)
        torch.testing.assert_close(loaded.encode_patches([str(file)]), loaded.encode_patches(pixels[:1]))
        for one in (file, str(file), file.read_bytes(), arrays[0], Image.open(file)):
            torch.testing.assert_close(loaded.encode_image(one), both[:1])
        with pytest.raises(ValueError, match="image 1: not a readable image"):
            loaded.encode_image([file, b"nothing"])


def test_a_student_embeds_images_and_its_teacher_embeds_text(runs: Path) -> None:
    for source in (runs / "uta", runs / "uta" / "model.safetensors"):
        loaded, clip = oner_fast.load(source), oner_fast.load(runs / "clip")
        pixels = pictures(24)
        assert torch.equal(loaded.encode_text(TEXTS), clip.encode_text(TEXTS))
        raw = loaded.model.encode_image(pixels)
        torch.testing.assert_close(loaded.encode_image(pixels), F.normalize(raw, dim=-1))
        patches = loaded.encode_patches([Image.new("RGB", (30, 24))])
        assert patches.shape == (1, 9, 12) and unit(patches)
        assert not loaded.model.training and not any(one.requires_grad for one in loaded.model.parameters())


def test_the_text_tower_is_found_beside_the_run_or_named(runs: Path, tmp_path: Path) -> None:
    expected = oner_fast.load(runs / "clip").encode_text(TEXTS)
    save_uta(tmp_path / "a" / "model.safetensors", UTA(STUDENT), {"teacher": "../clip"})
    save_clip(tmp_path / "clip", build_clip(CLIP), CLIP)
    assert oner_fast.load(tmp_path / "a").encode_text(TEXTS).shape == (2, 12)
    assert torch.equal(oner_fast.load(tmp_path / "a", text_tower=runs / "clip").encode_text(TEXTS), expected)
    save_uta(tmp_path / "b" / "model.safetensors", UTA(STUDENT))
    alone = oner_fast.load(tmp_path / "b")
    assert not alone.has_text
    with pytest.raises(ValueError, match="names no text tower; give one"):
        alone.encode_text(TEXTS)
    save_uta(tmp_path / "c" / "model.safetensors", UTA(replace(STUDENT, embed_dim=10)), {"teacher": str(runs / "clip")})
    with pytest.raises(ValueError, match="embeds in 12 numbers, the student in 10"):
        oner_fast.load(tmp_path / "c").encode_text(TEXTS)
    with pytest.raises(ValueError, match="text tower 'nowhere/clip' cannot be loaded: .*; name another"):
        oner_fast.load(runs / "uta", text_tower="nowhere/clip").encode_text(TEXTS)
    with pytest.raises(ValueError, match="has its own text tower"):
        oner_fast.load(runs / "clip", text_tower=runs / "clip")


def test_unfinished_runs_load(runs: Path, tmp_path: Path) -> None:
    student, clip = UTA(STUDENT), build_clip(CLIP)
    about = {
        "kind": "oner_fast.uta",
        "model_config": json.dumps(asdict(STUDENT)),
        "teacher": str(runs / "clip"),
    }
    for prefix in ("", "student."):  # the second stage keeps the student as one of two towers
        run = tmp_path / f"uta{prefix}"
        weights = {prefix + name: tensor for name, tensor in student.state_dict().items()}
        checkpoint.save(run / "checkpoints", 5, {"student": weights, **about}, keep=0)
        loaded = oner_fast.load(run)
        assert all(torch.equal(*pair) for pair in zip(loaded.model.parameters(), student.parameters(), strict=True))
        assert unit(loaded.encode_text(TEXTS))
    weights = {"clip." + name: tensor for name, tensor in clip.state_dict().items()}
    about = {"kind": "oner_fast.clip", "model_config": json.dumps(asdict(CLIP))}
    checkpoint.save(tmp_path / "clip" / "checkpoints", 5, {"student": weights, **about}, keep=0)
    save_clip(tmp_path / "done", clip, CLIP)
    training, done = oner_fast.load(tmp_path / "clip"), oner_fast.load(tmp_path / "done")
    assert torch.equal(training.encode_image(pictures(16)), done.encode_image(pictures(16)))
    assert torch.equal(training.encode_text(TEXTS), done.encode_text(TEXTS))


def test_bad_inputs_are_named(runs: Path) -> None:
    loaded = oner_fast.load(runs / "uta")
    with pytest.raises(TypeError, match="got one string"):
        loaded.encode_text("a red square")
    with pytest.raises(ValueError, match="at least one text"):
        loaded.encode_text([])
    with pytest.raises(TypeError, match="image 1: got NoneType, need a path"):
        loaded.encode_image([Image.new("RGB", (8, 8)), None])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eight training and six validation images of four colours."""
    folder = tmp_path / "data"
    folder.mkdir()
    splits: dict[str, Any] = {}
    for split, count in (("train", 12), ("val", 6)):
        with tarfile.open(folder / f"{split}-000000.tar", "w") as tar:
            for number in range(count):
                out = io.BytesIO()
                Image.new("RGB", (16, 16), (60 * (number % 4), 20 * number, 99)).save(out, "png")
                caption = ("red", "blue", "green", "grey")[number % 4]
                meta = {"caption": f"{caption} {split}", "set": caption}
                members = {"png": out.getvalue(), "txt": meta["caption"].encode(), "json": json.dumps(meta).encode()}
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{number:06d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        splits[split] = {"shards": [{"file": f"{split}-000000.tar", "samples": count}]}
    (folder / "dataset.json").write_text(json.dumps({"name": "colours", "format": 1, "splits": splits}))
    return folder


@pytest.mark.parametrize("kind", ["clip", "uta"])
def test_eval_of_untrained_towers(kind: str, runs: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(runs / kind), "--data", str(data), "--knn", "--linear-probe", "--batch-size", "4"]
    assert main(argv + (["--text-tower", str(runs / "clip")] if kind == "uta" else [])) == 0
    val = json.loads((runs / kind / "evaluation.json").read_text())["val"]
    assert val["pairs"] == 6 and "image_text_to_image" not in val
    assert val["image_to_text"]["gallery"] == 4 and 0 <= val["image_to_text"]["R@1"] <= 1
    assert val["zero_shot"]["classes"] == 4 and val["zero_shot"]["images"] == 6
    assert val["knn"]["set"]["images"] == 6 and val["linear_probe"]["set"]["classes"] == 4
    printed = capsys.readouterr().out
    assert "image → text" in printed and "linear probe, set" in printed
    assert main([str(runs / "clip"), "--data", str(data), "--text-tower", str(runs / "clip")]) == 1
    assert "has its own text tower" in capsys.readouterr().err
