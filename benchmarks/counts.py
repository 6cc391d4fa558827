"""Machine-independent counts: bytes kept for backward, graph breaks and FLOPs."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from oner_fast.benchmarks.cases import OURS, Call, Case, Forward, step
from oner_fast.benchmarks.peak_memory import saved_bytes


def graph_breaks(forward: Forward, call: Call) -> int:
    """Count how often torch.compile would leave the graph in a forward."""
    torch._dynamo.reset()
    breaks = torch._dynamo.utils.counters["graph_break"]
    breaks.clear()
    torch._dynamo.explain(forward)(*call.arguments)
    torch._dynamo.reset()
    # `explain` returns the number of graphs minus one, which misses a break before the first operation.
    return int(sum(breaks.values()))


def counted_flops(case: Case, name: str, device: str = "cpu") -> int:
    """Count the FLOPs of products that PyTorch's counter finds in a contender, forward and backward."""
    contender = case.contender(name)
    call = contender.layout(case.make(0, device))
    with FlopCounterMode(display=False) as counter:
        step(contender.forward, call)
    return int(counter.get_total_flops())


def of_case(case: Case, device: str = "cpu") -> dict[str, int]:
    """Count ours: bytes kept for backward beyond the inputs, graph breaks of torch.compile, and FLOPs of products."""
    ours = case.contender(OURS)
    call = ours.layout(case.make(0, device))
    return {
        "saved_bytes": saved_bytes(ours.forward, call)[1],
        "graph_breaks": graph_breaks(ours.forward, call),
        "flops": counted_flops(case, OURS, device),
    }


def expected(case: Case) -> dict[str, int]:
    """Return the counts that `of_case` must find: those of the case, and no graph break.

    Only products have FLOPs; an op that moves memory has none.
    """
    return {"saved_bytes": case.saved, "graph_breaks": 0, "flops": int(case.flops) if case.limit == "gemm" else 0}
