"""Ranks that call alike tell each other nothing before an op: the host would wait for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from oner_fast.ops.collectives import exchanged, ranks_alike

GROUP: Any = None
CPU = torch.device("cpu")


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], list[int]]:
    """Sets what the second of two ranks says; returns the list of exchanges, one entry each."""
    said: list[int] = []
    exchanges: list[int] = []

    def gather(found: list[torch.Tensor], own: torch.Tensor, group: Any = None) -> None:
        exchanges.append(len(own))
        found[0].copy_(own)
        found[1].copy_(torch.tensor(said))

    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(dist, "all_gather", gather)

    def say(numbers: list[int]) -> list[int]:
        said[:] = numbers
        return exchanges

    return say


def test_alike_they_exchange_nothing(others: Any) -> None:
    exchanges = others([5, 1])
    with ranks_alike():
        assert exchanged((5, 1), CPU, GROUP) == [(5, 5), (1, 1)] and not exchanges
    assert exchanged((4, 0), CPU, GROUP) == [(4, 5), (0, 1)] and len(exchanges) == 1


def test_an_error_ends_it(others: Any) -> None:
    exchanges = others([5, 1])
    with pytest.raises(KeyError), ranks_alike():
        raise KeyError
    exchanged((5, 1), CPU, GROUP)
    assert len(exchanges) == 1


def test_debugging_finds_ranks_that_differ(others: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONER_FAST_DEBUG", "1")
    others([3, 1])
    with ranks_alike():
        with pytest.raises(ValueError, match=r"call alike .* \[\(5, 1\), \(3, 1\)\] by rank"):
            exchanged((5, 1), CPU, GROUP)
        assert exchanged((3, 1), CPU, GROUP) == [(3, 3), (1, 1)]
