"""Measure what looks slower or faster again, in fresh processes, and believe it where it comes again.

A process keeps for all of its rounds what it has by luck, such as its memory's places in the caches, so no number of
rounds tells luck from a change of the code. Another process has other luck.
"""

from __future__ import annotations

from dataclasses import replace

from oner_fast.benchmarks.comparison import FASTER, SAME, SLOWER, Comparison, Row


def doubtful(found: Comparison) -> list[str]:
    """List the keys that are slower or faster."""
    return [row.key for row in found.rows if row.verdict in (SLOWER, FASTER)]


def confirmed(first: Comparison, again: Comparison) -> Comparison:
    """Return `first`, in which a key is slower or faster only where it is so in `again` too.

    Args:
        first: the comparison of the first run.
        again: that of the second run, which has the doubtful keys.
    """
    second = {row.key: row for row in again.rows}
    return replace(first, rows=[_confirmed(row, second.get(row.key)) for row in first.rows])


def _confirmed(row: Row, again: Row | None) -> Row:
    if row.verdict not in (SLOWER, FASTER) or again is None or again.verdict == row.verdict:
        return row
    second = again.verdict if again.change is None else f"{again.change:+.1%}"
    remark = f"{row.verdict} in the first processes ({row.change:+.1%}) and not in others ({second})"
    return replace(row, verdict=SAME, remarks=[*row.remarks, remark])
