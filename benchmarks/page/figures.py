"""The charts of a report: which candidates stand in them, and what the captions say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from oner_fast.benchmarks.cases import OURS
from oner_fast.benchmarks.charts.dots import Line, Point, Scale, dots
from oner_fast.benchmarks.charts.speed import compared, dtype_name, op_name, speed
from oner_fast.benchmarks.charts.stack import Stack, stacked
from oner_fast.benchmarks.drawing import Drawing
from oner_fast.benchmarks.page.content import Figure
from oner_fast.benchmarks.rows import GRADIENTS, OUTPUTS, Row
from oner_fast.benchmarks.words import MIB, error, outputs_of

PEER = "open_clip ClipLoss"
# Libraries beside PyTorch whose names stand in those of baselines.
LIBRARIES = ("open_clip", "apex", "xformers", "flash-attn", "flash_attn", "webdataset")
# Half a unit in the last place, which one rounding costs at most.
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8 / 2, "float16": 2.0**-11}
# The kernel counts memory in pages that it hands out in batches: peaks below this are not told apart.
LEAST_PEAK = 0.1  # MiB
_NAMES = {"ours": "ours", "eager": "eager PyTorch", "compiled": "torch.compile", "peer": "another library"}


@dataclass(frozen=True)
class Nearer:
    """Factors by which the error of open_clip's loss exceeds ours, for the loss and for the gradients of one row."""

    row: Row
    outputs: float
    gradients: float


def style(name: str) -> str:
    """Return the style of a candidate, by its name."""
    if name.split()[0] == OURS:
        return "ours"
    if any(library in name.lower() for library in LIBRARIES):
        return "peer"
    return "compiled" if "compiled" in name.split()[:2] else "eager"


def speed_figure(rows: Sequence[Row]) -> Figure | None:
    """Make the chart of ratios; None where no row has one."""
    rows = compared(rows)
    if not rows:
        return None
    caption = (
        "A bar is the time of the fastest baseline divided by ours: the median over interleaved rounds, with a whisker "
        "from p20 to p80. The baselines are eager PyTorch, torch.compile, PyTorch's fused ops and, where they are "
        "installed, third parties. The track behind a bar ends where ours would be at the machine's own limit, the "
        "rate of a matrix product or of a copy in the same rounds; an arrow says that it lies farther right. Ops run "
        "forward and backward; gather_patches has a forward alone."
    )
    return Figure.of(lambda width: speed(rows, width), caption)


def weighed(rows: Sequence[Row]) -> list[Row]:
    """List the rows that have the peak of ours and of another candidate."""
    return [row for row in rows if len(row.memory) > 1 and OURS in row.memory]


def peak_ratio(row: Row) -> float:
    """Return the smallest peak of the other candidates divided by that of ours."""
    peaks = {name: max(one["peak"] / MIB, LEAST_PEAK) for name, one in row.memory.items()}
    return min(peak for name, peak in peaks.items() if name != OURS) / peaks[OURS]


def memory_figure(rows: Sequence[Row]) -> Figure | None:
    """Make the chart of peaks; None where no row has two candidates."""
    rows = weighed(rows)
    if not rows:
        return None
    lines = []
    for row in rows:
        peaks = {name: max(one["peak"] / MIB, LEAST_PEAK) for name, one in row.memory.items()}
        points = [Point(style(name), peak, f"{name}: {peak:.1f} MiB") for name, peak in peaks.items()]
        ratio = peak_ratio(row)
        said = f"{ratio:.3g}x less" if ratio >= 1.05 else f"{1 / ratio:.3g}x more" if ratio <= 1 / 1.05 else "the same"
        lines.append(Line(op_name(row), dtype_name(row), points, said))
    scale = Scale(LEAST_PEAK, lambda value: f"{value:g} MiB", _NAMES)
    caption = (
        "Peak memory of a call in MiB, on a logarithmic scale: above its inputs, without the gradients that it "
        "returns, by the kernel's own count in a fresh process. At the right ours beside the smallest of the others. "
        "Peaks up to 0.1 MiB are drawn at 0.1."
    )
    return Figure.of(partial(dots, lines, scale, _spoken("Peak memory in MiB", lines)), caption)


def precision_figure(rows: Sequence[Row]) -> Figure | None:
    """Make the chart of errors; None where no row has any."""
    lines = []
    for row in rows:
        for group, name in ((OUTPUTS, outputs_of(row)), (GRADIENTS, "gradients")):
            found = {candidate: errors[group] for candidate, errors in row.precision.items() if group in errors}
            if not found:
                continue
            points = [
                Point(style(candidate), value, f"{candidate}: {error(value)}") for candidate, value in found.items()
            ]
            setting = _setting(row)
            detail = f"{dtype_name(row)}, {name}" + (f", {setting}" if setting else "")
            lines.append(Line(op_name(row), detail, points, error(found.get(OURS)), ROUNDING.get(dtype_name(row))))
    if not lines:
        return None
    scale = Scale(1e-9, lambda value: f"{value:.0e}".replace("e-0", "e-"), _NAMES, "one rounding to the dtype")
    caption = (
        "Relative error against the definition in float64, on a logarithmic scale: the larger of maximum error over "
        "maximum value and RMS error over RMS value, the largest of three draws of the inputs. Every candidate is a "
        "point; farther left is more precise. At the right the error of ours."
    )
    return Figure.of(partial(dots, lines, scale, _spoken("Relative error of ours against float64", lines)), caption)


def step_figure(rows: Sequence[Row]) -> Figure | None:
    """Make the chart of the whole step; None where no row has its parts."""
    rows = [row for row in rows if row.breakdown]
    if not rows:
        return None
    stacks = [
        Stack("ours" if name == OURS else name, seconds, f"{op_name(row)}, {dtype_name(row)}", row.floor.get("gemm"))
        for row in rows
        for name, seconds in row.breakdown.items()
    ]
    title = "Seconds of one training step: " + "; ".join(
        f"{stack.label} in {stack.group} {sum(stack.seconds.values()):.3g} s" for stack in stacks
    )
    caption = (
        "Seconds of one training step, optimiser and teacher included: the median of interleaved steps. The parts "
        "are the profiler's shares of one further step, scaled to that median; torch.compile fuses kinds that the "
        "other bars have apart. A line is the time that the step's matrix products need at the rate of the best "
        "product in the same run."
    )
    mark = "the products at the machine's rate"
    return Figure.of(lambda width: stacked(stacks, title, mark, width), caption)


def nearer(rows: Sequence[Row]) -> list[Nearer]:
    """Compare ours with open_clip's loss in every row that has it: with the more precise of its forms."""
    found = []
    for row in rows:
        theirs = [errors for name, errors in row.precision.items() if PEER in name and GRADIENTS in errors]
        ours = row.precision.get(OURS, {})
        if theirs and ours.get(OUTPUTS) and ours.get(GRADIENTS):
            least = [min(errors[group] for errors in theirs) / ours[group] for group in (OUTPUTS, GRADIENTS)]
            found.append(Nearer(row, *least))
    return found


def charts(rows: Sequence[Row]) -> dict[str, Drawing]:
    """Return the wide charts by name: speed, memory, precision, step, where the rows have such figures."""
    makers = {"speed": speed_figure, "memory": memory_figure, "precision": precision_figure, "step": step_figure}
    made = {name: make(rows) for name, make in makers.items()}
    return {name: figure.wide for name, figure in made.items() if figure is not None}


def _setting(row: Row) -> str:
    """Name the row's logit scale where its shape does."""
    return row.shape.partition("logit ")[2]


def _spoken(title: str, lines: Sequence[Line]) -> str:
    return f"{title}: " + "; ".join(f"{line.label} {line.detail} {line.said}" for line in lines)
