"""The charts of a study: R@10 of each row in each space, the gap over training, and a map of each row."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from oner_fast.ablation.results import SHOWN, Curve, RowResult
from oner_fast.evaluation.modality_gap import fit_basis, load_snapshots
from oner_fast.report.gap_map import MARGINS, limits_of, panel
from oner_fast.report.style import COLOURS, chart

SPACE_COLOURS = {"backbone": "muted", "projection": "joint", "predictor": "text", "teacher": "image"}
_LABELS = 1.72  # inches left of the dots, for the rows' titles


def recall_chart(
    name: str, results: Sequence[RowResult], folder: Path, colours: Mapping[str, str] = SPACE_COLOURS
) -> dict[str, str]:
    """Draw a line for each row: the R@10 of each seed as a small dot and their mean as a large one, in each space.

    `colours` names the spaces, or whatever the figures are divided by, and their colours.
    """
    rows = list(results)

    def draw(axes: Axes) -> None:
        for place, each in enumerate(rows):
            for number, (space, colour) in enumerate(colours.items()):
                values = [100 * value for value in each.by_seed(space, "recall@10").values()]
                if not values:
                    continue
                y = place + 0.17 * (number - (len(colours) - 1) / 2)
                axes.plot(values, [y] * len(values), "o", color=COLOURS[colour], markersize=2.6, alpha=0.55)
                axes.plot([sum(values) / len(values)], [y], "o", color=COLOURS[colour], markersize=6.4)
        chance = next((each.chance for each in rows if each.chance is not None), None)
        if chance is not None:
            axes.axvline(100 * chance, color=COLOURS["muted"], linewidth=1, linestyle=(0, (2, 2)))
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), [_wrapped(each.row.title) for each in rows], color=COLOURS["ink"])
        axes.tick_params(axis="y", length=0, labelsize=8.5, labelcolor=COLOURS["ink"])
        axes.set_xlim(left=0)
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        axes.set_xlabel("R@10, per cent; the dotted line is chance", loc="right", labelpad=2)
        handles = [
            Line2D([], [], linestyle="none", marker="o", color=COLOURS[colour], markersize=6)
            for colour in colours.values()
        ]
        axes.legend(
            handles,
            list(colours),
            loc="lower left",
            bbox_to_anchor=(-0.03, 1.0),
            ncols=4,
            frameon=False,
            fontsize=8.5,
            handletextpad=0.1,
            columnspacing=1.1,
            labelcolor=COLOURS["ink"],
        )

    height = 0.46 * len(rows) + 0.86
    return chart(name, draw, folder, size=(5.6, height), left=_LABELS, right=0.2, top=0.36, bottom=0.46)


def gap_charts(results: Sequence[RowResult], folder: Path) -> list[dict[str, str]]:
    """Chart the gap over training of each row in each space, all on one scale; bands show the range of the seeds."""
    shown = [each for each in results if each.gaps]
    every = [value for each in shown for curve in each.gaps.values() for one in curve.seeds.values() for value in one]
    highest = max(every, default=1.0)
    return [_gap_chart(each.row.title, each.gaps, 1.1 * highest, folder, f"gap-{_file_name(each)}") for each in shown]


def _gap_chart(title: str, gaps: dict[str, Curve], height: float, folder: Path, name: str) -> dict[str, str]:
    def draw(axes: Axes) -> None:
        last = 1
        for space in SHOWN:
            if space not in gaps:
                continue
            curve, colour = gaps[space], COLOURS[SPACE_COLOURS[space]]
            every = list(zip(*curve.seeds.values(), strict=True))
            if len(curve.seeds) > 1:
                low, high = [min(values) for values in every], [max(values) for values in every]
                axes.fill_between(curve.steps, low, high, color=colour, alpha=0.16, linewidth=0)
            axes.plot(curve.steps, curve.mean, color=colour, linewidth=1.8)
            last = max(last, curve.steps[-1])
        axes.set_ylim(0, height)
        axes.set_xlim(0, last)
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.annotate(title, (0.002, 0.995), xycoords="figure fraction", va="top", fontsize=9.5, fontweight="bold")

    return chart(name, draw, folder, size=(2.72, 2.0), right=0.2)


def map_charts(results: Sequence[RowResult], folder: Path) -> list[dict[str, str]]:
    """Map images and captions of each row's first seed at its end to two dimensions, in the projection."""
    found: list[dict[str, str]] = []
    for each in results:
        seeds = each.measures.get("projection", {})
        run = next((one for one in each.planned if one.seed in seeds), None)
        snapshots = load_snapshots(run.folder / "snapshots") if run is not None else []
        if not snapshots:
            continue
        basis = fit_basis(snapshots[-1:])
        draw = panel(snapshots[-1], basis, limits_of(snapshots[-1:], basis), title=each.row.title, legend=not found)
        found.append(chart(f"map-{_file_name(each)}", draw, folder, size=(3.4, 3.66), **MARGINS))
    return found


def _file_name(each: RowResult) -> str:
    return f"{each.row.name}-{each.equal}".replace(".", "-")


def _wrapped(title: str) -> str:
    """Break a title into short lines."""
    return "\n".join(textwrap.wrap(title, 25))
