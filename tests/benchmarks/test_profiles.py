from __future__ import annotations

import time

import pytest
import torch

from oner_fast.benchmarks.cases import Call
from oner_fast.benchmarks.profiles import CALLS, LISTED, OUTSIDE, REST, phases


def test_seconds_of_a_call_by_operation_and_phase() -> None:
    left, right = (torch.randn(1000, 1000).requires_grad_() for _ in range(2))
    upstream = (torch.ones(1000, 1000),)
    calls = [Call((left, right), (left, right), upstream), Call((right, left), (left,), upstream)]
    seen = []

    def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        seen.append(left)
        time.sleep(0.05)
        return (left @ right).sin().exp().abs().sqrt().neg().tanh()

    found = phases(product, calls)
    assert len(seen) == CALLS + 1 and seen[0] is seen[2] is left and seen[1] is seen[3] is right
    assert list(found) == ["forward", "backward"]
    for seconds in found.values():
        listed = list(seconds.values())[:LISTED]
        assert len(seconds) == LISTED + 2 and listed == sorted(listed, reverse=True)
        assert min(seconds.values()) >= 0 and list(seconds)[LISTED:] == [REST, OUTSIDE]
    assert "aten::mm" in found["forward"] and "aten::mm" in found["backward"]
    # Sleeping is not an operation, and the mean is over calls.
    assert 0.05 <= found["forward"][OUTSIDE] < 0.05 * CALLS


@pytest.mark.parametrize("many", [True, False])
def test_a_call_without_leaves_has_no_backward(many: bool) -> None:
    found = phases(lambda x: (2 * x, x) if many else 2 * x, [Call((torch.ones(3),))])
    assert list(found) == ["forward"] and "aten::mul" in found["forward"]
