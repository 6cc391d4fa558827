"""A fault at an access to a file ends in a sentence or is named, and nothing that was saved before is lost."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("tensorboard")
pytest.importorskip("matplotlib")
_spec = importlib.util.spec_from_file_location("oner_fast_faults", Path(__file__).with_name("faults.py"))
assert _spec is not None and _spec.loader is not None
faults = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(faults)

NAMES = [scenario.name for scenario in faults.SCENARIOS]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[faults.Bench]:
    made = faults.make_bench(tmp_path_factory.mktemp("faults"))
    yield made
    made.close()


@pytest.mark.parametrize("name", NAMES)
def test_some_faults_lose_nothing(bench: faults.Bench, name: str) -> None:
    scenario = faults.SCENARIOS[NAMES.index(name)]
    calls, expected = bench.calls(scenario)
    chosen = faults.some(calls, scenario.sample)
    results = [bench.meet(scenario, call, how, expected) for call, how in chosen]
    assert not [str(result) for result in results if result.wrong]
    assert any(result.ended == "a sentence" for result in results)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_fault_loses_nothing(bench: faults.Bench, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    scenario = faults.SCENARIOS[NAMES.index(name)]
    calls, expected = bench.calls(scenario)
    results = [bench.meet(scenario, call, how, expected) for call, how in faults.every(calls)]
    with capsys.disabled():
        print("\n" + faults.row(name, calls, results))
    assert not [str(result) for result in results if result.wrong]


def test_a_loss_is_noticed(bench: faults.Bench) -> None:
    """A command that ends well with another outcome, and says nothing, breaks the promise."""
    scenario = faults.SCENARIOS[NAMES.index("index")]
    calls, expected = bench.calls(scenario)
    read = next(call for call in calls if call.kind == "read")
    result = bench.meet(scenario, read, faults.SHORT, expected | {"data/lost": b"saved before"})
    assert result.wrong


def test_accesses_of_every_kind_are_seen(bench: faults.Bench) -> None:
    """The libraries' accesses count too: of numpy, safetensors, matplotlib and the tar writer."""
    seen: Counter[str] = Counter()
    for scenario in faults.SCENARIOS:
        seen.update(call.kind for call in bench.calls(scenario)[0])
    assert set(seen) >= {"open", "create", "read", "write", "fsync", "rename", "unlink", "mkdir", "opendir", "mmap"}
