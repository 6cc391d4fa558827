"""`oner-fast bench page`: write the report of a results.json, or of a commit's record, as Markdown, SVG and HTML."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from oner_fast.benchmarks.recorded import report_of
from oner_fast.benchmarks.report import Report


def parser() -> argparse.ArgumentParser:
    """Make the parser of `oner-fast bench page`."""
    made = argparse.ArgumentParser(prog="oner-fast bench page", description=__doc__)
    made.add_argument("file", type=Path, metavar="FILE", help="a results.json, or a record of `pytest benchmarks`")
    made.add_argument("--out", type=Path, default=None, help="the report's folder (default: the file's)")
    return made


def _spare(target: Path, file: Path, report: Report) -> None:
    """Refuse to replace the figures of another command. Raises ValueError."""
    if not target.exists() or target.samefile(file):
        return
    try:
        command = report_of(target).command
    except ValueError:
        command = ""
    if command != report.command:
        raise ValueError(f"{target} holds other figures, which this would replace: give another folder with --out")


def main(argv: Sequence[str]) -> int:
    """Run the command; returns 0, or 2 for a file that cannot be read or a folder that cannot be written."""
    options = parser().parse_args(argv)
    try:
        report = report_of(options.file)
        folder = options.file.parent if options.out is None else options.out
        _spare(folder / "results.json", options.file, report)
        written = report.write(folder)
    except (OSError, ValueError) as error:
        print(f"oner-fast bench page: {error}", file=sys.stderr)
        return 2
    print(f"wrote {', '.join(str(path) for path in written)}")
    return 0
