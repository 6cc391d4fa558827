"""Fingerprints: what they forgive, what they tell apart, and the search among many."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from oner_fast.data.sources.near_equal import BITS, COLOURS, Fingerprint, fingerprint, near_equal


def drawn(seed: int, side: int = 96, colour: tuple[int, int, int] = (20, 20, 20)) -> Image.Image:
    """Draw a few shapes on white, as icons have."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(image)
    for x, y, w, h in random.uniform(0.05, 0.5, (4, 4)) * side:
        pen.rectangle((x, y, x + w, y + h), fill=colour if w < h else None, outline=colour, width=3)
    return image


def photo(seed: int, side: int = 96) -> Image.Image:
    """Draw smooth colours, as photos have."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return Image.open(out)


@pytest.mark.parametrize("make", [drawn, photo])
def test_another_format_and_size_are_forgiven_and_other_pictures_are_not(make: object) -> None:
    assert callable(make)
    pictures = [make(seed) for seed in range(30)]
    prints = [fingerprint(one) for one in pictures]
    for again in (
        [jpeg(one, 75) for one in pictures],
        [jpeg(one.resize((192, 192), Image.Resampling.BICUBIC), 90) for one in pictures],
    ):
        found = near_equal([fingerprint(one) for one in again], prints)
        assert len(found) >= 24 and all(mine == other for mine, other in found.items())
    assert near_equal(prints[:15], prints[15:]) == {}


def test_colours_count() -> None:
    black, red = fingerprint(drawn(1)), fingerprint(drawn(1, colour=(180, 0, 0)))
    assert black.bits == red.bits
    assert near_equal([black], [red]) == {} and near_equal([black], [red, black]) == {0: 1}


def test_the_search_equals_its_definition() -> None:
    random = np.random.default_rng(0)
    base = random.integers(0, 256, (40, 64), dtype=np.uint8)
    base[20:] = base[:20]
    prints = []
    for number, row in enumerate(base):
        bits = np.unpackbits(row)
        bits[random.choice(512, number % 25, replace=False)] ^= 1
        colours = np.full(192, 100 + number % 9 * 4, np.uint8)
        prints.append(Fingerprint(np.packbits(bits).tobytes(), colours.tobytes()))
    ours, theirs = prints[:20], prints[20:]

    def near(one: Fingerprint, other: Fingerprint) -> bool:
        apart = np.unpackbits(np.frombuffer(one.bits, np.uint8) ^ np.frombuffer(other.bits, np.uint8)).sum()
        colours = np.frombuffer(one.colours, np.uint8) / 255.0 - np.frombuffer(other.colours, np.uint8) / 255.0
        return bool(apart <= BITS and np.abs(colours).max() <= COLOURS)

    expected = {}
    for i, one in enumerate(ours):
        matches = [j for j, other in enumerate(theirs) if near(one, other)]
        if matches:
            expected[i] = matches[0]
    assert 0 < len(expected) < 20
    assert near_equal(ours, theirs) == expected
    assert near_equal([], theirs) == near_equal(ours, []) == {}
