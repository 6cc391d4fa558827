"""A process that runs the cases of its own oner_fast, one call at a time, when another process asks for it.

`oner-fast bench against` starts three: one for each of two commits, and one for PyTorch. They take turns, so that what
slows the machine slows all of them alike. Requests and answers are lines of JSON on standard input and output.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import oner_fast
from oner_fast.benchmarks import counts
from oner_fast.benchmarks.cases import OURS, Case, key_of, name_of
from oner_fast.benchmarks.machine import describe
from oner_fast.benchmarks.measure import check, quiet, runner
from oner_fast.benchmarks.ops import cases
from oner_fast.benchmarks.rows import Row
from oner_fast.benchmarks.timing import Rotation
from oner_fast.ops.implementations import choose
from oner_fast.train.engine.allocator import freed_memory_kept

Run = Callable[[int], object]


@dataclass(frozen=True)
class Prepared:
    """Contenders that are ready to run.

    Args:
        runs: runs a contender on the inputs of a call's number, by the contender's name.
        served: the implementation that serves ours; empty where the process does not run ours.
        errors: relative errors against float64, by contender and group of results.
        unfit: why a contender has wrong results or cannot run here, by contender.
    """

    runs: Mapping[str, Run]
    served: str = ""
    errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    unfit: Mapping[str, str] = field(default_factory=dict)


class Subject(ABC):
    """One measurement; its key is made of the operation, the shape and the dtype."""

    kind: str
    op: str
    shape: str
    dtype: str

    @property
    def key(self) -> str:
        """The same key as in the record of a commit."""
        return key_of(self.op, self.shape, self.dtype)

    @abstractmethod
    def prepare(self, ours: bool, compiled: bool) -> Prepared:
        """Check results, compile, and make inputs: for ours alone, or for PyTorch's contenders alone.

        Args:
            ours: whose.
            compiled: whether those under torch.compile take part.
        """

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """Count ours exactly."""


class OpSubject(Subject):
    """A case of an op."""

    kind = "op"

    def __init__(self, case: Case) -> None:
        self.case = replace(case, contenders=[one for one in case.contenders if "cpu" in one.devices])
        self.op, self.shape, self.dtype = case.op, case.shape, name_of(case.dtype)

    def prepare(self, ours: bool, compiled: bool) -> Prepared:
        """Prepare as `Subject.prepare` says."""
        case = self.case
        first = case.make(0, "cpu")
        row = Row(case.op, case.shape, "")
        chosen = [one for one in case.contenders if one.ours == ours and (compiled or not one.compiled)]
        # The error of the first eager baseline says what is allowed.
        judged = [*chosen, *([one for one in case.contenders if one.eager][:1] if ours else [])]
        forwards = {one.name: one.function() for one in judged}
        check(replace(case, contenders=judged), forwards, first, row, lambda text: None)
        unfit = {**row.unavailable, **row.refused}
        inputs = Rotation(lambda seed: case.make(seed, "cpu"), first.bytes())
        fit = [one for one in chosen if one.name not in unfit]
        runs = {one.name: runner(forwards[one.name], [one.layout(call) for call in inputs.sets]) for one in fit}
        served = ""
        if ours:
            op, device, facts = case.facts_of(case.contender(OURS).layout(first), "cpu")
            served = choose(op, device, **facts).name
        names = [one.name for one in chosen]
        return Prepared(
            runs,
            served,
            {name: each for name, each in row.precision.items() if name in names and name not in unfit},
            {name: why for name, why in unfit.items() if name in names},
        )

    def counts(self) -> dict[str, int]:
        """Count as `Subject.counts` says."""
        return counts.of_case(self.case)


class StepSubject(Subject):
    """A training step of a system in float32, at the small size of a record."""

    kind, dtype, suffix = "step", "float32", " step"

    def __init__(self, system: str) -> None:
        from oner_fast.benchmarks.step import systems

        self.systems, self.system = systems, systems.SYSTEMS[system]
        self.op, self.shape = system + self.suffix, self.system.shape()

    def prepare(self, ours: bool, compiled: bool) -> Prepared:
        """Prepare as `Subject.prepare` says."""
        from oner_fast.benchmarks.step import agreement

        mine = self.system.ours(None)
        plain = self.system.plain(mine, None)
        agreement.check(mine, plain, *self.systems.TOLERANCES[self.dtype])
        if ours:
            return Prepared({OURS: mine}, "oner_fast.train")
        return Prepared({plain.name: plain})

    def counts(self) -> dict[str, int]:
        """Count as `Subject.counts` says."""
        return self.systems.counts_of(self.system.ours(None))


def subjects(ops: Sequence[str], steps: Sequence[str]) -> list[Subject]:
    """List the quick cases of ops and the steps of systems, by name."""
    found: list[Subject] = [OpSubject(case) for case in (cases(True, ops) if ops else []) if case.timed]
    return [*found, *(StepSubject(system) for system in steps)]


def seconds_of(run: Run, call: int, longer: float = 1.0) -> tuple[float, float]:
    """Time one call, freeing of its results included: by the wall's clock, and of all cores that it was on.

    A `longer` of 1.2 waits busily until the call took a fifth more.
    """
    start, busy = time.perf_counter(), time.process_time()
    result = run(call)
    del result
    if longer > 1.0:
        end = busy + (time.process_time() - busy) * longer
        while time.process_time() < end:
            pass
    return time.perf_counter() - start, time.process_time() - busy


class Worker:
    """Answer requests, which are lists of a word and its arguments; see the methods of those names."""

    def __init__(self, ours: bool, compiled: bool, slower: Mapping[str, float]) -> None:
        self.ours, self.compiled, self.slower = ours, compiled, slower
        self.subjects: dict[str, Subject] = {}
        self.prepared: dict[str, Prepared] = {}

    def describe(self) -> dict[str, Any]:
        """Say which package this is, and on which machine."""
        machine = describe()
        return {"package": str(Path(oner_fast.__file__).parent), "line": machine.line(), "facts": machine.as_dict()}

    def keys(self, ops: list[str], steps: list[str]) -> list[dict[str, str]]:
        """List the subjects of ops and systems, by name."""
        found = {one.key: one for one in subjects(ops, steps)}
        self.subjects |= found
        return [
            {"key": key, "kind": one.kind, "op": one.op, "shape": one.shape, "dtype": one.dtype}
            for key, one in found.items()
        ]

    def counts(self, key: str) -> dict[str, int]:
        """Count ours exactly."""
        with quiet():
            return self.subjects[key].counts()

    def prepare(self, key: str, kind: str, op: str) -> dict[str, Any]:
        """Prepare a subject that a process listed; say what can run."""
        if key not in self.subjects:
            self.keys(*(([op], []) if kind == OpSubject.kind else ([], [op.removesuffix(StepSubject.suffix)])))
        if key not in self.subjects:
            raise ValueError(f"{op} has no such case there")
        with quiet():
            self.prepared[key] = done = self.subjects[key].prepare(self.ours, self.compiled)
        return {"runs": list(done.runs), "served": done.served, "errors": done.errors, "unfit": done.unfit}

    def run(self, key: str, name: str, call: int) -> tuple[float, float]:
        """Time one call of a contender, in seconds: wall, and CPU."""
        return seconds_of(self.prepared[key].runs[name], call, self.slower.get(self.subjects[key].op, 1.0))


def main(argv: Sequence[str]) -> int:
    """Serve requests until standard input ends."""
    parser = argparse.ArgumentParser(prog="python -m oner_fast.benchmarks.worker", description=__doc__)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: as torch chooses)")
    parser.add_argument("--pytorch", action="store_true", help="run the baselines and not ours")
    parser.add_argument("--eager", action="store_true", help="leave out what torch.compile compiles")
    parser.add_argument("--slower", action="append", default=[], metavar="OP=FACTOR", help="a planted slow-down")
    options = parser.parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    # Answers have the pipe for themselves: what libraries print goes to standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    slower = {op: float(factor) for op, factor in (one.split("=") for one in options.slower)}
    worker = Worker(not options.pytorch, not options.eager, slower)
    known: dict[str, Callable[..., Any]] = {
        "describe": worker.describe,
        "keys": worker.keys,
        "prepare": worker.prepare,
        "counts": worker.counts,
        "run": worker.run,
    }
    gc.disable()
    with freed_memory_kept():
        for line in sys.stdin:
            word, *arguments = json.loads(line)
            try:
                answer = {"answer": known[word](*arguments)}
            except Exception as error:  # the other process decides what it means
                answer = {"error": f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0][:300]}"}
            if word != "run":
                gc.collect()
            print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
