"""The report of a run: results.json, report.md, report.html and plots, rewritten after each row, never by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO, Any

from oner_fast.atomic import write_atomic
from oner_fast.benchmarks.cases import OURS
from oner_fast.benchmarks.page import page
from oner_fast.benchmarks.rows import Row

MIB = 2**20
CRITERIA: dict[str, Callable[[float], str]] = {
    "speedup": lambda value: f"{value:g}x of the best",
    "eager": lambda value: f"{value:g}x of eager",
    "share": lambda value: f"{value:.0%} of the limit",
    "memory_share": lambda value: f"memory at most 1/{1 / value:.3g} of compiled",
    "memory_bytes": lambda value: f"memory at most {value / 1e6:.0f} MB",
}


@dataclass
class Report:
    """Rows so far, and the machine they were measured on."""

    command: str
    machine: str
    machine_facts: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    finished: bool = False
    started: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))

    def as_dict(self) -> dict[str, Any]:
        """The report as a dict for JSON."""
        return {
            "command": self.command,
            "started": self.started,
            "finished": self.finished,
            "machine": self.machine,
            "machine_facts": self.machine_facts,
            "rows": [row.as_dict() for row in self.rows],
        }

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read a results.json."""
        data = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row.from_dict(row) for row in data["rows"]]
        return cls(data["command"], data["machine"], data["machine_facts"], rows, data["finished"], data["started"])

    def write(self, folder: Path) -> list[Path]:
        """Write results.json, report.md and report.html into `folder`, made where it is missing; return their paths.

        Each file is replaced at once. The HTML page holds the plots; the Markdown refers to them.
        """
        folder.mkdir(parents=True, exist_ok=True)
        markdown = self.markdown(folder)
        texts = {
            "results.json": json.dumps(self.as_dict(), indent=1) + "\n",
            "report.md": markdown,
            "report.html": page(markdown, folder),
        }
        for name, text in texts.items():
            write_atomic(folder / name, partial(_write, text))
        return [folder / name for name in texts]

    def markdown(self, folder: Path | None = None) -> str:
        """Format the report as Markdown; with a folder, it shows the folder's plots."""
        lines = ["# Benchmarks", "", f"`{self.command}`, {self.started}", "", f"Machine: {self.machine}", ""]
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
        for name in ("speedup.png", "share.png", "memory.png"):
            if folder is not None and (folder / name).exists():
                lines += [f"![{name.removesuffix('.png')}]({name})", ""]
        lines += ["## Every candidate", ""]
        for row in self.rows:
            lines += _details(row)
        return "\n".join(lines).rstrip() + "\n"


def _write(text: str, file: IO[bytes]) -> None:
    file.write(text.encode())


def milliseconds(seconds: float) -> str:
    """Format seconds as milliseconds with three digits."""
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def verdict(row: Row) -> str:
    """State which of the row's targets were met and which were not."""
    if row.wrong:
        return "REFUSED"
    if not row.target:
        return "no target"
    words = {True: "met", False: "MISSED", None: "not measured"}
    return "; ".join(f"{CRITERIA[name](value)}: {words[row.met.get(name)]}" for name, value in row.target.items())


def _ours(row: Row) -> str:
    times = row.times.get(OURS)
    if times is None:
        return "refused" if OURS in row.refused else "cannot run"
    return f"{milliseconds(times.p50)} ({milliseconds(times.p20)} to {milliseconds(times.p80)})"


def _best(row: Row) -> str:
    return f"{row.best}: {milliseconds(row.times[row.best].p50)}" if row.best else ""


def _share(row: Row) -> str:
    if row.share is None:
        return ""
    return f"{row.share:.0%}: {row.rate / 1e9:.3g} of {row.limit_rate / 1e9:.3g} {row.limit_unit}"


_TIMES: dict[str, Callable[[Row], str]] = {
    "op": lambda row: f"{row.op} ({row.served})",
    "shape": lambda row: row.shape,
    "dtype": lambda row: row.dtype,
    "ours, ms": _ours,
    "best baseline, ms": _best,
    "ratio": lambda row: f"{row.speedup.p50:.2f}x" if row.speedup else "",
    "to eager": lambda row: f"{row.speedup_eager.p50:.2f}x" if row.speedup_eager else "",
    "share of the limit": _share,
    "target": verdict,
}


def _table(columns: dict[str, Callable[[Row], str]], rows: Sequence[Row]) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(cell(row) for cell in columns.values())} |" for row in rows]
    return [*lines, ""]


def _memory_table(rows: Sequence[Row]) -> list[str]:
    lines = ["| op | shape | dtype | candidate | peak, MiB | saved, MiB | beyond inputs, bytes |", "|" + "---|" * 7]
    for row in rows:
        for name, one in row.memory.items():
            lines.append(
                f"| {row.op} | {row.shape} | {row.dtype} | {name} | {one['peak'] / MIB:.1f} | "
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
            parts = ", ".join(f"{part} {milliseconds(one)}" for part, one in seconds.items())
            lines.append(f"| {name} | {phase} | {milliseconds(sum(seconds.values()))} | {parts} |")
    return [*lines, ""]


def _details(row: Row) -> list[str]:
    lines = [f"### {row.op}, {row.shape}, {row.dtype}", ""]
    if row.times:
        lines += ["| candidate | p20, ms | p50, ms | p80, ms | rounds | error | set-up, s |", "|" + "---|" * 7]
        for name, one in sorted(row.times.items(), key=lambda item: item[1].p50):
            error = f"{row.errors[name]:.1e}" if name in row.errors else ""
            lines.append(
                f"| {name} | {milliseconds(one.p20)} | {milliseconds(one.p50)} | {milliseconds(one.p80)} | "
                f"{one.rounds} | {error} | {one.setup:.1f} |"
            )
        lines.append("")
    if False in row.met.values():
        lines += _in_the_way(row)
    if row.parts:
        lines += ["| part | share of ours |", "|---|---|"]
        lines += [f"| {name} | {share:.1%} |" for name, share in row.parts.items()]
        lines.append("")
    notes = [f"{verdict(row)}"]
    notes += [f"refused, wrong: {name}: {why}" for name, why in row.refused.items()]
    notes += [f"cannot run here: {name}: {why}" for name, why in row.unavailable.items()]
    if row.tolerance is not None:
        notes.append(f"errors are relative to float64; allowed: {row.tolerance:.1e}")
    if row.graph_breaks is not None:
        notes.append(f"graph breaks of ours under torch.compile: {row.graph_breaks}")
    notes += row.notes
    return [*lines, *(f"* {note}" for note in notes), ""]
