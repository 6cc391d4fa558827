"""Style of the charts, which become SVG in the page's colours and PNG files beside it."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from oner_fast.atomic import write_atomic

# CSS variables and their colours on a light page, in which the charts are drawn.
COLOURS = {
    "ink": "#1f2023",
    "muted": "#74716b",
    "rule": "#dedad1",
    "paper": "#fbfaf6",
    "image": "#17708f",
    "text": "#d0583a",
    "joint": "#6a4fa8",
    "right": "#2c7f53",
}
_FAMILIES = ("Inter", "Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans")


def style() -> Any:
    """matplotlib settings of every chart, a dict for `matplotlib.rc_context`."""
    present = {font.name for font in font_manager.fontManager.ttflist}
    return {
        "font.family": [name for name in _FAMILIES if name in present] or ["sans-serif"],
        "font.size": 9.5,
        "text.color": COLOURS["ink"],
        "axes.edgecolor": COLOURS["rule"],
        "axes.labelcolor": COLOURS["muted"],
        "axes.labelsize": 9,
        "axes.linewidth": 1.0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": COLOURS["rule"],
        "grid.linewidth": 0.7,
        "xtick.color": COLOURS["rule"],
        "ytick.color": COLOURS["rule"],
        "xtick.labelcolor": COLOURS["muted"],
        "ytick.labelcolor": COLOURS["muted"],
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "ytick.major.size": 0,
        "xtick.major.size": 3,
        "lines.solid_capstyle": "round",
        "lines.solid_joinstyle": "round",
        "figure.facecolor": COLOURS["paper"],
        "axes.facecolor": "none",
        "svg.fonttype": "none",
        "text.parse_math": False,  # a caption may hold dollar signs
        "axes.unicode_minus": True,
        "path.simplify": True,
        "path.simplify_threshold": 0.4,
    }


def chart(
    name: str,
    draw: Callable[[Axes], None],
    folder: Path,
    *,
    size: tuple[float, float],
    left: float = 0.4,
    right: float = 0.45,
    top: float = 0.34,
    bottom: float = 0.4,
) -> dict[str, str]:
    """Draw one chart: write FOLDER/NAME.png and return {"name", "svg"}, with the SVG for the page.

    Args:
        name: name of the chart.
        draw: fills the axes. Colours of `COLOURS` become the page's own, light or dark.
        folder: folder of the PNG file.
        size: width and height in inches; the page shows 96 px to the inch.
        left, right, top, bottom: margins in inches, the same for charts side by side so that they line up.
    """
    with matplotlib.rc_context(style() | {"svg.hashsalt": name}):
        figure = Figure(figsize=size)
        width, height = size
        inside = ((width - left - right) / width, (height - top - bottom) / height)
        draw(figure.add_axes((left / width, bottom / height, *inside)))
        save_png(figure, folder / f"{name}.png", dpi=200)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return {"name": name, "svg": page_svg(text.getvalue(), name)}


def save_png(figure: Figure, path: Path, **options: Any) -> None:
    """Save a figure atomically, with the options of matplotlib's `savefig`."""
    write_atomic(path, lambda file: figure.savefig(file, format="png", **options))


def page_svg(svg: str, name: str) -> str:
    """Turn an SVG file into an element of a page.

    The header and external addresses are removed, ids become unique, and colours become the page's.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg class="chart" viewBox="\1" role="img">', svg, count=1)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    svg = re.sub(r'\sid="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 var(--sans)", svg)
    for variable, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return re.sub(r">\s+<", "><", svg).strip()
