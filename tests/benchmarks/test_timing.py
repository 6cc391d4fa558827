from __future__ import annotations

import gc
import time

import pytest

from oner_fast.benchmarks import timing
from oner_fast.benchmarks.timing import Candidate, Rotation, Samples, interleave, quantile, ratio


def test_rounds_are_interleaved_after_preparing_and_warming_up() -> None:
    said: list[str] = []
    candidates = [
        Candidate(name, lambda call, name=name: said.append(f"{name}{call}"), lambda name=name: said.append(f"+{name}"))  # type: ignore[misc]
        for name in "AB"
    ]
    samples = interleave(candidates, rounds=3)
    assert said == ["+A", "A0", "+B", "B1", "A2", "B3", "A4", "B5", "A6", "B7", "A8", "B9"]
    assert {name: len(one.seconds) for name, one in samples.items()} == {"A": 3, "B": 3}


def test_preparation_is_not_timed() -> None:
    sleepy = Candidate("sleepy", lambda call: None, lambda: time.sleep(0.2), setup_seconds=1.0)
    samples = interleave([sleepy], rounds=3)["sleepy"]
    assert 1.2 <= samples.setup_seconds < 2.0 and samples.p80 < 0.1


def test_garbage_collection_stops_while_timing() -> None:
    seen: list[bool] = []
    interleave([Candidate("A", lambda call: seen.append(gc.isenabled()))], rounds=4)
    assert seen[1:] == [False] * 5 and gc.isenabled()


def test_a_slow_candidate_has_few_rounds_within_the_time_limit() -> None:
    samples = interleave(
        [Candidate("fast", lambda call: None), Candidate("slow", lambda call: time.sleep(0.02))], seconds=0.1
    )
    assert len(samples["slow"].seconds) == timing.SLOW_ROUNDS
    assert timing.LEAST_ROUNDS <= len(samples["fast"].seconds) <= timing.MOST_ROUNDS


def test_freeing_the_result_is_timed() -> None:
    alive: list[int] = []

    class Result:
        def __init__(self) -> None:
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    def run(call: int) -> Result:
        assert not alive
        return Result()

    interleave([Candidate("A", run)], rounds=2)
    assert not alive


def test_ratio_is_the_median_of_the_ratios_within_rounds() -> None:
    """The medians of the two columns would give 3 / 2."""
    slower, faster = Samples("slower", [2.0, 30.0, 3.0]), Samples("faster", [1.0, 10.0, 2.0])
    assert ratio(slower, faster).p50 == 2.0
    assert ratio(Samples("few", [2.0, 2.0]), faster).p50 == pytest.approx((2.0 + 0.2) / 2)


def test_quantiles() -> None:
    one = Samples("one", [5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (one.p20, one.p50, one.p80) == (2.0, 3.5, 5.0)
    assert quantile([7.0], 0.2) == 7.0
    with pytest.raises(ValueError, match="at least one sample"):
        quantile([], 0.5)


def test_a_rotation_exceeds_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1000)
    sets = Rotation(lambda index: index, 300)
    assert [sets[call] for call in range(9)] == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    assert len(Rotation(lambda index: index, 10**6).sets) == 2
    assert len(Rotation(lambda index: index, 1, most=5).sets) == 5


@pytest.mark.parametrize("options", [{}, {"seconds": 1.0, "rounds": 1}])
def test_exactly_one_of_seconds_and_rounds_is_needed(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="seconds or rounds"):
        interleave([Candidate("A", lambda call: None)], **options)  # type: ignore[arg-type]


def test_names_are_unique() -> None:
    with pytest.raises(ValueError, match="distinct names"):
        interleave([Candidate("A", lambda call: None)] * 2, rounds=1)
    with pytest.raises(ValueError, match="distinct names"):
        interleave([], rounds=1)
