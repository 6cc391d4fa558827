"""Images in every form that users have: the same file gives the pixels of training, or an error says what was given."""

import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from oner_fast.data.dataset import CorruptSample
from oner_fast.data.given_images import as_list, as_rgb
from oner_fast.data.images import decode

Y, X = np.mgrid[:24, :40]
PIXELS = np.stack([X * 6, Y * 10, (X + Y) % 7 * 30], 2).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def photo(orientation: int, kind: str = "PNG", **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(PIXELS), kind, exif=exif, **options)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", [1, 2, 5, 6, 8])
def test_a_file_gives_the_pixels_of_training_in_every_form(kind: str, orientation: int, tmp_path: Path) -> None:
    data = photo(orientation, kind)
    (tmp_path / "a").write_bytes(data)
    expected = np.asarray(decode(data))
    assert expected.shape[:2] == ((40, 24) if orientation > 4 else (24, 40))
    opened = Image.open(io.BytesIO(data))
    loaded = Image.open(io.BytesIO(data))
    loaded.load()
    forms: list[Any] = [tmp_path / "a", str(tmp_path / "a"), data, bytearray(data), memoryview(data), opened, loaded]
    forms += [Image.open(io.BytesIO(data)).copy(), expected, torch.from_numpy(expected.copy()).permute(2, 0, 1)]
    if kind != "TIFF":  # Pillow turns a TIFF itself
        forms.append(Image.open(io.BytesIO(data)).convert("RGB"))
    for form in forms:
        assert np.array_equal(np.asarray(as_rgb(form)), expected), form


def test_a_decoded_image_is_not_turned_again() -> None:
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF"):
        once = decode(photo(6, kind))
        assert np.array_equal(np.asarray(as_rgb(once)), np.asarray(once)), kind
    photo_of_pillow = Image.open(io.BytesIO(photo(6)))
    as_rgb(photo_of_pillow)
    assert photo_of_pillow.size == (40, 24) and photo_of_pillow.getexif()[0x0112] == 6  # the user's image stays


def test_damaged_metadata_of_an_opened_image_are_passed_over() -> None:
    image = Image.fromarray(PIXELS)
    for info in (
        {"exif": b"Exif\0\0nonsense"},
        {"Raw profile type exif": "\nexif\n 9\nno hexadecimal"},
        {"xmp": b"<"},
        {"exif": "x"},
    ):
        image.info = dict(info)
        assert np.array_equal(np.asarray(as_rgb(image)), PIXELS)
    image.info = {"exif": b"Exif\0\0nonsense", "xmp": b'<x tiff:Orientation="3"/>'}
    assert np.array_equal(np.asarray(as_rgb(image)), PIXELS[::-1, ::-1])


def test_arrays_of_every_shape() -> None:
    grey = PIXELS[..., 0]
    assert np.array_equal(np.asarray(as_rgb(grey)), np.repeat(grey[..., None], 3, 2))
    assert np.array_equal(np.asarray(as_rgb(grey[..., None])), np.repeat(grey[..., None], 3, 2))
    clear = np.concatenate([PIXELS, np.zeros_like(PIXELS[..., :1])], 2)
    assert (np.asarray(as_rgb(clear)) == 255).all()
    assert np.array_equal(np.asarray(as_rgb(PIXELS[::2, ::-1])), PIXELS[::2, ::-1])
    assert np.array_equal(np.asarray(as_rgb(torch.from_numpy(PIXELS).permute(2, 0, 1))), PIXELS)
    assert [one.shape for one in as_list(np.stack([PIXELS, PIXELS]))] == [PIXELS.shape] * 2
    assert len(as_list(PIXELS)) == len(as_list("a.png")) == len(as_list(b"x")) == len(as_list(Path("a.png"))) == 1
    assert len(as_list(("a.png", b"x", PIXELS))) == 3


@pytest.mark.parametrize(
    "given, kind, said",
    [
        (None, TypeError, "k: got NoneType, need a path, the bytes of an image file, a PIL image, a uint8 array"),
        (3, TypeError, "k: got int, need"),
        (io.BytesIO(b"x"), TypeError, "k: got _io.BytesIO, need"),
        (PIXELS.astype(np.float32), TypeError, "k: got an array of float32, need uint8, 0 to 255"),
        (PIXELS.astype(np.uint16), TypeError, "k: got an array of uint16"),
        (torch.zeros(3, 4, 4), TypeError, "k: got a tensor of float32, need uint8"),
        (PIXELS.transpose(2, 0, 1), ValueError, r"k: an array of an image needs the shape (H, W, 3), got (3, 24, 40)"),
        (PIXELS[:0], ValueError, "got (0, 40, 3)"),
        (np.zeros(3, np.uint8), ValueError, "got (3,)"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), ValueError, "needs the shape (3, H, W), got (4, 4, 3)"),
        (b"no image", CorruptSample, "k: not a readable image (of no known format)"),
        (b"no image", ValueError, "k: not a readable image"),
        (Image.new("1", (1, 2000)), ValueError, "k: over the budget of one sample: aspect 2,000, at most 1,000"),
        (os.sep, ValueError, "/: a folder, not a file"),
        ("none.png", FileNotFoundError, "none.png"),
    ],
)
def test_what_was_given_is_named(given: Any, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=re.escape(said)):
        as_rgb(given, "k")


@pytest.mark.parametrize(
    "given, kind, said",
    [
        ([], ValueError, "at least one image, got none"),
        (np.zeros((0, 4, 4, 3), np.uint8), ValueError, "at least one image, got none"),
        (np.zeros((1, 1, 4, 4, 3), np.uint8), ValueError, "(N, H, W, 3), got (1, 1, 4, 4, 3)"),
        ({"a": 1}, TypeError, "images: got dict, need a path"),
        (None, TypeError, "images: got NoneType, need a path"),
        (iter([b"x"]), TypeError, "images: got list_iterator, need a path"),
    ],
)
def test_lists_that_are_none_are_named(given: Any, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=re.escape(said)):
        as_list(given)


def test_a_pil_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    closed = Image.fromarray(PIXELS)
    closed.close()
    cut = Image.open(io.BytesIO(encoded(Image.fromarray(PIXELS))[:-40]))
    for image in (closed, cut):
        with pytest.raises(CorruptSample, match="^photo: a PIL image that cannot be read: "):
            as_rgb(image, "photo")


def test_arrays_and_tensors_without_values_are_named() -> None:
    with pytest.raises(TypeError, match=r"images: got numpy\.ndarray"):
        as_list(np.array("a.png", dtype=object))
    with pytest.raises(TypeError, match="image: got a meta tensor, need a dense one"):
        as_rgb(torch.zeros(3, 4, 4, dtype=torch.uint8, device="meta"))
    with pytest.raises(TypeError, match="image: got a sparse tensor, need a dense one"):
        as_rgb(torch.zeros(3, 4, 4, dtype=torch.uint8).to_sparse())
