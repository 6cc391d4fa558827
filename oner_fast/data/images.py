"""Decode images to uint8 tensors; crops and flips follow from random integers that the caller gives."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch import Tensor

from oner_fast.data.pixels import read_picture
from oner_fast.data.rand_augment import DRAWS, rand_augment

RANDOMS = 8  # 32-bit integers that a training transform takes without RandAugment: two blocks of four

_ONE = 1 << 32
_LONGEST = 16  # ratio of sides up to which an evaluated image is resized whole


def decode(data: bytes, name: str = "image", side: int = 0) -> Image.Image:
    """Decode an image file to RGB, upright, on white where it is transparent.

    Args and errors are those of `oner_fast.data.pixels.read_picture`.
    """
    return read_picture(data, name, side).rgb


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to a contiguous uint8 tensor (3, height, width)."""
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


@dataclass(frozen=True)
class ImageTransform:
    """Random resized crop, horizontal flip and change of colour, decided by random integers that the caller gives.

    Attributes:
        size: side of the result in pixels.
        scale: least and greatest part of the image's area that a crop covers.
        aspect: greatest ratio of a crop's sides.
        flip: probability of a horizontal flip.
        colour: greatest relative change of brightness, contrast and saturation; hues stay, as captions name colours.
        operations: number of operations of RandAugment, after the others.
        magnitude: strength of those, from 0 to 10.
    """

    size: int
    scale: tuple[float, float] = (0.5, 1.0)
    flip: float = 0.5
    aspect: float = 4 / 3
    colour: float = 0.0
    operations: int = 0
    magnitude: float = 5.0

    def __post_init__(self) -> None:
        _check_size(self.size)
        if not 0.0 < self.scale[0] <= self.scale[1] <= 1.0:
            raise ValueError(f"scale must be (low, high) with 0 < low <= high <= 1, not {self.scale}")
        if not 0.0 <= self.flip <= 1.0:
            raise ValueError(f"flip must be in [0, 1], not {self.flip}")
        if not 0.0 <= self.colour < 1.0:
            raise ValueError(f"colour must be in [0, 1), not {self.colour}")
        if self.operations < 0 or not 0.0 <= self.magnitude <= 10.0:
            raise ValueError(
                f"RandAugment needs 0 operations or more and a magnitude in [0, 10], got {self.operations} and "
                f"{self.magnitude}"
            )
        if not self.aspect >= 1.0:
            raise ValueError(f"aspect must be at least 1, not {self.aspect}")

    @property
    def randoms(self) -> int:
        """Number of random integers that a call takes, in whole blocks of four."""
        return RANDOMS + -(-DRAWS * self.operations // 4) * 4

    @property
    def decode_side(self) -> int:
        """Smallest side, in pixels, of an image whose smallest crop needs no enlarging."""
        return math.ceil(self.size * math.sqrt(self.aspect / self.scale[0]))

    def __call__(self, image: Image.Image, randoms: NDArray[np.int64]) -> Tensor:
        """Crop, resize, flip, recolour and augment an RGB image: uint8 (3, size, size).

        `randoms` holds `self.randoms` integers in [0, 2^32), for area, aspect, left, top, flip, brightness, contrast
        and saturation, and two for each operation of RandAugment. They decide the result.
        """
        area, aspect, left, top, flip, *colours = (int(value) for value in randoms[:RANDOMS])
        width, height = image.size
        low, high = self.scale
        pixels = width * height * (low + (high - low) * (area / _ONE))
        # Draws above a half widen the crop and the others narrow it by the same factor, without exp or log.
        lean = 2 * aspect / _ONE - 1
        ratio = 1 + abs(lean) * (self.aspect - 1)
        ratio = ratio if lean >= 0 else 1 / ratio
        crop_width = min(width, max(1, round(math.sqrt(pixels * ratio))))
        crop_height = min(height, max(1, round(pixels / crop_width)))
        crop_width = min(width, max(1, round(pixels / crop_height)))
        x = (left * (width - crop_width + 1)) >> 32
        y = (top * (height - crop_height + 1)) >> 32
        box = (x, y, x + crop_width, y + crop_height)
        if box != (0, 0, self.size, self.size) or image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
        if flip < self.flip * _ONE:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.colour:
            enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
            for enhancer, value in zip(enhancers, colours, strict=True):
                image = enhancer(image).enhance(1 + self.colour * (2 * value / _ONE - 1))
        if self.operations:
            draws = [int(value) for value in randoms[RANDOMS : RANDOMS + DRAWS * self.operations]]
            image = rand_augment(image, draws, self.magnitude)
        return to_tensor(image)


@dataclass(frozen=True)
class EvalTransform:
    """Resize the shorter side to `size` pixels, then cut out the centre square.

    Attributes:
        size: side of the result in pixels.
        squash: resize the whole image to the square instead, so that nothing is cut off.
        bilinear: interpolate bilinearly instead of bicubically.
    """

    size: int
    squash: bool = False
    bilinear: bool = False

    def __post_init__(self) -> None:
        _check_size(self.size)

    def __repr__(self) -> str:
        """Name the values that are not the default, since a cache of features has this text in its key."""
        others = "".join(f", {name}=True" for name in ("squash", "bilinear") if getattr(self, name))
        return f"EvalTransform(size={self.size}{others})"

    @property
    def randoms(self) -> int:
        """As many random integers as a plain training transform is given; none is read."""
        return RANDOMS

    @property
    def decode_side(self) -> int:
        """Always 0: evaluation decodes images at full size."""
        return 0

    def __call__(self, image: Image.Image, randoms: NDArray[np.int64] | None = None) -> Tensor:
        """Convert an RGB image to uint8 (3, size, size); `randoms` are ignored."""
        if image.size == (self.size, self.size):
            return to_tensor(image)
        method = Image.Resampling.BILINEAR if self.bilinear else Image.Resampling.BICUBIC
        if self.squash:
            return to_tensor(image.resize((self.size, self.size), method))
        shorter, longer = min(image.size), max(image.size)
        width, height = (round(side * self.size / shorter) for side in image.size)
        x, y = (width - self.size) // 2, (height - self.size) // 2
        square = (x, y, x + self.size, y + self.size)
        if longer <= _LONGEST * shorter:
            return to_tensor(image.resize((width, height), method).crop(square))
        # Resized whole, the image would take its ratio of sides times the memory of the square.
        across, down = image.width / width, image.height / height
        box = (square[0] * across, square[1] * down, square[2] * across, square[3] * down)
        return to_tensor(image.resize((self.size, self.size), method, box=box))


def eval_transform(size: int) -> EvalTransform:
    """Transform for evaluation: the shorter side resized to `size` pixels, bicubic, and the centre square."""
    return EvalTransform(size)


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, not {size}")
