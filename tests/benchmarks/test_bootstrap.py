from __future__ import annotations

import math

import pytest
import torch

from oner_fast.benchmarks import bootstrap

ROUNDS = 48


def noise(series: int, spread: float, memory: float, seed: int, rounds: int = ROUNDS) -> list[list[float]]:
    """Draw log-normal numbers of median 1; neighbours have the correlation `memory`."""
    drawn = torch.randn(series, rounds, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for place in range(1, rounds):
        drawn[:, place] = memory * drawn[:, place - 1] + math.sqrt(1 - memory**2) * drawn[:, place]
    found: list[list[float]] = (spread * drawn).exp().tolist()
    return found


@pytest.mark.parametrize("memory", [0.0, 0.8])
def test_noise_that_lasts_raises_few_alarms(memory: float) -> None:
    """With an error of 1 % the bound lies above the truth in 1.5 to 2 % of thousands of series, of every memory."""
    before, after = noise(100, 0.1, memory, 1), noise(100, 0.1, memory, 2)
    pairs = list(zip(before, after, strict=True))
    high = sum(bootstrap.independent(a, b, block=1, error=0.01).low > 0 for a, b in pairs)
    low = sum(bootstrap.paired(a, b, block=2, error=0.01).high < 0 for a, b in pairs)
    assert high + low <= 6


def test_single_rounds_would_raise_many_alarms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "_correlation", lambda values: 0.0)
    monkeypatch.setattr(bootstrap, "MOST_BLOCKS", ROUNDS)
    pairs = zip(noise(100, 0.1, 0.8, 1), noise(100, 0.1, 0.8, 2), strict=True)
    assert sum(bootstrap.paired(a, b, block=1, error=0.01).low > 0 for a, b in pairs) > 12


def test_the_interval_holds_the_truth_and_shrinks_with_the_rounds() -> None:
    widths = []
    for rounds in (24, 96, 384):
        (before,), (after,) = noise(1, 0.1, 0.3, 3, rounds), noise(1, 0.1, 0.3, 4, rounds)
        found = bootstrap.paired(before, [1.2 * one for one in after], block=2, error=0.01)
        assert found.low < math.log(1.2) < found.high
        widths.append(found.high - found.low)
    assert widths[0] > 1.5 * widths[1] > 2 * widths[2]


def test_a_few_very_slow_rounds_change_little() -> None:
    (before,), (after,) = noise(1, 0.02, 0.0, 5), noise(1, 0.02, 0.0, 6)
    found = bootstrap.paired(
        before, [one * (50 if i % 8 == 3 else 1) for i, one in enumerate(after)], block=2, error=0.01
    )
    assert abs(found.log) < 0.02 and found.high < math.log(1.2)


def test_rounds_that_are_all_the_same_have_no_noise() -> None:
    found = bootstrap.paired([2.0] * 8, [3.0] * 8, block=2, error=0.01)
    assert found.low == pytest.approx(found.high) == math.log(1.5)


def test_a_few_rounds_seldom_look_quiet_by_chance() -> None:
    """With an error of 0.1 % for each side, the bootstrap alone raises an alarm in 1 % of such series."""
    found = [
        bootstrap.paired([1.0] * 12, one, block=2, error=0.001) for one in noise(900, 0.1, 0.0, 9, 12)
    ]  # fmt: skip
    assert sum(one.low > 0 or one.high < 0 for one in found) <= 4


def test_noise_looks_neither_faster_nor_slower() -> None:
    """The lower of two middle values would lie below the truth in most short series."""
    before, after = noise(300, 0.1, 0.0, 7, 8), noise(300, 0.1, 0.0, 8, 8)
    found = [bootstrap.paired(a, b, block=2, error=0.01).log for a, b in zip(before, after, strict=True)]
    assert abs(sum(found) / len(found)) < 0.008 and 120 < sum(one > 0 for one in found) < 180


def test_other_rounds_than_numbers_are_named() -> None:
    good = [1.0] * 8
    with pytest.raises(ValueError, match="5 rounds after, and at least 6 are needed"):
        bootstrap.independent(good, good[:5], block=1, error=0.01)
    with pytest.raises(ValueError, match="0 rounds before, and at least 6"):
        bootstrap.independent([], good, block=1, error=0.01)
    with pytest.raises(ValueError, match="the same rounds are needed, got 8 before and 7 after"):
        bootstrap.paired(good, good[:7], block=1, error=0.01)
    for bad in (math.nan, 0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match=f"a round after has the value {bad}, and a positive, finite number"):
            bootstrap.paired(good, [*good[:7], bad], block=1, error=0.01)


@pytest.mark.parametrize(
    ("probability", "freedom", "quantile"),
    [(0.975, 1, 12.706), (0.975, 4, 2.776), (0.99, 10, 2.764), (0.999, 7, 4.785), (0.9999, 15, 4.880)],
)
def test_the_quantiles_are_those_of_the_tables(probability: float, freedom: int, quantile: float) -> None:
    assert bootstrap.student_t(probability, freedom) == pytest.approx(quantile, rel=1e-3)
