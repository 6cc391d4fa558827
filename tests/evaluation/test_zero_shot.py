"""Class embeddings, accuracy, and the layouts of image files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from oner_fast.evaluation.coco import read_captions
from oner_fast.evaluation.imagenet import SUBSETS
from oner_fast.evaluation.run import evaluate_retrieval, evaluate_zero_shot
from oner_fast.evaluation.zero_shot import (
    TEMPLATES,
    accuracy,
    class_embeddings,
    only_classes,
    read_image_folder,
    read_lines,
    read_templates,
)

Draw = Callable[[int], bytes]


def encode(texts: list[str]) -> torch.Tensor:
    """Embed each text differently, with various lengths."""
    rows = [torch.randn(8, generator=torch.Generator().manual_seed(sum(map(ord, text)))) for text in texts]
    return torch.stack(rows) * torch.arange(1, len(texts) + 1)[:, None]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_class_embedding_is_the_normalised_mean_of_normalised_prompts(batch_size: int) -> None:
    templates = ["{}", "a {} here", "the {} of {}"]
    found = class_embeddings(encode, ["cat", "dog"], templates, batch_size=batch_size)
    for row, name in zip(found, ["cat", "dog"], strict=True):
        prompts = [name, f"a {name} here", f"the {name} of {name}"]
        mean = F.normalize(encode(prompts).double(), dim=1).mean(0)
        torch.testing.assert_close(row.double(), mean / mean.norm(), atol=1e-6, rtol=0)
    assert all("{}" in template for template in TEMPLATES)


def test_accuracy_has_chance_and_counts_ties_as_misses() -> None:
    classes = torch.eye(8)
    image = torch.eye(8)[[0, 1, 2, 2]]
    result = accuracy(image, torch.tensor([0, 1, 2, 3]), classes)
    assert result["top1"] == 0.75
    assert result["chance@1"] == pytest.approx(1 / 8)
    assert result["chance@5"] == pytest.approx(5 / 8)
    same = accuracy(torch.ones(4, 8), torch.arange(4), torch.ones(8, 8))
    assert same["top5"] == 0.0
    with pytest.raises(ValueError, match=r"\[0, 8\)"):
        accuracy(image, torch.tensor([0, 1, 2, 8]), classes)


def test_bad_prompts_are_named() -> None:
    with pytest.raises(ValueError, match="'a photo'"):
        class_embeddings(encode, ["cat"], ["a photo"])
    with pytest.raises(ValueError, match="at least one class"):
        class_embeddings(encode, [])


def make_folder(root: Path, draw: Draw) -> Path:
    for name, numbers in {"blue_circle": (100,), "arrow_up": (103, 102)}.items():
        (root / name).mkdir(parents=True)
        for number in numbers:
            (root / name / f"{number}.png").write_bytes(draw(number))
    (root / "arrow_up" / "notes.txt").write_text("no picture")
    return root


def test_image_folder(tmp_path: Path, draw: Draw, reader: Any) -> None:
    folder = make_folder(tmp_path / "images", draw)
    files, labels, names = read_image_folder(folder)
    assert names == ["arrow_up", "blue_circle"]
    assert [path.name for path in files] == ["102.png", "103.png", "100.png"]
    assert labels.tolist() == [0, 0, 1]
    result = evaluate_zero_shot(reader, folder)
    assert result["top1"] == 1.0
    assert result["classes"] == 2
    (folder / "blue_circle" / "bad.png").write_bytes(b"no picture")
    assert evaluate_zero_shot(reader, folder)["damaged"] == 1
    with pytest.raises(ValueError, match="2 sub-folders but 1 class names"):
        evaluate_zero_shot(reader, folder, classes=["one"])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_image_folder(tmp_path / "nowhere")


def test_prompts_and_classes_of_published_evaluations() -> None:
    slip = read_templates("slip")
    assert len(slip) == 7 and slip[0] == "itap of a {}." and all(one.count("{}") == 1 for one in slip)
    for places in SUBSETS.values():
        assert len(places) == 200 and list(places) == sorted(set(places)) and places[0] >= 0 and places[-1] < 1000
    with pytest.raises(FileNotFoundError, match="takes `openai`, `slip` or a file"):
        read_templates("nowhere")


def test_some_classes_of_a_folder_of_all(tmp_path: Path, draw: Draw, reader: Any) -> None:
    folder = make_folder(tmp_path / "images", draw)
    (folder / "never").mkdir()
    (folder / "never" / "100.png").write_bytes(draw(100))
    names = ["arrow up", "blue circle"]
    some = evaluate_zero_shot(reader, folder, classes=names, places=[0, 1])
    assert (some["images"], some["classes"], some["top1"]) == (3, 2, 1.0)
    (folder / "never" / "100.png").unlink()
    (folder / "never").rmdir()
    assert evaluate_zero_shot(reader, folder, classes=names, places=[3, 7]) == some  # a folder of these alone
    files, labels, kept = only_classes(
        [Path("a"), Path("b"), Path("c")], torch.tensor([2, 0, 1]), ["x", "y", "z"], [0, 2]
    )
    assert (files, labels.tolist(), kept) == ([Path("a"), Path("b")], [1, 0], ["x", "z"])


def test_lines_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("cat\n\n a dog \n", encoding="utf-8")
    assert read_lines(path) == ["cat", "a dog"]
    path.write_text("\n")
    with pytest.raises(ValueError, match="no lines"):
        read_lines(path)


def test_karpathy_and_coco_json_give_the_same_retrieval(tmp_path: Path, draw: Draw, reader: Any) -> None:
    images = tmp_path / "images"
    (images / "val2014").mkdir(parents=True)
    captions = {100: ["blue circle", "circle blue"], 102: ["arrow", " arrow arrow"], 104: ["square left"]}
    for number in captions:
        (images / "val2014" / f"{number}.png").write_bytes(draw(number))
    karpathy = {
        "images": [
            {
                "filename": f"{n}.png",
                "filepath": "val2014",
                "split": "test",
                "sentences": [{"raw": text} for text in texts],
            }
            for n, texts in captions.items()
        ]
        + [{"filename": "other.png", "filepath": "val2014", "split": "train", "sentences": [{"raw": "other"}]}]
    }
    coco = {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in captions],
        "annotations": [{"image_id": n, "caption": text} for n, texts in captions.items() for text in texts],
    }
    results = []
    for name, content, folder in (("karpathy", karpathy, images), ("coco", coco, images / "val2014")):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        found = read_captions(path, folder)
        assert [one.captions for one in found] == [
            ["blue circle", "circle blue"],
            ["arrow", "arrow arrow"],
            ["square left"],
        ]
        results.append(evaluate_retrieval(reader, found, batch_size=2))
    assert results[0] == results[1]
    assert results[0]["captions"] == 5
    assert results[0]["image_to_text"]["R@1"] == 1.0
    assert results[0]["text_to_image"]["R@1"] == 1.0
    with pytest.raises(ValueError, match="it has test, train"):
        read_captions(tmp_path / "karpathy.json", images, split="val")
    (images / "val2014" / "104.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"104\.png"):
        read_captions(tmp_path / "coco.json", images / "val2014")
    (tmp_path / "odd.json").write_text("{}")
    with pytest.raises(ValueError, match="lists no images"):
        read_captions(tmp_path / "odd.json", images)


def test_captions_and_names_have_to_be_texts(tmp_path: Path) -> None:
    path = tmp_path / "coco.json"
    sentence = {"raw": "a cat"}
    for entry, message in (
        ({"filename": 5, "sentences": [sentence]}, "need a text, got 5"),
        ({"filename": "a.png", "filepath": 5, "sentences": [sentence]}, "need a text, got 5"),
        ({"filename": "a.png", "sentences": [{"raw": ["a"]}]}, "need a text, got"),
        ({"filename": "a.png", "sentences": [{"raw": " "}]}, "has no image with a caption"),
    ):
        path.write_text(json.dumps({"images": [{"split": "test"} | entry]}))
        with pytest.raises(ValueError, match=message):
            read_captions(path, tmp_path)


def test_the_first_captions_of_an_image_are_taken(tmp_path: Path, draw: Draw, reader: Any) -> None:
    for number in (100, 101, 102):
        (tmp_path / f"{number}.png").write_bytes(draw(number))
    captions = {101: ["blue circle"], 100: ["Blue  circle", "circle", "the blue circle"], 102: ["arrow"] * 7}
    notes = [{"image_id": n, "caption": text} for n, texts in captions.items() for text in texts]
    coco = {"images": [{"id": n, "file_name": f"{n}.png"} for n in captions], "annotations": notes}
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(coco))
    five = read_captions(path, tmp_path)
    assert [one.path.stem for one in five] == ["100", "101", "102"]
    assert [(len(one.captions), one.left_out) for one in five] == [(3, 0), (1, 0), (5, 2)]
    assert [(len(one.captions), one.left_out) for one in read_captions(path, tmp_path, first=0)][2] == (7, 0)
    two = read_captions(path, tmp_path, first=2)
    assert [one.captions for one in two] == [["Blue  circle", "circle"], ["blue circle"], ["arrow", "arrow"]]
    figures = evaluate_retrieval(reader, two, batch_size=2)
    assert (figures["captions"], figures["captions_left_out"]) == (5, 6)
    # Two images show the same circle under the same words: each finds the other's caption as near as its own.
    assert figures["equal_captions"]["captions"] == 2
    assert figures["image_to_text"]["R@1"] == pytest.approx(1 / 3)
    assert figures["equal_captions"]["image_to_text"]["R@1"] == 1.0
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        read_captions(path, tmp_path, first=-1)


@pytest.mark.parametrize(
    "content",
    [
        {"images": [{"sentences": [], "split": "test"}]},
        {"images": [{"sentences": [{"raw": 5}], "split": "test", "filename": "a.png"}]},
        {"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "a"}]},
        {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [3]},
        {"images": [{"id": 1, "file_name": "a"}, {"id": "2", "file_name": "b"}], "annotations": []},
    ],
)
def test_a_malformed_json_is_named(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"odd\.json has an image or caption without what is needed"):
        read_captions(path, tmp_path)
