"""Read pictures whose captions' phrases have boxes: scenes of `oner-fast data scenes`, and two forms of json.

A box is left, top, width and height in pixels, as in COCO's json.

RefCOCO's form: `images` (`id`, `file_name`), `annotations` (`id`, `bbox`), and `refs` (`image_id`, `ann_id`, `split`,
`sentences` with `raw` or `sent`). Each sentence is a phrase with one box. This is the content of RefCOCO's
`instances.json` together with its list of references.

Flickr30k Entities' form: `images` (`id`, `file_name`, `caption`) and `annotations` (`image_id`, `bbox`,
`tokens_positive`). `tokens_positive` lists the first and last place, the end excluded, of the caption's parts that the
box shows; boxes with equal parts belong to one phrase. Without it the box belongs to the whole caption.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from oner_fast import bounded_json
from oner_fast.data.dataset import PairDataset
from oner_fast.data.pixels import read_file

Box = tuple[float, float, float, float]
_MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Phrase:
    """A phrase, its boxes (left, top, width, height in pixels), and its concept where the data state it."""

    text: str
    boxes: tuple[Box, ...]
    concept: str = ""


@dataclass(frozen=True)
class BoxedPicture:
    """A picture with its phrases; `read` returns the bytes of its file."""

    name: str
    read: Callable[[], bytes]
    phrases: tuple[Phrase, ...]


def read_scenes(dataset: PairDataset) -> list[BoxedPicture]:
    """Read the scenes of a split: samples whose json has `objects` with `phrase` and `box`.

    Raises:
        ValueError: a sample has no such objects.
        CorruptSample: a sample's json cannot be read.
    """
    scenes = []
    for row in range(len(dataset)):
        objects, name = dataset.meta(row).get("objects"), dataset.name(row)
        if not isinstance(objects, list) or not objects:
            raise ValueError(f"{name} has no objects with boxes; give data that `oner-fast data scenes` made")
        phrases = tuple(_object(one, name) for one in objects)
        scenes.append(BoxedPicture(name, partial(dataset.picture, row), phrases))
    return scenes


def read_boxes(annotations: Path, images: Path, *, split: str = "val") -> list[BoxedPicture]:
    """Read pictures with phrases and boxes from json in RefCOCO's or Flickr30k Entities' form.

    Args:
        annotations: the json file.
        images: the folder of the image files.
        split: the split of RefCOCO's references; the other form has none.

    Returns:
        Pictures that have a phrase with a box. In RefCOCO's form every reference's sentences are phrases of their
        image; in the other form, each entry of `images` is a picture of its own, as a caption has one.

    Raises:
        FileNotFoundError: the file, the folder or an image is missing.
        ValueError: the file has neither form, the split is unknown, or a box is malformed.
    """
    if not annotations.is_file():
        raise FileNotFoundError(f"no annotation file {annotations}")
    if not images.is_dir():
        raise FileNotFoundError(f"no image folder {images}")
    content = bounded_json.load_object(annotations.read_bytes(), str(annotations), max_bytes=_MAX_BYTES)
    if not isinstance(content.get("images"), list) or not isinstance(content.get("annotations"), list):
        raise ValueError(
            f"{annotations} lacks `images` or `annotations`; need json in RefCOCO's or Flickr30k Entities' form"
        )
    try:
        found = _refcoco(content, split, annotations) if "refs" in content else _entities(content, annotations)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{annotations} has an image, box or reference without what is needed ({type(error).__name__}: {error}); "
            "need json in RefCOCO's or Flickr30k Entities' form"
        ) from error
    kept = [(name, [phrase for phrase in phrases if phrase.text]) for name, phrases in found]
    pictures = [
        BoxedPicture(name, partial(read_file, _find(images, name)), tuple(phrases)) for name, phrases in kept if phrases
    ]
    if not pictures:
        raise ValueError(f"{annotations} has no image with a phrase and its box, so that there is nothing to evaluate")
    return pictures


def _refcoco(content: dict[str, Any], split: str, source: Path) -> list[tuple[str, list[Phrase]]]:
    # COCO has boxes without a width; only those that a reference names have to be boxes.
    boxes = {note["id"]: note["bbox"] for note in content["annotations"]}
    phrases: dict[Any, list[Phrase]] = {}
    for ref in content["refs"]:
        if ref["split"] == split:
            box = _box(boxes[ref["ann_id"]], f"{source}: annotation {bounded_json.shown(ref['ann_id'])}")
            texts = [_text(sentence.get("raw") or sentence["sent"]) for sentence in ref["sentences"]]
            phrases.setdefault(ref["image_id"], []).extend(Phrase(text, (box,)) for text in texts)
    if not phrases:
        known = ", ".join(sorted({str(ref["split"]) for ref in content["refs"]}))
        raise ValueError(f"{source} has no reference of split {split!r}; it has {known or 'no reference at all'}")
    return [(_text(image["file_name"]), phrases.get(image["id"], [])) for image in content["images"]]


def _entities(content: dict[str, Any], source: Path) -> list[tuple[str, list[Phrase]]]:
    captions = {image["id"]: image["caption"] for image in content["images"]}
    boxes: dict[Any, dict[str, list[Box]]] = {}
    for note in content["annotations"]:
        caption = captions[note["image_id"]]
        text = _phrase(caption, note.get("tokens_positive"), source)
        box = _box(note["bbox"], f"{source}: the box of {bounded_json.shown(text)}")
        boxes.setdefault(note["image_id"], {}).setdefault(text, []).append(box)
    return [
        (
            _text(image["file_name"]),
            [Phrase(text, tuple(several)) for text, several in boxes.get(image["id"], {}).items()],
        )
        for image in content["images"]
    ]


def _phrase(caption: Any, spans: Any, source: Path) -> str:
    """Join the parts of a caption that `tokens_positive` names; without it, the phrase is the whole caption."""
    whole_caption = _text(caption)
    if not spans:
        return whole_caption
    for span in spans if isinstance(spans, list) else [spans]:
        whole = isinstance(span, list) and len(span) == 2 and all(type(place) is int for place in span)
        if not whole or not 0 <= span[0] < span[1] <= len(caption):
            raise ValueError(
                f"{source}: tokens_positive needs pairs of a first and a last place, the end excluded, in the "
                f"{len(caption)} characters of {bounded_json.shown(caption)}, got {bounded_json.shown(span)}"
            )
    return " ".join(caption[first:end].strip() for first, end in spans).strip()


def _object(one: Any, name: str) -> Phrase:
    try:
        found = Phrase(_text(one["phrase"]), (_box(one["box"], name),), str(one.get("concept", "")))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} has an object without a phrase or a box ({type(error).__name__}: {error})") from error
    if not found.text:
        raise ValueError(f"{name} has an object whose phrase is empty; each needs the words that its box shows")
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"need a text, got {bounded_json.shown(value)}")
    return value.strip()


def _box(value: Any, where: Any) -> Box:
    """Check a box. Raises ValueError unless it is four finite numbers, with width and height above 0."""
    numbers = value if isinstance(value, list) else []
    if len(numbers) != 4 or not all(_finite(number) for number in numbers) or min(numbers[2:]) <= 0:
        raise ValueError(
            f"{where}: a box needs left, top, width and height in pixels, the last two above 0, got "
            f"{bounded_json.shown(value)}"
        )
    left, top, width, height = (float(number) for number in numbers)
    return left, top, width, height


def _finite(number: Any) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and abs(number) < 1e9


def _find(images: Path, name: str) -> Path:
    """Find an image file in the folder, under its own name or under the last part of it."""
    for path in (images / name, images / Path(name).name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"no image {name} in {images}")
