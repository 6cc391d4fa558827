import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from oner_fast.evaluation import pointing
from oner_fast.evaluation.boxes import BoxedPicture, Phrase, read_boxes
from oner_fast.evaluation.pointing import SIDE, evaluate_localisation

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
GRID = 8


class Painter:
    """Embed a patch as its mean colour and a word as that colour, so that words are found where they are."""

    def __init__(self, blind: bool = False) -> None:
        self.blind = blind
        self.config = SimpleNamespace(shared_trunk=True)

    def preprocess(self, image: Image.Image) -> Tensor:
        assert image.width == image.height
        small = image.resize((GRID, GRID), Image.Resampling.BOX)
        return torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).reshape(GRID, GRID, 3).permute(2, 0, 1)

    def encode_patches(self, images: Tensor) -> Tensor:
        colours = images.flatten(2).transpose(1, 2).float() - 128
        return F.normalize(torch.ones_like(colours) if self.blind else colours, dim=-1)

    def encode_image(self, images: Tensor) -> Tensor:
        return F.normalize(self.encode_patches(images).mean(1), dim=-1)

    def encode_text(self, texts: list[str]) -> Tensor:
        return F.normalize(torch.tensor([COLOURS[text] for text in texts]).float() - 128, dim=-1)


def picture(size: tuple[int, int], shown: dict[str, tuple[int, int, int, int]], name: str = "one") -> BoxedPicture:
    image = Image.new("RGB", size, "white")
    for word, (left, top, width, height) in shown.items():
        image.paste(COLOURS[word], (left, top, left + width, top + height))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    phrases = tuple(Phrase(word, (tuple(map(float, box)),), word) for word, box in shown.items())  # type: ignore[arg-type]
    return BoxedPicture(name, buffer.getvalue, phrases)


SCENES = [
    picture((64, 64), {"red": (0, 0, 16, 16), "blue": (32, 32, 24, 32)}),
    picture((64, 32), {"green": (40, 8, 16, 16), "red": (8, 8, 8, 8)}),
]


def test_a_model_that_sees_words_hits_their_boxes() -> None:
    found = evaluate_localisation(Painter(), SCENES, batch_size=1)
    assert (found["pictures"], found["phrases"], found["grid"]) == (2, 4, GRID)
    hits = found["pointing"]
    assert hits["hit"] == 1.0 and hits["other_phrase"] == 0.0
    areas = [16 * 16 / 4096, 24 * 32 / 4096, 16 * 16 / 2048, 8 * 8 / 2048]
    assert hits["chance"] == pytest.approx(sum(areas) / 4, abs=1e-3)
    assert hits["random_cell"] == pytest.approx(sum(areas) / 4)  # the boxes consist of whole cells
    assert hits["centre"] == 0.25 and hits["largest_box"] == 0.5  # the blue box holds (32, 32)
    box = found["box"]
    assert box["model"]["iou"] > 0.6 and box["model"]["iou@0.5"] == 1.0
    assert box["whole_picture"]["iou"] == pytest.approx(sum(areas) / 4, abs=1e-6)
    assert box["largest_box"] == {"iou": 0.5, "iou@0.5": 0.5}
    assert box["other_phrase"]["iou"] == 0.0


def test_flat_maps_hit_nothing() -> None:
    found = evaluate_localisation(Painter(blind=True), SCENES)
    assert found["pointing"]["hit"] == 0.0
    assert found["box"]["model"]["iou"] == pytest.approx(found["box"]["whole_picture"]["iou"])


def test_the_box_of_a_map_is_the_part_around_its_greatest_pixel() -> None:
    heat = torch.zeros(1, SIDE, SIDE)
    heat[0, 10:20, 10:30] = 0.6
    heat[0, 12, 15] = 1.0
    heat[0, 20:60, 29] = 0.7  # a bent arm, connected over edges
    heat[0, 59, 29:50] = 0.7
    heat[0, 80:90, 80:90] = 0.9  # another part
    inside = torch.ones(SIDE, SIDE, dtype=torch.bool)
    mask = pointing._connected(heat, pointing._greatest(heat, inside), inside)[0]
    box = pointing._box_of(mask)
    assert (box.left, box.top, box.right, box.bottom) == (10, 10, 50, 60)
    assert int(mask.sum()) == 200 + 40 + 20


def test_damaged_pictures_are_left_out_and_counted() -> None:
    broken = BoxedPicture("broken", lambda: b"no image", (Phrase("red", ((0.0, 0.0, 1.0, 1.0),)),))
    found = evaluate_localisation(Painter(), [broken, SCENES[0]])
    assert (found["pictures"], found["damaged"], found["phrases"]) == (1, 1, 2)
    with pytest.raises(ValueError, match="none of 1 pictures could be read"):
        evaluate_localisation(Painter(), [broken])


def write(tmp_path: Path, content: Any) -> Path:
    (tmp_path / "images").mkdir(exist_ok=True)
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "images" / name).write_bytes(b"")
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    return tmp_path / "boxes.json"


REFCOCO: dict[str, Any] = {
    "images": [{"id": 7, "file_name": "train2014/a.jpg"}, {"id": 8, "file_name": "b.jpg"}],
    "annotations": [{"id": 1, "image_id": 7, "bbox": [1, 2, 3, 4]}, {"id": 2, "image_id": 8, "bbox": [0, 0, 5.5, 5]}],
    "refs": [
        {"image_id": 7, "ann_id": 1, "split": "val", "sentences": [{"raw": "Left man "}, {"sent": "him"}]},
        {"image_id": 8, "ann_id": 2, "split": "testA", "sentences": [{"sent": "it"}]},
    ],
}
ENTITIES: dict[str, Any] = {
    "images": [
        {"id": 1, "file_name": "a.jpg", "caption": "Two dogs and a red ball"},
        {"id": 2, "file_name": "a.jpg", "caption": "A ball"},
        {"id": 3, "file_name": "b.jpg", "caption": "nothing has a box"},
    ],
    "annotations": [
        {"image_id": 1, "bbox": [0, 0, 4, 4], "tokens_positive": [[0, 8]]},
        {"image_id": 1, "bbox": [9, 9, 4, 4], "tokens_positive": [[0, 8]]},
        {"image_id": 1, "bbox": [5, 5, 1, 1], "tokens_positive": [[15, 23]]},
        {"image_id": 2, "bbox": [5, 5, 1, 1]},
    ],
}


def test_references_of_refcoco_are_phrases(tmp_path: Path) -> None:
    path = write(tmp_path, REFCOCO)
    (found,) = read_boxes(path, tmp_path / "images")
    assert found.name == "train2014/a.jpg" and found.read() == b""
    assert found.phrases == (Phrase("Left man", ((1, 2, 3, 4),)), Phrase("him", ((1, 2, 3, 4),)))
    (found,) = read_boxes(path, tmp_path / "images", split="testA")
    assert found.phrases == (Phrase("it", ((0, 0, 5.5, 5),)),)
    with pytest.raises(ValueError, match="no reference of split 'test'; it has testA, val"):
        read_boxes(path, tmp_path / "images", split="test")


def test_parts_of_flickrs_captions_are_phrases(tmp_path: Path) -> None:
    found = read_boxes(write(tmp_path, ENTITIES), tmp_path / "images")
    assert [one.phrases for one in found] == [
        (Phrase("Two dogs", ((0, 0, 4, 4), (9, 9, 4, 4))), Phrase("red ball", ((5, 5, 1, 1),))),
        (Phrase("A ball", ((5, 5, 1, 1),)),),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": [{"id": 1, "bbox": [0, 0, 0, 4]}]}, "the last two above 0"),
        ({"annotations": [{"id": 1, "bbox": [0, 0, 1e400, 4]}]}, "a box needs left, top, width and height"),
        ({"annotations": [{"id": 1}]}, "without what is needed"),
        ({"annotations": []}, "without what is needed"),
        ({"annotations": None}, "lacks `images` or `annotations`"),
        ({"refs": [{"image_id": 7}]}, "without what is needed"),
        ({"refs": []}, "it has no reference at all"),
        ({"images": [{"id": 7, "file_name": 3}]}, "need a text, got 3"),
    ],
)
def test_malformed_boxes_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_boxes(write(tmp_path, REFCOCO | change), tmp_path / "images")


@pytest.mark.parametrize("spans", [[[0]], [[0, 8, 9]], [0, 8], [[0, 24]], [[-8, -1]], [[8, 8]], [["0", "8"]], "all", 7])
def test_parts_that_lie_outside_the_caption_are_refused(tmp_path: Path, spans: Any) -> None:
    notes = [{"image_id": 1, "bbox": [0, 0, 4, 4], "tokens_positive": spans}]
    with pytest.raises(ValueError, match=r"boxes\.json: tokens_positive needs pairs .* 23 characters"):
        read_boxes(write(tmp_path, ENTITIES | {"annotations": notes}), tmp_path / "images")


def test_parts_are_counted_from_the_captions_first_character(tmp_path: Path) -> None:
    content = json.loads(json.dumps(ENTITIES))
    content["images"][0]["caption"] = "  " + content["images"][0]["caption"]
    content["annotations"][0]["tokens_positive"] = [[2, 10]]
    assert read_boxes(write(tmp_path, content), tmp_path / "images")[0].phrases[0].text == "Two dogs"


def test_only_what_a_reference_names_has_to_be_a_box(tmp_path: Path) -> None:
    empty = {"id": 3, "image_id": 7, "bbox": [1, 2, 0, 4]}  # COCO has such ones
    sentences = [{"raw": "him"}, {"raw": " ", "sent": ""}]
    content = REFCOCO | {"annotations": [*REFCOCO["annotations"], empty]}
    content["refs"] = [{"image_id": 7, "ann_id": 1, "split": "val", "sentences": sentences}]
    (found,) = read_boxes(write(tmp_path, content), tmp_path / "images")
    assert [phrase.text for phrase in found.phrases] == ["him"]  # an empty sentence asks for nothing
    content["refs"][0]["sentences"] = sentences[1:]
    with pytest.raises(ValueError, match=r"boxes\.json has no image with a phrase and its box"):
        read_boxes(write(tmp_path, content), tmp_path / "images")


def test_pictures_that_the_map_cannot_show_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    good, thin = picture((40, 40), {"red": (0, 0, 8, 8)}), picture((500, 2), {"red": (0, 0, 2, 2)}, "thin")
    beside = picture((40, 40), {"red": (60, 0, 8, 8)}, "beside")
    found = evaluate_localisation(Painter(), [good, thin, beside])
    assert (found["pictures"], found["phrases"], found["damaged"]) == (1, 1, 2)
    assert "thin has 500 x 2 pixels; a side needs to be at most 112 times the other one" in caplog.text
    assert "the box (60.0, 0.0, 8.0, 8.0) of 'red' lies beside them" in caplog.text


def test_missing_images_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, REFCOCO)
    (tmp_path / "images" / "a.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"no image train2014/a\.jpg"):
        read_boxes(path, tmp_path / "images")
