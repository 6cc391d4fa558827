"""Bounds on what one sample may cost, so that no file of a data set can stop or slow a training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SampleBudget:
    """Limits of one sample. A sample over a limit counts as corrupt and is named.

    The numbers are our choice. A photo of 50 megapixels that was taken with the camera held upright is within all of
    them: turning it needs 400 MB.

    Attributes:
        image_bytes: length of an image file.
        pixels: width times height of an image; the number from which Pillow warns.
        aspect: ratio of an image's longer side to its shorter one.
        decoded_bytes: memory that decoding an image takes: the decoder's own, the image, and the copies as RGB and
            turned upright.
        scans: passes over the image that a JPEG file asks of its decoder; ten are usual.
        seconds: processor time to decode one image. It is checked whenever the decoder reads on, and at the end, so a
            busy machine changes nothing.
        caption_bytes: length of a caption in UTF-8.
        json_bytes: length of a sample's metadata.
        json_depth: number of objects and arrays inside each other in a sample's metadata.
    """

    image_bytes: int = 256 << 20
    pixels: int = 89_478_485
    aspect: float = 1000.0
    decoded_bytes: int = 512 << 20
    scans: int = 100
    seconds: float = 10.0
    caption_bytes: int = 64 << 10
    json_bytes: int = 1 << 20
    json_depth: int = 32


BUDGET = SampleBudget()


def excess(limit: str, value: float) -> str | None:
    """Say that `value` is over the limit named `limit`; None where it is not."""
    most = getattr(BUDGET, limit)
    return f"over the budget of one sample: {limit} {value:,.0f}, at most {most:,.0f}" if value > most else None
