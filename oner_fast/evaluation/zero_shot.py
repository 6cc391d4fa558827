"""Zero-shot classification: words describe the classes, and an image takes the class with the nearest embedding.

A class embedding is the mean of the L2-normalised embeddings of its prompts, normalised again.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from oner_fast.data.picture_formats import SUFFIXES
from oner_fast.data.sources.concepts import concept
from oner_fast.evaluation.classifier import check_labels
from oner_fast.evaluation.imagenet import SLIP_TEMPLATES, SUBSETS
from oner_fast.evaluation.retrieval import Ties, recall, topk_ranks
from oner_fast.models.optional_packages import optional_package

Template = str | Callable[[str], str]
"""Prompt with `{}`, or clip_benchmark's `{c}`, where the class goes; or a function of the class, as in open_clip."""
TEMPLATES = (
    "{}",
    "a picture of a {}",
    "a photo of a {}",
    "a drawing of a {}",
    "an image with a {} in it",
    "a close view of a {}",
    "a small {}",
    "the {}",
)


def class_embeddings(
    encode_text: Callable[[list[str]], Tensor],
    classes: Sequence[str],
    templates: Sequence[Template] = TEMPLATES,
    *,
    batch_size: int = 256,
) -> Tensor:
    """Embed each class: (C, E) float32, L2-normalised.

    Args:
        encode_text: list of T prompts -> (T, E) embeddings.
        classes: names that go into each template.
        templates: prompts, in any form of `Template`.
        batch_size: prompts embedded at once.

    Raises:
        ValueError: there is no class or no template, or a template has no place for the class.
    """
    if not classes or not templates:
        raise ValueError(f"need at least one class and one template, got {len(classes)} and {len(templates)}")
    prompts = [prompt(template, name) for name in classes for template in templates]
    parts = [encode_text(prompts[i : i + batch_size]).float().cpu() for i in range(0, len(prompts), batch_size)]
    each = F.normalize(torch.cat(parts), dim=-1)
    return F.normalize(each.reshape(len(classes), len(templates), -1).mean(1), dim=-1)


def prompt(template: Template, name: str) -> str:
    """Put the name of a class into a template. Raises ValueError where the template has no place for it."""
    if callable(template):
        return template(name)
    if "{}" not in template and "{c}" not in template:
        raise ValueError(f"a prompt template needs {{}} where the class goes, got {template!r}")
    return template.replace("{}", name).replace("{c}", name)


def accuracy(image: Tensor, labels: Tensor, classes: Tensor, *, ties: Ties = "miss") -> dict[str, Any]:
    """Compute the top-1 and top-5 accuracy of (N, E) images with (N,) int64 labels against (C, E) class embeddings.

    Args:
        image: L2-normalised embeddings.
        labels: places in `classes`.
        classes: L2-normalised embeddings.
        ties: "miss" counts a tie as a miss. "topk" decides as `clip_benchmark` and open_clip do: one `torch.topk` of
            the scaled cosines in the embeddings' own dtype.

    Returns:
        {"top1", "top5", "chance@1", "chance@5", "images", "classes"}; shares, not per cent. With "topk", "ties" too.
    """
    if labels.shape != image.shape[:1]:
        raise ValueError(f"labels need shape ({len(image)},), got {tuple(labels.shape)}")
    check_labels(labels, len(classes))
    return _top(image, classes, torch.arange(len(image)), labels, ties)


def _top(image: Tensor, classes: Tensor, row: Tensor, label: Tensor, ties: Ties) -> dict[str, Any]:
    """Compute the figures of images whose row `row[p]` shows the class `label[p]`."""
    scores = recall(image, classes, row, label, ks=(1, 5))
    if ties == "topk":
        ranks = topk_ranks(100.0 * image @ classes.T, row, label, 5)
        scores |= {f"R@{k}": int((ranks < k).sum()) / len(ranks) for k in (1, 5)}
    return {
        "top1": scores["R@1"],
        "top5": scores["R@5"],
        "chance@1": scores["chance@1"],
        "chance@5": scores["chance@5"],
        "images": scores["queries"],
        "classes": scores["gallery"],
        **({"ties": ties} if ties != "miss" else {}),
    }


@dataclass(frozen=True)
class ConceptClasses:
    """Concepts of captions as classes.

    Attributes:
        concepts: names of the C classes, sorted.
        described: the text of each class in a prompt: its most frequent caption.
        image, label: (P,) int64: image `image[p]` shows class `label[p]`; an image may show several.
    """

    concepts: list[str]
    described: list[str]
    image: Tensor
    label: Tensor


def concept_classes(captions: Sequence[Sequence[str]], known: Sequence[str | None] | None = None) -> ConceptClasses:
    """Make classes of the distinct concepts of the images' first captions (`oner_fast.data.sources.concepts`).

    Args:
        captions: for each image its caption, then others that are right for it too; those add no class.
        known: the concept of each image's own caption where the data state it.

    Raises:
        ValueError: an image has no caption.
    """
    if not all(captions):
        raise ValueError(f"image {[bool(several) for several in captions].index(False)} has no caption")
    given = known or [None] * len(captions)
    own = [name or concept(several[0]) for several, name in zip(captions, given, strict=True)]
    wordings: dict[str, Counter[str]] = {}
    for name, several in zip(own, captions, strict=True):
        wordings.setdefault(name, Counter())[several[0]] += 1
    concepts = sorted(wordings)
    place = {name: number for number, name in enumerate(concepts)}
    pairs = [
        (image, place[name])
        for image, several in enumerate(captions)
        for name in dict.fromkeys([own[image], *map(concept, several[1:])])
        if name in place
    ]
    table = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    described = [min(wordings[name], key=lambda text: (-wordings[name][text], text)) for name in concepts]
    return ConceptClasses(concepts, described, table[:, 0].clone(), table[:, 1].clone())


def concept_accuracy(image: Tensor, classes: Tensor, shown: ConceptClasses, *, ties: Ties = "miss") -> dict[str, Any]:
    """Compute the top-1 and top-5 accuracy of (N, E) images among (C, E) class embeddings, in the form of `accuracy`.

    Any class that an image shows is right.
    """
    return _top(image, classes, shown.image, shown.label, ties)


def read_templates(source: str) -> list[str]:
    """Read prompt templates: `openai`, `slip`, or a file with one a line.

    `openai` are the 80 of CLIP's ImageNet evaluation, from open_clip; `slip` are the 7 of SLIP's.
    """
    if source == "slip":
        return list(SLIP_TEMPLATES)
    if source != "openai":
        return read_lines(Path(source), "--templates takes `openai`, `slip` or a file")
    # open_clip's templates are functions of the class's name; {} stands for the name again.
    return [template("{}") for template in optional_package("open_clip").OPENAI_IMAGENET_TEMPLATES]


def read_classes(source: str) -> list[str]:
    """Read class names: `imagenet`, the 1,000 of open_clip in the order of the WordNet ids, or a file of lines.

    `imagenet-a` and `imagenet-r` are the 200 of them that ImageNet-A and ImageNet-R have.
    """
    if source != "imagenet" and source not in SUBSETS:
        return read_lines(Path(source), "--classes takes `imagenet`, `imagenet-a`, `imagenet-r` or a file")
    names = list(optional_package("open_clip").IMAGENET_CLASSNAMES)
    return [names[place] for place in SUBSETS.get(source, range(len(names)))]


def read_image_folder(folder: Path) -> tuple[list[Path], Tensor, list[str]]:
    """Read the ImageFolder layout, one sub-folder for each class: files, (N,) int64 labels, names of the sub-folders.

    Both are sorted by name, so that class numbers equal torchvision's.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no sub-folder holds images.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        files += found
        labels += [label] * len(found)
    if not files:
        raise ValueError(f"{folder} holds no images; the ImageFolder layout is FOLDER/class/image.jpg")
    return files, torch.tensor(labels, dtype=torch.int64), names


def only_classes(
    files: Sequence[Path], labels: Tensor, names: Sequence[str], places: Sequence[int]
) -> tuple[list[Path], Tensor, list[str]]:
    """Keep the images of some classes of an ImageFolder, and number these anew, in their order."""
    number = {place: new for new, place in enumerate(places)}
    kept = [row for row, label in enumerate(labels.tolist()) if label in number]
    new = torch.tensor([number[int(labels[row])] for row in kept], dtype=torch.int64)
    return [files[row] for row in kept], new, [names[place] for place in places]


def read_lines(path: Path, takes: str = "") -> list[str]:
    """Read the non-empty lines of a UTF-8 text file: class names or prompt templates, one a line.

    Raises:
        FileNotFoundError: there is no such file; the message ends with `takes`.
        ValueError: the file holds no lines.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}" + (f"; {takes}" if takes else ""))
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    found = [line for line in lines if line]
    if not found:
        raise ValueError(f"{path} holds no lines")
    return found
