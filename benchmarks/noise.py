"""`oner-fast bench noise`: compare this build with itself, many times, and count the alarms.

A pair is one run as `oner-fast bench against` makes it, of the same build twice, with fresh processes and the eager
baselines alone; what looks slower or faster is measured again. Each pair is a file of the folder, so that the same
command goes on where it was interrupted. Pairs are judged in turn, the way of `bench against`; and apart, as `bench
compare` does with records that were made at different times: each pair's first build is compared with the next pair's
second, by the same clock and by the wall's.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oner_fast.atomic import write_atomic
from oner_fast.benchmarks.against import clock_of, records_of
from oner_fast.benchmarks.alone import Busy, alone
from oner_fast.benchmarks.cases import OURS
from oner_fast.benchmarks.comparison import ERROR, MARGIN, PAIRED_MARGIN, SLOWER, Comparison, compare
from oner_fast.benchmarks.confirmation import confirmed, doubtful
from oner_fast.benchmarks.ops import OPS
from oner_fast.benchmarks.record import Record
from oner_fast.benchmarks.source import commit_of_this
from oner_fast.benchmarks.turns import AFTER, BEFORE, PYTORCH, Failed, Side, Subject, Turns
from oner_fast.benchmarks.values import between, count, filled, get, number, of
from oner_fast.bounded_json import load_object, shown
from oner_fast.format_version import check_format_version

FOLDER = Path("runs/noise")
PAIRS, SECONDS = 100, 20.0
MOST_BYTES = 64 * 2**20
IN_TURN = "in turn"
FORMAT = 1
"""Version of a pair's file."""
MOST_PLANTED = 100.0
_REMEDY = "remove the file, and it is measured again"
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """Settings of a series of pairs; all pairs of a folder have the same.

    Args:
        ops: the ops, by name.
        seconds: for all rounds of a pair together.
        threads: CPU threads of each process.
        planted: factors by which the second build's ops are slowed down, by op.
    """

    ops: tuple[str, ...] = OPS
    seconds: float = SECONDS
    threads: int = 1
    planted: tuple[tuple[str, float], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The settings as a dict for JSON."""
        return {
            "ops": list(self.ops),
            "seconds": self.seconds,
            "threads": self.threads,
            "planted": dict(self.planted),
        }


def collect(folder: Path, pairs: int, settings: Settings, tell: Tell = lambda text: None) -> list[Path]:
    """Measure the pairs that `folder` lacks, and return the files of all of them.

    Raises:
        Busy: another process measures in the folder.
        Failed: a process ended, or a result was wrong.
        ValueError: the folder has pairs of other settings, or files that are none.
    """
    with alone(folder):
        return _collected(folder, pairs, settings, tell)


def _collected(folder: Path, pairs: int, settings: Settings, tell: Tell) -> list[Path]:
    paths = [folder / f"{place:03}.json" for place in range(pairs)]
    for place, path in enumerate(paths):
        if not path.exists():
            tell(f"pair {place + 1} of {pairs}")
            _write(path, settings, *_measure(settings, settings.seconds))
        pair = _load(path, settings, clock_of(settings.threads))
        again = again_of(path)
        if (keys := doubtful(compare(*pair))) and not again.exists():
            tell(f"pair {place + 1} of {pairs} again: {', '.join(keys)}")
            seconds = settings.seconds * len(keys) / len(pair[0].entries)
            _write(again, settings, *_measure(settings, seconds, keys))
        if again.exists():
            _load(again, settings, "wall")
    return paths


def again_of(path: Path) -> Path:
    """Name the file of a pair's second run, which exists where its first one raised an alarm."""
    return path.with_suffix(".again.json")


def _write(path: Path, settings: Settings, subjects: Sequence[Subject], described: Mapping[str, Any]) -> None:
    commit, dirty = commit_of_this()
    whole = {
        "format": FORMAT,
        "settings": settings.as_dict(),
        "commit": commit,
        "dirty": dirty,
        "described": described,
        "subjects": [_as_dict(one) for one in subjects],
    }
    text = json.dumps(whole) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def _measure(
    settings: Settings, seconds: float, keys: Sequence[str] | None = None
) -> tuple[list[Subject], dict[str, dict[str, Any]]]:
    options = ("--threads", str(settings.threads), "--eager")
    planted = tuple(word for op, factor in settings.planted for word in ("--slower", f"{op}={factor}"))
    sides = [
        Side(BEFORE, None, options),
        Side(AFTER, None, options + planted),
        Side(PYTORCH, None, (*options, "--pytorch")),
    ]
    with Turns(sides) as turns:
        described = turns.describe()
        subjects = turns.prepare(settings.ops, (), lambda text: None, keys)
        for one in subjects:
            if one.missing:
                raise Failed(f"{one.key} cannot be measured: {one.missing}")
        turns.measure(subjects, seconds, lambda text: None)
    return subjects, described


def judge(paths: Sequence[Path], settings: Settings, margin: float | None = None) -> dict[str, list[Comparison]]:
    """Compare the pairs of `collect`, in each way; the names of those of neighbouring pairs begin with "apart"."""
    clock = clock_of(settings.threads)
    found = {IN_TURN: [_in_turn(path, settings, margin) for path in paths]}
    for each in dict.fromkeys((clock, "wall")):
        pairs = [_load(path, settings, each) for path in paths]
        found[f"apart, {each} clock"] = [
            compare(one[0], two[1], margin=margin) for one, two in zip(pairs, pairs[1:], strict=False)
        ]
    return found


def _in_turn(path: Path, settings: Settings, margin: float | None) -> Comparison:
    clock, again = clock_of(settings.threads), again_of(path)
    first = compare(*_load(path, settings, clock), margin=margin)
    return confirmed(first, compare(*_load(again, settings, clock), margin=margin)) if again.exists() else first


def alarms(comparisons: Sequence[Comparison]) -> int:
    """Count the comparisons in which a key is slower."""
    return sum(any(row.verdict == SLOWER for row in one.rows) for one in comparisons)


def caught(comparisons: Sequence[Comparison], op: str) -> int:
    """Count the comparisons in which every key of an op is slower."""
    verdicts = ([row.verdict for row in one.rows if row.key.split()[0] == op] for one in comparisons)
    return sum(bool(each) and all(one == SLOWER for one in each) for each in verdicts)


def margins(comparisons: Sequence[Comparison]) -> list[float]:
    """Return the margin below which each comparison would have raised an alarm, in ascending order."""
    lows = [[math.log1p(row.high) for row in one.rows if row.high is not None] for one in comparisons]
    return sorted(math.expm1(-min(each)) for each in lows)


def _load(path: Path, settings: Settings, clock: str) -> tuple[Record, Record]:
    """Read a pair's file as two records. Raises ValueError where it is none, or of other settings."""
    with open(path, "rb") as file:
        whole = load_object(file.read(MOST_BYTES + 1), str(path), max_bytes=MOST_BYTES)
    check_format_version(path, whole.get("format"), FORMAT)
    if whole.get("settings") != settings.as_dict():
        raise ValueError(
            f"{path} has the settings {whole.get('settings')}, and {settings.as_dict()} are asked for; "
            "give another folder with --out"
        )
    what = str(path)
    found = get(whole, "subjects", list, what, _REMEDY)
    subjects = [_from_dict(one, f"{what}: subjects[{place}]") for place, one in enumerate(found)]
    commit = (get(whole, "commit", str, what, _REMEDY), get(whole, "dirty", bool, what, _REMEDY))
    described = get(whole, "described", dict, what, _REMEDY)
    for side in (BEFORE, AFTER):
        one = get(described, side, dict, f"{what}: described", _REMEDY)
        get(one, "line", str, f"{what}: described.{side}", _REMEDY)
        facts = get(one, "facts", dict, f"{what}: described.{side}", _REMEDY)
        get(facts, "oner_fast", str, f"{what}: described.{side}.facts", _REMEDY)
    return records_of(subjects, described, commit, commit, clock)


def _as_dict(subject: Subject) -> dict[str, Any]:
    times = {name: [[*key, each] for key, each in getattr(subject, name).items()] for name in ("wall", "busy")}
    names = ("key", "kind", "op", "shape", "dtype", "served", "errors", "rounds_in_a_visit")
    return {**{name: getattr(subject, name) for name in names}, **times}


def _from_dict(found: Any, what: str) -> Subject:
    found = of(found, dict, what)
    wall, busy = (_times(get(found, name, list, what, _REMEDY), f"{what}.{name}") for name in ("wall", "busy"))
    if wall.keys() != busy.keys() or not wall.keys() >= {(BEFORE, OURS), (AFTER, OURS)}:
        raise ValueError(f"{what} lacks the rounds of a build, or of one of both clocks; {_REMEDY}")
    served = get(found, "served", dict, what, _REMEDY)
    errors = get(found, "errors", dict, what, _REMEDY)
    key, kind, op, shape, dtype = (
        get(found, name, str, what, _REMEDY) for name in ("key", "kind", "op", "shape", "dtype")
    )
    return Subject(
        key=filled(key, f"{what}.key"),
        kind=kind,
        op=op,
        shape=shape,
        dtype=dtype,
        served={side: get(served, side, str, f"{what}.served", _REMEDY) for side in (BEFORE, AFTER)},
        errors={side: of(errors[side], dict, f"{what}.errors.{side}") for side in errors},
        wall=wall,
        busy=busy,
        rounds_in_a_visit=count(found.get("rounds_in_a_visit"), f"{what}.rounds_in_a_visit"),
    )


def _times(found: list[Any], what: str) -> dict[tuple[str, str], list[float]]:
    made = {}
    for one in found:
        if not isinstance(one, list) or len(one) != 3 or not isinstance(one[2], list) or not one[2]:
            raise ValueError(f"{what} has {shown(one)}, and needs a side, a contender and its seconds; {_REMEDY}")
        side, contender = filled(one[0], what), filled(one[1], what)
        made[side, contender] = [float(between(number(each, what), 1e-9, 1e9, what)) for each in one[2]]
    return made


def parser() -> argparse.ArgumentParser:
    """Make the parser of `oner-fast bench noise`."""
    made = argparse.ArgumentParser(prog="oner-fast bench noise", description=__doc__)
    made.add_argument("--pairs", type=int, default=PAIRS, help=f"number of pairs (default: {PAIRS})")
    made.add_argument("--op", nargs="+", metavar="NAME", default=list(OPS), help=f"only these: {', '.join(OPS)}")
    made.add_argument("--seconds", type=float, default=SECONDS, help=f"of a pair's rounds (default: {SECONDS:g})")
    made.add_argument("--threads", type=int, default=1, help="CPU threads of each process (default: 1)")
    made.add_argument("--plant", metavar="OP=FACTOR", default=None, help="slow one op of the second build down: OP=1.2")
    made.add_argument("--margin", type=float, default=None, help="least change that counts (default: as compared)")
    made.add_argument("--out", type=Path, default=FOLDER, help=f"folder of the pairs ({FOLDER})")
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(argv)
    try:
        settings = Settings(tuple(options.op), options.seconds, options.threads, _planted(options.plant))
        if reason := _reason_against(options):
            raise ValueError(reason)
        paths = collect(options.out, options.pairs, settings, lambda text: print(text, file=sys.stderr, flush=True))
        found = judge(paths, settings, options.margin)
    except (Busy, Failed, OSError, ValueError) as problem:
        print(f"oner-fast bench noise: {problem}", file=sys.stderr)
        return 2
    for way, comparisons in found.items():
        if not comparisons:
            continue
        margin = PAIRED_MARGIN if way == IN_TURN else MARGIN
        needed = margins(comparisons)
        print(
            f"{way}: {alarms(comparisons)} of {len(comparisons)} comparisons raise an alarm with a margin of "
            f"{margin if options.margin is None else options.margin:.0%} and an error of {ERROR:.0%}; margins below "
            f"{needed[-1]:.1%} raise one, and below {needed[-2] if len(needed) > 1 else needed[-1]:.1%} two"
        )
        for op, factor in settings.planted:
            print(
                f"{way}: {op}, {factor:g} times as slow, is caught in {caught(comparisons, op)} of {len(comparisons)}"
            )
    return 0


def _planted(text: str | None) -> tuple[tuple[str, float], ...]:
    if text is None:
        return ()
    op, _, factor = text.partition("=")
    try:
        return ((op, float(factor)),)
    except ValueError:
        raise ValueError(f"--plant must be OP=FACTOR, such as masked_gather=1.2, got {text!r}") from None


def _reason_against(options: argparse.Namespace) -> str:
    for name in options.op:
        if name not in OPS:
            return f"unknown op {name!r}; known: {', '.join(OPS)}"
    for name, factor in _planted(options.plant):
        if name not in options.op:
            return f"--plant must name an op that is measured, one of {', '.join(options.op)}, got {name!r}"
        if not 1 < factor <= MOST_PLANTED:
            return f"--plant needs a factor above 1 and up to {MOST_PLANTED:g}, got {factor:g}"
    if options.margin is not None and not 0 <= options.margin < float("inf"):
        return f"--margin must be 0 or more, got {options.margin:g}"
    if options.out.exists() and not options.out.is_dir():
        return f"--out must be a folder, and {options.out} is a file"
    if options.pairs < 1 or options.threads < 1:
        return f"--pairs and --threads must be at least 1, got {options.pairs} and {options.threads}"
    if not 0 < options.seconds < float("inf"):
        return f"--seconds must be positive, got {options.seconds:g}"
    return ""
