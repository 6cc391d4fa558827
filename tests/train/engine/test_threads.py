"""The number of threads: the fewest that are fast enough, recorded, and the same after a resume."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from oner_fast.train.config.common import Run
from oner_fast.train.config.serialization import from_dict, to_dict
from oner_fast.train.engine import threads
from oner_fast.train.engine.distributed import World
from oner_fast.train.engine.pace_watch import PaceWatch
from oner_fast.train.engine.threads import fewest_fast_enough, settle_threads, slow_threads, time_threads

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({1: 1.0}, 1),
        ({1: 1.0, 2: 0.55}, 2),
        ({1: 1.0, 2: 0.95}, 1),  # a second thread that saves a twentieth is not worth a core
        ({1: 1.0, 2: 34.0}, 1),  # a busy neighbour
        ({1: 1.0, 2: 0.52, 4: 0.27, 8: 0.26}, 4),
        ({1: 1.0, 2: 0.52, 4: 3.0, 8: 9.0}, 2),
    ],
)
def test_the_fewest_threads_that_are_fast_enough(times: dict[int, float], expected: int) -> None:
    assert fewest_fast_enough(times) == expected


def test_a_number_that_is_far_slower_than_one_is_named() -> None:
    assert slow_threads({1: 1.0, 2: 1.2}) is None
    said = slow_threads({1: 1.0, 2: 34.0})
    assert said is not None and said.startswith("2 threads are 34.0 times slower than one here")
    assert "--threads 1 or --threads auto" in said and f"on {len(os.sched_getaffinity(0))} cores" in said


class Machine:
    """A clock, and work whose time depends on the number of threads."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.now, self.seconds, self.order = 0.0, seconds, list[int]()

    def clock(self) -> float:
        return self.now

    def work(self) -> None:
        self.order.append(torch.get_num_threads())
        self.now += self.seconds[self.order[-1]] * (10.0 if len(self.order) <= len(self.seconds) else 1.0)


def test_timing_takes_turns_leaves_out_the_first_round_and_ends() -> None:
    before, state = torch.get_num_threads(), torch.get_rng_state()
    machine = Machine({1: 0.02, 2: 0.01})
    found = time_threads([1, 2], machine.work, machine.clock)
    assert found == pytest.approx({1: 0.02, 2: 0.01})
    assert machine.order[:6] == [1, 2, 1, 2, 1, 2] and 0.5 < machine.now < 1.0
    slow = Machine({1: 0.5, 2: 40.0})
    assert time_threads([1, 2], slow.work, slow.clock) == pytest.approx({1: 5.0, 2: 400.0})
    assert len(slow.order) == 2
    assert torch.get_num_threads() == before and torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], list[list[int]]]]:
    """`timed(ratio)` gives t threads `ratio ** log2(t)` of one thread's time; returns the numbers that are timed."""
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "_DEFAULT", 8)
    monkeypatch.setattr(threads, "_cores", lambda: 8)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    asked: list[list[int]] = []

    def set_ratio(ratio: float) -> list[list[int]]:
        def fake(numbers: list[int], work: object) -> dict[int, float]:
            asked.append(list(numbers))
            return {number: number ** math.log2(ratio) for number in numbers}

        monkeypatch.setattr(threads, "time_threads", fake)
        return asked

    yield set_ratio
    torch.set_num_threads(before)


def test_auto_tries_powers_of_two_and_leaves_cores_to_the_workers(
    timed: Callable[[float], list[list[int]]], caplog: pytest.LogCaptureFixture
) -> None:
    asked = timed(0.6)
    with caplog.at_level(logging.INFO):
        found = settle_threads("auto", ALONE, workers=1, dtype=torch.float32)
    assert asked == [[1, 2, 4, 8]] and found.used == 8 == torch.get_num_threads()
    assert found.asked == "auto" and list(found.milliseconds) == ["1", "2", "4", "8"]
    assert "--threads auto: 8 of 8 cores (1: 1000.0 ms, 2: 600.0 ms" in caplog.text
    assert settle_threads("auto", ALONE, workers=3, dtype=torch.float32).used == 6 and asked[-1] == [1, 2, 4, 6]
    assert settle_threads("auto", ALONE, workers=20, dtype=torch.float32).used == 1 and len(asked) == 2


def test_auto_divides_the_cores_among_the_ranks_of_a_machine(
    timed: Callable[[float], list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = timed(0.6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert settle_threads("auto", ALONE, workers=0, dtype=torch.float32).used == 4 and asked == [[1, 2, 4]]


def test_a_busy_neighbour_leaves_one_thread(timed: Callable[[float], list[list[int]]]) -> None:
    timed(30.0)
    assert settle_threads("auto", ALONE, workers=1, dtype=torch.float32).used == 1 == torch.get_num_threads()


def test_a_resumed_run_keeps_its_number_whatever_would_be_faster_now(
    timed: Callable[[float], list[list[int]]], caplog: pytest.LogCaptureFixture
) -> None:
    asked = timed(30.0)
    assert settle_threads("auto", ALONE, workers=1, recorded=2, dtype=torch.float32).used == 2
    assert asked == [[1, 2]] and "2 threads are 30.0 times slower than one here" in caplog.text
    for unusable in (None, 0, 64, "2", True):
        assert settle_threads("auto", ALONE, workers=1, recorded=unusable, dtype=torch.float32).used == 1
        assert asked[-1] == [1, 2, 4, 8]


def test_a_number_is_obeyed_and_a_slow_one_is_named(
    timed: Callable[[float], list[list[int]]], caplog: pytest.LogCaptureFixture
) -> None:
    asked = timed(0.6)
    assert settle_threads(1, ALONE, workers=9, dtype=torch.float32).used == 1 and asked == []
    assert settle_threads(4, ALONE, workers=9, recorded=2, dtype=torch.float32).used == 4 == torch.get_num_threads()
    assert settle_threads(0, ALONE, workers=9, dtype=torch.float32).used == 8
    assert asked == [[1, 4], [1, 8]] and caplog.text == ""
    timed(5.0)
    assert settle_threads(2, ALONE, workers=1, dtype=torch.float32).used == 2
    assert "2 threads are 5.0 times slower" in caplog.text


@pytest.mark.slow  # the scheduler decides what a neighbour takes, so this is no check of every change
def test_with_busy_cores_one_thread_is_chosen() -> None:
    """A real neighbour on each core: threads that wait for each other lose more than one alone."""
    busy = f"import os\nwhile os.getppid() == {os.getpid()}: pass"
    neighbours = [subprocess.Popen([sys.executable, "-c", busy]) for _ in os.sched_getaffinity(0)]
    try:
        chosen = [fewest_fast_enough(time_threads([1, 2], threads._products(torch.float32))) for _ in range(2)]
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()
    assert 1 in chosen


def test_the_record(tmp_path: Path) -> None:
    threads.Threads("auto", 2, {"1": 20.5, "2": 11.0}).save(tmp_path)
    assert json.loads((tmp_path / "run.json").read_text()) == {
        "format_version": 1,
        "threads": {"asked": "auto", "used": 2, "milliseconds": {"1": 20.5, "2": 11.0}},
    }


@pytest.mark.parametrize("value", ["auto", 0, 1, 7])
def test_configurations_hold_a_number_or_auto(value: int | str) -> None:
    assert from_dict(Run, to_dict(Run()) | {"threads": value}).threads == value


def test_other_values_are_refused() -> None:
    for value in ("two", 1.5, None):
        with pytest.raises((TypeError, ValueError), match="threads"):
            from_dict(Run, {"threads": value})
    with pytest.raises(ValueError, match="threads must be auto, 0 or more, got -1"):
        Run(threads=-1)


def watch(paces: list[float], data_wait: float = 0.0, count: int | None = 2) -> list[str | None]:
    watching = PaceWatch(count, lambda: "load 3.0 on 2 cores")
    return [watching.read(pace, data_wait) for pace in paces]


def test_a_fallen_pace_is_said_once_with_the_remedy() -> None:
    said = watch([1013.0, 900.0, 30.0, 31.0, 30.0, 29.0, 1000.0, 30.0, 30.0, 30.0])
    assert [index for index, each in enumerate(said) if each] == [4]
    assert said[4] == (
        "the pace fell from 1013.0 to 30.0 samples/s: another process may keep the processor busy (load 3.0 on 2 "
        "cores); stop it, or stop this run and continue it with --threads 1"
    )


def test_a_short_or_small_fall_is_not_said() -> None:
    assert not any(watch([1000.0, 400.0, 340.0, 350.0, 340.0, 340.0]))
    assert not any(watch([1000.0, 30.0, 30.0, 900.0, 30.0, 30.0, 900.0]))


def test_the_remedy_fits_the_cause() -> None:
    assert str(watch([90.0, 9.0, 9.0, 9.0], data_wait=0.9)[3]).endswith(
        "90% of the time is spent waiting for data: give more --workers"
    )
    for count in (None, 1):
        assert str(watch([90.0, 9.0, 9.0, 9.0], count=count)[3]).endswith("(load 3.0 on 2 cores); stop it")
