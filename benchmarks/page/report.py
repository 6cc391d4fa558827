"""The page of a report: speed, precision, memory, the whole step, and every candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from oner_fast.benchmarks.cases import OURS
from oner_fast.benchmarks.charts.colours import times
from oner_fast.benchmarks.charts.speed import compared, dtype_name, op_name
from oner_fast.benchmarks.page import figures
from oner_fast.benchmarks.page.content import Detail, Fact, Figure, Page, Section, Table
from oner_fast.benchmarks.rows import GRADIENTS, OUTPUTS, Quantiles, Row
from oner_fast.benchmarks.words import MIB, error, milliseconds, outputs_of, remarks, share, verdict


def report_page(rows: Sequence[Row], facts: Mapping[str, str], finished: bool = True) -> Page:
    """Make the page.

    Args:
        rows: the rows.
        facts: what a reader needs to judge or repeat the run, by name: "Command", "Machine", "Commit", "Measured".
        finished: whether the run was; otherwise the page says that rows are missing.
    """
    sections = [_speed(rows), _precision(rows), _memory(rows), _step(rows), _candidates(rows)]
    return Page(
        title="How fast, how precise, how much memory: oner_fast beside PyTorch",
        lead=_lead(rows),
        warning="" if finished else "This run was not finished: the page holds the finished rows.",
        facts=[Fact(name, value, name in ("Command", "Commit")) for name, value in facts.items() if value],
        sections=[section for section in sections if section is not None],
    )


def _lead(rows: Sequence[Row]) -> list[str]:
    ratios = [(row.speedup.p50, row) for row in compared(rows) if row.speedup]
    said = []
    if ratios:
        faster = sum(ratio > 1 for ratio, _ in ratios)
        (low, slowest), (high, fastest) = min(ratios, key=lambda one: one[0]), max(ratios, key=lambda one: one[0])
        said.append(
            f"Ours is faster than the fastest of PyTorch in {faster} of {len(ratios)} rows: {times(low)} "
            f"({op_name(slowest)}, {dtype_name(slowest)}) to {times(high)} ({op_name(fastest)}, {dtype_name(fastest)})."
        )
    if peaks := [(figures.peak_ratio(row), row) for row in figures.weighed(rows)]:
        most, row = max(peaks, key=lambda one: one[0])
        least = min(ratio for ratio, _ in peaks)
        worst = f"at worst {_factor(1 / least)} times larger" if least < 1 else "nowhere larger"
        said.append(
            f"Its peak memory is at best {_factor(most)} times smaller than the smallest of the others "
            f"({op_name(row)}, {dtype_name(row)}), and {worst}."
        )
    if found := figures.nearer(rows):
        loss, gradients = max(one.outputs for one in found), max(one.gradients for one in found)
        said.append(
            f"In bfloat16 the error of open_clip's contrast is up to {_factor(loss)} times ours in the loss and up to "
            f"{_factor(gradients)} times in the gradients."
        )
    if wrong := [row for row in rows if row.wrong]:
        said.append(f"{len(wrong)} of {len(rows)} rows have a refused result: see every candidate.")
    return said


def _figures(*made: Figure | None) -> list[Figure]:
    return [figure for figure in made if figure is not None]


def _speed(rows: Sequence[Row]) -> Section | None:
    timed = [row for row in rows if row.times]
    if not timed:
        return None
    columns = ["op", "shape", "ours, ms (p20 to p80)", "fastest of PyTorch, ms", "ratio (p20 to p80)", "to eager"]
    columns.append("share of the limit")
    table = Table("Every timed row, in milliseconds", columns, [_speed_cells(row) for row in timed])
    return Section(
        "speed", "Speed, and the machine's limit", figures=_figures(figures.speed_figure(rows)), tables=[table]
    )


def _speed_cells(row: Row) -> list[str]:
    ours, ratio, eager = row.times.get(OURS), row.speedup, row.speedup_eager
    if ours is None:
        mine = "refused" if OURS in row.refused else "cannot run"
    else:
        mine = f"{milliseconds(ours.p50)} ({milliseconds(ours.p20)} to {milliseconds(ours.p80)})"
    return [
        f"{op_name(row)}, {dtype_name(row)}",
        row.shape,
        mine,
        f"{row.best}: {milliseconds(row.times[row.best].p50)}" if row.best else "",
        _ratio(ratio) if ratio else "",
        times(eager.p50) if eager else "",
        share(row),
    ]


def _factor(value: float) -> str:
    """Write a factor with two or three digits that count: 1.24, 39.6, 2,980."""
    if value < 100:
        return f"{value:.3g}"
    return f"{float(f'{value:.3g}'):,.0f}"


def _ratio(ratio: Quantiles) -> str:
    spread = f" ({ratio.p20:.2f} to {ratio.p80:.2f})" if ratio.p20 < ratio.p80 else ""
    return times(ratio.p50) + spread


def _precision(rows: Sequence[Row]) -> Section | None:
    known = [row for row in rows if row.precision]
    if not known:
        return None
    paragraphs = []
    if found := figures.nearer(rows):
        each = (
            f"{_factor(one.outputs)} times ours in the loss and {_factor(one.gradients)} times in the gradients "
            f"({one.row.shape})"
            for one in found
        )
        paragraphs.append(f"In bfloat16 the error of open_clip's contrast is {'; '.join(each)}.")
        paragraphs.append(
            "What is computed there: open_clip's own ClipLoss for one process, on the same bfloat16 features, under "
            "autocast to bfloat16, as its training with amp_bf16 has it. The logits are a product in bfloat16 and are "
            "rounded to it; the cross-entropies take them in float32. The features are normalised in float32, as a "
            "GPU's autocast does. A full run also has the CPU's autocast, which normalises in bfloat16; the smaller "
            "of the two errors counts. Ours keeps logits and sums in float32, and rounds the gradients alone."
        )
    columns = ["op", "shape", "candidate", "loss or output", "gradients"]
    cells = [
        [
            f"{op_name(row)}, {dtype_name(row)}",
            row.shape,
            name,
            error(errors.get(OUTPUTS)),
            error(errors.get(GRADIENTS)),
        ]
        for row in known
        for name, errors in row.precision.items()
    ]
    table = Table("Relative error against float64 of every candidate", columns, cells)
    opened = Detail("Errors of every candidate", [table])
    made = _figures(figures.precision_figure(rows))
    return Section("precision", "Precision against float64", paragraphs, made, details=[opened])


def _memory(rows: Sequence[Row]) -> Section | None:
    weighed = [row for row in rows if row.memory]
    if not weighed:
        return None
    columns = ["op", "shape", "candidate", "peak, MiB", "saved for backward, MiB", "beyond the inputs, bytes"]
    cells = [
        [f"{op_name(row)}, {dtype_name(row)}", row.shape, name, f"{one['peak'] / MIB:.1f}", f"{one['saved'] / MIB:.1f}"]
        + [f"{one['saved_beyond_inputs']:,}"]
        for row in weighed
        for name, one in row.memory.items()
    ]
    table = Table("Peak of a call, and what is kept for backward", columns, cells)
    figure = figures.memory_figure(rows)
    if figure is None:
        return Section("memory", "Memory", tables=[table])
    return Section("memory", "Memory", figures=[figure], details=[Detail("Memory of every candidate", [table])])


def _step(rows: Sequence[Row]) -> Section | None:
    figure = figures.step_figure(rows)
    if figure is None:
        return None
    tables = []
    for row in rows:
        if not row.breakdown:
            continue
        kinds = dict.fromkeys(kind for seconds in row.breakdown.values() for kind in seconds)
        cells = [
            [kind, *(_seconds(seconds.get(kind), row.times[name].p50) for name, seconds in row.breakdown.items())]
            for kind in kinds
        ]
        names = [f"{'ours' if name == OURS else name}, ms (share)" for name in row.breakdown]
        caption = f"Parts of a {op_name(row)} in {dtype_name(row)}: {row.shape}"
        tables.append(Table(caption, ["part", *names], cells))
    return Section("step", "The whole training step", figures=[figure], tables=tables)


def _seconds(value: float | None, whole: float) -> str:
    return "" if value is None else f"{milliseconds(value)} ({value / whole:.1%})"


def _candidates(rows: Sequence[Row]) -> Section:
    method = (
        "Candidates take turns, A B C A B C ..., on rotated inputs larger than the caches; seconds are p50, beside p20 "
        "and p80, and a ratio is the median of the ratios within a round. Every result was compared with float64 "
        "first; a wrong one is refused and has no time."
    )
    return Section("candidates", "Every candidate", [method], details=[_detail(row) for row in rows])


def _detail(row: Row) -> Detail:
    columns = ["candidate", "p20, ms", "p50, ms", "p80, ms", "rounds", f"error, {outputs_of(row)}", "error, gradients"]
    columns.append("set-up, s")
    cells = []
    for name, one in sorted(row.times.items(), key=lambda item: item[1].p50):
        errors = row.precision.get(name, {OUTPUTS: row.errors[name]} if name in row.errors else {})
        cells.append(
            [name, milliseconds(one.p20), milliseconds(one.p50), milliseconds(one.p80), str(one.rounds)]
            + [error(errors.get(OUTPUTS)), error(errors.get(GRADIENTS)), f"{one.setup:.1f}"]
        )
    tables = [Table("Seconds, errors and set-up of every candidate", columns, cells)] if cells else []
    if False in row.met.values() and row.profiles:
        tables.append(_in_the_way(row))
    ratio = f": {times(row.speedup.p50)}" if row.speedup else ""
    summary = f"{op_name(row)}, {row.shape}, {dtype_name(row)}{ratio}; {verdict(row)}"
    return Detail(summary, tables, [f"implementation: {row.served}", *remarks(row)])


def _in_the_way(row: Row) -> Table:
    words = {"gemm": "its products at the best product's rate", "copy": "its bytes at the copy's rate"}
    floor = "; ".join(f"{milliseconds(seconds)} ms for {words[kind]}" for kind, seconds in row.floor.items())
    cells = [
        [name, phase, milliseconds(sum(seconds.values()))]
        + [", ".join(f"{part} {milliseconds(one)}" for part, one in seconds.items())]
        for name, phases in row.profiles.items()
        for phase, seconds in phases.items()
    ]
    caption = f"What stands in the way of the target, by the profiler. The machine needs {floor}."
    return Table(caption, ["candidate", "phase", "ms", "of these"], cells)
