"""Read images with several captions each from files in COCO's format."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oner_fast import bounded_json

CAPTIONS = 5
"""Captions of an image that the published protocol takes: the first five. COCO has images with six and seven."""
_MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class CaptionedImage:
    """One image file and its captions; `left_out` counts its further captions, which are not evaluated."""

    path: Path
    captions: list[str]
    left_out: int = 0


def read_captions(
    annotations: Path, images: Path, *, split: str = "test", first: int = CAPTIONS
) -> list[CaptionedImage]:
    """Read images with their captions from Karpathy's json or COCO's own `captions_*.json`.

    Images of Karpathy's json keep the file's order. Those of COCO's json are sorted by their id. The captions of an
    image keep the file's order.

    Args:
        annotations: the json file. Karpathy's lists `images` with `filename`, `split` and `sentences`; COCO's lists
            `images` with `id` and `file_name`, and `annotations` with `image_id` and `caption`.
        images: the folder of the image files; COCO's sub-folders (`val2014/...`) are searched too.
        split: the split of Karpathy's json (the 5K images of "test"); COCO's json has none.
        first: take this many captions of each image, the first ones; 0 takes all.

    Raises:
        FileNotFoundError: a file or image is missing.
        ValueError: the file has neither layout or no caption, the split is unknown, or `first` is negative.
    """
    if first < 0:
        raise ValueError(f"the number of captions of an image must not be negative, got {first}; 0 takes all")
    if not annotations.is_file():
        raise FileNotFoundError(f"no annotation file {annotations}")
    if not images.is_dir():
        raise FileNotFoundError(f"no image folder {images}")
    content = bounded_json.load_object(annotations.read_bytes(), str(annotations), max_bytes=_MAX_BYTES)
    entries = content.get("images")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{annotations} lists no images; need Karpathy's json or COCO's captions json")
    try:
        listed = _karpathy(entries, split, annotations) if "sentences" in entries[0] else _coco(content, annotations)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{annotations} has an image or caption without what is needed ({type(error).__name__}: {error}); need "
            "Karpathy's json or COCO's captions json"
        ) from error
    found = [
        CaptionedImage(
            _find(images, folder, name), several[: first or None], max(0, len(several) - first) * bool(first)
        )
        for folder, name, several in listed
        if several
    ]
    if not found:
        raise ValueError(f"{annotations} has no image with a caption, so that there is nothing to evaluate")
    return found


def _karpathy(entries: list[dict[str, Any]], split: str, source: Path) -> list[tuple[str, str, list[str]]]:
    found = [
        (
            _text(entry.get("filepath", "")),
            _text(entry["filename"]),
            [caption for sentence in entry["sentences"] if (caption := _text(sentence["raw"]).strip())],
        )
        for entry in entries
        if entry["split"] == split
    ]
    if not found:
        known = ", ".join(sorted({str(entry["split"]) for entry in entries}))
        raise ValueError(f"{source} has no split {split!r}; it has {known}")
    return found


def _coco(content: dict[str, Any], source: Path) -> list[tuple[str, str, list[str]]]:
    if "annotations" not in content:
        raise ValueError(f"{source} has neither `sentences` nor `annotations`; need Karpathy's or COCO's captions json")
    captions: dict[int, list[str]] = {}
    for note in content["annotations"]:
        if caption := _text(note["caption"]).strip():
            captions.setdefault(note["image_id"], []).append(caption)
    entries = sorted(content["images"], key=lambda entry: entry["id"])
    return [("", _text(entry["file_name"]), captions.get(entry["id"], [])) for entry in entries]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"need a text, got {bounded_json.shown(value)}")
    return value


def _find(images: Path, folder: str, name: str) -> Path:
    for path in (images / folder / name, images / name, images / Path(folder).name / name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"no image {name} in {images}" + (f" or its folder {folder}" if folder else ""))
