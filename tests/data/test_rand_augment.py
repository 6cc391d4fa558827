"""RandAugment: each operation does what it is named for, and draws alone decide the result."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageOps

from oner_fast.data.images import RANDOMS, ImageTransform, to_tensor
from oner_fast.data.rand_augment import rand_augment

NAMES = ("identity", "autocontrast", "equalise", "brightness", "sharpness", "shear x", "shear y", "shift x", "shift y",
         "turn")  # fmt: skip


def picture(width: int = 40, height: int = 30) -> Image.Image:
    pixels = np.random.default_rng(0).integers(40, 200, (height // 5, width // 5, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def draws(name: str, up: bool = True) -> list[int]:
    return [(NAMES.index(name) * 2 + 1) * 2**32 // (2 * len(NAMES)), 2**32 - 1 if up else 0]


@pytest.mark.parametrize("name", NAMES)
def test_operations_keep_size_and_mode_and_grow_with_the_magnitude(name: str) -> None:
    image = picture()
    found = {m: rand_augment(image, draws(name), m) for m in (0.0, 4.0, 10.0)}
    assert all(each.size == image.size and each.mode == "RGB" for each in found.values())
    distance = [float((to_tensor(each).float() - to_tensor(image).float()).abs().mean()) for each in found.values()]
    if name in ("autocontrast", "equalise"):  # these have no strength
        assert distance[0] == distance[2] > 1.0
    elif name == "identity":
        assert distance == [0.0, 0.0, 0.0]
    else:
        assert distance[0] == 0.0 < distance[1] < distance[2]
        assert ImageChops.difference(found[10.0], rand_augment(image, draws(name, up=False), 10.0)).getbbox()


def test_operations_are_those_of_their_names() -> None:
    image = picture()
    assert rand_augment(image, draws("equalise"), 5.0) == ImageOps.equalize(image)
    shifted = to_tensor(rand_augment(image, draws("shift x"), 10.0))
    assert torch.equal(shifted[:, :, :28], to_tensor(image)[:, :, 12:]) and bool((shifted[:, :, 29:] == 255).all())
    down = to_tensor(rand_augment(image, draws("shift y", up=False), 10.0))
    assert torch.equal(down[:, 9:], to_tensor(image)[:, :21]) and bool((down[:, :8] == 255).all())
    middle = to_tensor(rand_augment(image, draws("shear x"), 10.0))[:, 14:16, 15:25].float()
    assert float((middle - to_tensor(image)[:, 14:16, 15:25].float()).abs().mean()) < 15  # the middle stays in place
    two = rand_augment(image, [*draws("turn"), *draws("brightness")], 5.0)
    assert two == rand_augment(rand_augment(image, draws("turn"), 5.0), draws("brightness"), 5.0)


def test_a_transform_takes_its_integers_in_blocks_of_four() -> None:
    plain, one, three = (ImageTransform(16, operations=count) for count in (0, 1, 3))
    assert (plain.randoms, one.randoms, three.randoms) == (RANDOMS, RANDOMS + 4, RANDOMS + 8)
    image, randoms = picture(), np.random.default_rng(1).integers(0, 2**32, one.randoms)
    randoms[RANDOMS:][:2] = draws("identity")
    assert torch.equal(one(image, randoms), plain(image, randoms[:RANDOMS]))
    randoms[RANDOMS:][:2] = draws("equalise")
    assert not torch.equal(one(image, randoms), plain(image, randoms[:RANDOMS]))


@pytest.mark.parametrize(("operations", "magnitude"), [(-1, 5.0), (2, -0.5), (2, 10.5), (2, float("nan"))])
def test_what_is_out_of_range_is_refused(operations: int, magnitude: float) -> None:
    with pytest.raises(ValueError, match=r"0 operations or more and a magnitude in \[0, 10\]"):
        ImageTransform(16, operations=operations, magnitude=magnitude)
