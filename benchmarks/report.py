"""The report of a run: results.json, report.md, report.html and charts, rewritten after each row, never by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO, Any

from oner_fast.atomic import write_atomic
from oner_fast.benchmarks.cases import OURS
from oner_fast.benchmarks.page.figures import charts
from oner_fast.benchmarks.page.render import render
from oner_fast.benchmarks.page.report import report_page
from oner_fast.benchmarks.rows import GRADIENTS, OUTPUTS, Row
from oner_fast.benchmarks.typed import made
from oner_fast.benchmarks.values import in_markdown
from oner_fast.benchmarks.words import MIB, error, milliseconds, remarks, share, verdict
from oner_fast.remedies import install_extra_command


@dataclass
class Report:
    """Rows so far, and the machine they were measured on."""

    command: str
    machine: str
    machine_facts: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    finished: bool = False
    commit: str = ""
    started: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))

    def as_dict(self) -> dict[str, Any]:
        """The report as a dict for JSON, without the seconds of single rounds, which a commit's record has."""
        return {
            "command": self.command,
            "started": self.started,
            "commit": self.commit,
            "finished": self.finished,
            "machine": self.machine,
            "machine_facts": self.machine_facts,
            "rows": [row.as_dict() | {"seconds": {}} for row in self.rows],
        }

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read a results.json."""
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Make a report from the dict of `as_dict`."""
        known = {one.name for one in fields(cls)}
        given = {name: value for name, value in data.items() if name in known and name != "rows"}
        report = made(cls, given, "the report")
        report.rows = [Row.from_dict(row) for row in data["rows"]]
        return report

    def write(self, folder: Path) -> list[Path]:
        """Write the report into `folder`, made where it is missing; return the paths of what was written.

        Each file is replaced at once. The HTML page holds the charts; the Markdown refers to their SVG files. Without
        jinja2 there is no page, and a line on stderr says so.
        """
        folder.mkdir(parents=True, exist_ok=True)
        drawn = charts(self.rows)
        texts = {
            "results.json": json.dumps(self.as_dict(), indent=1) + "\n",
            **{f"{name}.svg": chart.file() for name, chart in drawn.items()},
            "report.md": self.markdown(drawn),
        }
        try:
            texts["report.html"] = self.html()
        except ModuleNotFoundError as missing:
            if self.finished:
                print(f"no page: {missing.name} is not installed ({install_extra_command('bench')})", file=sys.stderr)
        for name, text in texts.items():
            write_atomic(folder / name, partial(_write, text))
        return [folder / name for name in texts]

    def html(self) -> str:
        """Return the report as one HTML page. Raises ModuleNotFoundError without jinja2."""
        facts = {
            "Command": self.command,
            "Measured": self.started,
            "Machine": self.machine,
            "Commit": self.commit,
        }
        return render(report_page(self.rows, facts, self.finished))

    def markdown(self, drawn: Sequence[str] | Mapping[str, object] = ()) -> str:
        """Format the report as Markdown that shows the charts of the names `drawn`, which stand beside it."""
        commit = f", commit {self.commit}" if self.commit else ""
        command = " ".join(self.command.replace("`", "'").split())
        lines = ["# Benchmarks", "", f"`{command}`, {in_markdown(self.started + commit)}", ""]
        lines += [f"Machine: {in_markdown(self.machine)}", ""]
        if not self.finished:
            lines += ["**This run was not finished:** the report holds the finished rows.", ""]
        lines += [
            "Seconds are p50 (p20 to p80) of interleaved calls, forward and backward, on rotated inputs larger than "
            "the caches. A ratio is the median of the ratios within a round. Every result was compared with float64 "
            "first. The limit is the machine's own, measured in the same rounds.",
            "",
            "The command also writes `results.json` beside this page, with every figure of every candidate.",
            "",
        ]
        timed = [row for row in self.rows if row.times]
        if timed:
            lines += _table(_TIMES, timed)
        weighed = [row for row in self.rows if row.memory]
        if weighed:
            lines += [
                "## Memory",
                "",
                "Peak of a call above its inputs without the gradients it returned (outputs count), by the kernel's "
                "own count in a fresh process; and what is kept for backward.",
                "",
            ]
            lines += _memory_table(weighed)
        for name in drawn:
            lines += [f"![{name}]({name}.svg)", ""]
        lines += ["## Every candidate", ""]
        for row in self.rows:
            lines += _details(row)
        return "\n".join(lines).rstrip() + "\n"


def _write(text: str, file: IO[bytes]) -> None:
    file.write(text.encode())


def _names(*names: str) -> str:
    """Put names into the cells of a table."""
    return " | ".join(map(in_markdown, names))


def _ours(row: Row) -> str:
    times = row.times.get(OURS)
    if times is None:
        return "refused" if OURS in row.refused else "cannot run"
    return f"{milliseconds(times.p50)} ({milliseconds(times.p20)} to {milliseconds(times.p80)})"


def _best(row: Row) -> str:
    return f"{row.best}: {milliseconds(row.times[row.best].p50)}" if row.best else ""


_TIMES: dict[str, Callable[[Row], str]] = {
    "op": lambda row: f"{row.op} ({row.served})",
    "shape": lambda row: row.shape,
    "dtype": lambda row: row.dtype,
    "ours, ms": _ours,
    "best baseline, ms": _best,
    "ratio": lambda row: f"{row.speedup.p50:.2f}x" if row.speedup else "",
    "to eager": lambda row: f"{row.speedup_eager.p50:.2f}x" if row.speedup_eager else "",
    "share of the limit": share,
    "target": verdict,
}


def _table(columns: dict[str, Callable[[Row], str]], rows: Sequence[Row]) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(in_markdown(cell(row)) for cell in columns.values())} |" for row in rows]
    return [*lines, ""]


def _memory_table(rows: Sequence[Row]) -> list[str]:
    lines = ["| op | shape | dtype | candidate | peak, MiB | saved, MiB | beyond inputs, bytes |", "|" + "---|" * 7]
    for row in rows:
        for name, one in row.memory.items():
            lines.append(
                f"| {_names(row.op, row.shape, row.dtype, name)} | {one['peak'] / MIB:.1f} | "
                f"{one['saved'] / MIB:.1f} | {one['saved_beyond_inputs']} |"
            )
    return [*lines, ""]


def _in_the_way(row: Row) -> list[str]:
    """Explain a row that misses a target: the time that the machine needs at its limits, and the slowest operations."""
    if not row.profiles:
        return []
    words = {"gemm": "its products at the best product's rate", "copy": "its bytes at the copy's rate"}
    floor = "; ".join(f"{milliseconds(seconds)} ms for {words[kind]}" for kind, seconds in row.floor.items())
    lines = [f"What stands in the way. The machine needs {floor}. By the profiler, each operation's own time:", ""]
    lines += ["| candidate | phase | ms | of these |", "|" + "---|" * 4]
    for name, phases in row.profiles.items():
        for phase, seconds in phases.items():
            parts = in_markdown(", ".join(f"{part} {milliseconds(one)}" for part, one in seconds.items()))
            lines.append(f"| {_names(name, phase)} | {milliseconds(sum(seconds.values()))} | {parts} |")
    return [*lines, ""]


def _details(row: Row) -> list[str]:
    lines = [f"### {in_markdown(f'{row.op}, {row.shape}, {row.dtype}')}", ""]
    if row.times:
        lines += [
            "| candidate | p20, ms | p50, ms | p80, ms | rounds | error | gradients | set-up, s |",
            "|" + "---|" * 8,
        ]
        for name, one in sorted(row.times.items(), key=lambda item: item[1].p50):
            errors = row.precision.get(name, {OUTPUTS: row.errors[name]} if name in row.errors else {})
            lines.append(
                f"| {_names(name)} | {milliseconds(one.p20)} | {milliseconds(one.p50)} | {milliseconds(one.p80)} | "
                f"{one.rounds} | {error(errors.get(OUTPUTS))} | {error(errors.get(GRADIENTS))} | {one.setup:.1f} |"
            )
        lines.append("")
    if False in row.met.values():
        lines += _in_the_way(row)
    if row.parts:
        lines += ["| part | share of ours |", "|---|---|"]
        lines += [f"| {_names(name)} | {share:.1%} |" for name, share in row.parts.items()]
        lines.append("")
    return [*lines, *(f"* {in_markdown(note)}" for note in (verdict(row), *remarks(row))), ""]
