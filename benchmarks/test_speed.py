"""The record of a commit: every op, a step of each system, and the loader; against the committed ratios.

`pytest benchmarks --benchmark-json=FILE` writes the quick set, and with `--full` the full one. A test fails where a
result is wrong, a count differs from the committed one, or the ratio stays clearly below the committed ratios in every
attempt, since other work disturbs single attempts.
"""

from __future__ import annotations

from typing import Any

import pytest

from oner_fast.benchmarks.machine import describe
from oner_fast.benchmarks.ratios import RATIOS, Ratios, processor_of
from oner_fast.benchmarks.ratios import read as read_ratios
from oner_fast.benchmarks.record import NAME
from oner_fast.benchmarks.replay import clock, replay
from oner_fast.benchmarks.source import versions
from oner_fast.benchmarks.suite import Memory, Subject, subjects, with_memory

ATTEMPTS = 3


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test of each subject of the set."""
    if "subject" in metafunc.fixturenames:
        chosen = subjects(metafunc.config.getoption("--full", default=False))
        metafunc.parametrize("subject", chosen, ids=lambda subject: subject.key)


@pytest.mark.benchmark(timer=clock)
def test_speed(subject: Subject, benchmark: Any, memory: dict[str, Memory], request: pytest.FixtureRequest) -> None:
    """Measure, put the entry into the record, and judge it."""
    unjudged = request.config.getoption("--unjudged", default=False)
    committed, processor = Ratios() if unjudged else read_ratios(RATIOS), processor_of(describe().as_dict())
    failures = []
    for _ in range(ATTEMPTS):
        try:
            entry = subject.measure()
        except ModuleNotFoundError as error:
            pytest.skip(str(error))
        wrong_count = committed.wrong_count(entry, processor, versions())
        failure = wrong_count or committed.regression(entry, processor)
        if not failure:
            break
        failures.append(failure)
        if wrong_count:
            break
    benchmark.group = subject.kind
    benchmark.extra_info[NAME] = with_memory(entry, memory).as_dict()
    replay(benchmark, entry.seconds.get(entry.ours) or [1e-9])
    if failure:
        pytest.fail("; ".join(failures), pytrace=False)
