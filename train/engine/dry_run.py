"""Try a training before starting it: take one to four steps on its data, and keep nothing."""

from __future__ import annotations

import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from oner_fast.data.tar_index import indexes_only_in_memory
from oner_fast.train.engine.distributed import World, barrier, sum_over_ranks
from oner_fast.train.engine.loop import C, Training

_STEPS, _SECONDS = 4, 10.0
"""The most steps, and the seconds after which no further step begins."""


@dataclass(frozen=True)
class DryRun:
    """The measurements of a dry run.

    Attributes:
        steps: optimisation steps taken.
        timed: number of steps that the pace is measured over: all but the first, or the first where there is no other.
        samples: samples per step, over all ranks.
        seconds_per_step: wall-clock time.
        data_wait: share of that time spent waiting for data, 0 to 1.
        peak_memory: peak bytes of this rank: of its GPU, or of its process where it computes on the CPU.
        loss: loss of the last step.
    """

    steps: int
    timed: int
    samples: int
    seconds_per_step: float
    data_wait: float
    peak_memory: int
    loss: float

    def report(self, total_steps: int, device: torch.device) -> str:
        """Describe the measurements, and what they mean for a run of `total_steps`."""
        place = "the GPU" if device.type == "cuda" else "the process"
        kept = "the first step, with its warm-up" if self.steps == 1 else f"the last {self.timed} of {self.steps} steps"
        hours = total_steps * self.seconds_per_step / 3600
        return "\n".join(
            [
                f"memory  {self.peak_memory / 2**30:.2f} GiB at the peak of {place}",
                f"pace    {self.samples / self.seconds_per_step:.1f} samples/s, {self.seconds_per_step:.3f} s a step, "
                f"{self.data_wait:.0%} of it waiting for data ({kept})",
                f"run     {total_steps} steps of {self.samples} samples: {hours:.2f} hours",
                f"loss    {self.loss:.4f}",
            ]
        )


def dry_run(config: C, kind: type[Training[C]], world: World) -> DryRun:
    """Build a training in a temporary folder, take one to four steps on its data, and remove the folder.

    A step is repeated up to three times while all together take less than ten seconds, so that the pace excludes the
    warm-up of the first step. Nothing of an existing run is read or written.

    Args:
        config: the configuration; its `run_dir` and `resume` are not used.
        kind: the class of the training.
        world: this process's place in the process group, all ranks of which must call this.
    """
    with indexes_only_in_memory(), _temporary_folder(Path(config.run.run_dir), world) as folder:
        training = kind(
            kind.without_traces(replace(config, run=replace(config.run, run_dir=folder, resume="none"))), world
        )
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(world.device)
        times: list[tuple[float, float]] = []
        with training.batches:
            while True:
                start = time.perf_counter()
                batch = next(training.batches)
                waited = time.perf_counter() - start
                metrics = training.step_once(batch)
                loss = float(metrics["loss"])  # waits for the device
                times.append((time.perf_counter() - start, waited))
                # All ranks must take the same number of steps.
                spent = float(sum_over_ranks(torch.tensor(sum(seconds for seconds, _ in times)))) / world.size
                if len(times) == _STEPS or spent * (len(times) + 1) / len(times) > _SECONDS:
                    break
        barrier()
    timed = times[1:] or times
    seconds, waiting = (sum(each) / len(timed) for each in zip(*timed, strict=True))
    return DryRun(
        steps=len(times),
        timed=len(timed),
        samples=config.optim.batch_size,
        seconds_per_step=seconds,
        data_wait=waiting / seconds,
        peak_memory=_peak_memory(world.device),
        loss=loss,
    )


@contextmanager
def _temporary_folder(run_dir: Path, world: World) -> Iterator[str]:
    """Make a folder that all ranks share, where the run's would be, and remove it at the end."""
    place = next(parent for parent in run_dir.absolute().parents if parent.is_dir())
    found: list[Any] = [tempfile.mkdtemp(prefix=".dry-run-", dir=place) if world.is_main else None]
    if world.size > 1:
        dist.broadcast_object_list(found, src=0)
    try:
        yield found[0]
    finally:
        if world.is_main:
            shutil.rmtree(found[0], ignore_errors=True)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
