"""RandAugment (Cubuk et al., 2019) with operations that keep colours, for images whose captions name them.

Pillow makes the operations. The draws come from the caller, so that a batch stays a function of its seed and step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image, ImageEnhance, ImageOps

DRAWS = 2
"""Random integers that an operation takes: which it is, and its sign."""

_WHITE = (255, 255, 255)
_TOP = 10.0
"""Strongest magnitude."""

# The strongest effect of each: a share for shears and shifts, degrees for turns, a relative change for enhancements.
_SHEAR, _SHIFT, _TURN, _CHANGE = 0.3, 0.3, 30.0, 0.9


def rand_augment(image: Image.Image, draws: Sequence[int], magnitude: float) -> Image.Image:
    """Apply an operation for each pair of draws, one after another.

    The operations are: identity, autocontrast, equalise, brightness, sharpness, shear and shift along either axis, and
    turn. What enters from outside of the image is white.

    Args:
        image: RGB.
        draws: integers in [0, 2^32), `DRAWS` for each operation.
        magnitude: strength from 0 to 10.

    Returns:
        An RGB image of the same size.
    """
    for which, sign in zip(draws[::DRAWS], draws[1::DRAWS], strict=True):
        signed = magnitude / _TOP * (1.0 if sign >> 31 else -1.0)
        image = _OPERATIONS[(which * len(_OPERATIONS)) >> 32](image, signed)
    return image


def _affine(image: Image.Image, *rows: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, rows, Image.Resampling.BILINEAR, fillcolor=_WHITE)


def _identity(image: Image.Image, signed: float) -> Image.Image:
    return image


def _autocontrast(image: Image.Image, signed: float) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalise(image: Image.Image, signed: float) -> Image.Image:
    return ImageOps.equalize(image)


def _brightness(image: Image.Image, signed: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(1 + _CHANGE * signed)


def _sharpness(image: Image.Image, signed: float) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(1 + _CHANGE * signed)


def _shear_x(image: Image.Image, signed: float) -> Image.Image:
    return _affine(image, 1, _SHEAR * signed, -_SHEAR * signed * image.height / 2, 0, 1, 0)


def _shear_y(image: Image.Image, signed: float) -> Image.Image:
    return _affine(image, 1, 0, 0, _SHEAR * signed, 1, -_SHEAR * signed * image.width / 2)


def _shift_x(image: Image.Image, signed: float) -> Image.Image:
    return _affine(image, 1, 0, _SHIFT * signed * image.width, 0, 1, 0)


def _shift_y(image: Image.Image, signed: float) -> Image.Image:
    return _affine(image, 1, 0, 0, 0, 1, _SHIFT * signed * image.height)


def _turn(image: Image.Image, signed: float) -> Image.Image:
    return image.rotate(_TURN * signed, Image.Resampling.BILINEAR, fillcolor=_WHITE)


_OPERATIONS: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    _identity,
    _autocontrast,
    _equalise,
    _brightness,
    _sharpness,
    _shear_x,
    _shear_y,
    _shift_x,
    _shift_y,
    _turn,
)
