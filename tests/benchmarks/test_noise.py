"""Measure how often noise raises an alarm, and whether a planted slow-down does.

`make statistics` runs it, for an hour or more. Each pair is a file of runs/noise, so that the same command goes on
where it was interrupted. The margins were fixed on another series, see docs/benchmarks.md.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

import oner_fast.cli
from oner_fast.benchmarks import noise
from oner_fast.benchmarks.comparison import SLOWER, Comparison, Row
from oner_fast.benchmarks.noise import FOLDER, IN_TURN, PAIRS, Settings, alarms, caught, collect, judge, margins

OP = "masked_gather"
PLANTED = Settings(planted=(("token_alignment", 1.2),))
PLANTED_PAIRS = 10


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    def said(text: str) -> None:
        with capsys.disabled():
            print(text, flush=True)

    return said


@pytest.mark.statistics
def test_of_100_pairs_of_the_same_build_at_most_one_raises_an_alarm(
    tell: Callable[[str], None], pytestconfig: pytest.Config
) -> None:
    folder = pytestconfig.rootpath / FOLDER / "same"
    found = judge(collect(folder, PAIRS, Settings(), tell), Settings())
    for way, comparisons in found.items():
        worst = ", ".join(f"{one:.1%}" for one in margins(comparisons)[-3:])
        tell(f"{way}: {alarms(comparisons)} of {len(comparisons)} raise an alarm; the largest margins needed: {worst}")
    assert all(alarms(comparisons) <= 1 for comparisons in found.values())


@pytest.mark.statistics
def test_a_planted_slow_down_of_a_fifth_is_caught(tell: Callable[[str], None], pytestconfig: pytest.Config) -> None:
    folder = pytestconfig.rootpath / FOLDER / "planted"
    comparisons = judge(collect(folder, PLANTED_PAIRS, PLANTED, tell), PLANTED)[IN_TURN]
    found = caught(comparisons, PLANTED.planted[0][0])
    tell(f"in turn: caught in {found} of {len(comparisons)}")
    assert found >= PLANTED_PAIRS - 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--plant", f"{OP}=inf"], "--plant needs a factor above 1 and up to 100, got inf"),
        (["--plant", f"{OP}=nan"], "--plant needs a factor above 1"),
        (["--plant", f"{OP}=-1"], "--plant needs a factor above 1"),
        (["--plant", f"{OP}=x"], "--plant must be OP=FACTOR"),
        (["--plant", "other=1.2"], "--plant must name an op that is measured"),
        (["--op", "token_alignment", "--plant", "masked_gather=1.2"], "one of token_alignment, got 'masked_gather'"),
        (["--margin", "nan"], "--margin must be 0 or more"),
        (["--seconds", "inf"], "--seconds must be positive"),
        (["--out", __file__], "--out must be a folder"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert oner_fast.cli.main(["bench", "noise", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_an_op_that_was_not_measured_is_not_caught() -> None:
    assert noise.caught([Comparison({}, {}, True, 0.01, 0.05, [Row("other x", SLOWER)])], OP) == 0


def test_alarms_and_margins_are_counted_by_the_worst_key() -> None:
    from oner_fast.benchmarks.comparison import SAME, SLOWER, Comparison, Row

    def made(*highs: float) -> Comparison:
        rows = [Row(f"op {i}", SLOWER if high < -0.05 else SAME, 1, 1, 0, -0.5, high) for i, high in enumerate(highs)]
        return Comparison({}, {}, True, 0.01, 0.05, rows)

    comparisons = [made(0.1, -0.2), made(0.1, 0.0), made(-0.1, -0.5)]
    assert alarms(comparisons) == 2 and caught(comparisons, "op") == 1
    assert margins(comparisons) == pytest.approx([0.0, 0.25, 1.0])
