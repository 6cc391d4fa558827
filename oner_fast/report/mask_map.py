"""`python -m oner_fast.report.mask_map FILE.png`: draw how often each masking pattern masks each cell.

This is UTA's figure 3: block-wise masks rarely hide a corner, reversed block-wise masks nearly always do.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from oner_fast.boundary import guarded
from oner_fast.ops.patch_masks import Pattern, draw_masks
from oner_fast.report.style import COLOURS, save_png, style

PATTERNS: dict[Pattern, str] = {"random": "random", "block": "block-wise", "reversed_block": "reversed block-wise"}


@dataclass(frozen=True)
class Options:
    """Draw the probability that each cell is masked, for each pattern, side by side."""

    output: Annotated[Path, tyro.conf.Positional]
    """The PNG file to write."""
    grid: int = 16
    """Number of cells along a side."""
    ratio: float = 0.5
    """Share of cells that are masked."""
    draws: int = 5000
    """Number of masks to average."""
    seed: int = 0
    """Seed of the masks."""


def masking_probabilities(
    pattern: Pattern, *, grid: int = 16, ratio: float = 0.5, draws: int = 5000, seed: int = 0
) -> Tensor:
    """Share of `draws` masks in which each cell is masked: (grid, grid) float64."""
    if draws < 1 or not 0.0 <= ratio <= 1.0:
        raise ValueError(f"draws must be at least 1 and ratio in [0, 1], got {draws} and {ratio}")
    masks = draw_masks(seed, 0, torch.arange(draws), (grid, grid), round(ratio * grid * grid), pattern).mask
    return masks.double().mean(0).view(grid, grid)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status, as `oner_fast.boundary` lists them."""
    return guarded("mask_map", lambda: _run(argv), extra="demo")


def _run(argv: Sequence[str]) -> int:
    options = tyro.cli(Options, args=list(argv), prog="python -m oner_fast.report.mask_map")
    draw(options)
    print(f"wrote {options.output} ({options.output.stat().st_size / 1e3:.0f} kB)")
    return 0


def draw(options: Options) -> None:
    """Write the figure."""
    shares = {
        title: masking_probabilities(
            pattern, grid=options.grid, ratio=options.ratio, draws=options.draws, seed=options.seed
        )
        for pattern, title in PATTERNS.items()
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(7.4, 2.9))
        axes = figure.subplots(1, len(shares))
        for one, (title, share) in zip(axes, shares.items(), strict=True):
            image = _panel(one, title, share)
        figure.subplots_adjust(left=0.015, right=0.91, top=0.89, bottom=0.11, wspace=0.08)
        low, high = axes[-1].get_position().y0, axes[-1].get_position().y1
        bar = figure.colorbar(image, cax=figure.add_axes((0.925, low, 0.016, high - low)), ticks=[0, 0.5, 1])
        bar.outline.set_visible(False)
        bar.ax.set_title("P(masked)", fontsize=8.5, color=COLOURS["muted"], pad=5, loc="center")
        save_png(figure, options.output, dpi=130, metadata={"Software": None})


def _panel(axes: Axes, title: str, share: Tensor) -> AxesImage:
    axes.grid(False)
    image = axes.imshow(share.numpy(), cmap="viridis", vmin=0.0, vmax=1.0)
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    low, high = (len(share) - 1) // 2, len(share) // 2
    corners, centre = share[[0, 0, -1, -1], [0, -1, 0, -1]].mean(), share[low : high + 1, low : high + 1].mean()
    axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold", pad=5)
    axes.set_xlabel(f"corners {corners:.2f}, centre {centre:.2f}", loc="left", labelpad=5)
    return image


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
