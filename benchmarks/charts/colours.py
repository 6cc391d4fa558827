"""Colours of the charts by name, for light and dark themes, and how a number is written beside a bar."""

from __future__ import annotations

from collections.abc import Mapping

from oner_fast.benchmarks import drawing

WIDE, NARROW = 940, 340
"""Widths of a chart in pixels: on a desktop and on a phone."""

_LIGHT = {
    "ours": "#2563d9",
    "slower": "#c96a04",
    "limit": "#be185d",
    "eager": "#9aa3b2",
    "compiled": "#5b6576",
    "peer": "#d9480f",
    "track": "#e6eaf1",
    "white": "#ffffff",
    "band": "#c7d7f6",
    "kind0": "#2563d9",
    "kind1": "#e08a1e",
    "kind2": "#7c4dcc",
    "kind3": "#12966f",
    "kind4": "#d6336c",
    "kind5": "#0c8599",
    "kind6": "#8d6e2f",
    "kind7": "#5c7cfa",
    "rest": "#b4bbc7",
}
_DARK = {
    "ours": "#7aa2f7",
    "slower": "#f0a94a",
    "limit": "#f783ac",
    "eager": "#8b94a5",
    "compiled": "#c3cad6",
    "peer": "#ff8f5e",
    "track": "#2b313b",
    "white": "#ffffff",
    "band": "#2c3c61",
    "kind0": "#6d97f2",
    "kind1": "#f0a94a",
    "kind2": "#b795f0",
    "kind3": "#4fd0a5",
    "kind4": "#f583ab",
    "kind5": "#4cc3d6",
    "kind6": "#cbaa63",
    "kind7": "#a5b8ff",
    "rest": "#5d6675",
}
LIGHT: Mapping[str, str] = {**drawing.LIGHT, **_LIGHT}
DARK: Mapping[str, str] = {**drawing.DARK, **_DARK}
KINDS = 8


MARGIN = 18
"""Pixels around a chart that stands alone as a file."""


class Chart(drawing.Drawing):
    """A drawing in the colours of the charts."""

    def __init__(self, width: int, title: str) -> None:
        super().__init__(width, 0, title, LIGHT, DARK)

    def file(self, margin: int = MARGIN) -> str:
        """Return the chart as the text of an SVG file."""
        return super().file(margin)


def times(ratio: float) -> str:
    """Write a ratio with three digits: 0.85x, 12.3x, 410x."""
    return f"{ratio:.2f}x" if ratio < 9.995 else f"{ratio:.1f}x" if ratio < 99.95 else f"{ratio:.0f}x"


def text_width(words: str, size: float) -> float:
    """Estimate the width of a line of text in pixels; system fonts differ by some percent."""
    narrow = sum(letter in "ijl.,:;|' ()[]ft" for letter in words)
    return size * (0.57 * (len(words) - narrow) + 0.31 * narrow)


def shortened(words: str, size: float, width: float) -> str:
    """Cut a line of text where it would be wider than `width`."""
    if text_width(words, size) <= width:
        return words
    while words and text_width(words + "…", size) > width:
        words = words[:-1]
    return words.rstrip(" ,") + "…"
