"""`oner-fast bench ops`: check each op, compare it with PyTorch's fastest code, and report both with the machine."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from oner_fast.benchmarks.cases import OURS
from oner_fast.benchmarks.machine import describe
from oner_fast.benchmarks.measure import Settings, measure
from oner_fast.benchmarks.ops import OPS, cases
from oner_fast.benchmarks.peers import layers
from oner_fast.benchmarks.report import Report
from oner_fast.benchmarks.rows import Row
from oner_fast.benchmarks.source import commit_of_this
from oner_fast.benchmarks.words import milliseconds, verdict
from oner_fast.train.engine.allocator import freed_memory_kept

DEFAULT_FOLDER = Path("runs/bench")
SECONDS, QUICK_SECONDS = 12.0, 1.5
# The other benchmarks, each a module with its own `main`.
OTHERS = {
    "compare": "oner_fast.benchmarks.compare",
    "against": "oner_fast.benchmarks.against",
    "noise": "oner_fast.benchmarks.noise",
    "step": "oner_fast.benchmarks.step",
    "uta": "oner_fast.benchmarks.student",
    "integrations": "oner_fast.benchmarks.integrations.command",
    "gpu-resources": "oner_fast.benchmarks.gpu.resources",
    "gpu-peers": "oner_fast.benchmarks.gpu.rivals",
    "gpu-tune": "oner_fast.benchmarks.gpu.tune",
    "page": "oner_fast.benchmarks.page_command",
    "history": "oner_fast.benchmarks.history.cli",
    "ratios": "oner_fast.benchmarks.ratios",
}
Progress = Callable[[str], None]


def parser() -> argparse.ArgumentParser:
    """Make the parser of `oner-fast bench ops`."""
    made = argparse.ArgumentParser(prog="oner-fast bench ops", description=__doc__)
    made.add_argument("--quick", action="store_true", help="small shapes, under 3 minutes on 2 cores; no training step")
    made.add_argument("--op", nargs="+", metavar="NAME", default=None, help=f"only these: {', '.join(OPS)}")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the ops run (default: cpu)")
    made.add_argument("--threads", type=int, default=None, help="CPU threads (default: as torch chooses)")
    made.add_argument(
        "--seconds",
        type=float,
        default=None,
        help=f"for each case (default: {SECONDS:g}, quick {QUICK_SECONDS:g})",
    )
    made.add_argument("--out", type=Path, default=DEFAULT_FOLDER, help=f"the report's folder ({DEFAULT_FOLDER})")
    return made


def main(argv: Sequence[str]) -> int:
    """Run `oner-fast bench ops ...`; returns 0, 1 where a result was wrong, 2 for bad input, 130 when interrupted."""
    what, *rest = argv
    if what in OTHERS:
        return int(importlib.import_module(OTHERS[what]).main(rest))
    if what != "ops":
        return _fail(f"unknown benchmark {what!r}; known: ops, {', '.join(OTHERS)}")
    options = parser().parse_args(rest)
    if reason := _reason_against(options):
        return _fail(reason)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    seconds = options.seconds if options.seconds is not None else QUICK_SECONDS if options.quick else SECONDS
    settings = Settings(seconds, options.device, options.quick)
    machine = describe(options.device)
    command = shlex.join(["oner-fast", "bench", *_without_folder(argv)])
    commit, dirty = commit_of_this()
    report = Report(command, machine.line(), machine.as_dict(), commit=commit + "+" * dirty)
    print(f"machine: {machine.line()}", flush=True)
    interrupted = False
    try:
        # Keep freed memory, as training does, so that no candidate pays for touching fresh pages first.
        with freed_memory_kept() if options.device == "cpu" else nullcontext():
            for row in _rows(options, settings):
                report.rows.append(row)
                report.write(options.out)
                print(line_of(row), flush=True)
        report.finished = True
    except KeyboardInterrupt:
        interrupted = True
        print("\ninterrupted: the report holds the finished rows", file=sys.stderr)
    print(f"wrote {', '.join(str(path) for path in report.write(options.out))}")
    if interrupted:
        return 130
    wrong = [row for row in report.rows if row.wrong]
    for row in wrong:
        named = [*row.refused.items(), *((name, why) for name, why in row.unavailable.items() if name == OURS)]
        for name, why in named:
            print(f"oner-fast bench: {row.op} {row.shape} {row.dtype}: refused: {name}: {why}", file=sys.stderr)
    return 1 if wrong else 0


def _without_folder(argv: Sequence[str]) -> list[str]:
    """Arguments without the report's folder, which is a path of one machine."""
    kept, words = [], iter(argv)
    for word in words:
        if word == "--out":
            next(words, None)
        elif not word.startswith("--out="):
            kept.append(word)
    return kept


def _reason_against(options: argparse.Namespace) -> str:
    for name in options.op or ():
        if name not in OPS:
            return f"unknown op {name!r}; known: {', '.join(OPS)}"
    if options.threads is not None and options.threads < 1:
        return f"--threads must be at least 1, got {options.threads}"
    if options.seconds is not None and not 0 < options.seconds < float("inf"):
        return f"--seconds must be positive, got {options.seconds:g}"
    if options.device == "cuda" and not torch.cuda.is_available():
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        return f"--device cuda needs a GPU that torch can use; this torch is {build} and finds none"
    if options.out.exists() and not options.out.is_dir():
        return f"--out must be a folder, and {options.out} is a file"
    return ""


def _rows(options: argparse.Namespace, settings: Settings) -> Iterable[Row]:
    """Measure the ops' rows and then, in a full run, the training step's."""
    todo = cases(options.quick, options.op or OPS)
    if options.device == "cuda" and not options.op:
        todo += layers.cases()
    for number, case in enumerate(todo, 1):
        with _Status(f"{number} of {len(todo)}: {case.key}") as status:
            row = measure(case, settings, status)
        yield row
    if options.quick or options.op or importlib.util.find_spec("oner_fast.benchmarks.step") is None:
        return
    with _Status("one training step") as status:
        yield from importlib.import_module("oner_fast.benchmarks.step").rows(settings, status)


def line_of(row: Row) -> str:
    """Describe a row in one line."""
    parts = [f"{row.op} {row.shape} {row.dtype} by {row.served}:"]
    if OURS in row.times:
        parts.append(f"{milliseconds(row.times[OURS].p50)} ms,")
    if row.speedup and row.speedup_eager:
        parts.append(f"{row.speedup.p50:.2f}x {row.best}, {row.speedup_eager.p50:.2f}x {row.eager},")
    if row.share is not None:
        parts.append(f"{row.share:.0%} of the limit ({row.limit_rate / 1e9:.3g} {row.limit_unit}),")
    if OURS in row.memory:
        parts.append(f"peak {row.memory[OURS]['peak'] / 2**20:.1f} MiB,")
    return f"{' '.join(parts)} {verdict(row)}"


def _fail(message: str) -> int:
    print(f"oner-fast bench: {message}", file=sys.stderr)
    return 2


class _Status:
    """Show the current work: a changing line on a terminal, elsewhere one line for each title."""

    def __init__(self, title: str) -> None:
        self.title, self.start, self.live = title, time.perf_counter(), sys.stderr.isatty()

    def __enter__(self) -> _Status:
        if not self.live:
            print(f"{self.title} ...", file=sys.stderr, flush=True)
        return self

    def __call__(self, text: str) -> None:
        if self.live:
            width = os.get_terminal_size(sys.stderr.fileno()).columns - 1
            said = f"{self.title}: {text} ({time.perf_counter() - self.start:.0f} s)"[:width]
            print(f"\r\033[K{said}", end="", file=sys.stderr, flush=True)

    def __exit__(self, *error: object) -> None:
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
