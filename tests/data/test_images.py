import io

import numpy as np
import pytest
import torch
from PIL import Image

from oner_fast.data.dataset import CorruptSample
from oner_fast.data.images import RANDOMS, ImageTransform, decode, eval_transform
from oner_fast.data.pixels import to_rgb

FULL = 2**32 - 1


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def picture(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, 0 * x + 90], 2).astype(np.uint8))


def test_transparency_becomes_white():
    layer = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    layer.putpixel((1, 0), (200, 0, 0, 0))
    assert list(np.asarray(decode(encoded(layer))).reshape(-1)) == [200, 0, 0, 255, 255, 255]
    half = Image.new("LA", (1, 1), (0, 128))
    assert decode(encoded(half)).getpixel((0, 0)) == (127, 127, 127)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert np.asarray(decode(encoded(palette))).reshape(-1).tolist() == [10, 20, 30, 40, 50, 60]
    assert decode(encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    rgb = Image.new("RGB", (1, 1), (1, 2, 3))
    assert decode(encoded(rgb, transparency=(1, 2, 3))).getpixel((0, 0)) == (255, 255, 255)


def test_16_bit_and_float_grey_are_scaled():
    deep = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    for kind in ("PNG", "TIFF"):
        assert [pixel[0] for pixel in np.asarray(decode(encoded(deep, kind))).reshape(-1, 3)] == [0, 100, 255]
    assert to_rgb(Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))).getpixel((1, 0)) == (128, 128, 128)
    assert to_rgb(Image.fromarray(np.array([[0.0, 51.0]], dtype=np.float32))).getpixel((1, 0)) == (51, 51, 51)
    bits = Image.new("1", (2, 1))
    bits.putpixel((1, 0), 1)
    assert np.asarray(decode(encoded(bits))).reshape(-1).tolist() == [0, 0, 0, 255, 255, 255]


def test_cmyk_jpeg_keeps_its_colours():
    red = Image.new("RGB", (16, 16), (230, 20, 20)).convert("CMYK")
    decoded = decode(encoded(red, "JPEG", quality=95))
    assert decoded.mode == "RGB"
    assert np.abs(np.asarray(decoded).astype(int) - (230, 20, 20)).max() <= 6


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(picture(40, 20), "JPEG", exif=exif)).size == (20, 40)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_whole_images_decode_and_truncated_ones_are_corrupt(kind):
    data = encoded(picture(64, 48), kind)
    assert decode(data).size == (64, 48)
    with pytest.raises(CorruptSample, match="a.tar:k: not a readable image"):
        decode(data[: len(data) // 2], "a.tar:k")


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"<html>not found</html>", bytes(1000)])
def test_bytes_that_are_no_image_are_refused(data):
    with pytest.raises(CorruptSample, match="not a readable image|it is empty"):
        decode(data)


def test_a_jpeg_is_decoded_no_larger_than_needed():
    data = encoded(picture(512, 512), "JPEG")
    assert decode(data, side=100).size == (128, 128)
    assert decode(data, side=200).size == (256, 256)
    transform = ImageTransform(64, scale=(0.25, 1.0))
    assert transform.decode_side >= 128  # the smallest crop of an image of that side is no smaller than 64 px
    assert decode(data, side=600).size == (512, 512)


def test_a_transform_is_replayed_from_its_integers():
    image, transform = picture(90, 70), ImageTransform(32)
    rng = np.random.default_rng(0)
    for _ in range(20):
        randoms = rng.integers(0, 2**32, RANDOMS)
        first = transform(image, randoms)
        assert first.shape == (3, 32, 32) and first.dtype == torch.uint8 and first.is_contiguous()
        assert torch.equal(first, transform(picture(90, 70), randoms.copy()))
    assert not torch.equal(first, transform(image, rng.integers(0, 2**32, RANDOMS)))


def test_each_integer_changes_the_result():
    image = picture(64, 64)
    transform = ImageTransform(64, scale=(0.25, 1.0))
    middle = 2**31
    whole = transform(image, np.array([FULL, middle, 0, 0, FULL]))
    assert (whole.float() - torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())).abs().max() <= 1
    flipped = transform(image, np.array([FULL, middle, 0, 0, 0]))
    assert torch.equal(flipped, whole.flip(2))
    corners = {
        (left, top): transform(image, np.array([0, middle, left, top, FULL])).float()[:2].mean((1, 2)).tolist()
        for left in (0, FULL)
        for top in (0, FULL)
    }
    for (left, top), (red, green) in corners.items():  # half the width and height, in a corner of two ramps
        assert abs(red - (191 if left else 63)) < 3 and abs(green - (191 if top else 63)) < 3
    wide = transform(image, np.array([0, FULL, 0, 0, FULL])).float()
    tall = transform(image, np.array([0, 0, 0, 0, FULL])).float()
    assert wide[0].max() > tall[0].max() + 10 and tall[1].max() > wide[1].max() + 10


def test_a_change_of_colour_keeps_shapes_and_the_middle_draw_changes_nothing():
    image = Image.fromarray(np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3))
    plain, recoloured = ImageTransform(8, scale=(1.0, 1.0), flip=0.0), ImageTransform(8, (1.0, 1.0), 0.0, colour=0.4)
    middle = 1 << 31
    draws = np.array([0, middle, 0, 0, 0, middle, middle, middle])
    assert torch.equal(recoloured(image, draws), plain(image, draws))
    darker = recoloured(image, np.array([0, middle, 0, 0, 0, 0, middle, middle]))
    torch.testing.assert_close(darker.float(), 0.6 * plain(image, draws).float(), rtol=0, atol=1.0)


def test_crops_cover_the_stated_areas():
    side, transform = 1000, ImageTransform(8, scale=(0.3, 0.8), flip=0.0)
    image = picture(side, side)
    rng = np.random.default_rng(1)
    areas = []
    for _ in range(150):
        crop = transform(image, rng.integers(0, 2**32, RANDOMS)).double()
        width, height = (crop[0, 4, 7] - crop[0, 4, 0]) * 8 / 7 / 255, (crop[1, 7, 4] - crop[1, 0, 4]) * 8 / 7 / 255
        areas.append(float(width * height))
    assert 0.24 < min(areas) < 0.36 and 0.74 < max(areas) < 0.86
    assert abs(np.mean(areas) - 0.55) < 0.04


@pytest.mark.parametrize("width, height", [(1, 1), (1, 300), (300, 1), (7, 3), (32, 32)])
def test_extreme_aspect_ratios_work(width, height):
    for randoms in ([0] * RANDOMS, [FULL] * RANDOMS, [FULL, 0, FULL, 0, FULL]):
        assert ImageTransform(32)(picture(width, height), np.array(randoms)).shape == (3, 32, 32)
    assert eval_transform(32)(picture(width, height)).shape == (3, 32, 32)


def test_evaluation_crops_the_centre():
    image = Image.new("RGB", (96, 32), (0, 0, 0))
    image.paste((255, 255, 255), (32, 0, 64, 32))
    assert (eval_transform(32)(image) == 255).all()
    assert torch.equal(eval_transform(16)(image)[:, 2:-2, 2:-2], torch.full((3, 12, 12), 255, dtype=torch.uint8))
    exact = picture(32, 32)
    assert np.array_equal(eval_transform(32)(exact).numpy(), np.asarray(exact).transpose(2, 0, 1))


@pytest.mark.parametrize(
    "options, said",
    [
        ({"size": 0}, "size must be"),
        ({"size": 8, "scale": (0.0, 1.0)}, "scale must be"),
        ({"size": 8, "scale": (0.9, 0.5)}, "scale must be"),
        ({"size": 8, "flip": 2.0}, "flip must be"),
        ({"size": 8, "colour": 1.0}, "colour must be"),
        ({"size": 8, "aspect": 0.5}, "aspect must be"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        ImageTransform(**options)
