"""Let two builds of oner_fast and PyTorch take turns on one machine, each in a process of its own.

A round of a case is one call of the build before, one of the build after, and one of each PyTorch baseline. The next
round swaps the builds. Some rounds make a visit of the case, and the cases are visited in turn until the time is up, so
that the rounds of a case are spread over all of it. One process runs at a time; the others wait for a line.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oner_fast.benchmarks.cases import OURS

LEAST_VISITS = 8
# A visit has two rounds, or so many that it takes this long: a short call is noisier than a long one.
SECONDS_OF_A_VISIT, MOST_ROUNDS_IN_A_VISIT = 0.15, 12
# Baselines that are this much slower than the fastest in the first rounds are left out.
CLOSE, SCREENING_ROUNDS = 1.25, 4
BEFORE, AFTER, PYTORCH = "before", "after", "PyTorch"
# In pages of 4 KiB a process keeps for all of its rounds what it has by luck: its memory's places in the caches. That
# made the same build 20 % slower in one process than in another. With pages of 2 MiB it does so seldom.
_HUGE_PAGES = "glibc.malloc.hugetlb=1"
# Variables that would give both builds the same library or another path.
_UNSET = ("ONER_FAST_LIBRARY", "PYTHONPATH")
Tell = Callable[[str], None]


class Failed(Exception):
    """A process ended, or could not do what it was asked for."""


@dataclass(frozen=True)
class Side:
    """One of the three processes.

    Args:
        name: for messages.
        package: the folder on whose path its `oner_fast` lies; None for the package of this process.
        options: options of `oner_fast.benchmarks.worker`.
    """

    name: str
    package: Path | None = None
    options: tuple[str, ...] = ()


@dataclass
class Subject:
    """One case while it is measured.

    Args:
        key, kind, op, shape, dtype: as in a record's entry.
        served, counts: for each build, by the name of its side.
        errors: relative errors of the contenders, by side, contender and group of results.
        missing: why a build or a baseline does not take part, by side and contender.
        wall, busy: seconds by (side, contender), round by round, by the wall's clock and by that of the cores that the
            process was on.
        rounds_in_a_visit: rounds that follow each other.
    """

    key: str
    kind: str
    op: str
    shape: str
    dtype: str
    served: dict[str, str] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    errors: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    missing: dict[tuple[str, str], str] = field(default_factory=dict)
    wall: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    busy: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    rounds_in_a_visit: int = 2

    def screen(self) -> None:
        """Leave out the slow baselines, fix the number of rounds of a visit, and forget the rounds so far."""
        medians = {one: statistics.median(values) for one, values in self.busy.items() if one[0] == PYTORCH}
        fastest = min(medians.values(), default=0.0)
        slow = {one for one, median in medians.items() if median > CLOSE * fastest}
        round_ = sum(min(values) for one, values in self.wall.items() if one not in slow)
        fitting = 2 * round(SECONDS_OF_A_VISIT / max(round_, 1e-9) / 2)
        self.rounds_in_a_visit = max(2, min(fitting, MOST_ROUNDS_IN_A_VISIT))
        for times in (self.wall, self.busy):
            names = [one for one in times if one not in slow]
            times.clear()
            times.update({one: [] for one in names})


class Process:
    """A worker process and its two pipes."""

    def __init__(self, side: Side) -> None:
        self.side = side
        environment = {name: value for name, value in os.environ.items() if name not in _UNSET or side.package is None}
        if side.package is not None:
            environment["PYTHONPATH"] = str(side.package)
        # No folder of the caller may stand in front of the package.
        environment["PYTHONSAFEPATH"] = "1"
        environment["GLIBC_TUNABLES"] = ":".join(filter(None, (environment.get("GLIBC_TUNABLES"), _HUGE_PAGES)))
        self.said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "oner_fast.benchmarks.worker", *side.options],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
            encoding="utf-8",
        )

    def send(self, *request: object) -> None:
        """Ask for something without waiting for the answer."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # `receive` says why the process ended

    def receive(self) -> Any:
        """Wait for the answer. Raises Failed where the process says that it failed, or ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.endswith("\n"):  # a killed process may leave a part of a line
            raise Failed(self._ended())
        found = json.loads(line)
        if "error" in found:
            raise Failed(found["error"])
        return found["answer"]

    def _ended(self) -> str:
        status = self.process.wait()
        self.said.seek(0)
        last = (self.said.read().strip().splitlines() or ["it said nothing"])[-1]
        if status < 0:
            name = signal.Signals(-status).name
            memory = "; the system does so where memory runs out" if -status == signal.SIGKILL else ""
            return f"the process of {self.side.name} was ended by {name}{memory}: {last}"
        return f"the process of {self.side.name} ended with status {status}: {last}"

    def ask(self, *request: object) -> Any:
        """Send a request and wait for its answer."""
        self.send(*request)
        return self.receive()

    def release(self) -> None:
        """Close the pipes: a process that waits for a request ends."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    pass

    def close(self, patience: float = 10.0) -> None:
        """End the process: by itself within so many seconds, or else at once."""
        self.release()
        try:
            self.process.wait(patience)
        except BaseException as error:  # also where a second Ctrl-C ends the waiting
            self.process.kill()
            self.process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
        finally:
            self.said.close()


class Turns:
    """The three processes; a context manager that ends them.

    Args:
        sides: before, after and PyTorch, in this order.
    """

    def __init__(self, sides: Sequence[Side]) -> None:
        self.processes: dict[str, Process] = {}
        self.sides = sides

    def __enter__(self) -> Turns:
        try:
            for side in self.sides:
                self.processes[side.name] = Process(side)
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def __exit__(self, *error: object) -> None:
        # After a failure or Ctrl-C nobody waits for what is being compiled.
        with ExitStack() as all_of_them:
            for one in self.processes.values():
                one.release()
                all_of_them.callback(one.close, 0.5 if error[:1] != (None,) else 10.0)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Ask each process for its package and machine."""
        for one in self.processes.values():
            one.send("describe")
        return {name: one.receive() for name, one in self.processes.items()}

    def prepare(
        self, ops: Sequence[str], steps: Sequence[str], tell: Tell, keys: Sequence[str] | None = None
    ) -> list[Subject]:
        """Prepare every case in the processes that can run it. Raises Failed where a process ends.

        Args:
            ops: the ops, by name, whose quick cases are prepared.
            steps: the systems, by name, whose steps are.
            tell: called with the current work.
            keys: only these of them; all by default.
        """
        listed = self.processes[PYTORCH].ask("keys", list(ops), list(steps))
        subjects = [Subject(**one) for one in listed if keys is None or one["key"] in keys]
        for number, subject in enumerate(subjects, 1):
            tell(f"preparing {number} of {len(subjects)}: {subject.key}")
            self._prepare(subject)
        return subjects

    def _prepare(self, subject: Subject) -> None:
        for one in self.processes.values():
            one.send("prepare", subject.key, subject.kind, subject.op)
        for name, one in self.processes.items():
            try:
                found = one.receive()
            except Failed as error:
                if one.process.poll() is not None:
                    raise
                subject.missing[name, OURS] = str(error)
                continue
            subject.errors[name] = found["errors"]
            subject.missing |= {(name, contender): why for contender, why in found["unfit"].items()}
            if found["served"]:
                subject.served[name] = found["served"]
            for contender in found["runs"]:
                subject.wall[name, contender], subject.busy[name, contender] = [], []

    def count(self, subjects: Sequence[Subject], tell: Tell) -> None:
        """Fill in the exact counts of both builds, where they can be counted. Raises Failed where a process ends."""
        for subject in subjects:
            tell(f"counting {subject.key}")
            for name in subject.served:
                self.processes[name].send("counts", subject.key)
            for name in subject.served:
                try:
                    subject.counts[name] = self.processes[name].receive()
                except Failed as error:
                    if self.processes[name].process.poll() is not None:
                        raise
                    tell(f"{subject.key} is not counted {name}: {error}")

    def measure(self, subjects: Sequence[Subject], seconds: float, tell: Tell) -> None:
        """Visit the subjects in turn until `seconds` are over, and `LEAST_VISITS` times at least.

        Rounds before the first visit find the slow baselines and how long a round takes; they count for nothing else.
        """
        call = 0
        for subject in subjects:
            for _ in range(SCREENING_ROUNDS):
                self._round(subject, call, False)
                call += 1
            subject.screen()
        end = time.perf_counter() + seconds
        visit = 0
        while visit < LEAST_VISITS or time.perf_counter() < end:
            tell(f"visit {visit + 1}")
            for subject in subjects:
                for number in range(subject.rounds_in_a_visit):
                    self._round(subject, call, (visit + number) % 2 == 1)
                    call += 1
            visit += 1

    def _round(self, subject: Subject, call: int, swapped: bool) -> None:
        for side, contender in _ordered(list(subject.wall), swapped):
            wall, busy = self.processes[side].ask("run", subject.key, contender, call)
            subject.wall[side, contender].append(wall)
            subject.busy[side, contender].append(busy)


def _ordered(runners: Sequence[tuple[str, str]], swapped: bool) -> list[tuple[str, str]]:
    """Order the runners of a round: the builds first, swapped in every other round."""
    builds = [one for one in runners if one[0] != PYTORCH]
    return [*(reversed(builds) if swapped else builds), *(one for one in runners if one[0] == PYTORCH)]
