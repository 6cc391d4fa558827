"""The number of threads of the CPU's ops: asked for, or found by trying."""

from __future__ import annotations

import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from oner_fast.atomic import write_atomic
from oner_fast.format_version import FIELD, RUN
from oner_fast.train.engine.distributed import World, on_main

FILE = "run.json"
_DEFAULT = torch.get_num_threads()
"""Torch's own choice: the cores, or OMP_NUM_THREADS."""
_ENOUGH = 1.1
"""The fewest threads count as fast enough whose time is at most this multiple of the shortest."""
_FAR_SLOWER = 1.5
_ROUNDS, _SECONDS, _MOST_SECONDS = 5, 0.3, 3.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Threads:
    """The number of threads of a run.

    Attributes:
        asked: the setting: a number, 0 for torch's own choice, or `auto`.
        used: the number.
        milliseconds: time of the same small products by number of threads, where they were timed.
    """

    asked: int | Literal["auto"]
    used: int
    milliseconds: dict[str, float]

    def save(self, folder: Path) -> None:
        """Write the record into the run's `run.json`."""
        text = json.dumps({FIELD: RUN, "threads": asdict(self)}, indent=2) + "\n"
        write_atomic(folder / FILE, lambda file: file.write(text.encode()))


def settle_threads(
    asked: int | Literal["auto"], world: World, *, workers: int, recorded: object = None, dtype: torch.dtype
) -> Threads:
    """Set the number of threads, and say what was chosen or that the number asked for is slow here.

    `auto` takes the number that the checkpoint recorded, so that a resumed run has the same bits. A new run times small
    matrix products with one and more threads. Training itself is not touched: the number of threads changes the last
    bits of a step. On a GPU nothing is timed.

    Args:
        asked: as in `Threads`.
        workers: processes that decode. They take cores too, all but the first, which mostly waits.
        recorded: the number of threads of the run before it was interrupted.
        dtype: dtype of the products.

    Returns:
        The number, the same on every rank: rank 0 decides, whatever cores the others may use.
    """
    threads = on_main(world, lambda: _settle(asked, world, workers, recorded, dtype))
    torch.set_num_threads(threads.used)
    return threads


def _settle(asked: int | Literal["auto"], world: World, workers: int, recorded: object, dtype: torch.dtype) -> Threads:
    cores = _cores()
    if isinstance(asked, int):
        used = asked or _DEFAULT
    elif type(recorded) is int and 1 <= recorded <= cores:
        used = recorded
    else:
        ranks_here = os.environ.get("LOCAL_WORLD_SIZE", "")  # torchrun's
        share = cores // (int(ranks_here) if ranks_here.isdecimal() and int(ranks_here) else world.size)
        most = max(1, min(_DEFAULT, share - max(0, workers - 1)))
        if world.device.type == "cuda" or most == 1:
            used = most
        else:
            times = time_threads(_powers(most), _products(dtype))
            used = fewest_fast_enough(times)
            _log.info(
                "--threads auto: %d of %d cores (%s for the same products); --threads N fixes the number",
                used,
                cores,
                ", ".join(f"{threads}: {1000 * seconds:.1f} ms" for threads, seconds in times.items()),
            )
            return Threads(asked, used, _milliseconds(times))
    if used == 1 or world.device.type == "cuda":
        return Threads(asked, used, {})
    times = time_threads([1, used], _products(dtype))
    if warning := slow_threads(times):
        _log.warning("%s", warning)
    return Threads(asked, used, _milliseconds(times))


def fewest_fast_enough(times: dict[int, float]) -> int:
    """Return the smallest number of threads whose time is within a tenth of the shortest."""
    return min(threads for threads, seconds in times.items() if seconds <= _ENOUGH * min(times.values()))


def slow_threads(times: dict[int, float]) -> str | None:
    """Return a warning where the most threads are far slower than one; else None."""
    most = max(times)
    ratio = times[most] / times[1]
    if ratio < _FAR_SLOWER:
        return None
    return (
        f"{most} threads are {ratio:.1f} times slower than one here: other processes keep the cores busy "
        f"({load()}). Stop them, or give --threads 1 or --threads auto"
    )


def time_threads(
    numbers: Sequence[int], work: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> dict[int, float]:
    """Time `work` with each number of threads, in turns, so that all see the same neighbours.

    The number of threads is restored afterwards, and no global random state is touched.

    Returns:
        The median seconds by number of threads. About 0.3 s are spent on each, and 3 s on all at most.
    """
    before = torch.get_num_threads()
    spent: dict[int, list[float]] = {threads: [] for threads in numbers}
    try:
        begin = clock()
        while True:
            for threads, times in spent.items():
                torch.set_num_threads(threads)
                start = clock()
                work()
                times.append(clock() - start)
            rounds, passed = len(times), clock() - begin
            if passed > _MOST_SECONDS or (rounds > _ROUNDS and passed > _SECONDS * len(spent)):
                break
    finally:
        torch.set_num_threads(before)
    # The first round starts threads and chooses kernels.
    return {threads: statistics.median(times[1:] or times) for threads, times in spent.items()}


def load() -> str:
    """Describe how busy the machine is: `load 3.0 on 2 cores`."""
    return f"load {os.getloadavg()[0]:.1f} on {_cores()} cores"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _powers(most: int) -> list[int]:
    powers = [1]
    while 2 * powers[-1] < most:
        powers.append(2 * powers[-1])
    return [*powers, most]


def _milliseconds(times: dict[int, float]) -> dict[str, float]:
    return {str(threads): round(1000 * seconds, 3) for threads, seconds in times.items()}


def _products(dtype: torch.dtype) -> Callable[[], object]:
    """Return work in many short parallel parts, as a step of a small model has: what busy cores slow down most."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randn(1024, 192, generator=draw)
    up, down = (torch.randn(size, generator=draw).to(dtype) / 14 for size in ((768, 192), (192, 768)))

    @torch.no_grad()
    def work() -> Any:
        x = tokens
        for _ in range(6):
            x = x + F.linear(F.gelu(F.linear(F.layer_norm(x, (192,)).to(dtype), up)), down).float()
        return x

    return work
