"""Plots of the report: ratios, shares of the limit, memory. They need matplotlib, which the extra `bench` installs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oner_fast.benchmarks.cases import OURS
from oner_fast.benchmarks.rows import Row

OURS_COLOUR, OTHER_COLOUR, LINE_COLOUR = "#3b5bdb", "#adb5bd", "#e03131"


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw speedup.png, share.png and memory.png in `folder`, where the rows have such figures.

    Raises ModuleNotFoundError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    drawn = []
    compared = [row for row in rows if row.speedup]
    if compared:
        drawn.append(_speedups(compared, folder / "speedup.png"))
    bounded = [row for row in rows if row.share is not None]
    if bounded:
        drawn.append(_shares(bounded, folder / "share.png"))
    weighed = [row for row in rows if len(row.memory) > 1]
    if weighed:
        drawn.append(_memory(weighed, folder / "memory.png"))
    return drawn


def _label(row: Row) -> str:
    return f"{row.op}\n{row.shape}\n{row.dtype}"


def _bars(rows: Sequence[Row], title: str, axis: str) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.75 * len(rows)), layout="constrained")
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_title(title, loc="left")
    axes.set_xlabel(axis)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _speedups(rows: Sequence[Row], path: Path) -> Path:
    figure, axes = _bars(rows, "Times faster than the fastest baseline", "ratio (p20 to p80), target in red")
    for place, row in enumerate(rows):
        assert row.speedup is not None
        middle = row.speedup.p50
        spread = [[max(middle - row.speedup.p20, 0.0)], [max(row.speedup.p80 - middle, 0.0)]]
        axes.barh(place, middle, color=OURS_COLOUR, xerr=spread, ecolor="#495057", capsize=2)
        if target := row.target.get("speedup"):
            axes.plot([target] * 2, [place - 0.4, place + 0.4], color=LINE_COLOUR)
    axes.axvline(1.0, color="#495057", linewidth=0.8, linestyle=":")
    return _save(figure, path)


def _shares(rows: Sequence[Row], path: Path) -> Path:
    figure, axes = _bars(rows, "Share of the machine's own limit in the same run", "%")
    for place, row in enumerate(rows):
        axes.barh(place, 100 * (row.share or 0.0), color=OURS_COLOUR)
        best = row.times[row.best].p50 / row.times[OURS].p50 if row.best else None
        if best:
            axes.plot(100 * (row.share or 0.0) / best, place, "|", color="black", markersize=14)
    axes.set_xlabel("%; the fastest baseline as a black line")
    return _save(figure, path)


def _memory(rows: Sequence[Row], path: Path) -> Path:
    figure, axes = _bars(rows, "Peak memory of a call", "MiB above inputs, without returned gradients")
    for place, row in enumerate(rows):
        height = 0.8 / len(row.memory)
        for number, (name, one) in enumerate(row.memory.items()):
            middle = place - 0.4 + height * (number + 0.5)
            colour = OURS_COLOUR if name == OURS else OTHER_COLOUR
            axes.barh(middle, one["peak"] / 2**20, height=0.9 * height, color=colour)
            axes.text(one["peak"] / 2**20, middle, f" {name}", va="center", fontsize=7)
    return _save(figure, path)
