"""Part `speed`: ops beside PyTorch's fastest code for the same: SDPA, torch's varlen attention, torch.compile."""

from __future__ import annotations

from dataclasses import replace

import torch

from oner_fast.benchmarks.cases import OURS, Case
from oner_fast.benchmarks.cli import line_of
from oner_fast.benchmarks.first_gpu.parts import Setting
from oner_fast.benchmarks.first_gpu.record import Record
from oner_fast.benchmarks.first_gpu.shapes import SMALL
from oner_fast.benchmarks.machine import describe
from oner_fast.benchmarks.measure import Settings, measure
from oner_fast.benchmarks.ops import cases
from oner_fast.benchmarks.report import Report

# Where the time ends early, what matters most has been measured.
ORDER = (
    "varlen_attention", "mixup_info_nce", "masked_gather", "gather_patches", "sigmoid_loss", "padded_attention",
    "token_alignment",
)  # fmt: skip
REHEARSED = ("varlen_attention", "masked_gather")
SECONDS, REHEARSED_SECONDS = 1.5, 0.05
LONGEST = 20.0
"""Seconds that a case may take, compilation included: no case starts with less left."""


def run(record: Record, setting: Setting) -> None:
    """Measure case after case, while there is time, and write the report of `oner-fast bench ops` after each."""
    machine = describe(setting.device)
    report = Report("oner-fast gpu", machine.line(), machine.as_dict())
    settings = Settings(
        REHEARSED_SECONDS if setting.rehearse else SECONDS, setting.device, memory=False, profile=False,
        least_rounds=1 if setting.rehearse else 5,
    )  # fmt: skip
    todo = rehearsed() if setting.rehearse else chosen()
    for number, case in enumerate(todo):
        if record.left() < (0 if setting.rehearse else LONGEST):
            record.leave_out(
                f"{len(todo) - number} of {len(todo)} cases for want of time; "
                "'oner-fast bench ops --device cuda' has all of them"
            )
            break
        row = measure(case, settings)
        report.rows.append(row)
        report.write(setting.out / "speed")
        record.row(line_of(row), **(row.as_dict() | {"seconds": {}}))
        for who, why in {**row.refused, **row.unavailable}.items():
            sentence = f"{row.op} {row.dtype}: {who}: {why}"
            if who.split()[0] == OURS:
                record.fail(sentence)
            else:
                record.say(f"no rival: {sentence}")
    report.finished = True
    report.write(setting.out / "speed")
    faster = [row for row in report.rows if row.speedup and row.speedup.p50 >= 1]
    record.finish(f"{len(faster)} of {len(report.rows)} cases faster than the fastest of PyTorch")


def chosen() -> list[Case]:
    """Return one case of each op at its full size, in bfloat16 where it has one, with the fastest rivals."""
    found = []
    for op in ORDER:
        timed = [case for case in cases(ops=[op]) if case.timed]
        case = next((one for one in timed if one.dtype == torch.bfloat16), timed[0])
        found.append(replace(case, contenders=[one for one in case.contenders if one.quick]))
    return found


def rehearsed() -> list[Case]:
    """Return small cases without the rivals that would be compiled."""
    small = [SMALL[op](torch.float32) for op in REHEARSED]
    return [replace(case, contenders=[one for one in case.contenders if one.quick and not one.compiled])
            for case in small]  # fmt: skip
