"""Machine-independent counts: graph breaks and FLOPs."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from oner_fast.benchmarks.cases import Call, Case, Forward, step


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
