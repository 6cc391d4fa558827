"""Images in the forms in which users have them: paths, bytes, arrays, tensors, PIL images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from oner_fast.data.dataset import CorruptSample
from oner_fast.data.orientation import from_info, upright
from oner_fast.data.pixels import check_size, load, read_file, read_picture, to_rgb

GivenImage: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | NDArray[np.uint8] | Tensor
)
GivenImages: TypeAlias = GivenImage | Sequence[GivenImage]

_NEEDED = "a path, the bytes of an image file, a PIL image, a uint8 array (H, W, 3) or a uint8 tensor (3, H, W)"


def as_rgb(image: GivenImage, name: str = "image") -> Image.Image:
    """Convert one image of any form to RGB, upright, on white where it is transparent.

    The same file gives the same pixels as in training, whether it is given by its path, by its bytes, or as the PIL
    image that was opened from it. An array or a tensor is upright already.

    Args:
        image: a path, the bytes of an image file, a PIL image of any mode, a uint8 array (H, W), (H, W, 1), (H, W, 3)
            or (H, W, 4), or a uint8 tensor (3, H, W).
        name: the image's name in an error; a path names itself.

    Raises:
        TypeError: the image has another form.
        ValueError: the image cannot be decoded, is over the budget of a sample, or has another shape.
        OSError: the file cannot be read.
    """
    if isinstance(image, (str, os.PathLike)):
        return read_picture(read_file(image), os.fspath(image)).rgb
    if isinstance(image, (bytes, bytearray, memoryview)):
        return read_picture(bytes(image), name).rgb
    if isinstance(image, Image.Image):
        check_size(image, name)
        try:
            load(image)
            return to_rgb(upright(image, from_info(image.info)))
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders and conversions raise many kinds
            raise CorruptSample(name, f"a PIL image that cannot be read: {error}") from error
    if isinstance(image, Tensor):
        if image.is_nested:
            raise TypeError(f"{name}: got a nested tensor, need one of shape (3, H, W)")
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"{name}: a tensor of an image needs the shape (3, H, W), got {tuple(image.shape)}")
        _check_dtype(name, "tensor", str(image.dtype).removeprefix("torch."))
        if image.is_meta or image.is_sparse:
            raise TypeError(f"{name}: got a {'meta' if image.is_meta else 'sparse'} tensor, need a dense one")
        return _from_array(image.detach().cpu().permute(1, 2, 0).numpy(), name)
    if isinstance(image, (np.ndarray, np.generic)):
        _check_dtype(name, "array", str(image.dtype))
        return _from_array(np.asarray(image), name)
    raise TypeError(f"{name}: got {_described(image)}, need {_NEEDED}")


def as_list(images: GivenImages) -> list[GivenImage]:
    """List images that were given as one, in a sequence, or in an array (N, H, W, C).

    Raises:
        TypeError: the images have another form.
        ValueError: there are none.
    """
    if isinstance(images, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)):
        return [images]
    if isinstance(images, np.ndarray) and images.dtype != object:
        if images.ndim < 4:
            return [images]
        if images.ndim > 4:
            raise ValueError(f"an array of images needs the shape (N, H, W, 3), got {images.shape}")
    elif not isinstance(images, (Sequence, np.ndarray)) or (isinstance(images, np.ndarray) and images.ndim == 0):
        raise TypeError(f"images: got {_described(images)}, need {_NEEDED}, or a list of those")
    if len(images) == 0:
        raise ValueError("images must hold at least one image, got none")
    return list(images)


def _check_dtype(name: str, form: str, dtype: str) -> None:
    if dtype != "uint8":
        raise TypeError(f"{name}: got {'an' if form == 'array' else 'a'} {form} of {dtype}, need uint8, 0 to 255")


def _from_array(pixels: NDArray[np.uint8], name: str) -> Image.Image:
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if 0 in pixels.shape or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
        raise ValueError(f"{name}: an array of an image needs the shape (H, W, 3), got {pixels.shape}")
    return to_rgb(Image.fromarray(np.ascontiguousarray(pixels)))


def _described(given: Any) -> str:
    kind = type(given)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
