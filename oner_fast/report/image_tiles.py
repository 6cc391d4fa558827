"""Images for the page: small, on white, as data URIs."""

import base64
import io

from PIL import Image
from torch import Tensor

from oner_fast.data.pixels import read_picture

LARGEST = 192  # longer side in px, enough for a tile at twice the pixel density


def data_uri(content: bytes, kind: str = "png") -> str:
    """Encode the bytes of an image file as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def tile(content: bytes) -> str:
    """Encode an image file as a data URI; an upright small PNG unchanged, others reduced and drawn on white."""
    picture = read_picture(content)
    if picture.format == "PNG" and picture.as_stored and len(content) <= 16_384:
        return data_uri(content)
    picture.rgb.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return _encoded(picture.rgb)


def from_pixels(pixels: Tensor) -> str:
    """Encode (3, H, W) uint8 pixels as a data URI."""
    return _encoded(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()))


def _encoded(picture: Image.Image) -> str:
    out = io.BytesIO()
    if picture.getcolors(256):
        picture.save(out, "png", optimize=True)
        return data_uri(out.getvalue())
    # Full colour resolution, as the edges of a drawing would smear otherwise.
    picture.save(out, "jpeg", quality=90, subsampling=0)
    return data_uri(out.getvalue(), "jpeg")
