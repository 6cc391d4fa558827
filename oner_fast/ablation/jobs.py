"""Train several runs of a study at a time, each in a process of its own with its share of the cores."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from oner_fast.ablation.plan import PlannedRun
from oner_fast.ablation.study import Interrupted, duration, train_and_evaluate, waiting_runs
from oner_fast.boundary import guarded
from oner_fast.train.engine.signals import exit_status, stop_on_signals

LOGS = "logs"
"""The folder, in the study's, of what each run printed."""
_PAUSE = 0.2
"""Seconds between two looks at the processes."""

Job = subprocess.Popen[bytes]


def run_at_once(
    planned: Sequence[PlannedRun], jobs: int, out: Path, say: Callable[[str], None], *, knn: bool = False
) -> Iterator[PlannedRun]:
    """Train and evaluate the runs that are not done, `jobs` at a time; yield each that becomes done.

    A run with automatic threads gets the cores of this process divided by `jobs`. What it prints goes into
    `OUT/logs/RUN.log`. A signal is passed to the runs, which save; so is the end of this process, however it ends.

    Args:
        planned: the runs.
        jobs: how many run at a time.
        out: the study's folder.
        say: shows a line.
        knn: evaluate k-NN too.

    Raises:
        Interrupted: a signal ended the runs; the last step of each is saved.
        RuntimeError: a run failed; the message names its log. The others save and end first.
    """
    numbered = waiting_runs(planned)
    ahead = iter(numbered)
    (out / LOGS).mkdir(parents=True, exist_ok=True)
    running: dict[Job, PlannedRun] = {}
    began, done, left = time.perf_counter(), 0.0, sum(each.flops for _, _, each in numbered)
    with stop_on_signals() as stop:
        try:
            while True:
                while len(running) < jobs and (following := next(ahead, None)):
                    number, total, run = following
                    about = f"; about {duration(left * (time.perf_counter() - began) / done)} to go" if done else ""
                    say(f"run {number} of {total}: {run.described}{about}")
                    running[_start(_with_share(run, jobs), out, knn)] = run
                if not running:
                    return
                for job in _ended(running):
                    run = running.pop(job)
                    if stop.requested:
                        continue
                    if job.returncode != 0:
                        raise RuntimeError(
                            f"run {run.folder.name} ended with status {job.returncode}; the end of "
                            f"{_log_of(run, out)} says why"
                        )
                    done, left = done + run.flops, left - run.flops
                    yield run
                if stop.requested:
                    raise Interrupted(exit_status(stop.requested))
        finally:
            _stop(running)


def _with_share(run: PlannedRun, jobs: int) -> PlannedRun:
    config: Any = run.config
    if config.run.threads != "auto":
        return run
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return replace(run, config=replace(config, run=replace(config.run, threads=max(1, cores // jobs))))


def _log_of(run: PlannedRun, out: Path) -> Path:
    return out / LOGS / f"{run.folder.name}.log"


def _start(run: PlannedRun, out: Path, knn: bool) -> Job:
    """Start the process of a run. Its standard input stays open for as long as this process lives."""
    with _log_of(run, out).open("ab") as log:
        job = subprocess.Popen(
            [sys.executable, "-m", "oner_fast.ablation.jobs"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C at the terminal reaches the study alone, which tells its runs once
        )
    assert job.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # its exit status says what became of it
        job.stdin.write(pickle.dumps((run, knn)))
        job.stdin.flush()
    return job


def _ended(running: dict[Job, PlannedRun]) -> list[Job]:
    """Wait a moment and return the processes that have ended."""
    time.sleep(_PAUSE)
    return [job for job in running if job.poll() is not None]


def _stop(running: dict[Job, PlannedRun]) -> None:
    """Ask the runs to save and end, and wait until they have; a further Ctrl-C ends them without saving."""
    for job in running:
        job.terminate()
    try:
        for job in running:
            job.wait()
    except KeyboardInterrupt:
        for job in running:
            job.kill()
        raise


def _work() -> int:
    """Be the process of one run, which standard input describes; returns the training's exit status."""
    run, knn = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_the_study, daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    return guarded(run.folder.name, lambda: train_and_evaluate(run, knn), extra="demo")


def _end_with_the_study() -> None:
    # It returns when the study's process is gone. `sys.stdin` would be locked in every process forked meanwhile.
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(_work())
