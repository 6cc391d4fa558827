"""Write the examples as PNG files for use outside the page: retrieval by text, by image and word, and heat maps."""

import base64
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from oner_fast.data.images import decode
from oner_fast.report.examples import Example
from oner_fast.report.heat import HeatRow
from oner_fast.report.style import COLOURS, save_png, style

CELL = 1.2  # distance between two images, each 1 wide
LONGEST = 60  # letters of a caption beside its images


def write(content: dict[str, Any], folder: Path) -> None:
    """Write text-to-image.png, image-text-to-image.png and heat-maps.png, where the content has them."""
    with matplotlib.rc_context(style()):
        if content["to_image"].drawn:
            _rows(content["to_image"].drawn, folder / "text-to-image.png")
        if content["composed_examples"] and content["composed_examples"].drawn:
            _rows(content["composed_examples"].drawn, folder / "image-text-to-image.png")
        if content["heat"]:
            _heat(content["heat"], folder / "heat-maps.png")


def _canvas(columns: int, rows: int, left: float, height: float) -> tuple[Figure, Axes]:
    """Make a figure whose unit is an image: x from -left, y downwards, rows of the given height.

    One axes object for all images is fast.
    """
    wide, high = left + columns * CELL, rows * height
    figure = Figure(figsize=((wide + 0.3) * 0.9, (high + 0.2) * 0.9))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.set_xlim(-left - 0.2, columns * CELL + 0.1)
    axes.set_ylim(high + 0.1, -0.1)
    return figure, axes


def _rows(examples: list[Example], path: Path) -> None:
    first = 1 if examples[0].picture else 0
    figure, axes = _canvas(5 + first, len(examples), 3.0, CELL)
    for number, example in enumerate(examples):
        y = number * CELL + 0.1
        caption = _short(example.caption)
        asked = f"{caption}\n+ {_short(example.word)}" if example.word else f"“{caption}”"
        axes.text(-3.0, y + 0.5, asked, fontsize=11, fontweight="bold", va="bottom")
        place = f"right answer at place {example.rank:,} of {example.gallery:,}"
        axes.text(-3.0, y + 0.58, place, fontsize=8, color=COLOURS["muted"], va="top")
        if example.picture:
            _show(axes, 0, y, example.picture, "joint")
        for column, hit in enumerate(example.hits, start=first):
            _show(axes, column * CELL, y, hit.picture or "", "right" if hit.right else "rule", marked=hit.right)
    save_png(figure, path, dpi=160)


def _heat(rows: list[HeatRow], path: Path) -> None:
    figure, axes = _canvas(1 + max(len(row.maps) for row in rows), len(rows), 0.0, 1.42)
    for number, row in enumerate(rows):
        y = number * 1.42 + 0.3
        for column, (label, address) in enumerate([("picture", row.picture), *row.maps]):
            colour = COLOURS["muted" if column == 0 else "ink"]
            axes.text(column * CELL + 0.5, y - 0.06, _short(label), fontsize=8, color=colour, ha="center", va="bottom")
            _show(axes, column * CELL, y, address, "rule", margin=0.0)
    save_png(figure, path, dpi=160)


def _short(text: str) -> str:
    """Cut a text to what fits beside the images, in one line; characters that have no shape are shown as one box."""
    line = "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(text.split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"


def _show(
    axes: Axes, x: float, y: float, address: str, colour: str, *, marked: bool = False, margin: float = 0.09
) -> None:
    """Draw an image on a white tile of side 1 with its upper left corner at (x, y)."""
    picture = decode(base64.b64decode(address.partition(",")[2]))
    scale = (1 - 2 * margin) / max(picture.size)
    width, height = picture.width * scale, picture.height * scale
    left, top = x + (1 - width) / 2, y + (1 - height) / 2
    axes.add_patch(Rectangle((x, y), 1, 1, facecolor="white", linewidth=0, zorder=1))
    limits = axes.get_xlim(), axes.get_ylim()
    axes.imshow(picture, extent=(left, left + width, top + height, top), zorder=2, aspect="auto")
    axes.set(xlim=limits[0], ylim=limits[1])
    edge = 2.6 if marked else 0.9
    axes.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=COLOURS[colour], linewidth=edge, zorder=3))
    if marked:
        badge = {"boxstyle": "circle,pad=0.2", "facecolor": COLOURS[colour], "edgecolor": "none"}
        axes.text(
            x + 0.95,
            y + 0.95,
            "✓",
            ha="right",
            va="bottom",
            fontsize=9,
            color="white",
            family="DejaVu Sans",
            bbox=badge,
            zorder=4,
        )
