"""Render SVG to PNG on white, and recognise equal and blank images."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import resvg_py
from PIL import Image

from oner_fast.data.images import decode

WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Picture:
    """A rendered image.

    `digest` is the SHA-1 of its pixels in hexadecimal, equal for equal pixels. `blank` means one flat colour. A drawing
    that cannot be rendered has an `error` and no bytes.
    """

    png: bytes
    digest: str
    blank: bool = False
    error: str = ""


def render(svg: str | Path, size: int) -> Picture:
    """Draw `svg` (markup, or the path of a file) centred on a white square of `size` x `size` pixels.

    Shapes without a colour come out black. Images without colour are stored as 8-bit grey, others as RGB.
    """
    try:
        markup = svg if isinstance(svg, str) else svg.read_text(encoding="utf-8")
        drawn = resvg_py.svg_to_bytes(
            svg_string=markup, width=size, height=size, background="white", skip_system_fonts=True
        )
    except (ValueError, OSError) as error:
        return Picture(b"", "", error=str(error))
    image = decode(drawn)
    if image.size != (size, size):
        square = Image.new("RGB", (size, size), WHITE)
        square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        image = square
    pixels = image.tobytes()
    blank = len(image.getcolors(maxcolors=size * size) or ()) == 1
    return Picture(_png(image, pixels), hashlib.sha1(pixels).hexdigest(), blank)


def _png(image: Image.Image, pixels: bytes) -> bytes:
    grey = image.convert("L")
    stored = grey if grey.convert("RGB").tobytes() == pixels else image
    buffer = io.BytesIO()
    stored.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()
