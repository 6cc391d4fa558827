"""Part `step`: one step of OneR as the trainer takes it, at ViT-B/16 with 128 pairs: time, MFU, memory and a trace."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch

from oner_fast.benchmarks.first_gpu.parts import Setting
from oner_fast.benchmarks.first_gpu.record import Record
from oner_fast.benchmarks.step.ours import OurStep
from oner_fast.benchmarks.step.setting import synthetic_batch
from oner_fast.benchmarks.step.shares import shares
from oner_fast.train.engine.throughput import gemm_rate, mfu
from oner_fast.train.oner import recipes
from oner_fast.train.oner.flops import step_flops
from oner_fast.train.oner.settings import OneRConfiguration

PAIRS, REHEARSED_PAIRS = 128, 8
STEPS, REHEARSED_STEPS = 10, 2
WARM_UPS = 3
TRACE = "step.trace.json"


def run(record: Record, setting: Setting) -> None:
    """Time some steps, compute their MFU, count the waits of one, and profile one."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products need it, as in a training
    config = configuration(setting.rehearse)
    dtype = torch.float32 if setting.rehearse else torch.bfloat16
    batch = synthetic_batch(config, 4, 8) if setting.rehearse else synthetic_batch(config)
    start = time.perf_counter()
    step = OurStep(config, batch, None if setting.rehearse else dtype, setting.device)
    warm_up(step, record, setting)
    warm = time.perf_counter() - start
    seconds = timed(step, setting)
    flops, rate = step_flops(config, batch), gemm_rate(setting.device, dtype)
    middle = seconds[len(seconds) // 2]
    share = mfu(flops, middle, rate)
    peak = torch.cuda.max_memory_allocated() if setting.device == "cuda" else 0
    headline = f"{1000 * middle:.1f} ms a step of {len(batch)} pairs, MFU {share:.1%} of {rate / 1e12:.3g} TFLOP/s"
    record.row(
        f"{headline}; first steps and compilation {warm:.0f} s, peak memory {peak / 2**30:.1f} GiB",
        pairs=len(batch), seconds=seconds, median=middle, flops=flops, gemm_rate=rate, mfu=share, dtype=str(dtype),
        pairs_per_second=len(batch) / middle, peak_bytes=peak, setup_seconds=warm,
    )  # fmt: skip
    if setting.device == "cuda":
        waits = waits_of(step)
        record.row(f"the host waits {len(waits)} times in a step", waits=waits)
    found = shares(step, setting.device, setting.out / TRACE)
    for one in found:
        record.row(
            f"  {one.kind:<24} {1000 * one.seconds:8.2f} ms {one.share:6.1%}",
            kind=one.kind, seconds=one.seconds, share=one.share,
        )  # fmt: skip
    record.finish(headline)


def configuration(rehearse: bool) -> OneRConfiguration:
    """Return the recipe of 4M pairs with 128 pairs on one GPU or, for a rehearsal, the demo's with few."""
    if rehearse:
        base = recipes.oner_tiny_pictograms_cpu()
        model = replace(base.model, depth=1, vocab_size=64)
        return replace(base, model=model, optim=replace(base.optim, batch_size=REHEARSED_PAIRS))
    base = recipes.oner_vitb16_4m_a100x32()
    return replace(base, optim=replace(base.optim, batch_size=PAIRS, accum_freq=1))


def warm_up(step: OurStep, record: Record, setting: Setting) -> None:
    """Take the first steps; a loss that is no number, or that does not fall on the same batch, is wrong."""
    losses = [float(step()) for _ in range(WARM_UPS)]
    record.row(f"losses of the first steps: {', '.join(f'{one:.4f}' for one in losses)}", losses=losses)
    if not losses[-1] < losses[0]:  # NaN too
        record.fail(f"{WARM_UPS} steps on one batch took the loss from {losses[0]:.4f} to {losses[-1]:.4f}: not down")
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def timed(step: Callable[[], object], setting: Setting) -> list[float]:
    """Return the seconds of some steps, ascending, each from an idle device to an idle device."""
    wait = torch.cuda.synchronize if setting.device == "cuda" else lambda: None
    found = []
    for _ in range(REHEARSED_STEPS if setting.rehearse else STEPS):
        wait()
        start = time.perf_counter()
        step()
        wait()
        found.append(time.perf_counter() - start)
    return sorted(found)


def waits_of(step: Callable[[], object]) -> list[str]:
    """Return where the host waits for the GPU in a step: file and line of each call that synchronises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{one.filename}:{one.lineno}" for one in said if "synchronizing" in str(one.message)]
