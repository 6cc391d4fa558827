"""`oner-fast bench integrations`: other projects' code with one line of ours and without, in turn.

Each subject is a forward and a backward. Errors are those of the gradients against float64, as relative L2 distances
of all gradients together. Memory is what forward keeps for backward. A ratio of times is the median over rounds in
which both took a turn.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from oner_fast.atomic import write_atomic
from oner_fast.benchmarks import machine
from oner_fast.benchmarks.integrations.subjects import Loss, Pair, Subject, subjects
from oner_fast.benchmarks.peak_memory import saved_during
from oner_fast.benchmarks.timing import Candidate, Ratio, interleave, ratio
from oner_fast.train.engine.allocator import freed_memory_kept

PROJECTS = ("open_clip", "timm", "transformers")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
THEIRS, OURS = "theirs", "ours"


@dataclass(frozen=True)
class Found:
    """Figures of a subject in a dtype; of each pair the project's own comes first.

    Args:
        project, name, line, dtype: what was measured.
        losses: relative errors of the loss.
        gradients: relative errors of the gradients.
        kept: bytes kept for backward.
        speed: the project's own time / that with the line.
    """

    project: str
    name: str
    line: str
    dtype: str
    losses: tuple[float, float]
    gradients: tuple[float, float]
    kept: tuple[int, int]
    speed: Ratio


def under(dtype: str) -> AbstractContextManager[object]:
    """Compute as training does: under autocast in bfloat16, or in float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")


def backward(loss: Loss, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Return the loss and the gradients, in float64; leaves without a gradient have zeros."""
    total = loss()
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    found = (torch.zeros_like(leaf) if x is None else x for x, leaf in zip(gradients, leaves, strict=True))
    return [total.detach().double(), *(x.double() for x in found)]


def distance(found: Sequence[Tensor], exact: Sequence[Tensor]) -> tuple[float, float]:
    """Return the relative error of the loss, and that of all gradients together in the 2-norm."""
    apart = torch.stack([(x - right).norm() for x, right in zip(found[1:], exact[1:], strict=True)]).norm()
    whole = torch.stack([right.norm() for right in exact[1:]]).norm()
    return float((found[0] - exact[0]).abs() / exact[0].abs()), float(apart / whole)


def measure(subject: Subject, dtypes: Sequence[str], seconds: float) -> list[Found]:
    """Measure a subject."""
    exact_pair = subject.make(torch.float64)
    exact = backward(exact_pair.theirs, exact_pair.leaves)
    del exact_pair
    pair = subject.make(torch.float32)
    return [_measure(subject, pair, exact, dtype, seconds) for dtype in dtypes]


def _measure(subject: Subject, pair: Pair, exact: Sequence[Tensor], dtype: str, seconds: float) -> Found:
    ways = {THEIRS: pair.theirs, OURS: pair.ours}
    with under(dtype):
        errors = {name: distance(backward(loss, pair.leaves), exact) for name, loss in ways.items()}
        kept = {name: saved_during(loss, pair.given)[1] for name, loss in ways.items()}

        def candidate(name: str, loss: Loss) -> Candidate:
            return Candidate(name, lambda call: torch.autograd.grad(loss(), pair.leaves, allow_unused=True))

        with freed_memory_kept():
            samples = interleave([candidate(*way) for way in ways.items()], seconds=seconds)
    losses, gradients = zip(errors[THEIRS], errors[OURS], strict=True)
    speed = ratio(samples[THEIRS], samples[OURS])
    about = subject.project, subject.name, subject.line, dtype
    return Found(*about, losses, gradients, (kept[THEIRS], kept[OURS]), speed)


def markdown(found: Sequence[Found], about: str) -> str:
    """Format the figures as a page: the precision in bfloat16 first, then time and memory."""
    lines = [f"# One line in other projects' code\n\nWritten by `oner-fast bench integrations`. {about}\n"]
    for dtype in DTYPES:
        rows = [one for one in found if one.dtype == dtype]
        if not rows:
            continue
        title = "bfloat16, under autocast" if dtype == "bfloat16" else dtype
        lines += [
            f"## {title}\n",
            "| project | forward and backward of | line | error of the loss | with it | error of the gradients "
            "| with it | times as fast | p20 to p80 | kept for backward, MiB | with it |",
            "|---|---|---|---:|---:|---:|---:|---:|---|---:|---:|",
            *(_row(one) for one in rows),
            "",
        ]
    return "\n".join(lines)


def _row(one: Found) -> str:
    errors = (f"{x:.1e}" for x in (*one.losses, *one.gradients))
    speed = f"{one.speed.p50:.2f}x", f"{one.speed.p20:.2f} to {one.speed.p80:.2f}"
    kept = (f"{x / 2**20:.1f}" for x in one.kept)
    return f"| {one.project} | {one.name} | `{one.line}` | {' | '.join((*errors, *speed, *kept))} |"


def _write(page: bytes, file: BinaryIO) -> None:
    file.write(page)


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command."""
    made = argparse.ArgumentParser(prog="oner-fast bench integrations", description=__doc__)
    made.add_argument("--project", nargs="+", choices=PROJECTS, default=list(PROJECTS), help="only these")
    made.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    made.add_argument("--seconds", type=float, default=20.0, help="for each row (default: 20)")
    made.add_argument("--quick", action="store_true", help="small shapes")
    made.add_argument("--out", type=Path, default=None, help="Markdown file for the page")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    made = parser()
    options = made.parse_args(argv)
    if not 0 < options.seconds < float("inf"):
        made.error(f"--seconds must be positive, got {options.seconds:g}")
    if lacking := [name for name in options.project if find_spec(name) is None]:
        made.error(f"{', '.join(lacking)} not installed here; install them, or choose others with --project")
    about = machine.describe().line()
    print(about, flush=True)
    found: list[Found] = []
    for subject in subjects(options.quick):
        if subject.project not in options.project:
            continue
        found += measure(subject, options.dtypes, options.seconds)
        print("\n".join(_row(one) for one in found[-len(options.dtypes) :]), flush=True)
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            page = markdown(found, about).encode()
            write_atomic(options.out, partial(_write, page))
    return 0
