"""A record as github-action-benchmark reads it, with its tool "customBiggerIsBetter"."""

from __future__ import annotations

from typing import Any

from oner_fast.benchmarks.history.folder import History
from oner_fast.benchmarks.history.page import spread


def action_results(history: History, commit: str = "") -> list[dict[str, Any]]:
    """Return a result for each measurement of a record that has a baseline: its ratio and its spread.

    Args:
        history: the records.
        commit: the SHA whose record is meant; the newest record where it is empty.

    Raises:
        ValueError: no record is of this commit, or none of its measurements has a baseline, which the action refuses.
    """
    chosen = [one for one in history.records if commit in ("", one.record.commit)]
    if not chosen:
        raise ValueError(f"no record is of commit {commit!r}")
    one = chosen[-1]
    found = []
    for entry in one.record.entries:
        if not entry.best:
            continue
        low, middle, high = spread(entry)
        extra = [f"against {entry.best}", f"served by {entry.served}", one.record.machine]
        if entry.limit:
            extra.insert(2, f"{entry.limit.share:.0%} of the machine's limit")
        found.append(
            {
                "name": entry.key,
                "unit": "times as fast as the fastest of PyTorch",
                "value": middle,
                "range": f"{low:.3f} to {high:.3f}",
                "extra": "\n".join(extra),
            }
        )
    if not found:
        raise ValueError(f"the record of commit {one.commit} has no measurement with a baseline")
    return found
