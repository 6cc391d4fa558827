"""Part `ops`: every op against float64, in float32, bfloat16 and float16, by every implementation that can run.

On a GPU each op has a process of its own, since a fault of one kernel makes the whole process's GPU unusable, and
several compile at a time. A rehearsal runs small shapes, with the Triton kernels in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from oner_fast.benchmarks.cases import OURS, Case, name_of
from oner_fast.benchmarks.first_gpu import children, record
from oner_fast.benchmarks.first_gpu.parts import Setting
from oner_fast.benchmarks.first_gpu.record import Findings, Record
from oner_fast.benchmarks.first_gpu.shapes import CASES, SMALL, dtypes_of
from oner_fast.benchmarks.gpuless import tools
from oner_fast.benchmarks.measure import check, ours_by_name, quiet
from oner_fast.benchmarks.rows import Row
from oner_fast.ops.implementations import choose, implementations
from oner_fast.ops.patch_masks import Pattern, draw_masks

SELF = "oner_fast.benchmarks.first_gpu.exactness"
MASKS = "patch_masks"
PATTERNS: tuple[Pattern, ...] = ("random", "block", "reversed_block")
OPS = (*CASES, MASKS)
MOST_JOBS = 8


def run(found: Record, setting: Setting) -> None:
    """Check every op, and say how many results were compared."""
    if setting.rehearse:
        with interpreted(found):
            for op in OPS:
                check_op(op, found, "cpu", small=True)
    else:
        _in_processes(found, setting)
    compared = sum("error" in row or "equal" in row for row in found.found.rows)
    found.finish(f"{compared} results of {len(OPS)} ops compared")


def check_op(op: str, found: Record, device: str, *, small: bool) -> None:
    """Compare an op's results and gradients with float64 in each of its dtypes, or masks with the reference."""
    if op == MASKS:
        _masks(found, device)
        return
    for dtype in dtypes_of(op, few=small):
        case = (SMALL if small else CASES)[op](dtype)
        row = judged(case, device)
        served = f"{OURS} ({row.served})"
        for name, error in row.errors.items():
            if name.split()[0] == OURS:
                shown = served if name == OURS else name
                found.row(
                    f"{op} {row.dtype}, {shown}: error {error:.2g}, allowed {row.tolerance:.2g}",
                    op=op, dtype=row.dtype, who=shown, error=error, allowed=row.tolerance, shape=row.shape,
                )  # fmt: skip
        for name, reason in (row.refused | row.unavailable).items():
            if name.split()[0] == OURS:
                found.fail(f"{op} {row.dtype}, {served if name == OURS else name}: {reason}")


def judged(case: Case, device: str) -> Row:
    """Compare a case's results with float64: ours as chosen, each of ours by name, and the first eager baseline.

    The eager baseline sets the tolerance, as in the benchmarks.
    """
    plain = next(one for one in case.contenders if one.eager and device in one.devices)
    case = replace(case, contenders=[case.contender(OURS), *ours_by_name(case, device), plain])
    row = Row(case.op, case.shape, name_of(case.dtype))
    call = case.make(0, device)
    op, kind, facts = case.facts_of(call, device)
    row.served = choose(op, kind, **facts).name
    with quiet():
        check(case, {one.name: one.forward for one in case.contenders}, call, row, lambda text: None)
    return row


@contextmanager
def interpreted(found: Record) -> Iterator[None]:
    """Run Triton's kernels in the strict interpreter where its tools are there, and say so where they are not."""
    if absent := tools.missing(*tools.FOR_INTERPRETER):
        found.leave_out(f"the Triton kernels: the interpreter needs {', '.join(absent)}")
        yield
        return
    with importlib.import_module("oner_fast.benchmarks.gpuless.interpreter").active():
        yield


def _masks(found: Record, device: str) -> None:
    """Draw masks by Triton on the device, which must be the reference's to the bit."""
    if reasons := implementations(MASKS)["triton"].reasons_against(device, asked_for=True):
        found.leave_out(f"{MASKS}: {'; '.join(reasons)}")
        return
    samples = torch.arange(4)
    for pattern in PATTERNS:
        drawn = draw_masks(7, 3, samples.to(device), (8, 8), 32, pattern, implementation="triton")
        right = draw_masks(7, 3, samples, (8, 8), 32, pattern, implementation="reference")
        equal = all(torch.equal(one.cpu(), other) for one, other in zip(drawn, right, strict=True))
        found.row(f"{MASKS} {pattern}: {'equal' if equal else 'NOT equal'} to the reference", op=MASKS, equal=equal)
        if not equal:
            found.fail(f"{MASKS} {pattern}: the masks drawn on {device} differ from the reference's")


def _in_processes(found: Record, setting: Setting) -> None:
    jobs = max(1, min(MOST_JOBS, (os.cpu_count() or 1) // 2))
    # A process gets no more time than the whole part has, even where it starts late.
    with ThreadPoolExecutor(jobs) as pool:
        for each in pool.map(lambda op: _in_a_process(op, setting, found), OPS):
            found.found.rows += each.rows
            found.found.left_out += each.left_out
            for sentence in each.failures:
                found.fail(sentence if sentence.startswith(each.part) else f"{each.part}: {sentence}")


def _in_a_process(op: str, setting: Setting, found: Record) -> Findings:
    path, seconds = setting.out / f"ops.{op}.json", max(found.left() - 2 * children.PATIENCE, 1.0)
    ended = children.run(children.module(SELF, op, str(path), f"{seconds}"), path.with_suffix(".txt"), seconds)
    each = record.read(path, op)
    each.judge(timed_out=ended.timed_out, status=ended.status if each.finished else 1, limit=seconds, last=ended.last)
    return each


def main(argv: Sequence[str] | None = None) -> int:
    """Check one op on the GPU in this process."""
    parser = argparse.ArgumentParser(prog=SELF)
    parser.add_argument("op", choices=OPS)
    parser.add_argument("path", type=Path)
    parser.add_argument("seconds", type=float)
    options = parser.parse_args(argv)
    found = Record(options.path, options.op, options.seconds)
    check_op(options.op, found, "cuda", small=False)
    found.finish()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
