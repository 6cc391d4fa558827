"""A small SVG canvas whose colours follow the reader's light or dark theme."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

FONTS = "system-ui, Helvetica, Arial, sans-serif"

LIGHT = {
    "ground": "#fbfbfd",
    "edge": "#d7dae1",
    "ink": "#1c1f26",
    "soft": "#5d6472",
    "image": "#3d6fd6",
    "word": "#d97d0b",
    "cls": "#12966f",
    "faint": "#dfe3ea",
    "key": "#8a4fc9",
}
DARK = {
    "ground": "#1a1d23",
    "edge": "#3a404b",
    "ink": "#e8eaee",
    "soft": "#a3abb9",
    "image": "#7aa2f7",
    "word": "#f0a94a",
    "cls": "#4fd0a5",
    "faint": "#333943",
    "key": "#c49bf2",
}


def rules(light: Mapping[str, str], dark: Mapping[str, str]) -> str:
    """Return the CSS rules of both themes: `.name` fills and `.s-name` strokes in the colour of that name."""
    return f"{_rules(light)}@media(prefers-color-scheme:dark){{{_rules(dark)}}}"


def _rules(colours: Mapping[str, str]) -> str:
    fills = "".join(f".{name}{{fill:{value}}}" for name, value in colours.items())
    strokes = "".join(f".s-{name}{{stroke:{value}}}" for name, value in colours.items())
    return fills + strokes


class Drawing:
    """Shapes and text in the order they are added, on a card that has a background of its own.

    The card keeps the drawing readable where a page's theme differs from the reader's system theme. Colours are names
    of `LIGHT`: ground, edge, ink, soft, image, word, cls, faint, key.

    Args:
        width, height: in pixels; `height` may be set again before the drawing is written.
        title: what the picture shows, for readers who do not see it.
        light, dark: the colours by name, where they are not `LIGHT` and `DARK`.
    """

    def __init__(
        self, width: int, height: int, title: str, light: Mapping[str, str] = LIGHT, dark: Mapping[str, str] = DARK
    ) -> None:
        self.width, self.height, self.title = width, height, title
        self.light, self.dark = light, dark
        self._parts: list[str] = []

    def note(self, words: str) -> None:
        """Show `words` to a reader who points at the shape that was added last."""
        shape = self._parts.pop()
        self._parts.append(f"<g><title>{escape(words)}</title>{shape}</g>")

    def rect(self, x: float, y: float, w: float, h: float, fill: str, *, edge: str = "", round: float = 2) -> None:
        """Add a rectangle; `edge` names the colour of its outline, if it has one."""
        stroke = f' class="{fill} s-{edge}"' if edge else f' class="{fill}"'
        self._parts.append(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{round:g}"{stroke}/>')

    def squares(self, corners: list[tuple[float, float]], side: float, fill: str) -> None:
        """Add many squares of one size and colour, by their upper left corners."""
        path = "".join(f"M{x:g} {y:g}h{side:g}v{side:g}h-{side:g}z" for x, y in corners)
        self._parts.append(f'<path d="{path}" class="{fill}"/>')

    def frame(self, x: float, y: float, w: float, h: float, edge: str = "ink", *, dashed: bool = False) -> None:
        """Add an outline without a fill."""
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="3" fill="none" class="s-{edge}"'
            f' stroke-width="1.5"{dash}/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        colour: str = "ink",
        *,
        size: float = 15,
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        """Add one line of text; `anchor` is start, middle or end."""
        place = f'x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}"'
        place += ' font-weight="600"' if bold else ""
        self._parts.append(f'<text {place} class="{colour}">{escape(words)}</text>')

    def line(self, x1: float, y1: float, x2: float, y2: float, edge: str = "soft", *, width: float = 1.5) -> None:
        """Add a straight line."""
        self._parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="s-{edge}" stroke-width="{width:g}"/>'
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float, edge: str = "soft", *, both: bool = False) -> None:
        """Add an arrow that is horizontal or vertical; `both` gives it two heads."""
        self.line(x1, y1, x2, y2, edge)
        ends = [(x1, y1, x2, y2), (x2, y2, x1, y1)] if both else [(x1, y1, x2, y2)]
        for fx, fy, x, y in ends:
            dx, dy = _sign(x - fx), _sign(y - fy)
            left = (x - 6 * dx + 3.5 * dy, y - 6 * dy + 3.5 * dx)
            right = (x - 6 * dx - 3.5 * dy, y - 6 * dy - 3.5 * dx)
            points = " ".join(f"{px:g},{py:g}" for px, py in ((x, y), left, right))
            self._parts.append(f'<polygon points="{points}" class="{edge}"/>')

    def polygon(self, points: Iterable[tuple[float, float]], fill: str) -> None:
        """Add a filled polygon."""
        self._parts.append(f'<polygon points="{_points(points)}" class="{fill}"/>')

    def polyline(self, points: Iterable[tuple[float, float]], edge: str, *, width: float = 2) -> None:
        """Add a line through points."""
        self._parts.append(
            f'<polyline points="{_points(points)}" fill="none" class="s-{edge}" stroke-width="{width:g}"'
            ' stroke-linejoin="round"/>'
        )

    def circle(self, x: float, y: float, radius: float, fill: str) -> None:
        """Add a disc."""
        self._parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" class="{fill}"/>')

    def link(self, target: str) -> None:
        """Make a link of the shape that was added last; the Tab key passes it over."""
        shape = self._parts.pop()
        self._parts.append(f'<a href="{escape(target)}" tabindex="-1">{shape}</a>')

    def inline(self) -> str:
        """Return the drawing as an element of a page, whose style has the rules of the colours."""
        return "\n".join(
            [
                f'<svg viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}" role="img"'
                f' aria-label="{escape(self.title)}">',
                *self._parts,
                "</svg>",
            ]
        )

    def save(self, path: Path) -> None:
        """Write the drawing as an SVG file."""
        path.write_text(self.file(), encoding="utf-8")

    def file(self, margin: int = 0) -> str:
        """Return the drawing as the text of an SVG file, with the rules of its colours and a margin inside its edge."""
        style = rules(self.light, self.dark)
        width, height = self.width + 2 * margin, self.height + 2 * margin
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{-margin} {-margin} {width} {height}" width="{width}"'
            f' height="{height}" role="img" font-family="{FONTS}">',
            f"<title>{escape(self.title)}</title>",
            f"<style>{style}</style>",
            f'<rect x="{0.5 - margin:g}" y="{0.5 - margin:g}" width="{width - 1}" height="{height - 1}" rx="8"'
            ' class="ground s-edge"/>',
            *self._parts,
            "</svg>",
        ]
        return "\n".join(lines) + "\n"


def _points(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
