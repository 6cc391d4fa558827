"""`oner-fast bench history FOLDER`: draw the records of many commits as one HTML page."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO

from oner_fast.atomic import write_atomic
from oner_fast.benchmarks.history.action import action_results
from oner_fast.benchmarks.history.folder import read_folder
from oner_fast.benchmarks.history.page import history_page
from oner_fast.benchmarks.page.render import render
from oner_fast.remedies import install_extra_command


def parser() -> argparse.ArgumentParser:
    """Make the parser of `oner-fast bench history`."""
    made = argparse.ArgumentParser(prog="oner-fast bench history", description=__doc__)
    made.add_argument("folder", type=Path, metavar="FOLDER", help="holds the records, one *.json for each commit")
    made.add_argument("--out", type=Path, default=None, help="the page (default: FOLDER/history.html)")
    made.add_argument(
        "--action-json",
        type=Path,
        default=None,
        metavar="FILE",
        help='write the newest record for github-action-benchmark (tool "customBiggerIsBetter")',
    )
    made.add_argument("--commit", default="", metavar="SHA", help="write this commit's record instead of the newest")
    made.add_argument(
        "--repository", type=Path, default=Path(), help="the clone whose first-parent line orders the commits (here)"
    )
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command; returns 0, or 2 where there is no record or a file cannot be written."""
    options = parser().parse_args(argv)
    out = options.folder / "history.html" if options.out is None else options.out
    try:
        history = read_folder(options.folder, options.repository)
        for name, why in history.left_out:
            print(f"left out: {name}: {why}", file=sys.stderr)
        texts = {out: render(history_page(history))}
        if options.action_json is not None:
            texts[options.action_json] = (
                json.dumps(action_results(history, options.commit), indent=1, allow_nan=False) + "\n"
            )
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, partial(_write, text))
    except ModuleNotFoundError as error:
        print(
            f"oner-fast bench history: the page needs {error.name}: {install_extra_command('bench')}", file=sys.stderr
        )
        return 2
    except (OSError, ValueError) as error:
        print(f"oner-fast bench history: {error}", file=sys.stderr)
        return 2
    print(f"{len(history.records)} records by {history.order}; wrote {', '.join(map(str, texts))}")
    return 0


def _write(text: str, file: IO[bytes]) -> None:
    file.write(text.encode())
