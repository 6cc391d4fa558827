"""Turn image files into RGB pixels: the one place of the library that opens images from elsewhere."""

from __future__ import annotations

import io
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from oner_fast.data.budget import BUDGET, excess
from oner_fast.data.dataset import CorruptSample
from oner_fast.data.image_files import ImageFile, pixel_part, without_avif_exif
from oner_fast.data.orientation import from_info, upright
from oner_fast.data.picture_formats import FORMATS
from oner_fast.foreign_content import web_page

_PLUGINS = ("Jpeg", "Png", "WebP", "Gif", "Bmp", "Tiff", "Ppm", "Avif")
_STRIP = 1 << 18  # pixels converted at once
_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}  # a pixel of other modes takes 4
# Bytes a pixel that a decoder holds beside the image, as measured; a JPEG of several scans holds its coefficients.
_DECODER_BYTES = {"WEBP": 12, "AVIF": 12, "TIFF": 4}


class _TooSlow(Exception):
    pass


class _Clock:
    """Processor time of this thread, against the budget's."""

    def __init__(self) -> None:
        self._end = time.thread_time() + BUDGET.seconds
        self._ticks = 0

    def tick(self) -> None:
        """Count a small piece of work, and check the time at every 64th."""
        self._ticks += 1
        if not self._ticks & 63:
            self.check()

    def check(self) -> None:
        """Raise _TooSlow where the time is over."""
        if time.thread_time() > self._end:
            raise _TooSlow


class _Timed(io.BytesIO):
    """A file in memory that ends a decoder's work once the time is over."""

    def __init__(self, data: bytes, clock: _Clock) -> None:
        super().__init__(data)
        self._clock = clock

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0 or size >= 4096:
            self._clock.check()
        else:
            self._clock.tick()
        return super().read(size)


@dataclass(frozen=True)
class Picture:
    """A decoded image.

    Attributes:
        rgb: the image as RGB, upright, on white where it is transparent.
        format: Pillow's name of the file's format.
        mode: Pillow's name of the pixels' form in the file, such as "L" for grey.
        as_stored: whether the file's pixels are upright, with no turn stated.
    """

    rgb: Image.Image
    format: str
    mode: str
    as_stored: bool


def read_file(path: str | os.PathLike[str], name: str | None = None) -> bytes:
    """Read an image file.

    Args:
        path: a regular file.
        name: the image's name in an error; the path by default.

    Raises:
        CorruptSample: the path is no regular file, or the file is longer than the budget allows.
        OSError: the file cannot be read.
    """
    name = name or os.fspath(path)
    about = Path(path).stat()
    if not stat.S_ISREG(about.st_mode):
        raise CorruptSample(name, f"a {'folder' if stat.S_ISDIR(about.st_mode) else 'device or pipe'}, not a file")
    if over := excess("image_bytes", about.st_size):
        raise CorruptSample(name, over)
    return Path(path).read_bytes()


def read_picture(data: bytes, name: str = "image", side: int = 0) -> Picture:
    """Decode an image file of any format of `picture_formats` within the budget of a sample.

    Args:
        data: an image file; its first image where it holds several.
        name: the image's name in an error.
        side: if given, a JPEG may be decoded at a half, a quarter or an eighth of its size, with no side smaller than
            this many pixels.

    Raises:
        CorruptSample: the bytes are not a whole image, or it is over the budget.
    """
    if not data:
        raise CorruptSample(name, "it is empty: it has no bytes")
    if over := excess("image_bytes", len(data)):
        raise CorruptSample(name, over)
    clock = _Clock()
    try:
        file = pixel_part(data, clock.tick)
        image = _open(file.data, clock)
        orientation = file.orientation if file.orientation is not None else from_info(image.info)
        mode, kind = image.mode, image.format or ""
        turned = orientation in range(2, 9)
        if over := _over(image.size, mode, _decoder_bytes(image, file), turned) or excess("scans", file.scans):
            raise CorruptSample(name, over)
        if side and kind == "JPEG":
            image.draft("RGB", (side, side))
        load(image)
        rgb = to_rgb(upright(image, orientation))
        clock.check()
        rgb.info = {}  # a turn that was made is not made again by what reads the metadata
        return Picture(rgb, kind, mode, not turned)
    except (MemoryError, CorruptSample):
        raise
    except _TooSlow:
        raise CorruptSample(name, f"over the budget of one sample: more than {BUDGET.seconds:g} seconds") from None
    except Image.DecompressionBombError as error:
        found = re.search(r"\d+", str(error))
        raise CorruptSample(name, excess("pixels", int(found[0]) if found else 0) or str(error)) from error
    except UnidentifiedImageError as error:  # Pillow's own message contains an address in memory
        raise CorruptSample(name, f"not a readable image ({_unknown(data)})") from error
    except Exception as error:  # decoders raise whatever they meet first in damaged bytes
        raise CorruptSample(name, f"not a readable image ({type(error).__name__}: {error})") from error


def load(image: Image.Image) -> None:
    """Load the pixels of an image, and state its transparent colour as a value of those pixels.

    Pillow scales grey of 2 and 4 bits and colours of 16 bits to 8 bits, and leaves the transparent colour as the file
    states it. Of colours of 16 bits, the upper 8 bits are compared, which is our choice.
    """
    tiles = getattr(image, "tile", None)
    form = tiles[0][3] if tiles else None
    image.load()
    transparent = image.info.get("transparency")
    if form in ("L;2", "L;4") and isinstance(transparent, int):
        image.info["transparency"] = transparent * (85 if form == "L;2" else 17)
    elif form == "RGB;16B" and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in transparent)


def check_size(image: Image.Image, name: str = "image") -> None:
    """Raise CorruptSample where an image that was opened elsewhere is over the budget."""
    if over := _over(image.size, image.mode, 0, False):
        raise CorruptSample(name, over)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB: transparency on white, 16-bit and float grey scaled to 8 bits.

    Raises ValueError where integer grey is outside 0 to 65,535.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "1" or image.mode.startswith("I"):  # integer grey is 16-bit
        transparent = image.info.get("transparency")
        transparent = transparent if isinstance(transparent, int) else -1
        if image.mode == "I" and (outside := _outside_16_bits(image)) is not None:
            raise ValueError(f"integer grey of {outside:,}, and 0 to 65,535 is read; scale it to 16 or 8 bits")
        scale = 255.0 if image.mode == "1" else 1 / 257
        return _by_strips(image, lambda strip: _grey_to_rgb(_whitened(np.asarray(strip), transparent, scale)))
    if image.mode == "F":  # float grey ranges over [0, 1] or over [0, 255]
        scale = 255.0 if all(_greatest(np.asarray(strip)) <= 1.0 for _, strip in _strips(image)) else 1.0
        return _by_strips(image, lambda strip: _grey_to_rgb(np.asarray(strip).astype(np.float64) * scale))
    if image.mode == "La":  # Pillow converts it to nothing else
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        return _by_strips(image, _on_white)
    return image.convert("RGB")


def _open(data: bytes, clock: _Clock) -> Image.Image:
    try:
        return Image.open(_Timed(data, clock), formats=_formats())
    except (UnidentifiedImageError, ValueError):
        renamed = without_avif_exif(data) if data[4:8] == b"ftyp" else data
        if renamed is data:
            raise
        return Image.open(_Timed(renamed, clock), formats=_formats())


@cache
def _formats() -> tuple[str, ...]:
    """The formats that this installation of Pillow has a reader for, each reader loaded."""
    for plugin in _PLUGINS:
        with suppress(ImportError):
            import_module(f"PIL.{plugin}ImagePlugin")
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)


def _over(size: tuple[int, int], mode: str, decoder_bytes: float, turned: bool) -> str | None:
    width, height = size
    if width < 1 or height < 1:
        return f"it has no pixels ({width} x {height})"
    held = _BYTES.get(mode, 4) + decoder_bytes + 4 * (mode != "RGB") + 4 * turned
    return (
        excess("pixels", width * height)
        or excess("aspect", max(size) / min(size))
        or excess("decoded_bytes", width * height * held)
    )


def _decoder_bytes(image: Image.Image, file: ImageFile) -> float:
    """Bytes a pixel that the decoder holds beside the image."""
    layers = getattr(image, "layer", ())  # of a JPEG: number, horizontal and vertical sampling, table
    if image.format != "JPEG" or file.scans == 1 or not layers:
        return _DECODER_BYTES.get(image.format or "", 0)
    full = max(layer[1] for layer in layers) * max(layer[2] for layer in layers)
    return 2 * sum(layer[1] * layer[2] for layer in layers) / full


def _unknown(data: bytes) -> str:
    return "of no known format: a web page" if web_page(data[:512]) else "of no known format"


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield parts of whole rows, each with its first row."""
    width, height = image.size
    rows = max(1, _STRIP // max(1, width))
    if rows >= height:
        yield 0, image
        return
    for top in range(0, height, rows):
        yield top, image.crop((0, top, width, min(height, top + rows)))


def _by_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert an image pixel by pixel, a few rows at a time, so that no second copy of it is needed."""
    if image.width * image.height <= _STRIP:
        return convert(image)
    result = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        result.paste(convert(strip), (0, top))
    return result


def _whitened(grey: NDArray[Any], transparent: int, scale: float) -> NDArray[np.float64]:
    """Scale grey to 0 to 255, with 255 where it is the transparent value."""
    return np.where(grey == transparent, 255.0, grey.astype(np.float64) * scale)


def _outside_16_bits(image: Image.Image) -> int | None:
    for _, strip in _strips(image):
        values = np.asarray(strip)
        for value in (int(values.min()), int(values.max())):
            if not 0 <= value <= 65_535:
                return value
    return None


def _greatest(values: NDArray[np.float32]) -> float:
    return float(np.max(values, initial=0.0, where=np.isfinite(values)))


def _grey_to_rgb(values: NDArray[np.float64]) -> Image.Image:
    return Image.fromarray(np.nan_to_num(values).round().clip(0, 255).astype(np.uint8)).convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    layer = image.convert("RGBA")
    white = Image.new("RGB", layer.size, (255, 255, 255))
    white.paste(layer, mask=layer.getchannel("A"))
    return white
