"""`oner-fast eval --boxes`: scenes of coloured squares, and a model that sees colours and knows their things."""

import io
import itertools
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import oner_fast
from oner_fast.data.dataset import PairDataset
from oner_fast.evaluation.boxes import read_scenes
from oner_fast.evaluation.cli import main
from oner_fast.evaluation.scene_scores import scene_queries
from oner_fast.evaluation.score_lines import score_lines

THINGS = {
    "red rose": (255, 0, 0),
    "green leaf": (0, 255, 0),
    "blue sky": (0, 0, 255),
    "yellow sun": (255, 255, 0),
    "pink pig": (255, 0, 255),
}
GRID = 8


class Palette:
    """Embed what is seen or said as the directions of the things whose colours or words occur."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(shared_trunk=True)

    def preprocess(self, image: Image.Image) -> Tensor:
        small = image.resize((GRID, GRID), Image.Resampling.NEAREST)
        return torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).reshape(GRID, GRID, 3).permute(2, 0, 1)

    def encode_patches(self, images: Tensor) -> Tensor:
        colours = torch.tensor(list(THINGS.values()), dtype=torch.uint8)
        return (images.flatten(2).transpose(1, 2)[:, :, None] == colours).all(-1).float()

    def encode_image(self, images: Tensor) -> Tensor:
        return F.normalize(self.encode_patches(images).amax(1), dim=1)

    def encode_text(self, texts: list[str]) -> Tensor:
        said = [[float(bool(set(name.split()) & set(text.split()))) for name in THINGS] for text in texts]
        return F.normalize(torch.tensor(said), dim=1)

    def encode_image_text(self, images: Tensor, texts: list[str]) -> Tensor:
        return F.normalize(self.encode_image(images) + self.encode_text(texts), dim=1)


def write_scenes(folder: Path, split: str) -> None:
    """Write a scene of each two things."""
    with tarfile.open(folder / f"{split}-000000.tar", "w") as tar:
        for number, (first, second) in enumerate(itertools.combinations(THINGS, 2)):
            image = Image.new("RGB", (64, 64), "white")
            objects = []
            for name, left in ((first, 0), (second, 40)):
                image.paste(THINGS[name], (left, 8 * (number % 4), left + 24, 8 * (number % 4) + 24))
                objects.append({"phrase": name, "concept": name, "box": [left, 8 * (number % 4), 24, 24]})
            out = io.BytesIO()
            image.save(out, "png")
            meta = {"caption": f"{first} and {second}", "objects": objects}
            members = {"png": out.getvalue(), "txt": meta["caption"].encode(), "json": json.dumps(meta).encode()}  # type: ignore[attr-defined]
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{split}-{number:03d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    folder = tmp_path / "scenes"
    folder.mkdir()
    write_scenes(folder, "val")
    return folder


@pytest.fixture
def painted(run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run, whose model sees colours."""
    monkeypatch.setattr(oner_fast, "load", lambda path, device, **_: Palette(), raising=False)
    return run


def test_scenes_are_scored(painted: Path, scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(painted), "--boxes", str(scenes), "--batch-size", "3"]) == 0
    record = json.loads((painted / "evaluation.json").read_text())
    assert set(record) == {"val_boxes", "about"}
    entry = record["val_boxes"]
    assert (entry["data"], entry["split"], entry["damaged"]) == (str(scenes), "val", 0)
    assert entry["localisation"]["phrases"] == 20 and entry["localisation"]["pointing"]["hit"] == 1.0
    assert entry["localisation"]["pointing"]["other_phrase"] == 0.0
    reasoning = entry["reasoning"]["three_classes"]
    assert entry["reasoning"]["questions"] == 10
    assert reasoning["image_only"] == 0.0  # both things have equal scores
    assert reasoning["joint"] == reasoning["text_only"] == reasoning["moved"]["joint"] == 1.0
    composed = entry["image_text_to_image"]
    assert composed["queries"] == 20 and composed["gallery"] == 9
    assert composed["image_only"]["R@1"] == composed["text_only"]["R@1"] == 0.0
    assert composed["R@1"] == composed["fusions"]["mean"]["R@1"] == 1.0
    assert "shift" in composed["fusions"]
    printed = capsys.readouterr().out
    assert "pointing game, val, with boxes, 20 phrases: the word's map 100 %, chance" in printed
    assert "image + text → image, R@10, val, with boxes, 20 queries: image alone" in printed


def test_boxes_alone_leave_the_other_figures(painted: Path, scenes: Path) -> None:
    (painted / "evaluation.json").write_text(json.dumps({"val": {"data": "d", "pairs": 1}}))
    assert main([str(painted), "--boxes", str(scenes)]) == 0
    assert json.loads((painted / "evaluation.json").read_text())["val"] == {"data": "d", "pairs": 1}


def test_models_of_two_trunks_are_scored_by_localisation(
    painted: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = Palette()
    two.config.shared_trunk = False
    monkeypatch.setattr(oner_fast, "load", lambda path, device, **_: two, raising=False)
    assert main([str(painted), "--boxes", str(scenes)]) == 0
    entry = json.loads((painted / "evaluation.json").read_text())["val_boxes"]
    assert "localisation" in entry and "reasoning" not in entry and "image_text_to_image" not in entry


def test_json_with_boxes_is_scored(painted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = Image.new("RGB", (64, 32), "white")
    image.paste((255, 0, 0), (8, 8, 24, 24))
    image.save(tmp_path / "one.png")
    content = {
        "images": [{"id": 1, "file_name": "one.png"}],
        "annotations": [{"id": 5, "image_id": 1, "bbox": [8, 8, 16, 16]}],
        "refs": [{"image_id": 1, "ann_id": 5, "split": "testA", "sentences": [{"sent": "red rose"}]}],
    }
    (tmp_path / "refs.json").write_text(json.dumps(content))
    given = [str(painted), "--boxes", str(tmp_path / "refs.json")]
    assert main(given) == 1
    assert "--boxes takes a json with --boxes-images" in capsys.readouterr().err
    assert main([*given, "--boxes-images", str(tmp_path), "--boxes-split", "testA"]) == 0
    found = json.loads((painted / "evaluation.json").read_text())["testA_boxes"]["localisation"]
    assert found["pointing"]["hit"] == 1.0 and found["pointing"]["other_phrase"] is None
    assert found["pointing"]["chance"] == pytest.approx(0.125, abs=0.01)  # of the picture, without its padding
    assert main([str(painted), "--boxes-images", str(tmp_path)]) == 1


@pytest.mark.parametrize(("split", "message"), [("val", "has no objects with boxes"), ("test", "no split 'test'")])
def test_data_without_boxes_are_refused(
    painted: Path, data: Path, capsys: pytest.CaptureFixture[str], split: str, message: str
) -> None:
    assert main([str(painted), "--boxes", str(data), "--boxes-split", split]) == 1
    assert message in capsys.readouterr().err


def test_a_query_takes_a_thing_from_a_scene_without_the_other(scenes: Path) -> None:
    pictures = read_scenes(PairDataset(scenes, "val"))
    made = scene_queries(pictures)
    assert len(made) == len(THINGS) * (len(THINGS) - 1)
    for query, box in made:
        shown = {phrase.text: phrase.boxes for phrase in pictures[query.image].phrases}
        (thing,) = (name for name, boxes in shown.items() if boxes == (box,))
        assert query.word not in shown
        for target in query.targets:
            assert {thing, query.word} <= {phrase.text for phrase in pictures[target].phrases}
    assert made[:7] == scene_queries(pictures, limit=7) != scene_queries(pictures, limit=7, seed=1)


def test_entries_without_scores_have_no_sentences() -> None:
    entry: dict[str, Any] = {"pairs": 3, "image_text_to_image": {"R@10": 0.5}}
    assert list(score_lines({"val": entry, "about": {"model": "x"}})) == []
