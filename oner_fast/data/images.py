"""Decode images to uint8 tensors; crops and flips follow from random integers that the caller gives."""

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from oner_fast.data.dataset import CorruptSample

RANDOMS = 5  # number of 32-bit integers that one training transform takes

_ORIENTATION = 0x0112
_ONE = 1 << 32


def decode(data: bytes, name: str = "image", side: int = 0) -> Image.Image:
    """Decode an image to RGB, upright, on white where it is transparent.

    Args:
        data: an image file.
        name: the image's name in an error.
        side: if given, a JPEG may be decoded at a half, a quarter or an eighth of its size, with no side smaller than
            this many pixels.

    Raises:
        CorruptSample: the bytes are not a whole image.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        if side and image.format == "JPEG":
            image.draft("RGB", (side, side))
        image.load()
        if image.getexif().get(_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        return to_rgb(image)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:  # Pillow's own message contains an address in memory
        raise CorruptSample(name, "not a readable image (of no known format)") from error
    except Exception as error:  # decoders raise whatever they meet first in damaged bytes
        raise CorruptSample(name, f"not a readable image ({type(error).__name__}: {error})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB: transparency on white, 16-bit and float grey scaled to 8 bits."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_to_rgb(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGB", layer.size, (255, 255, 255))
        white.paste(layer, mask=layer.getchannel("A"))
        return white
    return image.convert("RGB")


def _grey_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    if image.mode.startswith("I"):  # integer grey is 16-bit
        values = values / 257.0
    elif values.size and values.max() <= 1.0:  # float grey ranges over [0, 1] or over [0, 255]
        values = values * 255.0
    return Image.fromarray(np.nan_to_num(values).round().clip(0, 255).astype(np.uint8)).convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to a contiguous uint8 tensor (3, height, width)."""
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


@dataclass(frozen=True)
class ImageTransform:
    """Random resized crop and horizontal flip, decided by random integers that the caller gives.

    Attributes:
        size: side of the result in pixels.
        scale: least and greatest part of the image's area that a crop covers.
        aspect: greatest ratio of a crop's sides.
        flip: probability of a horizontal flip.
    """

    size: int
    scale: tuple[float, float] = (0.5, 1.0)
    flip: float = 0.5
    aspect: float = 4 / 3

    def __post_init__(self) -> None:
        _check_size(self.size)
        if not 0.0 < self.scale[0] <= self.scale[1] <= 1.0:
            raise ValueError(f"scale must be (low, high) with 0 < low <= high <= 1, not {self.scale}")
        if not 0.0 <= self.flip <= 1.0:
            raise ValueError(f"flip must be in [0, 1], not {self.flip}")
        if not self.aspect >= 1.0:
            raise ValueError(f"aspect must be at least 1, not {self.aspect}")

    @property
    def decode_side(self) -> int:
        """Smallest side, in pixels, of an image whose smallest crop needs no enlarging."""
        return math.ceil(self.size * math.sqrt(self.aspect / self.scale[0]))

    def __call__(self, image: Image.Image, randoms: NDArray[np.int64]) -> Tensor:
        """Crop, resize and flip an RGB image: uint8 (3, size, size).

        `randoms` holds `RANDOMS` integers in [0, 2^32), for area, aspect, left, top and flip. They decide the result.
        """
        area, aspect, left, top, flip = (int(value) for value in randoms[:RANDOMS])
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
        return to_tensor(image)


@dataclass(frozen=True)
class EvalTransform:
    """Resize the shorter side to `size` pixels (bicubic), then cut out the centre square."""

    size: int

    def __post_init__(self) -> None:
        _check_size(self.size)

    @property
    def decode_side(self) -> int:
        """Always 0: evaluation decodes images at full size."""
        return 0

    def __call__(self, image: Image.Image, randoms: NDArray[np.int64] | None = None) -> Tensor:
        """Convert an RGB image to uint8 (3, size, size); `randoms` are ignored."""
        width, height = image.size
        if (width, height) != (self.size, self.size):
            shorter = min(width, height)
            width, height = round(width * self.size / shorter), round(height * self.size / shorter)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
            x, y = (width - self.size) // 2, (height - self.size) // 2
            image = image.crop((x, y, x + self.size, y + self.size))
        return to_tensor(image)


def eval_transform(size: int) -> EvalTransform:
    """Transform for evaluation: the shorter side resized to `size` pixels, bicubic, and the centre square."""
    return EvalTransform(size)


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, not {size}")
