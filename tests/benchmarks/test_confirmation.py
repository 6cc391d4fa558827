"""A change of speed counts where it comes again in fresh processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from oner_fast.benchmarks import noise
from oner_fast.benchmarks.cases import OURS
from oner_fast.benchmarks.comparison import FASTER, NEW, SAME, SLOWER, UNKNOWN, Comparison, Row
from oner_fast.benchmarks.confirmation import confirmed, doubtful
from oner_fast.benchmarks.turns import AFTER, BEFORE, PYTORCH, Subject


def comparison(*rows: Row) -> Comparison:
    return Comparison({}, {}, True, 0.01, 0.05, list(rows))


def test_a_change_counts_where_it_comes_again() -> None:
    first = comparison(
        Row("a", SLOWER, change=-0.2),
        Row("b", SLOWER, change=-0.2),
        Row("c", FASTER, change=0.3),
        Row("d", FASTER, change=0.3),
        Row("e", SAME, change=0.0),
        Row("f", NEW),
        Row("g", SLOWER, change=-0.2, more=["flops 1 -> 2"]),
        Row("h", SLOWER, change=-0.2),
    )
    assert doubtful(first) == ["a", "b", "c", "d", "g", "h"]
    again = comparison(
        Row("a", SLOWER, change=-0.18),
        Row("b", SAME, change=0.01),
        Row("c", FASTER, change=0.2),
        Row("d", SLOWER, change=-0.2),
        Row("g", SAME, change=0.0),
        Row("h", UNKNOWN),
    )
    found = {row.key: row for row in confirmed(first, again).rows}
    verdicts = {key: row.verdict for key, row in found.items()}
    assert verdicts == {"a": SLOWER, "b": SAME, "c": FASTER, "d": SAME, "e": SAME, "f": NEW, "g": SAME, "h": SAME}
    assert found["b"].remarks == ["slower in the first processes (-20.0%) and not in others (+1.0%)"]
    assert found["h"].remarks == ["slower in the first processes (-20.0%) and not in others (not compared)"]
    # A count that rose needs no second look.
    assert found["g"].regressed and not found["b"].regressed and found["a"] == first.rows[0]


@pytest.mark.parametrize(("second", "alarms"), [(1.0, 0), (1.3, 1)])
def test_a_pair_with_an_alarm_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: float, alarms: int
) -> None:
    settings = noise.Settings(("masked_gather",), 8.0)
    asked: list[tuple[float, list[str] | None]] = []

    def measure(_: noise.Settings, seconds: float, keys: list[str] | None = None) -> Any:
        asked.append((seconds, keys))
        factors = {"quiet": 1.0, "lucky": 1.3 if keys is None else second}
        described = {side: {"line": "", "facts": {"oner_fast": "0"}} for side in (BEFORE, AFTER)}
        return [subject(key, factor) for key, factor in factors.items() if keys is None or key in keys], described

    def subject(key: str, factor: float) -> Subject:
        steady = [1e-3 * (1 + 0.001 * (number % 7)) for number in range(40)]
        times = {
            (BEFORE, OURS): steady,
            (AFTER, OURS): [factor * one for one in steady],
            (PYTORCH, "eager"): steady,
        }
        return Subject(
            key, "op", "masked_gather", "", "float32", served={BEFORE: "cpp", AFTER: "cpp"}, wall=times, busy=times
        )

    monkeypatch.setattr(noise, "_measure", measure)
    for _ in range(2):  # the second time finds all files
        (path,) = noise.collect(tmp_path, 1, settings)
        assert asked == [(8.0, None), (4.0, ["lucky"])]
    found = noise.judge([path], settings)[noise.IN_TURN]
    assert noise.alarms(found) == alarms
    # An interruption between the two runs repeats the second alone.
    noise.again_of(path).unlink()
    noise.collect(tmp_path, 1, settings)
    assert asked[2:] == [(4.0, ["lucky"])]
