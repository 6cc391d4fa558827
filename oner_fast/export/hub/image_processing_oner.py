"""Preprocessing of OneR's images for transformers: the shorter side reduced (bicubic), the centre square cut out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_base import ImageProcessingMixin


class OneRImageProcessor(ImageProcessingMixin):
    """Turn PIL images into uint8 pixels (B, 3, S, S); the model itself subtracts the mean."""

    model_input_names = ["pixel_values"]

    def __init__(self, size: int = 48, **values: Any) -> None:
        """Take the side S in pixels."""
        super().__init__(**values)
        self.size = size

    def __call__(self, images: Image.Image | list[Image.Image], **_: Any) -> BatchFeature:
        """Convert one image or a list; a transparent one is laid on white. `return_tensors` is always "pt"."""
        given = [images] if isinstance(images, Image.Image) else list(images)
        return BatchFeature({"pixel_values": torch.stack([self._pixels(image) for image in given])})

    def _pixels(self, image: Image.Image) -> torch.Tensor:
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = image.convert("RGB")
        width, height = (round(side * self.size / min(image.size)) for side in image.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        square = image.resize((width, height), Image.Resampling.BICUBIC)
        square = square.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(np.asarray(square).transpose(2, 0, 1).copy())
