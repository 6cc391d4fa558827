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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import oner_fast
from oner_fast.benchmarks.cases import OURS, Call, Case, Forward, step
from oner_fast.benchmarks.counts import counted_flops, graph_breaks
from oner_fast.benchmarks.machine import describe
from oner_fast.benchmarks.measure import check, quiet
from oner_fast.benchmarks.ops import OPS, cases
from oner_fast.benchmarks.peak_memory import saved_bytes
from oner_fast.benchmarks.rows import Row
from oner_fast.benchmarks.timing import Rotation
from oner_fast.ops.implementations import choose
from oner_fast.train.engine.allocator import freed_memory_kept


@dataclass(frozen=True)
class Prepared:
    """A case that is ready to run.

    Args:
        runs: runs a contender on the inputs of a call's number, by the contender's name.
        served: the implementation that serves ours; empty where the process does not run ours.
        errors: the largest relative error against float64, by contender.
        unfit: why a contender has wrong results or cannot run here, by contender.
    """

    runs: Mapping[str, Callable[[int], object]]
    served: str
    errors: Mapping[str, float]
    unfit: Mapping[str, str]


def prepare(case: Case, ours: bool) -> Prepared:
    """Check a case's contenders against float64, compile them, and make the inputs: ours alone, or PyTorch's alone."""
    case = replace(case, contenders=[one for one in case.contenders if "cpu" in one.devices])
    first = case.make(0, "cpu")
    row = Row(case.op, case.shape, "")
    chosen = [one for one in case.contenders if one.ours == ours]
    # The error of the first eager baseline says what is allowed.
    judged = [*chosen, *([one for one in case.contenders if one.eager][:1] if ours else [])]
    forwards = {one.name: one.function() for one in judged}
    with quiet():
        check(replace(case, contenders=judged), forwards, first, row, lambda text: None)
    unfit = {**row.unavailable, **row.refused}
    inputs = Rotation(lambda seed: case.make(seed, "cpu"), first.bytes())
    runs = {
        one.name: _runner(forwards[one.name], [one.layout(call) for call in inputs.sets])
        for one in chosen
        if one.name not in unfit
    }
    served = ""
    if ours:
        op, device, facts = case.facts_of(case.contender(OURS).layout(first), "cpu")
        served = choose(op, device, **facts).name
    return Prepared(runs, served, row.errors, {one.name: unfit[one.name] for one in chosen if one.name in unfit})


def counts_of(case: Case) -> dict[str, int]:
    """Count ours exactly."""
    ours = case.contender(OURS)
    call = ours.layout(case.make(0, "cpu"))
    with quiet():
        return {
            "saved_bytes": saved_bytes(ours.forward, call)[1],
            "graph_breaks": graph_breaks(ours.forward, call),
            "flops": counted_flops(case, OURS),
        }


def _runner(forward: Forward, calls: list[Call]) -> Callable[[int], object]:
    return lambda number: step(forward, calls[number % len(calls)])


def seconds_of(run: Callable[[int], object], call: int, longer: float = 1.0) -> tuple[float, float]:
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

    def __init__(self, ours: bool, slower: Mapping[str, float]) -> None:
        self.ours, self.slower = ours, slower
        self.cases: dict[str, Case] = {}
        self.prepared: dict[str, Prepared] = {}

    def describe(self) -> dict[str, Any]:
        """Say which package this is, and on which machine."""
        machine = describe()
        return {"package": str(Path(oner_fast.__file__).parent), "line": machine.line(), "facts": machine.as_dict()}

    def keys(self, quick: bool, ops: list[str]) -> list[dict[str, str]]:
        """List the cases by key, operation, shape and dtype."""
        self.cases = {case.key: case for case in cases(quick, ops or OPS) if case.timed}
        return [
            {"key": key, "op": one.op, "shape": one.shape, "dtype": key.rsplit(" ", 1)[-1]}
            for key, one in self.cases.items()
        ]

    def counts(self, key: str) -> dict[str, int]:
        """Count ours exactly."""
        return counts_of(self.cases[key])

    def prepare(self, key: str) -> dict[str, Any]:
        """Prepare a case; say what can run."""
        self.prepared[key] = done = prepare(self.cases[key], self.ours)
        return {**asdict(replace(done, runs={})), "runs": list(done.runs)}

    def run(self, key: str, name: str, call: int) -> tuple[float, float]:
        """Time one call of a contender, in seconds: wall, and CPU."""
        return seconds_of(self.prepared[key].runs[name], call, self.slower.get(self.cases[key].op, 1.0))


def main(argv: Sequence[str]) -> int:
    """Serve requests until standard input ends."""
    parser = argparse.ArgumentParser(prog="python -m oner_fast.benchmarks.worker", description=__doc__)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: as torch chooses)")
    parser.add_argument("--pytorch", action="store_true", help="run the baselines and not ours")
    parser.add_argument("--slower", action="append", default=[], metavar="OP=FACTOR", help="a planted slow-down")
    options = parser.parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    # Answers have the pipe for themselves: what libraries print goes to standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    slower = {op: float(factor) for op, factor in (one.split("=") for one in options.slower)}
    worker = Worker(not options.pytorch, slower)
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
