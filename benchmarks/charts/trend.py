"""A ratio over commits: a line with its spread, and marks where the machine changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from oner_fast.benchmarks.charts.colours import WIDE, Chart, times

HEIGHT = 118


@dataclass(frozen=True)
class Value:
    """The ratio at one commit.

    Args:
        middle, low, high: the median over rounds, and p20 and p80.
        words: what a reader sees who points at it.
        target: the anchor of its row in a table.
    """

    middle: float
    low: float
    high: float
    words: str
    target: str


def trend(values: Sequence[Value | None], changes: Sequence[int], title: str, width: int = WIDE) -> Chart:
    """Draw the values from left to right.

    Args:
        values: one for each commit, the oldest first; None leaves a gap.
        changes: places in `values` from which on another machine measured.
        title: for readers who do not see the picture.
        width: in pixels.
    """
    chart = Chart(width, title)
    left, right, top, bottom = 46.0, width - 10.0, 14.0, HEIGHT + 14.0
    known = [value for value in values if value is not None]
    low, high = _range(known)

    def x(place: float) -> float:
        return (left + right) / 2 if len(values) == 1 else left + (right - left) * place / (len(values) - 1)

    def y(ratio: float) -> float:
        return bottom - (bottom - top) * (ratio - low) / (high - low)

    for tick in (low, (low + high) / 2, high):
        chart.line(left - 4, y(tick), right, y(tick), "track", width=1)
        chart.text(left - 8, y(tick) + 4, times(tick), "soft", size=11.5, anchor="end")
    if low < 1 < high:
        chart.line(left - 4, y(1), right, y(1), "ink", width=1)
    for place in changes:
        at = x(place - 0.5)
        chart.line(at, top - 6, at, bottom, "limit", width=1.5)
        chart.note("another machine from here on")
    placed = [(place, value) for place, value in enumerate(values) if value is not None]
    for _, group in groupby(enumerate(placed), key=lambda one: one[1][0] - one[0]):
        _run(chart, [one for _, one in group], x, y)
    for place, value in placed:
        chart.circle(
            x(place), y(value.middle), 3.5 if len(values) <= 60 else 2.2, "ours" if value.middle >= 1 else "slower"
        )
        chart.note(value.words)
        chart.link(f"#{value.target}")
    chart.height = int(bottom + 8)
    return chart


def _run(
    chart: Chart, run: Sequence[tuple[int, Value]], x: Callable[[float], float], y: Callable[[float], float]
) -> None:
    """Draw the spread and the line of neighbours without a gap."""
    if len(run) == 1:
        ((place, value),) = run
        chart.line(x(place), y(value.low), x(place), y(value.high), "band", width=5)
        return
    upper = [(x(place), y(value.high)) for place, value in run]
    lower = [(x(place), y(value.low)) for place, value in reversed(run)]
    chart.polygon([*upper, *lower], "band")
    chart.polyline([(x(place), y(value.middle)) for place, value in run], "ours")


def _range(known: Sequence[Value]) -> tuple[float, float]:
    low, high = min(value.low for value in known), max(value.high for value in known)
    # 1x is shown where it is near.
    low, high = (min(low, 1.0) if low < 1.5 else low), (max(high, 1.0) if high > 0.67 else high)
    # Noise of some percent should not fill the height.
    room = max(0.06 * (high - low), (0.24 * high - (high - low)) / 2)
    return max(low - room, 0.0), high + room
