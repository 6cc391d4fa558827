from __future__ import annotations

import html
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import oner_fast.cli
from oner_fast.benchmarks.compare import markdown
from oner_fast.benchmarks.comparison import FASTER, GONE, NEW, SAME, SLOWER, UNKNOWN, compare
from oner_fast.benchmarks.record import Entry, Record, ratio_of, write

OURS, EAGER = "oner_fast", "eager"
Rounds = dict[str, list[float]]


def rounds(seed: int, count: int = 40, *, machine: float = 1e-3, ours: float = 1.0, spread: float = 0.04) -> Rounds:
    """Draw seconds of ours and of a baseline: load that both share for some rounds, and noise of each call.

    Args:
        seed: the seed.
        count: number of rounds.
        machine: seconds of a call of the baseline.
        ours: our time in units of the baseline's.
        spread: standard deviation of each call's own noise, which neighbours share a little; that of the load, which
            lasts for rounds, is four times as much.
    """
    draw = np.random.default_rng(seed)
    noise = draw.standard_normal((3, count))
    memory = np.array([0.3, 0.3, 0.9])
    for place in range(1, count):
        noise[:, place] = memory * noise[:, place - 1] + np.sqrt(1 - memory**2) * noise[:, place]
    slow = 1 + 2 * (draw.random((2, count)) < 0.02)
    times = machine * np.exp(4 * spread * np.abs(noise[2]) + spread * noise[:2]) * slow
    return {OURS: (ours * times[0]).tolist(), EAGER: times[1].tolist()}


def entry(seconds: Rounds, key: str = "op float32", **others: Any) -> Entry:
    best, ratio = ratio_of(seconds, OURS, [name for name in seconds if name != OURS])
    given = {"kind": "op", "op": "op", "shape": "", "dtype": "float32", "served": "cpp", **others}
    return Entry(key=key, seconds=seconds, best=best, ratio=ratio, **given)


def record(*entries: Entry, **others: Any) -> Record:
    return replace(Record("a machine", {}, {"torch": "2.13.0"}, "c" * 40, False, list(entries)), **others)


def in_turn(seed: int, ours: float = 1.0, spread: float = 0.04, key: str = "op float32") -> tuple[Record, Record]:
    """Make two records that share their rounds; the second is slower by `ours`."""
    shared, other = rounds(seed, spread=spread), rounds(seed + 1_000_000, spread=spread)
    load = np.array(shared[EAGER])
    after = {OURS: (ours * load * np.array(other[OURS]) / np.array(other[EAGER])).tolist(), EAGER: shared[EAGER]}
    facts = {"interleaved": {"id": "one", "rounds_in_a_visit": {key: 2}}}
    return record(entry(shared, key), facts=facts), record(entry(after, key), facts=facts)


def verdict(before: Record, after: Record) -> str:
    (row,) = compare(before, after).rows
    return row.verdict


def test_noise_raises_no_alarm() -> None:
    """The stated rate is 1 % of the comparisons, beside the margin."""
    alarms = [verdict(record(entry(rounds(2 * i))), record(entry(rounds(2 * i + 1)))) for i in range(80)]
    assert set(alarms) == {SAME}
    assert {verdict(*in_turn(i)) for i in range(80)} == {SAME}


def test_many_keys_raise_no_more_alarms_than_one() -> None:
    keys = [f"op {number}" for number in range(30)]
    before, after = (record(*(entry(rounds(31 * i + s), key) for i, key in enumerate(keys))) for s in (0, 5000))
    many, one = compare(before, after), compare(record(before.entries[0]), record(after.entries[0]))
    assert not many.regressions
    wide, narrow = many.rows[0], one.rows[0]
    assert wide.low is not None and narrow.low is not None and wide.low < narrow.low


def test_a_slow_down_of_a_fifth_is_found() -> None:
    """In turn in nearly all pairs; apart in most of a quieter machine's, with a margin that fits it."""
    assert sum(verdict(*in_turn(i, 1.2)) == SLOWER for i in range(40)) >= 39
    assert sum(verdict(*in_turn(i, 1 / 1.2)) == FASTER for i in range(40)) >= 39
    apart = []
    for i in range(40):
        before, after = rounds(2 * i, 80, spread=0.02), rounds(2 * i + 1, 80, ours=1.2, spread=0.02)
        records = record(entry(before)), record(entry(after))
        apart.append(compare(*records, margin=0.1).rows[0].verdict)
        assert verdict(*records) == SAME
    assert apart.count(SLOWER) >= 36


def test_a_machine_of_another_speed_raises_no_alarm() -> None:
    for machine in (3e-3, 1e-3 / 3):
        assert verdict(record(entry(rounds(1))), record(entry(rounds(2, machine=machine)))) == SAME


def test_the_change_is_that_of_speed_and_lies_in_its_interval() -> None:
    (row,) = compare(record(entry(rounds(1, ours=0.5))), record(entry(rounds(2, ours=1.0)))).rows
    assert row.before == pytest.approx(2, rel=0.05) and row.after == pytest.approx(1, rel=0.05)
    assert row.change is not None and row.low is not None and row.high is not None
    assert row.low < row.change < row.high and row.change == pytest.approx(-0.5, abs=0.05)


def test_the_baseline_is_the_fastest_of_both_together() -> None:
    before, after = rounds(1), rounds(2)
    before["other"] = [0.98 * one for one in before[EAGER]]  # a little faster here
    after["other"] = [3.0 * one for one in after[EAGER]]
    (row,) = compare(record(entry(before)), record(entry(after))).rows
    assert row.verdict == SAME and row.before == pytest.approx(1, rel=0.05)


def test_noise_that_could_hide_a_fifth_is_named() -> None:
    (row,) = compare(record(entry(rounds(1, 8, spread=0.3))), record(entry(rounds(2, 8, spread=0.3)))).rows
    assert row.verdict == SAME and row.remarks == ["too noisy to rule out that it takes 20% longer"]


def test_counts_are_compared_exactly_and_the_peak_with_a_tolerance() -> None:
    def made(counts: dict[str, int], peak: int, saved: int = 8) -> Record:
        memory = {OURS: {"peak": peak, "saved": saved, "saved_beyond_inputs": 0}, EAGER: {"peak": peak * peak}}
        return record(entry(rounds(1), counts=counts, memory=memory))

    base = made({"flops": 1000, "saved_bytes": 20}, 100 << 20)
    (row,) = compare(base, made({"flops": 1000, "saved_bytes": 20, "graph_breaks": 1}, 101 << 20)).rows
    assert (row.more, row.less, row.regressed) == ([], [], False)
    (row,) = compare(base, made({"flops": 1000, "saved_bytes": 21}, 100 << 20)).rows
    assert (row.more, row.less, row.regressed, row.verdict) == (["saved_bytes 20 -> 21"], [], True, SAME)
    (row,) = compare(base, made({"flops": 999, "saved_bytes": 20}, 103 << 20, 9)).rows
    assert row.more == ["saved 8 -> 9", "peak memory 100.0 -> 103.0 MiB"] and row.less == ["flops 1,000 -> 999"]


def test_new_and_gone_keys_and_another_implementation_are_no_regression() -> None:
    before = record(entry(rounds(1), "old"), entry(rounds(2), "both"))
    after = record(entry(rounds(3), "both", served="portable"), entry(rounds(4), "new"))
    found = compare(before, after)
    assert {row.key: row.verdict for row in found.rows} == {"old": GONE, "both": SAME, "new": NEW}
    assert not found.regressions and found.rows[1].remarks == ["served by portable, before by cpp"]


def test_times_that_differ_beyond_measure_are_compared() -> None:
    """An interval of this width overflows where its end is not cut."""
    before, after = (
        {OURS: [10.0 ** (-9 if place % 2 else 9) for place in range(8)], EAGER: [low] * 8} for low in (1e-12, 1e9)
    )
    (row,) = compare(record(entry(before)), record(entry(after))).rows
    assert row.verdict == SAME and row.high == pytest.approx(1e6, rel=1e-3) and row.low is not None and row.low >= -1


def test_a_baseline_without_rounds_is_none() -> None:
    lone = replace(entry({OURS: [1.0] * 9}), seconds={OURS: [1.0] * 9, EAGER: []})
    (row,) = compare(record(lone), record(lone)).rows
    assert row.verdict == UNKNOWN and row.remarks == ["the records have no PyTorch baseline of it in common"]


def test_names_from_elsewhere_stay_text_in_markdown() -> None:
    name = "a|b [x](http://e.org) ![i](//e.org/i.png) <img src=x> **1 regressed** `c` @team #1 www.e.org"
    found = compare(
        record(entry(rounds(1), name), machine=name, versions={"torch": "1<b>"}),
        record(entry(rounds(2, ours=2.0), name, served=name), commit=name, versions={"torch": "2"}),
    )
    text = markdown(found)
    assert not re.search(r"[\[\]<>`@]|\*\*1 regressed|http:|www\.|!\[", text) and text.count("\n#") == 0
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {8}
    assert html.unescape(text).count(name) == 4


def test_short_and_lone_rounds_are_not_compared() -> None:
    (row,) = compare(record(entry(rounds(1, 3))), record(entry(rounds(2)))).rows
    assert row.verdict == UNKNOWN and row.remarks == ["3 rounds before, and at least 6 are needed"]
    lone = entry({OURS: [1.0] * 9})
    (row,) = compare(record(lone), record(lone)).rows
    assert row.verdict == UNKNOWN and row.remarks == ["the records have no PyTorch baseline of it in common"]


def test_the_command_says_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        status = oner_fast.cli.main(["bench", "compare", *arguments])
        out, err = capsys.readouterr()
        return status, out, err

    base, slow, other = (str(tmp_path / name) for name in ("base.json", "slow.json", "other.json"))
    write(record(entry(rounds(1), "a|b float32")), base)
    write(record(entry(rounds(2, ours=1.6), "a|b float32"), commit="d" * 40, dirty=True, versions={"torch": "3"}), slow)
    write(record(entry(rounds(2), "other")), other)

    status, out, _ = run(base, base)
    assert status == 0 and "1 key compared, 0 regressed." in out and "changes under 25% do not count" in out
    status, out, _ = run(base, slow)
    assert status == 1 and "1 regressed: a|b float32" in out and "after: dddddddddddd with changes; a machine" in out
    assert "other versions: torch 2.13.0 -> 3" in out
    assert run(base, slow, "--margin", "1")[0] == 0
    status, out, _ = run(base, slow, "--markdown")
    assert status == 1 and "| a&#124;b float32 |" in out and "| **slower** |" in out
    status, out, _ = run(base, slow, "--json")
    found = json.loads(out)
    assert status == 1 and found["regressions"] == 1 and found["rows"][0]["verdict"] == SLOWER
    assert math.isclose(found["rows"][0]["change"], 1 / 1.6 - 1, abs_tol=0.1)

    status, _, err = run(base, other)
    assert status == 2 and "no key in common: one has 'a|b float32', the other 'other'" in err
    status, _, err = run(base, str(tmp_path / "none.json"))
    assert status == 2 and "none.json" in err
    (tmp_path / "broken.json").write_text('{"machine_info": {}}')
    status, _, err = run(str(tmp_path / "broken.json"), base)
    assert status == 2 and "is no record of a commit" in err
    for option, value in (("--margin", "-1"), ("--margin", "nan"), ("--error", "0"), ("--error", "0.9")):
        status, _, err = run(base, base, option, value)
        assert status == 2 and option in err
    short = str(tmp_path / "short.json")
    write(record(entry(rounds(1, 3), "a|b float32")), short)
    status, _, err = run(short, base)
    assert status == 2 and "3 rounds before, and at least 6 are needed" in err and "no key could be compared" in err
