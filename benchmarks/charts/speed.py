"""Speed of each row against the fastest of PyTorch, with the machine's own limit drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby

from oner_fast.benchmarks.charts.colours import WIDE, Chart, times
from oner_fast.benchmarks.rows import Row

MOST_TICKS = 12
TITLE = "Times as fast as the fastest of PyTorch"


def compared(rows: Sequence[Row]) -> list[Row]:
    """List the rows that have a ratio to a baseline."""
    return [row for row in rows if row.speedup is not None]


def dtype_name(row: Row) -> str:
    """Name of the row's dtype; a training step calls it as its trainer does."""
    return {"fp32": "float32", "bf16": "bfloat16"}.get(row.dtype, row.dtype)


def op_name(row: Row) -> str:
    """Name of the row's op for readers."""
    return "training step" if row.op == "step" else row.op


def limit_ratio(row: Row) -> float | None:
    """Return the ratio that ours would have at the machine's limit; None without a limit."""
    return row.speedup.p50 / row.share if row.speedup and row.share else None


def speed(rows: Sequence[Row], width: int = WIDE, heading: str = "", subtitle: str = "") -> Chart:
    """Draw a bar for each row that has a ratio.

    Bars end at ours; the whisker is p20 to p80 of the ratio, the track ends at the machine's limit.

    Args:
        rows: the rows of a report; those without a baseline are left out.
        width: in pixels; below 600 the labels stand above the bars.
        heading, subtitle: lines above the chart, for a picture that stands alone.
    """
    rows = compared(rows)
    wide = width >= 600
    chart = Chart(width, _words(rows))
    left, right = (216, width - 150) if wide else (0, width - 2)
    most = _scale_end(rows)

    def x(ratio: float) -> float:
        return left + (right - left) * min(ratio, most) / most

    y = 0.0
    if heading:
        chart.text(0, 16, heading, size=17, bold=True)
        y = 26
    if subtitle:
        chart.text(0, y + 12, subtitle, "soft", size=12.5)
        y += 24
    y = _legend(chart, y + 12, wide) + 20
    top = last = y
    for name, group in groupby(rows, op_name):
        for number, row in enumerate(group):
            if wide:
                if number == 0:
                    chart.text(0, y + 14, name, size=14, bold=True)
                chart.text(left - 12, y + 14, dtype_name(row), "soft", size=12.5, anchor="end")
            else:
                chart.text(left, y + 11, f"{name}, {dtype_name(row)}", size=13, bold=True)
                _value(chart, row, right, y + 11, wide)
                y += 17
            _bar(chart, row, x, y)
            if not wide:
                chart.line(x(1), y, x(1), y + 20, "ink", width=1.25)
            if wide:
                _value(chart, row, right + 14, y + 14, wide)
            last = y + 20
            y += 26 if wide else 32
        y += 8 if wide else 2
    if wide:
        chart.line(x(1), top - 6, x(1), last + 4, "ink", width=1.25)
    step = 10 ** max(0, math.ceil(math.log10(most / MOST_TICKS)))
    for tick in range(0, int(most) + 1, step):
        at = x(tick)
        anchor = "start" if at < 8 else "end" if at > width - 8 else "middle"
        chart.line(at, last + 4, at, last + 9, "soft", width=1)
        chart.text(at, last + 22, f"{tick}x", "soft", size=12, anchor=anchor)
    chart.height = int(last + 28)
    return chart


def _words(rows: Sequence[Row]) -> str:
    each = (
        f"{op_name(row)} {dtype_name(row)} {times(row.speedup.p50)}"
        + (f" at {row.share:.0%} of the limit" if row.share is not None else "")
        for row in rows
        if row.speedup
    )
    return f"{TITLE}: {'; '.join(each)}"


def _scale_end(rows: Sequence[Row]) -> float:
    ratios = [row.speedup.p50 for row in rows if row.speedup]
    limits = [limit for row in rows if (limit := limit_ratio(row))]
    # A limit far above every ratio would leave no room for the bars.
    return max([1.25, *(1.06 * ratio for ratio in ratios), min(max(limits, default=0), 2.2 * max(ratios, default=1))])


def _legend(chart: Chart, y: float, wide: bool) -> float:
    """Draw the keys of the colours; return the y of their lower edge."""
    keys = [
        ("ours", "ours is faster"),
        ("slower", "ours is slower"),
        ("line", "1x: the fastest of PyTorch"),
        ("limit", "the machine's limit"),
    ]
    at = 0.0
    for number, (kind, words) in enumerate(keys):
        if not wide and number == 2:
            at, y = 0.0, y + 18
        if kind == "line":
            chart.line(at + 5, y - 10, at + 5, y + 2, "ink", width=1.25)
        elif kind == "limit":
            chart.rect(at, y - 9, 10, 10, "track")
            chart.line(at + 10, y - 11, at + 10, y + 3, "limit", width=2)
        else:
            chart.rect(at, y - 9, 11, 10, kind)
        chart.text(at + 17, y, words, "soft", size=12.5)
        at += (130, 130, 210, 0)[number] if wide else (128, 0, 190, 0)[number]
    return y


def _bar(chart: Chart, row: Row, x: Callable[[float], float], y: float) -> None:
    assert row.speedup is not None
    ratio, limit = row.speedup.p50, limit_ratio(row)
    if limit is not None:
        chart.rect(x(0), y + 3, x(limit) - x(0), 14, "track", round=2)
    chart.rect(x(0), y + 3, max(x(ratio) - x(0), 1), 14, "ours" if ratio >= 1 else "slower", round=2)
    chart.note(_says(row))
    low, high = x(row.speedup.p20), x(row.speedup.p80)
    if high > low:
        chart.line(low, y + 10, high, y + 10, "ink", width=1.25)
        for end in (low, high):
            chart.line(end, y + 7, end, y + 13, "ink", width=1.25)
    if limit is not None and x(limit) < x(2 * limit):
        chart.line(x(limit), y, x(limit), y + 20, "limit", width=2)
    elif limit is not None:  # beyond the scale
        chart.polygon([(x(limit) - 6, y + 4), (x(limit), y + 10), (x(limit) - 6, y + 16)], "limit")


def _says(row: Row) -> str:
    assert row.speedup is not None
    said = f"{op_name(row)}, {row.shape}, {dtype_name(row)}: {times(row.speedup.p50)} {row.best}"
    return said + (f", {row.share:.0%} of the limit" if row.share is not None else "")


def _value(chart: Chart, row: Row, x: float, y: float, wide: bool) -> None:
    assert row.speedup is not None
    share = "" if row.share is None else f"{row.share:.0%} of limit"
    if wide:
        chart.text(x, y, times(row.speedup.p50), size=13.5, bold=True)
        chart.text(x + 54, y, share, "soft", size=12)
    else:
        chart.text(x, y, f"{times(row.speedup.p50)}  {share}", "soft", size=12.5, anchor="end")
