"""Curves over the steps of training: the losses, the speed, the modality gap."""

import itertools
import re
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from oner_fast.evaluation.modality_gap import Snapshot, modality_gap, spread
from oner_fast.report.style import COLOURS, chart

PART_NAMES = {
    "itc": "image–text contrast",
    "xmc": "cross-modal mixup",
    "cic": "contextual invariance",
    "cmc": "contextual mixup",
    "mlm": "masked words",
    "mim": "masked patches",
}
PART_COLOURS = {"mlm": "text", "mim": "image"}
SPEED_NAMES = {
    "samples_per_second": ("Speed, pairs a second", 1.0),
    "mfu": ("MFU, % of the machine's peak", 100.0),
    "data_wait": ("Waiting for data, % of time", 100.0),
    "grad_norm": ("Norm of the gradient", 1.0),
}

EVALUATION_NAMES = {
    "eval/mean_recall": ("Mean of R@1, R@5 and R@10 on held-out pairs, %", 100.0),
    "eval/zero_shot/top1": ("Zero-shot classification, top-1 in %", 100.0),
}

LARGEST = 1e30  # a larger value is damage or divergence, and no chart can show it


def smoothed(values: Sequence[float], reach: int) -> list[float]:
    """Average over `reach` values on either side, fewer at the ends; centred, so that the curve does not lag."""
    parts = [values[max(0, middle - reach) : middle + reach + 1] for middle in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def series(metrics: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and finite values of one metric."""
    pairs = [
        (entry["step"], float(entry[name]))
        for entry in metrics
        if isinstance(entry.get(name), int | float) and abs(entry[name]) < LARGEST
    ]
    return [step for step, _ in pairs], [value for _, value in pairs]


def loss_charts(metrics: Sequence[dict[str, Any]], folder: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Chart the total loss (one chart, or none) and its parts (one each)."""
    total, parts = [], []
    steps, values = series(metrics, "loss")
    if values:
        total.append(_curve("loss", "Total loss", steps, values, "ink", folder, size=(5.0, 3.0)))
    names = {key: None for entry in metrics for key in entry if key.startswith("loss/")}
    files: dict[str, None] = {}
    for key in names:
        steps, values = series(metrics, key)
        short = key.removeprefix("loss/")
        if values:
            title = f"{short.upper()}: {PART_NAMES[short]}" if short in PART_NAMES else _printable(short)
            colour = PART_COLOURS.get(short, "joint")
            file = _file_name(short, files)
            files[file] = None
            parts.append(_curve(file, title, steps, values, colour, folder))
    return total, parts


def _file_name(part: str, taken: Container[str]) -> str:
    """Name the chart of a part of the loss by letters that are safe in a file's name and in an id of the page."""
    plain = re.sub(r"[^A-Za-z0-9_]+", "-", part)[:40]
    names = (f"loss-{plain}" if number == 1 else f"loss-{plain}-{number}" for number in itertools.count(1))
    return next(name for name in names if name not in taken)


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text[:40])


def speed_charts(metrics: Sequence[dict[str, Any]], folder: Path) -> list[dict[str, str]]:
    """Chart pairs a second, MFU, the share of time spent waiting for data and the gradient norm, where logged."""
    return _charts(SPEED_NAMES, "speed", metrics, folder)


def evaluation_charts(metrics: Sequence[dict[str, Any]], folder: Path) -> list[dict[str, str]]:
    """Chart what `--eval-every` measured, where logged."""
    return _charts(EVALUATION_NAMES, "evaluation", metrics, folder)


def _charts(
    names: dict[str, tuple[str, float]], kind: str, metrics: Sequence[dict[str, Any]], folder: Path
) -> list[dict[str, str]]:
    charts = []
    for key, (title, factor) in names.items():
        steps, values = series(metrics, key)
        if values:
            scaled = [factor * value for value in values]
            name = f"{kind}-{re.sub('[^a-z0-9]', '-', key.removeprefix('eval/'))}"
            charts.append(_curve(name, title, steps, scaled, "ink", folder, from_zero=True))
    return charts


def gap_chart(snapshots: Sequence[Snapshot], folder: Path) -> dict[str, str]:
    """Chart the modality gap over training, with the spread of the images and of the texts."""
    steps = [snapshot.step for snapshot in snapshots]
    lines = {
        "gap": ("joint", [modality_gap(one.image, one.text) for one in snapshots], 2.4),
        "spread, images": ("image", [spread(one.image) for one in snapshots], 1.4),
        "spread, captions": ("text", [spread(one.text) for one in snapshots], 1.4),
    }

    def draw(axes: Axes) -> None:
        ends = []
        for label, (colour, values, width) in lines.items():
            axes.plot(
                steps, values, color=COLOURS[colour], linewidth=width, marker="o", markersize=width + 1.4, clip_on=False
            )
            ends.append((values[-1], label, colour))
        top = max(max(values) for _, values, _ in lines.values())
        axes.set_ylim(0, top * 1.12 or 1)
        _label_ends(axes, steps[-1], ends, top * 1.12 or 1)
        _dress(axes, "Distance between the centroids, and spread", steps)

    return chart("modality-gap", draw, folder, size=(5.0, 3.0), right=1.15)


SPACE_COLOURS = {"backbone": "muted", "projection": "joint", "predictor": "text", "teacher": "image"}


def space_gap_chart(metrics: Sequence[dict[str, Any]], folder: Path) -> list[dict[str, str]]:
    """Chart the logged modality gap in each space, of the same held-out pairs; nothing for fewer than two spaces."""
    found = {space: series(metrics, f"gap/{space}") for space in SPACE_COLOURS}
    lines = {space: curve for space, curve in found.items() if curve[0]}
    if len(lines) < 2:
        return []
    steps = max((curve[0] for curve in lines.values()), key=len)
    top = max(max(values) for _, values in lines.values()) * 1.12 or 1

    def draw(axes: Axes) -> None:
        for space, (places, values) in lines.items():
            axes.plot(places, values, color=COLOURS[SPACE_COLOURS[space]], linewidth=1.8, clip_on=False)
        axes.set_ylim(0, top)
        ends = [(values[-1], space, SPACE_COLOURS[space]) for space, (_, values) in lines.items()]
        _label_ends(axes, steps[-1], ends, top)
        _dress(axes, "The gap in each space", steps)

    return [chart("gap-by-space", draw, folder, size=(5.0, 3.0), right=1.15)]


def _label_ends(axes: Axes, x: float, ends: list[tuple[float, str, str]], height: float) -> None:
    """Write each line's name at its end, moved apart where two would overlap."""
    floor = 0.0
    for value, label, colour in sorted(ends):
        y = max(value, floor)
        floor = y + height * 0.075
        axes.annotate(
            label, (x, y), xytext=(8, 0), textcoords="offset points", va="center", color=COLOURS[colour], fontsize=9
        )


def _curve(
    name: str,
    title: str,
    steps: list[int],
    values: list[float],
    colour: str,
    folder: Path,
    *,
    size: tuple[float, float] = (2.72, 2.0),
    from_zero: bool = False,
) -> dict[str, str]:
    smooth = smoothed(values, len(values) // 50)

    def draw(axes: Axes) -> None:
        axes.plot(steps, values, color=COLOURS[colour], alpha=0.22, linewidth=0.8)
        axes.plot(steps, smooth, color=COLOURS[colour], linewidth=2)
        axes.plot(steps[-1:], smooth[-1:], "o", color=COLOURS[colour], markersize=4, clip_on=False)
        axes.annotate(
            _short(smooth[-1]),
            (steps[-1], smooth[-1]),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=COLOURS[colour],
            fontweight="bold",
            annotation_clip=False,
        )
        # A few spikes must not flatten the curve.
        ordered = sorted(values)
        low, high = ordered[len(ordered) // 200], ordered[-1 - len(ordered) // 200]
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
        axes.set_ylim(0 if from_zero else low - margin, high + margin)
        _dress(axes, title, steps)

    return chart(name, draw, folder, size=size)


def _dress(axes: Axes, title: str, steps: Sequence[int]) -> None:
    axes.annotate(title, (0.002, 0.995), xycoords="figure fraction", va="top", fontsize=9.5, fontweight="bold")
    axes.set_xlim(min(steps[0], 0), max(steps[-1], 1))
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("step", loc="right", labelpad=1)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
