from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import oner_fast
from oner_fast.data.tokenizer import Tokenizer
from oner_fast.loaded_towers import LoadedTowers
from oner_fast.models.files import save_model
from oner_fast.models.oner import OneR, OneRConfig
from oner_fast.models.uta import UTA, UTAConfig
from oner_fast.nn.positions import resample_grid
from oner_fast.train.engine import checkpoint
from oner_fast.train.oner.settings import Objectives
from oner_fast.train.oner.student import Student

CAPTIONS = ["a red square", "a green circle above a blue square", "blue"]
TOKENIZER = Tokenizer.train(CAPTIONS, 60)
SMALL = OneRConfig(
    image_size=16, patch_size=8, width=8, depth=1, heads=2, vocab_size=TOKENIZER.vocab_size, max_text_tokens=6,
    embed_dim=5, projector_hidden=7,
)  # fmt: skip


def picture(width: int = 30, height: int = 20, mode: str = "RGB") -> Image.Image:
    pixels = torch.randint(256, (height, width, len(mode)), dtype=torch.uint8).numpy()
    return Image.fromarray(pixels if len(mode) > 1 else pixels[..., 0])


@pytest.fixture
def tower() -> OneR:
    return OneR(SMALL)


@pytest.fixture
def file(tmp_path: Path, tower: OneR) -> Path:
    path = tmp_path / "run" / "model.safetensors"
    save_model(path, tower, TOKENIZER.to_json())
    return path


def save_checkpoint(run: Path, step: int, student: Student, teacher: OneR | None) -> Path:
    state = {
        "student": student.state_dict(),
        "teacher": None if teacher is None else teacher.state_dict(),
        "model_config": json.dumps(asdict(SMALL)),
        "tokenizer": TOKENIZER.to_json(),
    }
    return checkpoint.save(run / "checkpoints", step, state, keep=0)


def same(model: OneR, tower: OneR) -> bool:
    return all(torch.equal(one, other) for one, other in zip(model.parameters(), tower.parameters(), strict=True))


def test_a_run_folder_and_its_file_are_the_same_model(file: Path, tower: OneR) -> None:
    for source in (file, str(file), file.parent, str(file.parent)):
        loaded = oner_fast.load(source)
        assert same(loaded.model, tower) and loaded.config == SMALL
        assert not loaded.model.training and not any(one.requires_grad for one in loaded.model.parameters())
        assert torch.equal(loaded.tokenizer(CAPTIONS).input_ids, TOKENIZER(CAPTIONS).input_ids)


def test_embeddings_are_the_normalised_passes(file: Path, tower: OneR) -> None:
    loaded, pictures = oner_fast.load(file), [picture(), picture(16, 16), picture(20, 50, "L")]
    pixels = torch.stack([loaded.preprocess(one) for one in pictures])
    text = TOKENIZER(CAPTIONS, 6)
    assert pixels.shape == (3, 3, 16, 16) and pixels.dtype == torch.uint8
    assert max(text.cu_seqlens.diff()) == 6 < len(TOKENIZER(CAPTIONS[1:2]).input_ids)
    ids = text.input_ids, text.cu_seqlens
    with torch.no_grad():
        for found, raw in (
            (loaded.encode_image(pictures), tower.encode_image(pixels)),
            (loaded.encode_image(pixels), tower.encode_image(pixels)),
            (loaded.encode_text(CAPTIONS), tower.encode_text(*ids)),
            (loaded.encode_image_text(pictures, CAPTIONS), tower.encode_image_text(pixels, *ids)),
            (loaded.encode_patches(pictures), tower.encode_patches(pixels)),
        ):
            assert found.dtype == torch.float32 and not found.requires_grad
            torch.testing.assert_close(found.norm(dim=-1), torch.ones(found.shape[:-1]))
            torch.testing.assert_close(found, F.normalize(raw, dim=-1))


def test_preprocessing_crops_the_centre_on_white(file: Path) -> None:
    loaded = oner_fast.load(file)
    wide = Image.new("RGB", (48, 16), (255, 0, 0))
    wide.paste((0, 0, 255), (16, 0, 32, 16))
    assert loaded.preprocess(wide).flatten(1).unique(dim=1).tolist() == [[0], [0], [255]]
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    assert loaded.preprocess(clear).unique().tolist() == [255]


def test_an_unfinished_run_gives_its_newest_student(tmp_path: Path) -> None:
    older, newer = (Student(SMALL, Objectives(predictor_hidden=8)) for _ in range(2))
    first = save_checkpoint(tmp_path, 5, older, OneR(SMALL))
    save_checkpoint(tmp_path, 10, newer, OneR(SMALL))
    assert same(oner_fast.load(tmp_path).model, newer.tower)
    assert same(oner_fast.load(first).model, older.tower)
    save_model(tmp_path / "model.safetensors", older.tower, TOKENIZER.to_json())
    assert same(oner_fast.load(tmp_path).model, older.tower)


def test_without_teacher_the_student_is_the_model(tmp_path: Path) -> None:
    student = Student(SMALL, Objectives(momentum_teacher=False))
    path = save_checkpoint(tmp_path, 5, student, None)
    assert same(oner_fast.load(path).model, student.tower)


def test_files_that_are_no_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no run folder or model file .*nowhere"):
        oner_fast.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds neither model.safetensors nor a checkpoint; train it first"):
        oner_fast.load(tmp_path)
    other = checkpoint.save(tmp_path / "checkpoints", 1, {"weights": 1}, keep=0)
    with pytest.raises(ValueError, match="is not a checkpoint of a tower: it holds step, weights"):
        oner_fast.load(other)
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        oner_fast.load(tmp_path / "notes.txt")


def test_bad_inputs_are_named(file: Path) -> None:
    loaded = oner_fast.load(file)
    with pytest.raises(TypeError, match="texts must be a list of strings, got one string"):
        loaded.encode_text("a red square")
    with pytest.raises(TypeError, match="images: got dict, need a path, the bytes of an image file, a PIL image"):
        loaded.encode_image({"a": picture()})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="each image must have one text, got 1 images and 3 texts"):
        loaded.encode_image_text([picture()], CAPTIONS)
    with pytest.raises(ValueError, match="images must hold at least one image"):
        loaded.encode_image([])
    with pytest.raises(ValueError, match="texts must hold at least one text, got none"):
        loaded.encode_text([])
    with pytest.raises(ValueError, match=r"images must have shape \(B, C, 16, 16\), or another square size that"):
        loaded.encode_image(torch.zeros(1, 3, 20, 20, dtype=torch.uint8))
    with pytest.raises(ValueError, match="multiple of the patch size 8, such as 16 or 24, got 20"):
        loaded.encode_image([picture()], image_size=20)
    with pytest.raises(ValueError, match="got a tensor of 16 px beside image_size 24"):
        loaded.encode_image(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), image_size=24)


def test_images_of_another_size_are_embedded_with_resampled_positions(file: Path, tower: OneR) -> None:
    loaded, pictures = oner_fast.load(file), [picture(), picture(40, 20)]
    larger = OneR(OneRConfig(**{**asdict(SMALL), "image_size": 32})).eval()
    positions = {"patch_embedding.positions": resample_grid(tower.patch_embedding.positions.detach(), 4)}
    larger.load_state_dict(tower.state_dict() | positions)
    pixels = torch.stack([loaded.preprocess(one, image_size=32) for one in pictures])
    with torch.no_grad():
        expected = F.normalize(larger.encode_image(pixels), dim=-1)
    for _ in range(2):  # the second time from memory
        assert torch.equal(loaded.encode_image(pictures, image_size=32), expected)
        assert torch.equal(loaded.encode_image(pixels), expected)
    assert loaded.encode_patches(pictures, image_size=32).shape == (2, 16, 5)
    assert loaded.encode_image_text(pictures, CAPTIONS[:2], image_size=8).shape == (2, 5)


@pytest.mark.parametrize(
    ("texts", "error", "named"),
    [
        (None, TypeError, "got NoneType"), (3, TypeError, "got int"), ({"red"}, TypeError, "got set"),
        (b"red", TypeError, "got bytes"), (["red", 3], TypeError, "text 1: got int"),
        ([["red"]], TypeError, "text 0: got list"), (["\ud800"], ValueError, "text 0: it holds half a surrogate"),
    ],
)  # fmt: skip
def test_texts_of_other_kinds_are_named(texts: Any, error: type[Exception], named: str, file: Path) -> None:
    with pytest.raises(error, match=named):
        oner_fast.load(file).encode_text(texts)


@pytest.mark.parametrize(
    "images",
    [torch.zeros(3, 16, 16), torch.tensor(1), torch.zeros(1, 1, 3, 16, 16), torch.zeros(1, 3, 16, 16, device="meta")],
)
def test_a_tensor_that_is_no_batch_of_images_is_named(images: torch.Tensor, file: Path) -> None:
    with pytest.raises(ValueError, match=r"images: got .* tensor, need \(B, 3, S, S\).*as a list of tensors"):
        oner_fast.load(file).encode_image(images)


def test_towers_are_frozen_and_moved_to_the_device_that_is_given(tmp_path: Path) -> None:
    student = UTA(UTAConfig(24, 8, width=32, depth=1, heads=2, mlp_hidden=40, embed_dim=12))
    towers = LoadedTowers(student, 24, "", tmp_path, torch.device("meta"), True)
    assert towers.device.type == "meta" and towers.may_fetch and not towers.model.training
    assert not any(weight.requires_grad for weight in student.parameters())
