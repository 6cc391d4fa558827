"""`oner-fast checkpoint verify RUN|FILE`: list checkpoints, and say which are damaged and why."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from oner_fast.train.engine import checkpoint


@dataclass(frozen=True)
class Finding:
    """The state of one checkpoint file.

    Attributes:
        path: the file.
        step: the number of finished steps that it holds; None where it cannot be read.
        size: bytes; None where there is no file.
        problem: None for a whole file, else a sentence.
    """

    path: Path
    step: int | None
    size: int | None
    problem: str | None

    def line(self, width: int) -> str:
        """Describe the finding in one line, with the name padded to `width`."""
        step = "-" if self.step is None else str(self.step)
        size = "-" if self.size is None else f"{self.size / 2**20:.1f} MiB"
        return f"{self.path.name:<{width}}  step {step:>8}  {size:>12}  {self.problem or 'whole'}"


def examine(path: Path) -> Finding:
    """Read a checkpoint once and report its state; nothing is changed."""
    step: int | None = None
    problem: str | None = None
    try:
        step = checkpoint.check(path)
    except checkpoint.DamagedCheckpoint as error:
        problem = f"damaged: {error}"
    except (OSError, ValueError) as error:
        problem = f"cannot be used: {error}"
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError:
        size = None
    return Finding(path, step, size, problem)


def main(argv: Sequence[str]) -> int:
    """Run the command; return 0 where every checkpoint is whole, 1 where one is not or there is none.

    The exit code of a wrong command line is 2.
    """
    parser = argparse.ArgumentParser(
        prog="oner-fast checkpoint",
        description="List the checkpoints of a run with step, size and state. Each is read once and none is changed. "
        "The exit code is 1 where one is damaged.",
    )
    parser.add_argument("verb", choices=["verify"], metavar="verify")
    parser.add_argument("place", type=Path, nargs="+", metavar="RUN|FILE", help="a run, its checkpoints/, or a file")
    try:
        options = parser.parse_args(list(argv))
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 2
    return max([_verify(place) for place in options.place])


def _verify(place: Path) -> int:
    paths = _paths(place)
    if not paths:
        print(f"oner-fast checkpoint: there is no checkpoint at {place}", file=sys.stderr)
        return 1
    aside = sorted(path.name for path in paths[0].parent.glob("step-*.pt.damaged*")) if place.is_dir() else []
    width = max(len(path.name) for path in paths)
    print(paths[0].parent)
    bad = 0
    for path in paths:
        finding = examine(path)
        bad += finding.problem is not None
        print(finding.line(width), flush=True)
    if aside:
        print(f"set aside before: {', '.join(aside)}")
    print(f"{len(paths) - bad} whole, {bad} damaged")
    return 1 if bad else 0


def _paths(place: Path) -> list[Path]:
    if not place.is_dir():
        return [place] if os.path.lexists(place) else []
    if checkpoint.is_name(place.name):  # a directory in a checkpoint's place
        return [place]
    inner = place / "checkpoints"
    return checkpoint.saved(inner if inner.is_dir() else place)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
