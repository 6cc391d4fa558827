"""Part `counters`: what ncu counts of our Triton kernels on this GPU, beside what the emulator counts of them.

The emulated code is sm_80's; another GPU runs other machine code, so that its instructions differ there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from oner_fast.benchmarks.cases import OURS
from oner_fast.benchmarks.first_gpu import children, ncu
from oner_fast.benchmarks.first_gpu.parts import Setting
from oner_fast.benchmarks.first_gpu.record import Record
from oner_fast.benchmarks.gpuless import tools

WORKLOADS = ("masked_gather", "token_alignment", "gather_patches", "varlen_attention", "mixup_info_nce")
REHEARSED = ("gather_patches",)
CONTEST = "oner_fast.benchmarks.gpu.contest"


def run(record: Record, setting: Setting) -> None:
    """Count each workload by both, as far as there is time; skip the part where neither can count."""
    counting = why_no_ncu(setting)
    emulating = tools.missing(*tools.FOR_EMULATE)
    if counting and emulating:
        record.skip(f"{counting}, and the emulator needs {', '.join(emulating)}")
        return
    if counting:
        record.leave_out(f"ncu's counters: {counting}")
    if emulating:
        record.leave_out(f"the emulator's counters: it needs {', '.join(emulating)}")
    workloads = REHEARSED if setting.rehearse else WORKLOADS
    emulated = {} if emulating else emulate(workloads, record, setting)
    compared = 0
    for workload in workloads:
        counted = {} if counting else count(workload, record, setting)
        if not counted and not emulated.get(workload):
            continue
        compared += bool(counted)
        record.row(line_of(workload, counted, emulated.get(workload, {})), workload=workload, ncu=counted,
                   emulator=emulated.get(workload, {}))  # fmt: skip
    record.finish(f"{compared} of {len(workloads)} workloads counted by ncu, {len(emulated)} emulated")


def why_no_ncu(setting: Setting) -> str:
    """Return why ncu cannot count here; empty where it can."""
    if setting.rehearse:
        return "ncu needs a GPU"
    return "" if ncu.found() else "ncu is not on PATH (Nsight Compute, part of the CUDA toolkit, brings it)"


def emulate(workloads: tuple[str, ...], record: Record, setting: Setting) -> dict[str, dict[str, Any]]:
    """Count workloads on the emulated A100, several at a time."""

    def one(workload: str) -> dict[str, Any]:
        log = setting.out / f"counters.emulated.{workload}.txt"
        # A rehearsal may run beside Triton's interpreter, which the emulator cannot be.
        ended = children.run(
            children.module(CONTEST, workload, OURS), log, max(record.left() - 2 * children.PATIENCE, 1.0),
            {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        if ended.timed_out or ended.status:
            record.leave_out(f"the emulator's counters of {workload}: {ended.last or 'for want of time'}")
            return {}
        found: dict[str, Any] = json.loads(log.read_text(encoding="utf-8").strip().splitlines()[-1])
        return found

    with ThreadPoolExecutor(max(1, min(len(workloads), (os.cpu_count() or 1) // 2))) as pool:
        found = dict(zip(workloads, pool.map(one, workloads), strict=True))
    return {workload: counts for workload, counts in found.items() if counts}


def count(workload: str, record: Record, setting: Setting) -> dict[str, int]:
    """Count a workload by ncu; a failure is noted."""
    left = record.left() - 2 * children.PATIENCE
    if left < 5:
        record.leave_out(f"ncu's counters of {workload}: for want of time")
        return {}
    try:
        return ncu.count(workload, setting.out / f"counters.ncu.{workload}.txt", left)
    except (PermissionError, TimeoutError) as error:
        record.leave_out(f"ncu's counters of {workload}: {error}")
    except RuntimeError as error:
        record.fail(f"{workload}: {error}")
    return {}


def line_of(workload: str, counted: Mapping[str, int], emulated: Mapping[str, Any]) -> str:
    """Write both counts of a workload side by side."""
    words = []
    for name in ("launches", *ncu.METRICS):
        both = [f"{each[name]:,}" if name in each else "-" for each in (counted, emulated)]
        words.append(f"{name} {both[0]} / {both[1]}")
    return f"{workload} (ncu / emulator): {', '.join(words)}"
