"""Encoded pictures to uint8 tensors: decoding, and transforms replayed from integers."""

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from oner_fast.data.dataset import CorruptSample

RANDOMS = 5  # the 32-bit integers that one training transform takes

_ORIENTATION = 0x0112
_ONE = 1 << 32


def decode(data: bytes, name: str = "image", side: int = 0) -> Image.Image:
    """Decodes a picture to RGB, upright, on white where it is transparent.

    `side`: where given, a JPEG may be decoded at a half, a quarter or an eighth of its size, its sides no smaller than
    that many pixels. Raises CorruptSample(name, why) for bytes that are no whole picture.
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
    except UnidentifiedImageError as error:  # its own message names an address in memory
        raise CorruptSample(name, "not a readable picture (of no known format)") from error
    except Exception as error:  # decoders raise whatever they meet first in damaged bytes
        raise CorruptSample(name, f"not a readable picture ({type(error).__name__}: {error})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB: transparency on white, 16-bit and float grey scaled to 8 bits."""
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
    elif values.size and values.max() <= 1.0:  # float grey is a fraction of one, or out of 255
        values = values * 255.0
    return Image.fromarray(np.nan_to_num(values).round().clip(0, 255).astype(np.uint8)).convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as a contiguous uint8 tensor (3, height, width)."""
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


@dataclass(frozen=True)
class ImageTransform:
    """Random resized crop and horizontal flip, replayed from integers.

    `size`: the side of the result in pixels. `scale`: the least and the greatest part of the picture's area that a crop
    covers. `aspect`: the greatest ratio of its sides. `flip`: the probability of a horizontal flip.
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
        """The least side of a picture from which the smallest crop still needs no enlarging."""
        return math.ceil(self.size * math.sqrt(self.aspect / self.scale[0]))

    def __call__(self, image: Image.Image, randoms: NDArray[np.int64]) -> Tensor:
        """Crops, resizes and flips an RGB picture: uint8 (3, size, size).

        `randoms`: `RANDOMS` integers in [0, 2^32) (area, aspect, left, top, flip) that decide everything.
        """
        area, aspect, left, top, flip = (int(value) for value in randoms[:RANDOMS])
        width, height = image.size
        low, high = self.scale
        pixels = width * height * (low + (high - low) * (area / _ONE))
        # The greater half of the draws widens and the lesser narrows by the same factor: no library exp or log.
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
    """Shorter side to `size` pixels (bicubic), then the centre square."""

    size: int

    def __post_init__(self) -> None:
        _check_size(self.size)

    @property
    def decode_side(self) -> int:
        """0: evaluation decodes at full size."""
        return 0

    def __call__(self, image: Image.Image, randoms: NDArray[np.int64] | None = None) -> Tensor:
        """An RGB picture as uint8 (3, size, size); `randoms` are ignored."""
        width, height = image.size
        if (width, height) != (self.size, self.size):
            shorter = min(width, height)
            width, height = round(width * self.size / shorter), round(height * self.size / shorter)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
            x, y = (width - self.size) // 2, (height - self.size) // 2
            image = image.crop((x, y, x + self.size, y + self.size))
        return to_tensor(image)


def eval_transform(size: int) -> EvalTransform:
    """The transform of evaluation: shorter side to `size` pixels, bicubic, and the centre square."""
    return EvalTransform(size)


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, not {size}")
