"""Gates of continuous integration, by pytest-benchmark: `pytest benchmarks`.

Counts are gated exactly (bytes kept for backward, graph breaks, FLOPs), wall-clock ratios loosely: a gate is about half
of the ratio that was reached. An op fails only if it stays below its gate in every attempt, since other work disturbs
single attempts. Where an op has no compiled implementation, the test is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from oner_fast.benchmarks.cases import OURS, Case, step
from oner_fast.benchmarks.counts import counted_flops, graph_breaks
from oner_fast.benchmarks.measure import Settings, measure
from oner_fast.benchmarks.ops import cases
from oner_fast.benchmarks.peak_memory import saved_bytes
from oner_fast.ops.implementations import choose
from oner_fast.train.engine.allocator import freed_memory_kept

SECONDS = 1.5
ATTEMPTS = 3
# About half of the ratios of three quick runs on two cores of a Xeon with AVX-512-BF16 and no AMX; not the targets.
GATES = {
    ("masked_gather", torch.float32): 1.0,  # 1.9 to 2.1
    ("gather_patches", torch.float32): 0.7,  # 1.2 to 1.3
    ("mixup_info_nce", torch.float32): 0.4,  # 0.80 to 0.83
    ("mixup_info_nce", torch.bfloat16): 0.4,  # 0.80 to 0.84
    ("varlen_attention", torch.float32): 0.5,  # 0.96 to 1.73
    ("varlen_attention", torch.bfloat16): 0.5,  # 0.94 to 1.29
    ("token_alignment", torch.float32): 0.6,  # 0.80 to 1.53
}
every_case = pytest.mark.parametrize("case", cases(quick=True), ids=lambda case: case.key)


@pytest.fixture(autouse=True, scope="module")
def _no_fresh_pages() -> Iterator[None]:
    """Keep freed memory, as training and `oner-fast bench ops` do, so that no candidate pays for fresh pages."""
    with freed_memory_kept():
        yield


def skip_unless_compiled(case: Case) -> None:
    ours = case.contender(OURS)
    op, device, facts = case.facts_of(ours.layout(case.make(0, "cpu")), "cpu")
    served = choose(op, device, **facts)
    if not served.compiled:
        pytest.skip(f"{case.op} uses {served.name!r}, which has no gate")


@every_case
def test_saved_bytes(case: Case) -> None:
    skip_unless_compiled(case)
    ours = case.contender(OURS)
    assert saved_bytes(ours.forward, ours.layout(case.make(0, "cpu")))[1] == case.saved


@every_case
def test_graph_breaks(case: Case) -> None:
    skip_unless_compiled(case)
    ours = case.contender(OURS)
    assert graph_breaks(ours.forward, ours.layout(case.make(0, "cpu"))) == 0


@every_case
def test_flops(case: Case) -> None:
    """Only products count; operations that move memory have no FLOPs."""
    skip_unless_compiled(case)
    assert counted_flops(case, OURS) == (case.flops if case.limit == "gemm" else 0)


@pytest.mark.parametrize("case", [one for one in cases(True) if one.counted is not None], ids=lambda case: case.key)
def test_flops_of_the_baseline(case: Case) -> None:
    """Count the first eager baseline that calls matrix products itself instead of a fused op."""
    name = next(one.name for one in case.contenders if one.eager and "SDPA" not in one.name)
    assert counted_flops(case, name) == case.counted


@every_case
def test_speed(case: Case, benchmark: Any) -> None:
    ours = case.contender(OURS)
    call = ours.layout(case.make(0, "cpu"))
    benchmark.pedantic(step, (ours.forward, call), rounds=5, warmup_rounds=1)
    skip_unless_compiled(case)
    gate, found = GATES[case.op, case.dtype], []
    for _ in range(ATTEMPTS):
        row = measure(case, Settings(SECONDS, memory=False))
        assert not row.refused and row.speedup is not None
        found.append(f"{row.speedup.p50:.2f}x of {row.best}")
        benchmark.extra_info.update(ratio=row.speedup.p50, against=row.best)
        if row.speedup.p50 >= gate:
            return
    pytest.fail(f"{', '.join(found)}; the gate is {gate}x")
