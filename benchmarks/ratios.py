"""The committed ratios, and whether a new one is clearly below them. `oner-fast bench ratios` writes them.

Ratios differ between machines by up to a factor of two, since PyTorch's code and ours use a processor differently. On
the processor of a committed ratio the bound is therefore tight, and elsewhere it is half of the lowest committed one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from oner_fast.atomic import write_atomic
from oner_fast.benchmarks.record import Entry, Record
from oner_fast.benchmarks.record import read as read_record
from oner_fast.benchmarks.values import count, get, number, of
from oner_fast.bounded_json import load_object, shown

RATIOS = Path(__file__).resolve().parent / "results" / "ratios.json"
LEAST_RUNS = 3
# On the same processor: as far below the lowest run as that is below the highest, and at least so much.
LEAST_MARGIN = 0.30
# On another processor.
ELSEWHERE = 0.5
MOST_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Committed:
    """One key's figures on one processor: the implementation, the ratio of each run, and the counts."""

    served: str
    ratios: list[float]
    counts: dict[str, int]

    def bound(self) -> float:
        """Return the ratio below which a run on this processor is a clear regression."""
        low, high = min(self.ratios), max(self.ratios)
        return low * min(low / high, 1 - LEAST_MARGIN)


@dataclass(frozen=True)
class Processor:
    """The committed runs of one processor.

    Args:
        name: see `processor_of`.
        machine: the machine's line.
        torch: torch's version.
        commits: the commit of each run.
        entries: figures by key.
    """

    name: str
    machine: str
    torch: str
    commits: list[str]
    entries: dict[str, Committed]


@dataclass(frozen=True)
class Ratios:
    """The committed file: processors by name."""

    processors: dict[str, Processor] = field(default_factory=dict)

    def wrong_count(self, entry: Entry, processor: str, versions: Mapping[str, str]) -> str:
        """Say which count differs from the committed one; empty where none does.

        Counts of an op are the same everywhere. Those of a step are compared under the same torch on the same
        processor, since PyTorch's own layers decide them too.
        """
        for one in self.processors.values():
            known = one.entries.get(entry.key)
            same = one.name == processor and _minor(one.torch) == _minor(versions["torch"])
            if known is None or known.served != entry.served or (entry.kind == "step" and not same):
                continue
            for name, known_count in known.counts.items():
                if name in entry.counts and entry.counts[name] != known_count:
                    found = f"{entry.key}: {name} is {entry.counts[name]:,}"
                    return f"{found}, and was {known_count:,} in {one.commits[-1][:12]}"
        return ""

    def regression(self, entry: Entry, processor: str) -> str:
        """Say how the ratio is clearly below the committed ones; empty where it is not, or nothing is committed.

        Another implementation than the committed one, such as the portable one, is not judged.
        """
        if entry.ratio is None:
            return ""
        known = {
            name: one.entries[entry.key]
            for name, one in self.processors.items()
            if entry.key in one.entries and one.entries[entry.key].served == entry.served
        }
        if not known:
            return ""
        here = known.get(processor)
        bound = here.bound() if here else ELSEWHERE * min(statistics.median(one.ratios) for one in known.values())
        if entry.ratio >= bound:
            return ""
        ratios = here.ratios if here else [statistics.median(one.ratios) for one in known.values()]
        where = "on this processor" if here else "on other processors"
        return (
            f"{entry.key}: {entry.ratio:.2f}x of {entry.best}; {where} it was {min(ratios):.2f} to {max(ratios):.2f}, "
            f"and less than {bound:.2f} is a clear regression"
        )


def processor_of(facts: Mapping[str, Any]) -> str:
    """Name the kind of machine on which ratios are alike: processor, instruction set, matrix units and threads."""
    units = f" and {facts['matrix_units']}" if facts.get("matrix_units") else ""
    return f"{facts.get('cpu')}, {facts.get('kernels')} kernels{units}, {facts.get('threads')} threads"


def read(path: Path = RATIOS) -> Ratios:
    """Read the committed file; none is empty. Raises OSError, or ValueError where the file is another."""
    if not path.exists():
        return Ratios()
    try:
        with open(path, "rb") as file:
            data = load_object(file.read(MOST_BYTES + 1), "the file", max_bytes=MOST_BYTES)
        processors = get(data, "processors", dict, "the file")
        return Ratios({name: _processor(name, one) for name, one in processors.items()})
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): write it again with `make ratios`") from error


def _processor(name: str, found: Any) -> Processor:
    what = shown(name)
    found = of(found, dict, what)
    commits = [of(one, str, f"{what}.commits") for one in get(found, "commits", list, what)]
    if not commits:
        raise ValueError(f"{what} names no commit")
    entries = get(found, "entries", dict, what)
    return Processor(
        name,
        get(found, "machine", str, what),
        get(found, "torch", str, what),
        commits,
        {key: _committed(each, f"{what}.{key}") for key, each in entries.items()},
    )


def _committed(found: Any, what: str) -> Committed:
    found = of(found, dict, what)
    ratios = [number(one, f"{what}.ratios") for one in get(found, "ratios", list, what)]
    if not ratios or min(ratios) <= 0:
        raise ValueError(f"{what}.ratios is {shown(ratios)}, and positive numbers are needed")
    counts = get(found, "counts", dict, what)
    return Committed(
        get(found, "served", str, what),
        ratios,
        {name: count(each, f"{what}.counts.{name}") for name, each in counts.items()},
    )


def write(ratios: Ratios, path: Path = RATIOS) -> None:
    """Write the file, keys in order, replaced at once."""
    processors = {}
    for name, one in sorted(ratios.processors.items()):
        processors[name] = {key: value for key, value in asdict(one).items() if key != "name"}
    text = json.dumps({"processors": processors}, indent=1, sort_keys=True) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, partial(_write, text))


def _write(text: str, file: IO[bytes]) -> None:
    file.write(text.encode())


def merged(records: Sequence[Record]) -> Processor:
    """Make the committed figures of one processor from the records of several runs.

    Raises:
        ValueError: there are too few runs, one of them is given twice, they come from different processors or versions
            of torch, or their keys, counts or implementations differ.
    """
    if len(records) < LEAST_RUNS:
        raise ValueError(f"{len(records)} records were given, and the spread needs at least {LEAST_RUNS} runs")
    if any(one == other for place, one in enumerate(records) for other in records[:place]):
        raise ValueError("a record is given twice, and its copy shows no spread: give runs of their own")
    for what, values in (
        ("processor", {processor_of(one.facts) for one in records}),
        ("torch", {one.versions.get("torch", "") for one in records}),
    ):
        if len(values) > 1:
            raise ValueError(f"the records must come from one {what}, and these have {' and '.join(sorted(values))}")
    entries = {}
    for first in records[0].entries:
        if first.ratio is None:
            continue
        runs = [each for one in records for each in one.entries if each.key == first.key]
        if len(runs) < len(records):
            raise ValueError(f"{first.key}: {len(records) - len(runs)} of {len(records)} records lack it")
        if any((one.served, one.counts) != (first.served, first.counts) for one in runs):
            raise ValueError(f"{first.key}: the implementation or a count differs between the records")
        ratios = [round(one.ratio, 4) for one in runs if one.ratio is not None]
        entries[first.key] = Committed(first.served, ratios, first.counts)
    newest = records[-1]
    commits = [one.commit + "+" * one.dirty for one in records]
    return Processor(processor_of(newest.facts), newest.machine, newest.versions.get("torch", ""), commits, entries)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def main(argv: Sequence[str] | None = None) -> int:
    """Run `oner-fast bench ratios`; returns 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="oner-fast bench ratios",
        description="Commit the ratios of several records of one machine, which the next run is judged by.",
    )
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORD", help="JSON of `pytest benchmarks`")
    parser.add_argument("--out", type=Path, default=RATIOS, help="the file; other processors in it stay")
    options = parser.parse_args(argv)
    try:
        found = merged([read_record(path) for path in options.records])
        before = read(options.out)
        write(Ratios({**before.processors, found.name: found}), options.out)
    except (OSError, ValueError) as error:
        print(f"oner-fast bench ratios: {error}", file=sys.stderr)
        return 2
    for key, one in found.entries.items():
        shown = ", ".join(f"{ratio:.2f}" for ratio in one.ratios)
        print(f"{key}: {shown}; a clear regression below {one.bound():.2f}")
    print(f"wrote {options.out}")
    return 0
