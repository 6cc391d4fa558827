"""Give pytest-benchmark rounds that were measured before: its statistics are then those of the record's rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_now = 0.0


def clock() -> float:
    """Return the replayed time, in seconds; `@pytest.mark.benchmark(timer=clock)` makes it a test's timer."""
    return _now


def replay(benchmark: Any, seconds: Sequence[float]) -> None:
    """Replay rounds through `benchmark.pedantic`, whose timer must be `clock`; the statistics are exactly theirs."""
    rounds = iter(seconds)

    def reset() -> None:
        global _now
        _now = 0.0

    def run() -> None:
        global _now
        _now = next(rounds)

    benchmark.pedantic(run, setup=reset, rounds=len(seconds))
