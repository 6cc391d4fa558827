"""Gates of continuous integration: exact counts of every op. `test_speed.py` has what is measured.

Bytes kept for backward, graph breaks and FLOPs must be those that the cases promise. Where an op has no compiled
implementation, the test is skipped.
"""

from __future__ import annotations

import pytest

from oner_fast.benchmarks.cases import OURS, Case
from oner_fast.benchmarks.counts import counted_flops, expected, of_case
from oner_fast.benchmarks.ops import cases
from oner_fast.ops.implementations import choose

every_case = pytest.mark.parametrize("case", cases(quick=True), ids=lambda case: case.key)


def skip_unless_compiled(case: Case) -> None:
    ours = case.contender(OURS)
    op, device, facts = case.facts_of(ours.layout(case.make(0, "cpu")), "cpu")
    served = choose(op, device, **facts)
    if not served.compiled:
        pytest.skip(f"{case.op} uses {served.name!r}, which has no gate")


@every_case
def test_counts(case: Case) -> None:
    skip_unless_compiled(case)
    assert of_case(case) == expected(case)


@pytest.mark.parametrize("case", [one for one in cases(True) if one.counted is not None], ids=lambda case: case.key)
def test_flops_of_the_baseline(case: Case) -> None:
    """Count the first eager baseline that calls matrix products itself instead of a fused op."""
    name = next(one.name for one in case.contenders if one.eager and "SDPA" not in one.name)
    assert counted_flops(case, name) == case.counted
