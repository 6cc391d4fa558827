"""Divide a step's time among kinds of operations, by the profiler."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

REST, OTHER_KERNELS = "rest", "other kernels"
# The first pattern that matches an operation's name decides; the rest is calls, views and Python.
_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("attention", r"scaled_dot_product|varlen_attention"),
        ("contrast", r"oner_fast::(mixup|sigmoid)"),
        ("optimizer and clipping", r"adamw|vector_norm|aten::mul_$|_foreach_(norm|mul)"),
        ("teacher's average", r"lerp"),
        ("fused by torch.compile", r"[Cc]ompiled"),
        ("linear layers", r"aten::(mm|addmm|bmm|baddbmm|mv|addmv)$|TiledLinear|mkldnn|convolution|linear_pointwise"),
        ("layer norm", r"layer_norm"),
        ("GELU", r"gelu"),
        ("gathers", r"oner_fast::.*gather|aten::(index|gather|scatter|embedding|where|take)"),
        ("softmax and losses", r"softmax|nll_loss|aten::(abs|sgn|sign|div|var_mean|exp|logsumexp)$"),
        ("additions and sums", r"aten::(add|add_|sum|sub|mean)$"),
        ("copies and casts", r"aten::(copy_|cat|fill_|zero_|clone|stack|constant_pad_nd)$"),
    )
)


@dataclass(frozen=True)
class Share:
    """Seconds that operations of a `kind` took, and their `share` of the step, 0 to 1."""

    kind: str
    seconds: float
    share: float


def kind_of(operation: str) -> str:
    """Kind of an operation that the profiler names."""
    return next((kind for kind, pattern in _KINDS if pattern.search(operation)), REST)


def shares(step: Callable[[], object], device: str = "cpu", trace: Path | None = None) -> list[Share]:
    """Profile one call of `step`, which has been warmed up: the time of each kind, largest first.

    On a GPU an operation's time is that of the kernels that it launches. The rest of the wall-clock time comes last, so
    that the times add up to the whole.

    Args:
        step: the call.
        device: the device type of its work, "cpu" or "cuda".
        trace: file for the chrome trace of the call; None writes none.
    """
    on_gpu = device != "cpu"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        start = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        wall = time.perf_counter() - start
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    seconds: dict[str, float] = {}
    for event in profiler.key_averages():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel, whose time its operation has
        kind = kind_of(event.key)
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        seconds[kind] = seconds.get(kind, 0.0) + own / 1e6
    if not on_gpu:
        seconds.pop(REST, None)  # calls, views and Python belong to the rest
    seconds[OTHER_KERNELS] = seconds.pop(REST, 0.0)
    found = [Share(kind, value, value / wall) for kind, value in sorted(seconds.items(), key=lambda item: -item[1])]
    rest = wall - sum(share.seconds for share in found)
    return [share for share in found if share.seconds > 0] + [Share(REST, rest, rest / wall)]
