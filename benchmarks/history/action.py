"""The newest record as github-action-benchmark reads it, with its tool "customBiggerIsBetter"."""

from __future__ import annotations

from typing import Any

from oner_fast.benchmarks.history.folder import History
from oner_fast.benchmarks.history.page import spread


def action_results(history: History) -> list[dict[str, Any]]:
    """Return a result for each measurement of the newest record that has a baseline: its ratio and its spread."""
    newest = history.records[-1]
    found = []
    for entry in newest.record.entries:
        if not entry.best:
            continue
        low, middle, high = spread(entry)
        extra = [f"against {entry.best}", f"served by {entry.served}", newest.record.machine]
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
    return found
