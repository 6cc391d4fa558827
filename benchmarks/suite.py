"""The measurements that make a commit's record: every op, a step of each system at a small size, and the loader.

`subjects()` lists them. A subject makes its entry in this process; `memory_of_all` starts one process that measures the
memory of all of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from abc import ABC, abstractmethod
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from oner_fast.benchmarks import counts, peak_memory
from oner_fast.benchmarks.cases import OURS, Case, key_of, name_of
from oner_fast.benchmarks.loading import LoaderContest
from oner_fast.benchmarks.measure import Settings, measure
from oner_fast.benchmarks.ops import cases
from oner_fast.benchmarks.record import Entry, LimitShare, ratio_of
from oner_fast.benchmarks.rows import Row
from oner_fast.benchmarks.step import systems
from oner_fast.benchmarks.step.contest import contest

# Seconds of interleaved rounds of an op or the loader, where a busy machine still makes so many rounds.
SECONDS, FULL_SECONDS, LEAST_ROUNDS = 2.0, 12.0, 12
# Rounds of a step, whose calls are long.
STEP_ROUNDS, FULL_STEP_ROUNDS = 12, 30
Memory = dict[str, dict[str, int]]


class Subject(ABC):
    """One measurement.

    Attributes:
        kind: "op", "step" or "loader".
        op, shape, dtype: its name, which makes its key.
    """

    kind: str
    op: str
    shape: str
    dtype: str

    @property
    def key(self) -> str:
        """Name of the measurement, unique in the suite."""
        return key_of(self.op, self.shape, self.dtype)

    @abstractmethod
    def measure(self) -> Entry:
        """Measure, and make the entry without its memory.

        Raises:
            ModuleNotFoundError: a package that the subject needs is not installed.
            Wrong: a result is wrong.
        """

    @abstractmethod
    def memory(self) -> Memory:
        """Measure bytes by contender in this process, which should have been started with `peak_memory.ENVIRONMENT`."""


class Wrong(AssertionError):
    """A contender's result is wrong, so that its speed counts for nothing."""


class OpSubject(Subject):
    """A case of an op.

    Args:
        case: the case.
        full: measure for longer, and the memory of compiled contenders too.
    """

    kind = "op"

    def __init__(self, case: Case, full: bool) -> None:
        self.case, self.full = case, full
        self.op, self.shape, self.dtype = case.op, case.shape, name_of(case.dtype)

    def measure(self) -> Entry:
        """Measure as `Subject.measure` says."""
        seconds = FULL_SECONDS if self.full else SECONDS
        row = measure(self.case, Settings(seconds, memory=False, profile=False, least_rounds=LEAST_ROUNDS))
        found = {"saved_bytes": self.case.saved}
        if self.case.timed:
            found = counts.of_case(self.case)
        work = {"FLOP": self.case.flops} if self.case.limit == "gemm" else {"bytes": self.case.bytes}
        return entry_of(row, self.kind, found, work)

    def memory(self) -> Memory:
        """Measure as `Subject.memory` says."""
        chosen = [one for one in self.case.contenders if "cpu" in one.devices and (self.full or not one.compiled)]
        return {one.name: asdict(peak_memory.of_contender(self.case, one)) for one in chosen}


class StepSubject(Subject):
    """A training step of a system.

    Args:
        system: one of `systems.SYSTEMS`.
        dtype: "float32", or "bfloat16" for autocast of every contender.
        full: measure for longer, and a compiled baseline too.
    """

    kind = "step"

    def __init__(self, system: str, dtype: str, full: bool) -> None:
        self.setting = systems.SYSTEMS[system]
        self.op, self.shape, self.dtype = f"{system} step", self.setting.shape(), dtype
        self.full = full

    @property
    def _autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.dtype == "bfloat16" else None

    def measure(self) -> Entry:
        """Measure as `Subject.measure` says."""
        torch._dynamo.reset()
        ours = self.setting.ours(self._autocast)
        baselines = [self.setting.plain(ours, self._autocast)]
        if self.full:
            baselines.append(self.setting.plain(ours, self._autocast, compiled=True))
        exact = self.setting.plain(ours, None, exact=True)
        found = systems.counts_of(ours)
        row = Row(self.op, self.shape, self.dtype, served="oner_fast.train")
        contest(
            row, ours, baselines, tolerances=systems.TOLERANCES[self.dtype], flops=found["flops"],
            dtype=self._autocast, exact=exact,
            rounds=FULL_STEP_ROUNDS if self.full else STEP_ROUNDS,
        )  # fmt: skip
        return entry_of(row, self.kind, found, {"FLOP": found["flops"]})

    def memory(self) -> Memory:
        """Measure as `Subject.memory` says."""
        ours = self.setting.ours(self._autocast)
        plain = self.setting.plain(ours, self._autocast)
        return {name: asdict(systems.memory_of(step)) for name, step in ((OURS, ours), (plain.name, plain))}


class LoaderSubject(Subject):
    """Batches from a tar of JPEGs; `full` measures for longer."""

    kind, op, dtype = "loader", "loader", "uint8"
    shape = LoaderContest.SHAPE

    def __init__(self, full: bool) -> None:
        self.full = full

    def measure(self) -> Entry:
        """Measure as `Subject.measure` says."""
        with LoaderContest() as contest:
            samples = contest.samples(FULL_SECONDS if self.full else SECONDS, LEAST_ROUNDS)
        found = {name: one.seconds for name, one in samples.items()}
        best, ratio = ratio_of(found, OURS, [name for name in found if name != OURS])
        return Entry(
            self.key, self.kind, self.op, self.shape, self.dtype, "oner_fast.data", found, best=best, ratio=ratio,
            work={"images": LoaderContest.BATCH},
        )  # fmt: skip

    def memory(self) -> Memory:
        """Measure as `Subject.memory` says; nothing is kept for a backward."""
        with LoaderContest() as contest:
            peaks = {name: peak_memory.peak_bytes(partial(_one, run))[0] for name, run in contest.runs().items()}
        return {name: {"peak": peak, "saved": 0, "saved_beyond_inputs": 0} for name, peak in peaks.items()}


def _one(run: Any) -> list[torch.Tensor]:
    return [run(0)]


def subjects(full: bool = False) -> list[Subject]:
    """List the suite: the quick set, or the full one with the ops' large shapes, both dtypes and compiled steps."""
    dtypes = ("float32", "bfloat16") if full else ("float32",)
    found: list[Subject] = [OpSubject(case, full) for case in cases(not full)]
    found += [StepSubject(system, dtype, full) for system in systems.SYSTEMS for dtype in dtypes]
    return [*found, LoaderSubject(full)]


def entry_of(row: Row, kind: str, found: dict[str, int], work: dict[str, float]) -> Entry:
    """Make the entry of a measured row. Raises Wrong where a result of the row was refused, or ours could not run."""
    key = key_of(row.op, row.shape, row.dtype)
    if row.wrong:
        raise Wrong(f"{key}: { ({**row.refused, **row.unavailable}) }")
    seconds = {name: one for name, one in row.seconds.items() if not name.startswith("limit")}
    best, ratio = ratio_of(seconds, OURS, [name for name in seconds if name.split()[0] != OURS])
    limit = None
    if row.limit and row.share is not None:
        limit = LimitShare(row.limit, row.limit_rate, row.limit_unit, row.share)
    return Entry(
        key=key,
        kind=kind,
        op=row.op,
        shape=row.shape,
        dtype=row.dtype,
        served=row.served,
        seconds=seconds,
        best=best,
        ratio=ratio,
        limit=limit,
        counts=found,
        errors=row.precision,
        work=work,
        parts=row.parts,
        breakdown=row.breakdown,
        notes=[*row.notes, *(f"cannot run here: {name}: {why}" for name, why in row.unavailable.items())],
    )


def with_memory(entry: Entry, memory: dict[str, Memory]) -> Entry:
    """Return the entry with its memory of `memory_of_all`."""
    return replace(entry, memory=memory.get(entry.key, {}))


def memory_of_all(full: bool = False) -> dict[str, Memory]:
    """Start a process that measures the memory of the whole suite in turn: {key: {contender: bytes}}.

    A subject whose memory cannot be measured there is absent, and all are where the process fails. Without Linux's
    /proc there is no measurement.
    """
    environment = {**os.environ, **peak_memory.ENVIRONMENT, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    task = json.dumps({"full": full, "threads": torch.get_num_threads()})
    command = [sys.executable, "-m", "oner_fast.benchmarks.suite", task]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"no memory was measured: its process ended with {done.returncode}: {last}", file=sys.stderr)
        return {}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def _main(argument: str) -> None:
    task: dict[str, Any] = json.loads(argument)
    torch.set_num_threads(task["threads"])
    found: dict[str, Memory] = {}
    for subject in subjects(task["full"]):
        try:
            found[subject.key] = subject.memory()
        except (peak_memory.Unavailable, ModuleNotFoundError) as error:
            print(f"{subject.key}: {error}", file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    _main(sys.argv[1])
