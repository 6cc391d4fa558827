"""Classes of captioned data sets and of ImageFolders: zero-shot, k-NN and linear probe, through the command."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from oner_fast.data.dataset import PairDataset
from oner_fast.evaluation.cli import main
from oner_fast.evaluation.embed import embed_split
from oner_fast.evaluation.labels import label_of, teach
from oner_fast.evaluation.zero_shot import (
    class_embeddings,
    concept_accuracy,
    concept_classes,
    read_classes,
    read_templates,
)

Draw = Callable[[int], bytes]
SHAPES = ("square", "circle", "arrow", "star", "moon", "sun", "house", "tree")


def write(folder: Path, splits: dict[str, list[tuple[int, dict[str, Any]]]], draw: Draw) -> Path:
    """Write a data set of images by number, each with its json fields."""
    folder.mkdir()
    listing: dict[str, Any] = {}
    for name, samples in splits.items():
        with tarfile.open(folder / f"{name}-000000.tar", "w") as tar:
            for number, meta in samples:
                members = {"png": draw(number), "txt": meta["caption"].encode(), "json": json.dumps(meta).encode()}
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{number:06d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        listing[name] = {"shards": [{"file": f"{name}-000000.tar", "samples": len(samples)}]}
    (folder / "dataset.json").write_text(json.dumps({"name": "drawn", "format": 1, "splits": listing}))
    return folder


@pytest.fixture
def drawn(tmp_path: Path, draw: Draw, reader: Any, run: Path) -> Path:
    """Shapes in three styles; `val` has shapes that are never trained on, and `style` such a style."""

    def sample(number: int, shape: str, style: str) -> tuple[int, dict[str, Any]]:
        reader.captions[number] = f"{style} {shape}"  # the image shows its style too
        return number, {"caption": shape, "concept": shape, "set": style}

    styles = ("inked", "painted", "pixelled")
    train = [sample(i, SHAPES[i % 6], styles[i % 3 if i < 24 else i // 6 % 3]) for i in range(48)]
    val = [sample(100 + i, SHAPES[6 + i % 2], styles[i % 3]) for i in range(6)]
    style = [sample(110 + i, SHAPES[i], "carved") for i in range(6)]
    return write(tmp_path / "drawn", {"train": train, "val": val, "style": style}, draw)


def evaluation(run: Path, *argv: str) -> dict[str, Any]:
    assert main([str(run), *argv]) == 0
    content: dict[str, Any] = json.loads((run / "evaluation.json").read_text())
    return content


def test_concepts_are_classes_described_by_their_most_frequent_caption() -> None:
    captions = [["Sheaf of rice"], ["rice sheaves"], ["Sheaf of rice"], ["moon", "crescent", "rice sheaf"], ["24"]]
    found = concept_classes(captions, [None, "rice sheaf", None, None, None])
    assert found.concepts == ["24", "moon", "rice sheaf"]
    assert found.described == ["24", "moon", "Sheaf of rice"]
    pairs = list(zip(found.image.tolist(), found.label.tolist(), strict=True))
    assert pairs == [(0, 2), (1, 2), (2, 2), (3, 1), (3, 2), (4, 0)]  # "crescent" is no image's own caption
    image = torch.eye(3)[[2, 2, 0, 2, 0]]
    result = concept_accuracy(image, torch.eye(3), found)
    assert result["top1"] == 0.8 and result["classes"] == 3 and result["images"] == 5
    assert result["chance@1"] == pytest.approx((4 * 1 / 3 + 2 / 3) / 5)
    with pytest.raises(ValueError, match="image 1 has no caption"):
        concept_classes([["a"], []])


def test_zero_shot_within_a_split(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    val = evaluation(run)["val"]["zero_shot"]
    assert val["classes"] == 7 and val["images"] == 8  # "blue circle" twice, once in capitals
    assert val["top1"] == 1.0 and val["chance@1"] == pytest.approx(1 / 7) and val["templates"] == 8
    assert "zero-shot, concept" in capsys.readouterr().out
    assert "zero_shot" not in evaluation(run, "--no-zero-shot")["val"]
    templates = run / "templates.txt"
    templates.write_text("{} arrow\n{}\n")
    assert evaluation(run, "--templates", str(templates))["val"]["zero_shot"]["templates"] == 2


def test_a_collapsed_model_scores_zero(run: Path, reader: Any) -> None:
    reader.collapsed = True
    assert evaluation(run)["val"]["zero_shot"]["top5"] == 0.0


def test_knn_and_probe_learn_labels_of_the_train_split(run: Path, drawn: Path, capsys: Any) -> None:
    result = evaluation(run, "--data", str(drawn), "--knn", "--linear-probe")
    for probe in ("knn", "linear_probe"):
        # Training sees no shape of val and no style of style.
        assert list(result["val"][probe]) == ["set"] and list(result["style"][probe]) == ["concept"]
        assert result["val"][probe]["set"]["images"] == 6 and result["style"][probe]["concept"]["images"] == 6
        assert result["val"][probe]["set"]["classes"] == 3 and result["style"][probe]["concept"]["classes"] == 6
        assert result["style"][probe]["concept"]["top1"] == 1.0
        assert result["val"][probe]["set"]["train_images"] == 48
        assert result["val"][probe]["set"]["majority"] == pytest.approx(1 / 3)
    assert result["val"]["linear_probe"]["set"]["top1"] == 1.0
    assert result["val"]["knn"]["set"]["k"] == 20
    printed = capsys.readouterr().out
    assert "k-NN, set" in printed and "linear probe, concept" in printed and "most frequent class" in printed
    few = evaluation(run, "--data", str(drawn), "--knn", "--label", "concept", "--label-classes", "4")
    assert few["style"]["knn"]["concept"]["classes"] == 4 and few["style"]["knn"]["concept"]["images"] == 4
    assert few["val"]["knn"] == {} and "linear_probe" not in few["val"]


def test_features_are_embedded_once_and_belong_to_their_labels(drawn: Path, reader: Any) -> None:
    dataset = PairDataset(drawn, split="train")
    taught = teach(reader, dataset, ("concept", "set", "licence"), most=5, batch_size=7)
    assert list(taught) == ["concept", "set"]
    assert len(taught["concept"].labels) == 40 and len(taught["set"].labels) == 48
    embedded = embed_split(reader, dataset)
    of_set = [label_of(*pair, "set") for pair in zip(("",) * 48, embedded.meta, strict=True)]
    assert [taught["set"].classes[label] for label in taught["set"].labels] == of_set
    torch.testing.assert_close(taught["set"].features, embedded.image)
    assert label_of("Sheaf of rice", {}, "concept") == "rice sheaf"
    assert label_of("rice", {}, "set") is None and label_of("rice", {"set": 3}, "set") == "3"
    assert teach(reader, dataset, ("licence",)) == {}


def folder_of(root: Path, draw: Draw, classes: dict[str, list[int]]) -> Path:
    for name, numbers in classes.items():
        (root / name).mkdir(parents=True)
        for number in numbers:
            (root / name / f"{number}.png").write_bytes(draw(number))
    return root


def test_image_folders(run: Path, tmp_path: Path, draw: Draw, reader: Any, capsys: Any) -> None:
    reader.captions |= {i: f"{('left', 'right', 'up')[i % 3]} number{i}" for i in range(45)}
    train = folder_of(tmp_path / "a", draw, {name: list(range(i, 33, 3)) for i, name in enumerate(["l", "r", "u"])})
    test = folder_of(tmp_path / "b", draw, {"r": [34, 37, 40], "u": [35, 38]})
    (test / "u" / "bad.png").write_bytes(b"no picture")
    for name in ("bad.png", "cut.png"):
        (train / "l" / name).write_bytes(b"no picture")
    argv = ["--image-folder", str(test), "--image-folder-train", str(train), "--knn", "--linear-probe"]
    result = evaluation(run, *argv)
    for probe in ("knn", "linear_probe"):
        assert result[probe]["top1"] == 1.0 and result[probe]["classes"] == 3
        assert result[probe]["images"] == 5 and result[probe]["damaged"] == 1 and result[probe]["train_images"] == 33
        assert result[probe]["damaged_training"] == 2
    said = capsys.readouterr().out
    assert "val" not in result and "image folder" in said
    assert "left out of what linear_probe learnt from: 2 damaged images" in said
    (train / "u").rename(train / "v")
    assert main([str(run), *argv]) == 1
    assert "has the class 'u', which" in capsys.readouterr().err


def test_errors_name_the_missing_option(run: Path, drawn: Path, tmp_path: Path, capsys: Any) -> None:
    def fails(*argv: str) -> str:
        assert main([str(run), *argv]) == 1
        return str(capsys.readouterr().err)

    assert "no image of val, style has a 'licence'" in fails("--data", str(drawn), "--knn", "--label", "licence")
    assert "--label names what" in fails("--label", "set")
    assert "at least 2, got 1" in fails("--data", str(drawn), "--knn", "--label-classes", "1")
    assert "need a train split" in fails("--data", str(drawn / "val-000000.tar"), "--knn")
    assert "give --image-folder-train" in fails("--image-folder", str(tmp_path), "--knn")
    assert "--image-folder-train needs --image-folder" in fails("--image-folder-train", str(tmp_path), "--knn")
    assert "takes `openai`, `slip` or a file" in fails("--templates", "clip")
    assert "takes `imagenet`, `imagenet-a`, `imagenet-r` or a file" in fails(
        "--image-folder", str(drawn.parent), "--classes", "coco"
    )


def test_a_model_without_text_is_evaluated_by_probes_alone(run: Path, drawn: Path, reader: Any, capsys: Any) -> None:
    reader.has_text = False
    assert main([str(run), "--data", str(drawn)]) == 1
    assert "give --text-tower" in capsys.readouterr().err
    result = evaluation(run, "--data", str(drawn), "--knn")
    assert set(result) == {"val", "style", "about"}
    assert (
        set(result["val"]) == {"data", "split", "pairs", "damaged", "knn"}
        and result["val"]["knn"]["set"]["images"] == 6
    )


def test_a_text_tower_that_fails_is_named_before_any_image_is_read(
    run: Path, reader: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def broken(_: list[str]) -> torch.Tensor:
        raise ValueError("the text tower 'gone' cannot be loaded")

    reader.encode_text = broken
    monkeypatch.setattr(reader, "encode_image", lambda _: pytest.fail("an image was read"))
    assert main([str(run)]) == 1
    assert "'gone' cannot be loaded" in capsys.readouterr().err


def test_templates_and_classes_of_open_clip() -> None:
    templates = read_templates("openai")
    assert len(templates) == 80 and len(set(templates)) == 80 and all("{}" in one for one in templates)
    classes = read_classes("imagenet")
    assert len(classes) == 1000 and classes[0] == "tench"
    for name, first, last in (("imagenet-a", "stingray", "acorn"), ("imagenet-r", "goldfish", "acorn")):
        some = read_classes(name)
        assert (len(some), some[0], some[-1]) == (200, first, last) and set(some) < set(classes)

    def encode(texts: list[str]) -> torch.Tensor:
        rows = [torch.randn(4, generator=torch.Generator().manual_seed(sum(map(ord, text)))) for text in texts]
        return torch.stack(rows)

    one = class_embeddings(encode, ["tench"], templates)[0].double()
    prompts = encode([text.replace("{}", "tench") for text in templates]).double()
    mean = (prompts / prompts.norm(dim=1, keepdim=True)).mean(0)
    torch.testing.assert_close(one, mean / mean.norm(), atol=1e-6, rtol=0)
