"""Zero-shot classification: classes are described in words, and an image takes the class it lies nearest to.

A class embedding is the mean of the L2-normalised embeddings of its prompts, normalised again (OneR, section 1,
"ImageNet zero-shot").
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from oner_fast.evaluation.retrieval import recall

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
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})


def class_embeddings(
    encode_text: Callable[[list[str]], Tensor],
    classes: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    *,
    batch_size: int = 256,
) -> Tensor:
    """Embed every class: (C, E) float32, L2-normalised.

    Args:
        encode_text: list of T prompts -> (T, E) embeddings.
        classes: the names, put in the place of `{}` in each template.

    Raises:
        ValueError: no class, no template, or a template without `{}`.
    """
    if not classes or not templates:
        raise ValueError(f"need at least one class and one template, got {len(classes)} and {len(templates)}")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"a prompt template needs {{}} where the class goes, got {template!r}")
    prompts = [template.replace("{}", name) for name in classes for template in templates]
    parts = [encode_text(prompts[i : i + batch_size]).float().cpu() for i in range(0, len(prompts), batch_size)]
    each = F.normalize(torch.cat(parts), dim=-1)
    return F.normalize(each.reshape(len(classes), len(templates), -1).mean(1), dim=-1)


def accuracy(image: Tensor, labels: Tensor, classes: Tensor) -> dict[str, float | int]:
    """Top-1 and top-5 accuracy of (N, E) images with (N,) int64 labels against (C, E) class embeddings.

    Returns {"top1", "top5", "chance@1", "chance@5", "images", "classes"}; shares, not per cent. A tie is lost.
    """
    if labels.shape != image.shape[:1]:
        raise ValueError(f"labels need shape ({len(image)},), got {tuple(labels.shape)}")
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= len(classes)):
        raise ValueError(f"labels need to be in [0, {len(classes)}), got {int(labels.min())} to {int(labels.max())}")
    scores = recall(image, classes, torch.arange(len(image)), labels, ks=(1, 5))
    return {
        "top1": scores["R@1"],
        "top5": scores["R@5"],
        "chance@1": scores["chance@1"],
        "chance@5": scores["chance@5"],
        "images": len(image),
        "classes": len(classes),
    }


def read_image_folder(folder: Path) -> tuple[list[Path], Tensor, list[str]]:
    """Read the ImageFolder layout, one sub-folder a class: files, (N,) int64 labels, names of the sub-folders.

    Both are sorted by name, so that the class numbers are the ones torchvision gives.

    Raises:
        FileNotFoundError: no such folder. ValueError: no sub-folder with pictures in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        files += found
        labels += [label] * len(found)
    if not files:
        raise ValueError(f"{folder} holds no pictures; the ImageFolder layout is FOLDER/class/picture.jpg")
    return files, torch.tensor(labels, dtype=torch.int64), names


def read_lines(path: Path) -> list[str]:
    """The non-empty lines of a UTF-8 text file: class names or prompt templates, one a line."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    found = [line for line in lines if line]
    if not found:
        raise ValueError(f"{path} holds no lines")
    return found
