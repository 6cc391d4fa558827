"""`oner-fast bench page`: write the report of a results.json, or of a commit's record, as Markdown, SVG and HTML."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from oner_fast.benchmarks.recorded import report_of


def parser() -> argparse.ArgumentParser:
    """Make the parser of `oner-fast bench page`."""
    made = argparse.ArgumentParser(prog="oner-fast bench page", description=__doc__)
    made.add_argument("file", type=Path, metavar="FILE", help="a results.json, or a record of `pytest benchmarks`")
    made.add_argument("--out", type=Path, default=None, help="the report's folder (default: the file's)")
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command; returns 0, or 2 for a file that cannot be read or a folder that cannot be written."""
    options = parser().parse_args(argv)
    try:
        written = report_of(options.file).write(options.file.parent if options.out is None else options.out)
    except (OSError, ValueError) as error:
        print(f"oner-fast bench page: {error}", file=sys.stderr)
        return 2
    print(f"wrote {', '.join(str(path) for path in written)}")
    return 0
