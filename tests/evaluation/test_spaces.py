"""The spaces of an evaluation: where the contrast is at its least, and where somebody looks."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from oner_fast.data.tokenizer import Tokenizer
from oner_fast.evaluation.cli import main
from oner_fast.evaluation.embed import SplitEmbeddings
from oner_fast.evaluation.retrieval import caption_gallery
from oner_fast.evaluation.spaces import SpacesEncoder, class_figures, gaps, greater, open_spaces, space_figures
from oner_fast.evaluation.table import plain_lines
from oner_fast.loading import load
from oner_fast.models.contrast import FILE, Contrast, save_contrast
from oner_fast.models.files import model_bytes
from oner_fast.models.oner import OneR, OneRConfig
from oner_fast.nn.heads import Predictor
from oner_fast.ops import mixup_info_nce

CAPTIONS = ["red square", "blue square", "red circle", "arrow left"]
TOKENIZER = Tokenizer.train(CAPTIONS, 60)
SMALL = OneRConfig(
    image_size=16, patch_size=8, width=8, depth=1, heads=2, vocab_size=TOKENIZER.vocab_size, max_text_tokens=6,
    embed_dim=6, projector_hidden=7,
)  # fmt: skip


class Swap(torch.nn.Module):
    """A predictor that swaps the halves of its input."""

    def forward(self, rows: Tensor) -> Tensor:
        first, second = rows.chunk(2, dim=1)
        return torch.cat([second, first], dim=1)


class Halves(torch.nn.Module):
    """A tower with F(I) = [x, 0] and F(T) = [0, x], whose inputs are the rows of x themselves."""

    def __init__(self, config: OneRConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_token = torch.nn.Parameter(torch.zeros(config.width))


def halves(count: int) -> tuple[Tensor, Tensor]:
    x, zero = F.normalize(torch.randn(count, 3), dim=1), torch.zeros(count, 3)
    return torch.cat([x, zero], dim=1), torch.cat([zero, x], dim=1)


def encoder(**changes: Any) -> SpacesEncoder:
    class Loaded:
        model = Halves(SMALL)

    contrast = Contrast(Swap(), None, Halves(SMALL))  # type: ignore[arg-type]
    return SpacesEncoder(Loaded(), contrast, changes.get("asked", ("backbone", "projection", "predictor", "max")))


def wide(each: SpacesEncoder, projected: Tensor) -> Tensor:
    swapped = Swap()(projected)
    columns = {"backbone": torch.cat([projected, projected[:, :2] * 0], 1), "projection": projected}
    columns |= {"predicted": swapped, "teacher": projected}
    return torch.cat([columns[name] for name in each.widths], dim=1)


def test_a_predictor_can_meet_where_projections_do_not() -> None:
    """ITC and XMC are at their least, R@1 of the projections is 0 and that through the predictor 1."""
    torch.manual_seed(0)
    count, each = 12, encoder()
    image, text = halves(count)
    names = [f"caption {number}" for number in range(count)]
    embedded = SplitEmbeddings(
        wide(each, image), wide(each, text), caption_gallery([[name] for name in names]), [[name] for name in names],
        list(range(count)), [],
    )  # fmt: skip
    found = space_figures(each, embedded)
    assert list(found) == ["backbone", "projection", "predictor", "max"]
    for direction in ("image_to_text", "text_to_image"):
        assert found["projection"][direction]["R@1"] == 0.0 == found["max"][direction]["R@1"]
        assert found["predictor"][direction]["R@1"] == 1.0
    assert found["projection"]["modality_gap"] > 0.1 and found["predictor"]["modality_gap"] < 1e-6
    assert "modality_gap" not in found["max"]
    # No smaller value of either contrast is possible: each query equals its key.
    swap, mixed = Swap(), (image + text) / 2
    for query, key in ((swap(image), text), (swap(text), image), (swap(mixed), mixed)):
        torch.testing.assert_close(mixup_info_nce(query, key, 5.0), mixup_info_nce(key, key, 5.0))
    top = class_figures(each, wide(each, image), wide(each, text), lambda a, b: {"top1": float((a * b).sum(1).mean())})
    assert top["predictor"]["top1"] == pytest.approx(1.0) and top["projection"]["top1"] == 0.0


def test_parts_of_a_split_and_the_maximum() -> None:
    each, count = encoder(asked=("predictor",)), 6
    image, text = halves(count)
    names = [f"caption {number}" for number in range(count)]
    embedded = SplitEmbeddings(
        wide(each, image), wide(each, text), caption_gallery([[name] for name in names]), [[name] for name in names],
        list(range(count)), [],
    )  # fmt: skip
    rows = torch.tensor([1, 4])
    found = space_figures(each, embedded, image_rows=rows, text_rows=rows)
    assert list(found) == ["predictor"]
    assert found["predictor"]["text_to_image"]["queries"] == 2 and found["predictor"]["text_to_image"]["gallery"] == 6
    one = {"image_to_text": {"R@1": 0.2, "median_rank": 9, "queries": 4}, "modality_gap": 0.5}
    other = {"image_to_text": {"R@1": 0.1, "median_rank": 3, "queries": 4}, "modality_gap": 0.1}
    assert greater(one, other) == {"image_to_text": {"R@1": 0.2, "median_rank": 3, "queries": 4}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of OneR with its predictor and teacher; the three towers are far from each other."""
    run = tmp_path_factory.mktemp("spaces") / "run"
    run.mkdir()
    torch.manual_seed(3)
    tower, teacher, predictor = OneR(SMALL), OneR(SMALL), Predictor(6, 5)
    model = model_bytes(tower, TOKENIZER.to_json())
    (run / "model.safetensors").write_bytes(model)
    save_contrast(run / FILE, Contrast(predictor, None, teacher), hashlib.sha256(model).hexdigest())
    return run


@pytest.fixture
def finished(trained: Path, tmp_path: Path, data: Path) -> Path:
    run = tmp_path / "oner"
    shutil.copytree(trained, run)
    (run / "config.json").write_text(json.dumps({"data": {"train_data": str(data)}}))
    return run


def test_the_encoder_is_the_model_the_predictor_and_the_teacher(finished: Path) -> None:
    loaded = load(finished)
    each, missing = open_spaces(finished, loaded)
    assert each is not None and missing is None and each.contrast is not None
    images = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    assert each.contrast.teacher is not None
    with torch.inference_mode():
        image, text = each.columns(each.encode_image(images)), each.columns(each.encode_text(CAPTIONS))
        torch.testing.assert_close(image["projection"], loaded.encode_image(images))
        torch.testing.assert_close(text["projection"], loaded.encode_text(CAPTIONS))
        projected = each.tower.encode_image(images)
        wanted = F.normalize(each.contrast.predictor(projected), dim=-1)  # type: ignore[misc]
        torch.testing.assert_close(image["predicted"], wanted)
        wanted = F.normalize(each.contrast.teacher.encode_image(images), dim=-1)
        torch.testing.assert_close(image["teacher"], wanted)
    assert image["backbone"].shape == (3, 8)
    found = gaps(image, text)
    assert list(found) == ["backbone", "projection", "predictor", "teacher"] and all(
        0 < gap < 2 for gap in found.values()
    )


def test_every_figure_of_an_evaluation_names_its_space(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(finished)]) == 0
    result = json.loads((finished / "evaluation.json").read_text())
    for part in ("val", "val_seen_words", "val_new_words"):
        entry = result[part]
        assert list(entry["spaces"]) == ["backbone", "projection", "predictor", "teacher", "max"]
        for direction in ("image_to_text", "text_to_image"):
            assert entry["spaces"]["projection"][direction] == entry[direction]
            both = [entry["spaces"][name][direction]["R@5"] for name in ("backbone", "projection")]
            assert entry["spaces"]["max"][direction]["R@5"] == max(both)
        assert entry["spaces"]["projection"]["modality_gap"] == entry["modality_gap"]
    assert result["val"]["spaces"]["projection"]["zero_shot"] == result["val"]["zero_shot"]
    assert result["val"]["spaces"]["teacher"]["zero_shot"]["images"] == 8
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line.startswith("val ")]
    assert [row[1] for row in rows if row[1] in ("backbone", "predictor", "teacher", "max")] == [
        "backbone", "predictor", "teacher", "max",
    ]  # fmt: skip
    assert plain_lines({"val": result["val"]}) != []


def test_a_space_can_be_asked_for(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(finished), "--space", "teacher", "max"]) == 0
    assert list(json.loads((finished / "evaluation.json").read_text())["val"]["spaces"]) == ["teacher", "max"]
    assert main([str(finished), "--space", "trunk"]) == 1
    assert "unknown space 'trunk'; known: backbone, projection, predictor, teacher, max" in capsys.readouterr().err


def test_a_run_without_the_file_says_what_is_missing(
    finished: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (finished / FILE).unlink()
    assert main([str(finished)]) == 0
    assert "has no contrast.safetensors" in caplog.text and "run the training's command again" in caplog.text
    assert list(json.loads((finished / "evaluation.json").read_text())["val"]["spaces"]) == [
        "backbone", "projection", "max",
    ]  # fmt: skip
    assert main([str(finished), "--space", "predictor"]) == 1
    assert "has no space 'predictor'" in capsys.readouterr().err


def test_a_file_of_another_model_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_bytes(OneR(SMALL), TOKENIZER.to_json())
    (finished / "model.safetensors").write_bytes(model)
    assert main([str(finished)]) == 1
    assert "contrast.safetensors belongs to another model" in capsys.readouterr().err


def test_a_model_of_two_towers_has_one_joint_space(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--space", "backbone"]) == 1
    assert "its two towers meet in one space, projection" in capsys.readouterr().err
