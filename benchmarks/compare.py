"""`oner-fast bench compare BEFORE.json AFTER.json`: print what changed beyond the noise.

Exits 1 on a regression (a key is slower, or one of its counts or its memory rose), 2 for bad input, and 0 otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from oner_fast.benchmarks import record
from oner_fast.benchmarks.comparison import ERROR, GONE, MARGIN, NEW, PAIRED_MARGIN, UNKNOWN, Comparison, Row, compare
from oner_fast.benchmarks.values import in_markdown

COLUMNS = ("key", "before", "after", "speed", "interval", "verdict")


def parser() -> argparse.ArgumentParser:
    """Make the parser of `oner-fast bench compare`."""
    made = argparse.ArgumentParser(prog="oner-fast bench compare", description=__doc__)
    made.add_argument("before", type=Path, help="a record, by `pytest benchmarks --benchmark-json=FILE`")
    made.add_argument("after", type=Path, help="the record that is compared with it")
    add_options(made)
    return made


def add_options(made: argparse.ArgumentParser) -> None:
    """Add the options of a comparison and its output."""
    made.add_argument(
        "--margin",
        type=float,
        default=None,
        help=f"least change that counts (default: {PAIRED_MARGIN:g} between records that were measured in turn, "
        f"{MARGIN:g} between others)",
    )
    made.add_argument(
        "--error",
        type=float,
        default=ERROR,
        help=f"probability that noise alone calls any key slower, beside the margin (default: {ERROR:g})",
    )
    output = made.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--markdown", action="store_true", help="print Markdown")


def reason_against(options: argparse.Namespace) -> str:
    """Say what is wrong with the options of a comparison; empty where nothing is."""
    if options.margin is not None and not 0 <= options.margin < float("inf"):
        return f"--margin must be 0 or more, got {options.margin:g}"
    if not 1e-6 <= options.error <= 0.25:
        return f"--error must lie between 1e-06 and 0.25, got {options.error:g}"
    return ""


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(argv)
    if reason := reason_against(options):
        return _fail(reason)
    try:
        records = [record.read(path) for path in (options.before, options.after)]
        found = compare(*records, error=options.error, margin=options.margin)
    except (OSError, ValueError) as problem:
        return _fail(str(problem))
    common = [row for row in found.rows if row.verdict not in (NEW, GONE)]
    if all(row.verdict == UNKNOWN for row in common) and not found.regressions:
        print(text(found), file=sys.stderr)
        return _fail("no key could be compared")
    print(formatted(found, options))
    return 1 if found.regressions else 0


def formatted(found: Comparison, options: argparse.Namespace) -> str:
    """Format a comparison as the options ask."""
    if options.json:
        return json.dumps(found.as_dict(), indent=1)
    return markdown(found) if options.markdown else text(found)


def text(found: Comparison) -> str:
    """Format a comparison for a terminal."""
    rows = [COLUMNS, *(_cells(row) for row in found.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = [*_head(found), ""]
    for cells, row in zip(rows, [None, *found.rows], strict=True):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
        lines += [f"    {note}" for note in (_notes(row) if row else ())]
    return "\n".join([*lines, "", conclusion(found)])


def markdown(found: Comparison) -> str:
    """Format a comparison as Markdown."""
    lines = [*(f"* {in_markdown(line)}" for line in _head(found)), ""]
    lines += [f"| {' | '.join(COLUMNS)} | notes |", "|---|---:|---:|---:|---|---|---|"]
    for row in found.rows:
        key, *cells, verdict = _cells(row)
        verdict = f"**{verdict}**" if row.regressed else verdict
        lines.append(f"| {' | '.join([in_markdown(key), *cells, verdict])} | {in_markdown('; '.join(_notes(row)))} |")
    said = in_markdown(conclusion(found))
    return "\n".join([*lines, "", f"**{said}**" if found.regressions else said])


def conclusion(found: Comparison) -> str:
    """Say in one line how many keys regressed and how small a change would have counted."""
    compared = [row for row in found.rows if row.change is not None]
    worse = found.regressions
    keys = "key" if len(compared) == 1 else "keys"
    names = f": {'; '.join(row.key for row in worse)}" if worse else ""
    said = f"{len(compared)} {keys} compared, {len(worse)} regressed{names}"
    way = "round by round, as both were measured in turn" if found.paired else "as ratios to PyTorch"
    return (
        f"{said}. Times were compared {way}; changes under {found.margin:.0%} do not count, and noise calls any key "
        f"slower with a probability of at most {found.error:.0%}."
    )


def _head(found: Comparison) -> list[str]:
    lines = []
    for name, about in (("before", found.before), ("after", found.after)):
        commit = about["commit"][:12] or "no commit"
        lines.append(f"{name}: {commit}{' with changes' if about['dirty'] else ''}; {about['machine']}")
    old, new = found.before["versions"], found.after["versions"]
    moved = [f"{name} {old[name]} -> {new[name]}" for name in ("torch", "triton", "python") if _differ(old, new, name)]
    if moved:
        lines.append(f"other versions: {', '.join(moved)}; PyTorch's own times moved with them")
    return lines


def _differ(old: dict[str, str], new: dict[str, str], name: str) -> bool:
    return name in old and name in new and old[name] != new[name]


def _cells(row: Row) -> tuple[str, ...]:
    ratios = [f"{value:.2f}x" if value is not None else "" for value in (row.before, row.after)]
    if row.change is None or row.low is None or row.high is None:
        return row.key, *ratios, "", "", row.verdict
    return row.key, *ratios, f"{row.change:+.1%}", f"{row.low:+.1%} to {row.high:+.1%}", row.verdict


def _notes(row: Row) -> list[str]:
    return [*(f"MORE {one}" for one in row.more), *(f"less {one}" for one in row.less), *row.remarks]


def _fail(message: str) -> int:
    print(f"oner-fast bench compare: {message}", file=sys.stderr)
    return 2
