"""Read images with several captions each from files in COCO's format."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class CaptionedImage:
    """One image file and its captions."""

    path: Path
    captions: list[str]


def read_captions(annotations: Path, images: Path, *, split: str = "test") -> list[CaptionedImage]:
    """Read images with their captions from Karpathy's json or COCO's own `captions_*.json`.

    Args:
        annotations: the json file. Karpathy's lists `images` with `filename`, `split` and `sentences`; COCO's lists
            `images` with `id` and `file_name`, and `annotations` with `image_id` and `caption`.
        images: the folder of the image files; COCO's sub-folders (`val2014/...`) are searched too.
        split: the split of Karpathy's json (the 5K images of "test"); COCO's json has none.

    Raises:
        FileNotFoundError: a file or image is missing.
        ValueError: the file has neither layout, or the split is unknown.
    """
    if not annotations.is_file():
        raise FileNotFoundError(f"no annotation file {annotations}")
    if not images.is_dir():
        raise FileNotFoundError(f"no image folder {images}")
    content = json.loads(annotations.read_text(encoding="utf-8"))
    entries = content.get("images") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{annotations} lists no images; need Karpathy's json or COCO's captions json")
    listed = _karpathy(entries, split, annotations) if "sentences" in entries[0] else _coco(content, annotations)
    return [CaptionedImage(_find(images, folder, name), captions) for folder, name, captions in listed if captions]


def _karpathy(entries: list[dict[str, Any]], split: str, source: Path) -> list[tuple[str, str, list[str]]]:
    found = [
        (entry.get("filepath", ""), entry["filename"], [sentence["raw"].strip() for sentence in entry["sentences"]])
        for entry in entries
        if entry["split"] == split
    ]
    if not found:
        known = ", ".join(sorted({entry["split"] for entry in entries}))
        raise ValueError(f"{source} has no split {split!r}; it has {known}")
    return found


def _coco(content: dict[str, Any], source: Path) -> list[tuple[str, str, list[str]]]:
    if "annotations" not in content:
        raise ValueError(f"{source} has neither `sentences` nor `annotations`; need Karpathy's or COCO's captions json")
    captions: dict[int, list[str]] = {}
    for note in content["annotations"]:
        captions.setdefault(note["image_id"], []).append(note["caption"].strip())
    return [("", entry["file_name"], captions.get(entry["id"], [])) for entry in content["images"]]


def _find(images: Path, folder: str, name: str) -> Path:
    for path in (images / folder / name, images / name, images / Path(folder).name / name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"no image {name} in {images}" + (f" or its folder {folder}" if folder else ""))
