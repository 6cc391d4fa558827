"""Map images and texts to two dimensions: the first, a middle and the last snapshot on the same axes."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from oner_fast.evaluation.modality_gap import PcaBasis, Snapshot, fit_basis, modality_gap
from oner_fast.report.style import COLOURS, chart

MARGINS = {"left": 0.02, "right": 0.02, "top": 0.3, "bottom": 0.02}
POINTS = 260  # pairs in each panel: enough to show the shape, few enough for the page


def shown_snapshots(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """First, middle and last snapshot; fewer where there are fewer."""
    places = sorted({0, len(snapshots) // 2, len(snapshots) - 1}) if snapshots else []
    return [snapshots[place] for place in places]


def map_charts(snapshots: Sequence[Snapshot], folder: Path) -> list[dict[str, str]]:
    """Draw one panel for each shown snapshot, in one PCA basis fitted to all of them."""
    shown = shown_snapshots(snapshots)
    if not shown:
        return []
    basis = fit_basis(shown)
    limits = limits_of(shown, basis)
    return [
        chart(
            f"map-{number}",
            panel(one, basis, limits, title=f"step {one.step:,}", legend=number == 1),
            folder,
            size=(3.4, 3.66),
            **MARGINS,
        )
        for number, one in enumerate(shown, start=1)
    ]


def limits_of(snapshots: Sequence[Snapshot], basis: PcaBasis) -> list[tuple[float, float]]:
    """Return the limits of both axes, equally long, that hold every point of some snapshots."""
    everything = torch.cat([basis.project(part) for one in snapshots for part in (one.image, one.text)])
    low, high = everything.amin(0), everything.amax(0)
    middle, half = (low + high) / 2, float((high - low).max()) / 2 * 1.06 or 1.0
    return [(float(centre) - half, float(centre) + half) for centre in middle]


def panel(
    snapshot: Snapshot, basis: PcaBasis, limits: list[tuple[float, float]], *, title: str, legend: bool
) -> Callable[[Axes], None]:
    """Return a function that draws one map, with its gap beside the title."""
    image, text = (basis.project(part).numpy() for part in (snapshot.image, snapshot.text))
    centres = numpy.stack([image.mean(0), text.mean(0)])
    gap = modality_gap(snapshot.image, snapshot.text)
    step = max(1, -(-len(image) // POINTS))
    image, text = image[::step], text[::step]

    def draw(axes: Axes) -> None:
        axes.grid(False)
        pairs = numpy.full((3 * min(len(image), len(text)), 2), numpy.nan)
        pairs[0::3], pairs[1::3] = image[: len(pairs) // 3], text[: len(pairs) // 3]
        axes.plot(pairs[:, 0], pairs[:, 1], color=COLOURS["muted"], linewidth=0.35, alpha=0.28, zorder=1)
        for points, colour, marker in ((image, "image", "o"), (text, "text", "D")):
            axes.plot(
                *points.T,
                linestyle="none",
                marker=marker,
                markersize=3.6 if marker == "o" else 3.1,
                color=COLOURS[colour],
                alpha=0.6,
                markeredgewidth=0,
                zorder=2,
            )
        axes.plot(*centres.T, color=COLOURS["ink"], linewidth=1.6, zorder=3)
        for centre, colour, marker in zip(centres, ("image", "text"), ("o", "D"), strict=True):
            axes.plot(
                *centre,
                marker=marker,
                markersize=9,
                color=COLOURS[colour],
                markeredgecolor=COLOURS["ink"],
                markeredgewidth=1.4,
                zorder=4,
            )
        axes.set_xlim(*limits[0])
        axes.set_ylim(*limits[1])
        axes.set_aspect("equal")
        axes.set_xticks([])
        axes.set_yticks([])
        for side in axes.spines.values():
            side.set_visible(True)
        axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold", pad=6)
        axes.set_title(f"gap {gap:.2f}", loc="right", fontsize=9.5, color=COLOURS["muted"], pad=6)
        if not legend:
            return
        handles = [
            Line2D([], [], linestyle="none", marker=marker, color=COLOURS[colour], markersize=5, markeredgewidth=0)
            for colour, marker in (("image", "o"), ("text", "D"))
        ]
        axes.legend(
            handles,
            ["images", "captions"],
            loc="upper right",
            frameon=False,
            fontsize=8,
            handletextpad=0.1,
            labelcolor=COLOURS["muted"],
            borderaxespad=0.7,
        )

    return draw
