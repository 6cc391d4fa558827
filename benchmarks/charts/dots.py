"""Candidates as points on a logarithmic scale, one line for each row: for memory and for errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from oner_fast.benchmarks.charts.colours import WIDE, Chart, shortened

STYLES = ("eager", "compiled", "peer", "ours")
"""Kinds of candidates in the order in which they are drawn, so that ours lies on top."""


@dataclass(frozen=True)
class Point:
    """One candidate's figure.

    Args:
        style: one of `STYLES`.
        value: the figure, at least 0.
        words: what a reader sees who points at it.
    """

    style: str
    value: float
    words: str


@dataclass(frozen=True)
class Line:
    """The points of one row.

    Args:
        label: what was measured; lines with the same label stand together.
        detail: what tells the line from the others with its label.
        points: the candidates' figures.
        said: words at the right edge, such as the ratio to ours.
        mark: where a short line is drawn, such as the dtype's rounding.
    """

    label: str
    detail: str
    points: Sequence[Point]
    said: str = ""
    mark: float | None = None


@dataclass(frozen=True)
class Scale:
    """A logarithmic axis.

    Args:
        least: figures below it, zeros too, are drawn there.
        tick: writes a power of ten.
        names: what each style is called in the legend.
        mark: what the lines' `mark` is called; empty without one.
    """

    least: float
    tick: Callable[[float], str]
    names: dict[str, str]
    mark: str = ""


def dots(lines: Sequence[Line], scale: Scale, title: str, width: int = WIDE) -> Chart:
    """Draw the lines; below 600 pixels the labels stand above the points."""
    chart, wide = Chart(width, title), width >= 600
    left, right = (318, width - 96) if wide else (10, width - 12)
    values = [max(point.value, scale.least) for line in lines for point in line.points]
    values += [line.mark for line in lines if line.mark]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)

    def x(value: float) -> float:
        return left + (right - left) * (math.log10(max(value, scale.least, 10.0**low)) - low) / (high - low)

    used = {point.style for line in lines for point in line.points}
    y = _legend(chart, [style for style in reversed(STYLES) if style in used], scale, wide) + 14
    places: list[tuple[Line, float]] = []
    label = ""
    for line in lines:
        first = line.label != label
        label = line.label
        y += (10 if wide else 6) if first and places else 0
        if wide:
            if first:
                chart.text(0, y + 14, shortened(line.label, 14, 205), size=14, bold=True)
            chart.text(left - 16, y + 14, shortened(line.detail, 12.5, 150), "soft", size=12.5, anchor="end")
            chart.text(width, y + 14, line.said, size=13, anchor="end")
            places.append((line, y + 10))
            y += 24
        else:
            if first:
                chart.text(0, y + 12, line.label, size=13, bold=True)
                y += 18
            chart.text(0, y + 11, line.detail, "soft", size=12.5)
            chart.text(width, y + 11, line.said, size=12.5, anchor="end")
            places.append((line, y + 24))
            y += 38
    step = 1 if (high - low) * 44 <= right - left else 2
    for power in range(low, high + 1, step):
        at = x(10.0**power)
        for start, end in [(places[0][1] - 12, y)] if wide else [(middle - 9, middle + 9) for _, middle in places]:
            chart.line(at, start, at, end, "track", width=1)
        chart.text(at, y + 15, scale.tick(10.0**power), "soft", size=12, anchor="middle")
    for line, middle in places:
        _draw(chart, line, x, middle)
    chart.height = int(y + 22)
    return chart


def _draw(chart: Chart, line: Line, x: Callable[[float], float], y: float) -> None:
    ends = [x(point.value) for point in line.points]
    if ends:
        chart.line(min(ends), y, max(ends), y, "edge", width=2)
    if line.mark:
        chart.line(x(line.mark), y - 8, x(line.mark), y + 8, "limit", width=2)
    for point in sorted(line.points, key=lambda one: STYLES.index(one.style)):
        marker(chart, point.style, x(point.value), y)
        chart.note(point.words)


def marker(chart: Chart, style: str, x: float, y: float) -> None:
    """Draw the shape of a style, which tells it apart without its colour."""
    if style == "ours":
        chart.circle(x, y, 6.5, "ours")
    elif style == "eager":
        chart.rect(x - 4.5, y - 4.5, 9, 9, "eager", round=0)
    elif style == "compiled":
        chart.polygon([(x, y - 6), (x + 6, y), (x, y + 6), (x - 6, y)], "compiled")
    else:
        chart.polygon([(x, y - 6.5), (x + 6.5, y + 5), (x - 6.5, y + 5)], "peer")


def _legend(chart: Chart, styles: Sequence[str], scale: Scale, wide: bool) -> float:
    x, y = 6.0, 14.0
    names = [(style, scale.names[style]) for style in styles] + ([("mark", scale.mark)] if scale.mark else [])
    for style, words in names:
        needed = 30 + 6.6 * len(words)
        if x + needed > chart.width + 14 and x > 6:
            x, y = 6.0, y + 19
        if style == "mark":
            chart.line(x, y - 12, x, y + 3, "limit", width=2)
        else:
            marker(chart, style, x, y - 4.5)
        chart.text(x + 13, y, words, "soft", size=12.5)
        x += needed
    return y
