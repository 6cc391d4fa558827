"""Bounds on what one sample may cost, so that no file of a data set can stop or slow a training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SampleBudget:
    """Limits of one sample. A sample over a limit counts as corrupt and is named. The numbers are our choice.

    Attributes:
        image_bytes: length of an image file.
        pixels: width times height of an image.
        aspect: ratio of an image's longer side to its shorter one.
        decoded_bytes: memory that an image takes once it is decoded.
        caption_bytes: length of a caption in UTF-8.
        json_bytes: length of a sample's metadata.
        json_depth: number of objects and arrays inside each other in a sample's metadata.
        seconds: time to decode one image.
    """

    image_bytes: int = 256 << 20
    pixels: int = 100_000_000
    aspect: float = 1000.0
    decoded_bytes: int = 256 << 20
    caption_bytes: int = 64 << 10
    json_bytes: int = 1 << 20
    json_depth: int = 32
    seconds: float = 10.0


BUDGET = SampleBudget()
