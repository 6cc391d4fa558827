"""The file of predictors and teacher: what comes back, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from oner_fast.models.contrast import FORMAT, Contrast, load_contrast, save_contrast
from oner_fast.models.oner import OneR, OneRConfig
from oner_fast.nn.heads import Predictor

SMALL = OneRConfig(
    image_size=16, patch_size=8, width=8, depth=2, heads=2, vocab_size=20, max_text_tokens=6, embed_dim=5,
    projector_hidden=7,
)  # fmt: skip
DIGEST = "a" * 64


@pytest.mark.parametrize("parts", ["everything", "no predictor", "nothing"])
def test_a_file_gives_back_what_was_saved(tmp_path: Path, parts: str) -> None:
    predictors = (Predictor(5, 3), Predictor(5, 4)) if parts == "everything" else (None, None)
    saved = Contrast(*predictors, None if parts == "nothing" else OneR(SMALL))
    path = tmp_path / "contrast.safetensors"
    save_contrast(path, saved, DIGEST)
    first = path.read_bytes()
    loaded = load_contrast(path, SMALL, DIGEST)
    for name in ("predictor", "text_predictor", "teacher"):
        one, two = getattr(saved, name), getattr(loaded, name)
        assert (one is None) == (two is None)
        if one is not None:
            assert not two.training and not any(each.requires_grad for each in two.parameters())
            for left, right in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
                assert torch.equal(left, right)
    save_contrast(path, loaded, DIGEST)
    assert path.read_bytes() == first


def test_each_pass_has_its_heads_predictor() -> None:
    image, text = Predictor(5, 3), Predictor(5, 3)
    rows = {name: torch.randn(2, 5) for name in ("text", "image", "image_text")}
    found = Contrast(image, text, None).predicted(rows)
    assert list(found) == list(rows)
    for name, predictor in (("text", text), ("image", image), ("image_text", image)):
        torch.testing.assert_close(found[name], predictor(rows[name]))
    shared = Contrast(image, None, None).predicted(rows)
    torch.testing.assert_close(shared["text"], image(rows["text"]))
    assert Contrast(None, None, None).predicted(rows) == rows


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "contrast.safetensors"
    with pytest.raises(FileNotFoundError):
        load_contrast(path, SMALL, DIGEST)
    save_contrast(path, Contrast(Predictor(5, 3), None, OneR(SMALL)), DIGEST)
    with pytest.raises(ValueError, match="belongs to another model than the one beside it; run the training's command"):
        load_contrast(path, SMALL, "b" * 64)
    with pytest.raises(ValueError, match="predictor: 0.weight has shape"):
        load_contrast(path, replace(SMALL, embed_dim=6), DIGEST)
    with pytest.raises(ValueError, match="teacher: .*asks for 3 blocks"):
        load_contrast(path, replace(SMALL, depth=3), DIGEST)
    about = {"format": FORMAT, "format_version": "1", "model": DIGEST}
    save_file({"other.weight": torch.zeros(1)}, path, about)
    with pytest.raises(ValueError, match="extra other"):
        load_contrast(path, SMALL, DIGEST)
    save_file({"predictor.0.bias": torch.zeros(1)}, path, about)
    with pytest.raises(ValueError, match="missing 0.weight"):
        load_contrast(path, SMALL, DIGEST)
    save_file({}, path, about | {"format_version": "99"})
    with pytest.raises(ValueError, match="format version 99"):
        load_contrast(path, SMALL, DIGEST)
    save_file({}, path, {"config": json.dumps({})})
    with pytest.raises(ValueError, match="holds no predictor and teacher"):
        load_contrast(path, SMALL, DIGEST)
