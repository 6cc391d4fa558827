"""An image tower and a text tower, ready to use: a CLIP, or UTA's student with its teacher's text tower."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from oner_fast.data.given_images import GivenImage, GivenImages, as_list, as_rgb
from oner_fast.data.images import eval_transform
from oner_fast.models.teacher import Teacher, is_fetched, is_teacher, load_teacher
from oner_fast.models.uta import UTA


@dataclass(frozen=True)
class LoadedTowers:
    """Two towers with a common space. Embeddings are (B, E) float32, L2-normalised.

    Attributes:
        model: the image tower, or a whole CLIP.
        image_size: pixels a side that `preprocess` gives.
        text_source: source of the text tower, which is loaded at its first use (see
            `oner_fast.models.teacher.load_teacher`); empty where there is none.
        may_fetch: whether that source was asked for by the caller and may be downloaded. A source that the model's file
            names is taken only where it lies on this machine.
        beside: the model's folder; a relative path in `text_source` may start there too.
        device: where the model computes.
    """

    model: UTA | Teacher
    image_size: int
    text_source: str
    beside: Path
    device: torch.device
    may_fetch: bool = False

    @property
    def has_text(self) -> bool:
        """Whether there is a text tower."""
        return bool(self.text_source)

    def preprocess(self, image: GivenImage, name: str = "image", image_size: int | None = None) -> Tensor:
        """Convert an image of any size to uint8 (3, S, S): upright, shorter side to S, centre square.

        S is the model's `image_size`, or the one given here. Takes, and raises as,
        `oner_fast.data.given_images.as_rgb`; `name` is the image's name in an error.
        """
        return eval_transform(image_size or self.image_size)(as_rgb(image, name))

    @torch.inference_mode()
    def encode_image(self, images: GivenImages, image_size: int | None = None) -> Tensor:
        """Embed images: (B, E).

        Args:
            images: one image or a list of images, each a path, the bytes of an image file, a PIL image or a uint8 array
                (H, W, 3); an array (B, H, W, 3); or a tensor of pixels ready for the model, uint8 (B, 3, S, S), where S
                may be any multiple of a student's patch size. A CLIP resizes a tensor to its own size.
            image_size: side in pixels that a student's images are brought to, a multiple of its patch size; the size of
                the training by default. Positions are resampled for another size.

        Raises:
            TypeError: an image has another form; the message says which.
            ValueError: there is no image, one cannot be decoded or is over the budget of a sample, the patches do not
                divide `image_size`, or a CLIP is given another than its own.
            OSError: a file cannot be read.
        """
        return _normalise(self.model.encode_image(self._images(images, image_size)))

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embed captions: (B, E).

        Raises:
            TypeError: `texts` is one string, or holds something that is no string.
            ValueError: there is no text, one that is not valid Unicode, no text tower, or one that cannot be loaded,
                would have to be fetched without having been asked for, or does not fit; the message says which.
        """
        return _normalise(self.text.encode_text(text_list(texts)))

    @torch.inference_mode()
    def encode_patches(self, images: GivenImages, image_size: int | None = None) -> Tensor:
        """Embed each patch token in the joint space: (B, N, E), the grid row by row."""
        pixels = self._images(images, image_size)
        if isinstance(self.model, UTA):
            return _normalise(self.model.encode_patches(pixels))
        return _normalise(self.model.tokens(pixels)[:, 1:])

    def _images(self, images: GivenImages, image_size: int | None) -> Tensor:
        if isinstance(self.model, UTA):
            check_image_size(image_size, self.model.config.patch_size)
        elif image_size not in (None, self.image_size):
            raise ValueError(f"this CLIP embeds images of {self.image_size} px alone, got image_size {image_size}")
        return stacked(images, self.preprocess, image_size).to(self.device)

    @cached_property
    def text(self) -> Teacher:
        """The text tower, with the rest of its CLIP."""
        if isinstance(self.model, Teacher):
            return self.model
        if not self.text_source:
            raise ValueError("the student's file names no text tower; give one: oner_fast.load(..., text_tower=...)")
        places = (Path(self.text_source), self.beside / self.text_source)
        source = next((str(place) for place in places if is_teacher(place)), self.text_source)
        if not self.may_fetch and is_fetched(source):
            raise ValueError(
                f"the student's file names the text tower {source[:200]!r}, which may have to be fetched; ask for it: "
                f"oner_fast.load(..., text_tower={source[:200]!r}), or --text-tower {source[:200]}"
            )
        try:
            tower = load_teacher(source, device=self.device)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"the text tower {self.text_source!r} cannot be loaded: {error}; name another") from error
        if tower.embed_dim != self.model.config.embed_dim:
            raise ValueError(
                f"the text tower {self.text_source!r} embeds in {tower.embed_dim} numbers, the student in "
                f"{self.model.config.embed_dim}; name the CLIP that it was aligned to"
            )
        return tower


def check_image_size(image_size: int | None, patch_size: int) -> None:
    """Raise ValueError unless the patches divide an image of this size; None is the model's own."""
    if image_size is not None and (image_size < patch_size or image_size % patch_size):
        least = max(1, image_size // patch_size) * patch_size
        raise ValueError(
            f"image_size must be a multiple of the patch size {patch_size}, such as {least} or {least + patch_size}, "
            f"got {image_size}"
        )


def stacked(
    images: GivenImages, preprocess: Callable[[GivenImage, str, int | None], Tensor], image_size: int | None = None
) -> Tensor:
    """Stack images to one uint8 tensor (B, 3, S, S); a tensor passes unchanged.

    Raises as `oner_fast.data.given_images.as_list` and `preprocess` do; a tensor that is no batch of images, or one of
    another size than `image_size`, is a ValueError.
    """
    if isinstance(images, Tensor):
        if images.is_nested or images.is_meta or images.ndim != 4:
            shape = "a nested" if images.is_nested else "a meta" if images.is_meta else f"{tuple(images.shape)}"
            raise ValueError(
                f"images: got {shape} tensor, need (B, 3, S, S) of the model's size S; give images of other sizes, or "
                "one alone, as a list of tensors (3, H, W)"
            )
        if len(images) == 0:
            raise ValueError("images must hold at least one image, got none")
        if image_size is not None and images.shape[-1] != image_size:
            raise ValueError(f"images: got a tensor of {images.shape[-1]} px beside image_size {image_size}; resize it")
        return images
    return torch.stack([preprocess(image, f"image {i}", image_size) for i, image in enumerate(as_list(images))])


def text_list(texts: Sequence[str]) -> list[str]:
    """Return texts as a list.

    Raises:
        TypeError: `texts` is one string, no list, or holds something that is no string; the message says which.
        ValueError: there is no text, or one that is not valid Unicode.
    """
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable) or isinstance(texts, (Set, Mapping)):
        given = "one string" if isinstance(texts, str) else type(texts).__name__
        raise TypeError(f"texts must be a list of strings, got {given}")
    listed = list(texts)
    if not listed:
        raise ValueError("texts must hold at least one text, got none")
    for number, text in enumerate(listed):
        if not isinstance(text, str):
            raise TypeError(f"text {number}: got {type(text).__name__}, need a string")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"text {number}: it holds half a surrogate pair, so it is not valid Unicode")
    return listed


def student_towers(student: UTA, teacher: str, beside: Path, device: torch.device | str) -> LoadedTowers:
    """Combine UTA's student with the text tower of the model `teacher`, or with none where `teacher` is empty."""
    ready = student.to(device).eval().requires_grad_(False)
    return LoadedTowers(ready, student.config.image_size, teacher, beside, torch.device(device))


def clip_towers(clip: Teacher, beside: Path, device: torch.device | str) -> LoadedTowers:
    """Combine the two towers of a CLIP."""
    return LoadedTowers(clip, clip.image_size, clip.name, beside, torch.device(device))


def _normalise(embeddings: Tensor) -> Tensor:
    return F.normalize(embeddings.float(), dim=-1)
