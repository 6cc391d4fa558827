"""`oner-fast bench against BASE`: compare this working tree with another commit, in turn on this machine.

The other commit is built beside this one, with this commit's benchmarks laid over it. Three processes then take turns,
round by round: the commit's oner_fast, this one's, and PyTorch. With one thread a call's time is that of the core it
was on, which other programs do not add to; with more it is the wall's. What looks slower or faster is measured again in
fresh processes, and counts where it comes again. Exits 1 on a regression, or where a result is
wrong; 2 where the other commit cannot be built or run; 0 otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import oner_fast
from oner_fast.atomic import write_atomic
from oner_fast.benchmarks import checkout
from oner_fast.benchmarks.alone import Busy, alone
from oner_fast.benchmarks.cases import OURS
from oner_fast.benchmarks.compare import add_options, formatted, markdown, reason_against
from oner_fast.benchmarks.comparison import INTERLEAVED, Comparison, compare
from oner_fast.benchmarks.confirmation import confirmed, doubtful
from oner_fast.benchmarks.ops import OPS
from oner_fast.benchmarks.record import Entry, Record, ratio_of, write
from oner_fast.benchmarks.source import commit_of_this, versions
from oner_fast.benchmarks.turns import AFTER, BEFORE, PYTORCH, Failed, Side, Subject, Turns

STEPS = ("oner", "uta", "clip")
SECONDS = 60.0
FOLDER = Path("runs/against")
Tell = Callable[[str], None]


def parser() -> argparse.ArgumentParser:
    """Make the parser of `oner-fast bench against`."""
    made = argparse.ArgumentParser(prog="oner-fast bench against", description=__doc__)
    made.add_argument("base", help="the other commit, by any name that git knows")
    made.add_argument("--op", nargs="+", metavar="NAME", default=list(OPS), help=f"only these: {', '.join(OPS)}")
    made.add_argument("--steps", action="store_true", help=f"measure a small step of {', '.join(STEPS)} too")
    made.add_argument("--seconds", type=float, default=SECONDS, help=f"for all rounds together (default: {SECONDS:g})")
    made.add_argument("--threads", type=int, default=1, help="CPU threads of each process (default: 1)")
    made.add_argument("--out", type=Path, default=FOLDER, help=f"folder of both records and the comparison ({FOLDER})")
    add_options(made)
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(argv)
    if reason := _reason_against(options):
        return _fail(reason)
    try:
        root, this = checkout.repository(), commit_of_this()
        options.out.mkdir(parents=True, exist_ok=True)
        builds = root / "build" / "against"
        with alone(builds):
            _tell(f"building {options.base}")
            base = checkout.check_out(options.base, builds)
            subjects, described = _measured(base, options, options.seconds)
            commits, clock = ((base.commit, False), this), clock_of(options.threads)
            records = records_of(subjects, described, *commits, clock)
            found = compare(*records, error=options.error, margin=options.margin)
            if keys := doubtful(found):
                _tell(f"again in fresh processes: {', '.join(keys)}")
                seconds = options.seconds * len(keys) / len(subjects)
                second = records_of(*_measured(base, options, seconds, keys), *commits, clock)
                found = confirmed(found, compare(*second, error=options.error, margin=options.margin))
        print(formatted(found, options))
        _write(options.out, records, found)
    except (checkout.NoBuild, Busy, Failed, OSError, ValueError) as problem:
        return _fail(str(problem))
    broken = [one for one in subjects if (AFTER, OURS) in one.missing]
    for one in subjects:
        for (side, contender), why in one.missing.items():
            print(f"not measured: {one.key}: {contender} {side}: {why}", file=sys.stderr)
    return 1 if found.regressions or broken else 0


def _measured(
    base: checkout.Checkout, options: argparse.Namespace, seconds: float, keys: Sequence[str] | None = None
) -> tuple[list[Subject], dict[str, dict[str, Any]]]:
    """Measure all that the options name, or only `keys` of it."""
    threads = ("--threads", str(options.threads))
    sides = [
        Side(BEFORE, base.package, threads),
        Side(AFTER, None, threads),
        Side(PYTORCH, None, (*threads, "--pytorch")),
    ]
    with Turns(sides) as turns:
        described = _described(turns, base)
        subjects = turns.prepare(options.op, STEPS if options.steps else (), _tell, keys)
        if keys is None:
            turns.count(subjects, _tell)
        turns.measure(subjects, seconds, _tell)
    return subjects, described


def clock_of(threads: int) -> str:
    """Choose the clock: "cpu" where a process has one thread, whose time others do not add to; otherwise "wall"."""
    return "cpu" if threads == 1 else "wall"


def records_of(
    subjects: Sequence[Subject],
    described: Mapping[str, Mapping[str, Any]],
    before: tuple[str, bool],
    after: tuple[str, bool],
    clock: str,
) -> tuple[Record, Record]:
    """Make the records of both builds.

    Args:
        subjects: what was measured.
        described: the answers of `Turns.describe`.
        before, after: the commit of each build, and whether its files differ from it.
        clock: "cpu" for the time on the cores, or "wall".
    """
    common = {"id": uuid.uuid4().hex, "clock": clock}
    made = []
    for side, (commit, dirty) in ((BEFORE, before), (AFTER, after)):
        entries = [_entry(one, side, clock) for one in subjects if (side, OURS) in one.wall]
        visits = {one.key: one.rounds_in_a_visit for one in subjects}
        facts = {**described[side]["facts"], INTERLEAVED: {**common, "rounds_in_a_visit": visits}}
        package = {**versions(), "oner_fast": described[side]["facts"]["oner_fast"]}
        made.append(Record(described[side]["line"], facts, package, commit, dirty, entries))
    return made[0], made[1]


def _entry(subject: Subject, side: str, clock: str) -> Entry:
    times = subject.busy if clock == "cpu" else subject.wall
    seconds = {OURS: times[side, OURS], **{name: each for (where, name), each in times.items() if where == PYTORCH}}
    best, ratio = ratio_of(seconds, OURS, [name for name in seconds if name != OURS])
    return Entry(
        key=subject.key,
        kind=subject.kind,
        op=subject.op,
        shape=subject.shape,
        dtype=subject.dtype,
        served=subject.served[side],
        seconds=seconds,
        best=best,
        ratio=ratio,
        counts=subject.counts.get(side, {}),
        errors={**subject.errors.get(PYTORCH, {}), **subject.errors.get(side, {})},
    )


def _described(turns: Turns, base: checkout.Checkout) -> dict[str, dict[str, Any]]:
    """Ask the processes what they are. Raises Failed where one is not what it should be."""
    try:
        described = turns.describe()
    except Failed as error:
        if turns.processes[BEFORE].process.poll() is None:
            raise
        raise Failed(f"commit {base.commit[:12]} cannot run this commit's benchmarks: {error}") from error
    _check_packages(described, base)
    return described


def _check_packages(described: Mapping[str, Mapping[str, Any]], base: checkout.Checkout) -> None:
    """Refuse to measure another package than each side's own."""
    for side, wanted in ((BEFORE, base.package / "oner_fast"), (AFTER, Path(oner_fast.__file__).parent)):
        package = Path(described[side]["package"])
        if package.resolve() != wanted.resolve():
            raise Failed(f"the process {side} imported oner_fast from {package}, and {wanted} is needed")
        if described[side]["facts"]["kernels"] == "no compiled":
            raise Failed(
                f"the C++ extension of the build {side} did not load; `oner-fast doctor` says why"
                if side == AFTER
                else f"the C++ extension of commit {base.commit[:12]} did not load under this torch"
            )


def _write(folder: Path, records: tuple[Record, Record], found: Comparison) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, one in zip((BEFORE, AFTER), records, strict=True):
        write(one, folder / f"{name}.json")
    texts = {"comparison.md": markdown(found), "comparison.json": json.dumps(found.as_dict(), indent=1)}
    for name, text in texts.items():
        write_atomic(folder / name, partial(_write_text, text + "\n"))


def _write_text(text: str, file: IO[bytes]) -> None:
    file.write(text.encode())


def _reason_against(options: argparse.Namespace) -> str:
    for name in options.op:
        if name not in OPS:
            return f"unknown op {name!r}; known: {', '.join(OPS)}"
    if options.threads < 1:
        return f"--threads must be at least 1, got {options.threads}"
    if not 0 < options.seconds < float("inf"):
        return f"--seconds must be positive, got {options.seconds:g}"
    if options.out.exists() and not options.out.is_dir():
        return f"--out must be a folder, and {options.out} is a file"
    return reason_against(options)


def _tell(what: str) -> None:
    """Say on standard error what is done; a terminal shows the visits on one line."""
    live = sys.stderr.isatty()
    if live:
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)
    elif not what.startswith("visit"):
        print(what, file=sys.stderr, flush=True)


def _fail(message: str) -> int:
    print(f"oner-fast bench against: {message}", file=sys.stderr)
    return 2
