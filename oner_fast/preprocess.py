"""Preprocessing of images for a loaded model, as an object that a data set takes as its transform."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from oner_fast.data.given_images import GivenImage, as_rgb
from oner_fast.data.images import EvalTransform


@dataclass(frozen=True)
class Preprocess:
    """Convert one image of any form and size to the pixels that a model takes; it can be pickled for workers.

    Attributes:
        image_size: side S of the result in pixels.
        squash: whether the image is resized to a square as a whole. Otherwise its shorter side is resized to S, and the
            centre square cut out.
        bilinear: whether it is interpolated bilinearly instead of bicubically.
    """

    image_size: int
    squash: bool = False
    bilinear: bool = False

    def __call__(self, image: GivenImage, name: str = "image", image_size: int | None = None) -> Tensor:
        """Convert an image to uint8 (3, S, S), upright and on white where it is transparent.

        The model subtracts the mean itself, so that pixels stay bytes.

        Args:
            image: see `oner_fast.data.given_images.as_rgb`, whose errors are raised too.
            name: the image's name in an error.
            image_size: another side S.
        """
        size = self.image_size if image_size is None else image_size
        return EvalTransform(size, self.squash, self.bilinear)(as_rgb(image, name))
