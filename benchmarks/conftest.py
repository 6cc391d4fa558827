"""The plugin of `pytest benchmarks`: the option --full, and what the record says about machine and commit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from oner_fast.benchmarks.machine import describe
from oner_fast.benchmarks.record import NAME, machine_object
from oner_fast.benchmarks.source import commit_of_this, versions
from oner_fast.benchmarks.suite import Memory, memory_of_all
from oner_fast.train.engine.allocator import freed_memory_kept


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --full and --unjudged."""
    group = parser.getgroup("oner_fast")
    group.addoption("--unjudged", action="store_true", help="measure ratios and counts alone, to commit them")
    group.addoption(
        "--full",
        action="store_true",
        help="measure the large shapes, both dtypes and the compiled steps too (about 20 minutes on 2 cores)",
    )


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add the machine's facts, the versions and the commit to the record."""
    here = describe()
    commit, dirty = commit_of_this()
    machine_info[NAME] = machine_object(here.line(), here.as_dict(), versions(), commit, dirty)


@pytest.fixture(autouse=True, scope="session")
def _no_fresh_pages() -> Iterator[None]:
    """Keep freed memory, as training and `oner-fast bench ops` do, so that no candidate pays for fresh pages."""
    with freed_memory_kept():
        yield


@pytest.fixture(scope="session")
def memory(request: pytest.FixtureRequest) -> dict[str, Memory]:
    """Bytes by key and contender, measured once in a process of their own; none with --unjudged."""
    if request.config.getoption("--unjudged"):
        return {}
    return memory_of_all(request.config.getoption("--full"))
