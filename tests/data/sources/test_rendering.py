import io
from pathlib import Path

import pytest

pytest.importorskip("resvg_py", reason="needs the demo extra")
Image = pytest.importorskip("PIL.Image", reason="needs the train extra")

from oner_fast.data.sources.rendering import Picture, render  # noqa: E402

SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}">{body}</svg>'


def pixels(picture: Picture) -> "Image.Image":
    return Image.open(io.BytesIO(picture.png)).convert("RGB")


def test_uncoloured_shapes_are_black_on_white_and_stored_grey() -> None:
    picture = render(SVG.format(w=8, h=8, body='<path d="M2 2h4v4H2z"/>'), 32)
    image = pixels(picture)
    assert image.size == (32, 32)
    assert image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((16, 16)) == (0, 0, 0)
    assert Image.open(io.BytesIO(picture.png)).mode == "L"


def test_colour_is_kept() -> None:
    picture = render(SVG.format(w=8, h=8, body='<path fill="#f00" d="M2 2h4v4H2z"/>'), 32)
    assert pixels(picture).getpixel((16, 16)) == (255, 0, 0)
    assert Image.open(io.BytesIO(picture.png)).mode == "RGB"


def test_oblong_drawings_are_centred() -> None:
    image = pixels(render(SVG.format(w=16, h=8, body='<path d="M0 0h16v8H0z"/>'), 32))
    assert [image.getpixel((16, y)) for y in (0, 7, 8, 23, 24)] == [(255,) * 3] * 2 + [(0,) * 3] * 2 + [(255,) * 3]


def test_blank_equal_and_broken_drawings(tmp_path: Path) -> None:
    assert render(SVG.format(w=8, h=8, body=""), 16).blank
    assert render(SVG.format(w=8, h=8, body='<path d="M0 0h8v8H0z"/>'), 16).blank
    one = SVG.format(w=8, h=8, body='<path d="M2 2h4v4H2z"/>')
    other = SVG.format(w=16, h=16, body='<path d="M4 4h8v8H4z"/>')
    assert render(one, 16).digest == render(other, 16).digest != render(one, 32).digest
    (tmp_path / "one.svg").write_text(one)
    assert render(tmp_path / "one.svg", 16) == render(one, 16)
    assert render("<svg", 16).error and not render("<svg", 16).png
    assert "absent.svg" in render(tmp_path / "absent.svg", 16).error
