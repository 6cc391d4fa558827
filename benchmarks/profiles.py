"""Profile a call by PyTorch's profiler: the time of each operation, forward and backward separately."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from oner_fast.benchmarks.cases import Call, Forward

CALLS = 3
LISTED = 5
OUTSIDE, REST = "outside operations", "other operations"
Phases = dict[str, dict[str, float]]


def phases(forward: Forward, calls: Sequence[Call], device: str = "cpu") -> Phases:
    """Mean seconds of a call by operation: {"forward": {operation: seconds}, "backward": ...}, longest first.

    An operation's time excludes the operations that it calls. Time outside all operations (Python, the profiler) is
    `OUTSIDE`, so that the seconds of a phase add up to its wall-clock time. Operations beyond `LISTED` are summed as
    `REST`.

    Args:
        forward: the forward, which has run before.
        calls: the calls to profile, in turn: one warm-up, then `CALLS` that count. Without leaves there is no backward.
        device: where the call runs.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler's library prints each start and stop
    found: Phases = {}
    for number in range(CALLS + 1):
        call = calls[number % len(calls)]
        outputs = _add(found, "forward", partial(forward, *call.arguments), device)
        if call.leaves:
            given = outputs if isinstance(outputs, tuple) else (outputs,)
            _add(found, "backward", partial(torch.autograd.grad, given, call.leaves, call.upstream), device)
        if number == 0:
            found.clear()
    return {phase: _listed({name: one / CALLS for name, one in seconds.items()}) for phase, seconds in found.items()}


def _add(found: Phases, phase: str, run: Callable[[], Any], device: str) -> Any:
    """Run under the profiler and add its seconds to those of the phase."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device != "cpu" else [])]
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        result = run()
        if device != "cpu":
            torch.cuda.synchronize()
        wall = time.perf_counter() - start
    seconds = found.setdefault(phase, {OUTSIDE: 0.0})
    inside = 0.0
    for event in profiler.key_averages():
        # On a GPU count kernels alone: an operation's time is that of its kernels, which are events too.
        if device != "cpu" and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        own = (event.self_cpu_time_total if device == "cpu" else event.self_device_time_total) / 1e6
        seconds[event.key] = seconds.get(event.key, 0.0) + own
        inside += own
    seconds[OUTSIDE] += max(wall - inside, 0.0)
    return result


def _listed(seconds: dict[str, float]) -> dict[str, float]:
    outside = seconds.pop(OUTSIDE)
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    listed = {name: one for name, one in ordered[:LISTED] if one > 0}
    return {**listed, REST: sum(one for _, one in ordered[LISTED:]), OUTSIDE: outside}
