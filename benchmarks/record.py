"""The record of a commit: the JSON of `pytest benchmarks --benchmark-json=FILE`, and what this library adds to it.

pytest-benchmark's file has an object "oner_fast" in two places. That of `machine_info` describes the machine, the
versions and the commit; that of each benchmark's `extra_info` is an `Entry`. A later format may add fields, which a
reader of an earlier one ignores.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from oner_fast.atomic import write_atomic
from oner_fast.benchmarks.values import at_least_0, between, cleaned, count, filled, get, number, of, printable
from oner_fast.bounded_json import load_object, shown
from oner_fast.format_version import check_format_version

FORMAT = 1
"""Version of both objects."""
NAME = "oner_fast"
"""Name of both objects, and of ours among the contenders."""
KINDS = ("op", "step", "loader")
MOST_BYTES = 256 * 2**20
# Seconds of a round that can be true; ratios of such numbers neither overflow nor vanish.
LEAST_SECONDS, MOST_SECONDS = 1e-12, 1e9
MEMORY = ("peak", "saved", "saved_beyond_inputs")
_WRITE = "`pytest benchmarks --benchmark-json=FILE` writes one"


@dataclass(frozen=True)
class LimitShare:
    """The machine's limit that bounds a measurement: its name, its rate, and the share of it that ours reached.

    Args:
        name: the candidate that reached the limit.
        rate: FLOPs or bytes a second.
        unit: "GFLOP/s" or "GB/s", the unit for readers; `rate` counts single FLOPs or bytes.
        share: ours divided by the limit.
    """

    name: str
    rate: float
    unit: str
    share: float


@dataclass(frozen=True)
class Entry:
    """One measurement of a record.

    Args:
        key: what was measured; unique in a record and the same in every commit's.
        kind: "op", "step" or "loader".
        op, shape, dtype: the parts of the key; the op of a step is "step of oner", for example.
        served: the implementation that served ours.
        seconds: the seconds of every contender, round by round. The same place is the same round; a slow contender
            has fewer rounds.
        ours: our name in `seconds`.
        best: the fastest of the others, by its median; empty where ours ran alone.
        ratio: the median over rounds of best / ours; None where ours ran alone.
        limit: the machine's limit, where one bounds the measurement.
        memory: bytes of each contender: "peak", "saved" and "saved_beyond_inputs".
        counts: exact numbers of ours, which are compared for equality.
        errors: relative errors of each contender against float64, the largest of each group of results.
        work: what a round does, by its unit ("FLOP", "bytes", "images"), so that work / seconds is a rate; optional.
        parts: each kind of operation's share of our time; optional.
        breakdown: seconds of each kind of operation by contender, as shares of a profiled step; optional.
        notes: remarks that a reader of the figures needs; optional.
    """

    key: str
    kind: str
    op: str
    shape: str
    dtype: str
    served: str
    seconds: dict[str, list[float]]
    ours: str = NAME
    best: str = ""
    ratio: float | None = None
    limit: LimitShare | None = None
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)
    breakdown: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def rounds(self) -> list[float]:
        """Return best / ours within each round that both took part in; empty where ours ran alone."""
        if not self.best:
            return []
        return [a / b for a, b in zip(self.seconds[self.best], self.seconds[self.ours], strict=False)]

    def as_dict(self) -> dict[str, Any]:
        """Return the entry as `extra_info["oner_fast"]` holds it."""
        return {"format": FORMAT, **asdict(self)}


@dataclass(frozen=True)
class Record:
    """The record of a commit.

    Args:
        machine: the machine in one line.
        facts: the machine's facts by name (see `oner_fast.benchmarks.machine`).
        versions: the versions of torch, triton, python and oner_fast; empty for what is not installed.
        commit: the commit's SHA; empty outside a repository.
        dirty: whether tracked files differed from the commit.
        entries: the measurements, in the order in which they ran.
        time: when the record was written, as pytest-benchmark writes it (ISO 8601, UTC); empty where it says nothing.
    """

    machine: str
    facts: dict[str, Any]
    versions: dict[str, str]
    commit: str
    dirty: bool
    entries: list[Entry]
    time: str = ""

    def entry(self, key: str) -> Entry:
        """Find an entry by its key. Raises KeyError, with the known keys, where there is none."""
        for one in self.entries:
            if one.key == key:
                return one
        raise KeyError(f"the record has no entry {key!r}; known: {', '.join(one.key for one in self.entries)}")


def ratio_of(seconds: Mapping[str, list[float]], ours: str, others: list[str]) -> tuple[str, float | None]:
    """Find the fastest of `others` by its median, and the median over rounds of its time / ours; ("", None) of none."""
    if not others:
        return "", None
    best = min(others, key=lambda name: statistics.median(seconds[name]))
    return best, statistics.median(a / b for a, b in zip(seconds[best], seconds[ours], strict=False))


def machine_object(
    line: str, facts: Mapping[str, Any], versions: Mapping[str, str], commit: str, dirty: bool
) -> dict[str, Any]:
    """Return the object that `machine_info["oner_fast"]` holds; the arguments are the fields of `Record`."""
    return {
        "format": FORMAT,
        "line": line,
        "facts": dict(facts),
        "versions": dict(versions),
        "commit": commit,
        "dirty": dirty,
    }


def read(path: Path | str) -> Record:
    """Read a record.

    Benchmarks of the file without an object "oner_fast" are passed over: they are gates, which measure nothing.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is no record, or a newer version wrote it; the message names the file and the place.
    """
    path = Path(path)
    with open(path, "rb") as file:
        data = file.read(MOST_BYTES + 1)
    return parse(data, str(path))


def parse(data: bytes | str, what: str) -> Record:
    """Parse the text of a record; `what` names it in errors. Returns and raises as `read`."""
    whole = load_object(data, what, max_bytes=MOST_BYTES)
    machine = whole.get("machine_info")
    benchmarks = whole.get("benchmarks")
    if not isinstance(machine, dict) or not isinstance(machine.get(NAME), dict) or not isinstance(benchmarks, list):
        raise ValueError(f"{what} is no record of a commit: it lacks machine_info.{NAME} or benchmarks; {_WRITE}")
    here = machine[NAME]
    _check_format(what, here)
    place = f"{what}: machine_info.{NAME}"
    entries = []
    for index, one in enumerate(benchmarks):
        extra = one.get("extra_info") if isinstance(one, dict) else None
        if not isinstance(extra, dict):
            raise ValueError(f"{what}: benchmarks[{index}] has no extra_info; {_WRITE}")
        if NAME in extra:
            entries.append(_entry(extra[NAME], f"{what}: benchmarks[{index}].extra_info.{NAME}"))
    if twice := next((key for key, count in Counter(one.key for one in entries).items() if count > 1), None):
        raise ValueError(f"{what} has two entries {twice!r}, and a key must be unique")
    versions = _get(here, "versions", dict, place)
    time = whole.get("datetime", "")
    return Record(
        machine=_get(here, "line", str, place),
        facts=_get(here, "facts", dict, place),
        versions={printable(name, place): _get(versions, name, str, f"{place}.versions") for name in versions},
        commit=_get(here, "commit", str, place),
        dirty=_get(here, "dirty", bool, place),
        entries=entries,
        time=cleaned(time, f"{what}: datetime") if isinstance(time, str) else "",
    )


def _check_format(what: str, found: Mapping[str, Any]) -> None:
    if "format" not in found:
        raise ValueError(f'{what} has no "format"; {_WRITE}')
    check_format_version(what, found["format"], FORMAT)


def _entry(found: Any, what: str) -> Entry:
    found = of(found, dict, what)
    _check_format(what, found)
    kind = _get(found, "kind", str, what)
    if kind not in KINDS:
        raise ValueError(f"{what}.kind is {shown(kind)}, and one of {', '.join(KINDS)} is needed")
    seconds = {
        filled(name, what): [
            _seconds(each, f"{what}.seconds[{name!r}]") for each in of(values, list, f"{what}.seconds[{name!r}]")
        ]
        for name, values in _get(found, "seconds", dict, what).items()
    }
    ours, best = _get(found, "ours", str, what), _get(found, "best", str, what)
    for name in (ours, best) if best else ():
        if not seconds.get(name):
            raise ValueError(f"{what}.seconds has no rounds of {name!r}, which the ratio needs")
    if best and best == ours:
        raise ValueError(f"{what} has {shown(best)} as ours and as the best of the others")
    ratio = found.get("ratio")
    if bool(best) != (ratio is not None):
        raise ValueError(f"{what} has the ratio {shown(ratio)} and the best {best!r}: give both or neither")
    return Entry(
        key=filled(_get(found, "key", str, what), f"{what}.key"),
        kind=kind,
        op=filled(_get(found, "op", str, what), f"{what}.op"),
        shape=_get(found, "shape", str, what),
        dtype=_get(found, "dtype", str, what),
        served=_get(found, "served", str, what),
        seconds=seconds,
        ours=ours,
        best=best,
        ratio=None if ratio is None else _ratio(ratio, f"{what}.ratio"),
        limit=_limit(found.get("limit"), f"{what}.limit"),
        memory=_memory(found, what),
        counts=_numbers(found, "counts", count, what),
        errors=_table(found, "errors", at_least_0, what),
        work=_numbers(found, "work", at_least_0, what),
        parts=_numbers(found, "parts", at_least_0, what),
        breakdown=_breakdown(found, seconds, what),
        notes=[cleaned(note, f"{what}.notes") for note in of(found.get("notes", []), list, f"{what}.notes")],
    )


def _limit(found: Any, what: str) -> LimitShare | None:
    if found is None:
        return None
    found = of(found, dict, what)
    name, unit = _get(found, "name", str, what), _get(found, "unit", str, what)
    rate, share = _ratio(found.get("rate"), f"{what}.rate"), _ratio(found.get("share"), f"{what}.share")
    return LimitShare(name, rate, unit, share)


def _numbers(found: Mapping[str, Any], name: str, value: Any, what: str) -> dict[str, Any]:
    each = of(found.get(name, {}), dict, f"{what}.{name}")
    return {printable(one, f"{what}.{name}"): value(each[one], f"{what}.{name}[{one!r}]") for one in each}


def _table(found: Mapping[str, Any], name: str, value: Any, what: str) -> dict[str, dict[str, Any]]:
    rows = of(found.get(name, {}), dict, f"{what}.{name}")
    return {filled(row, f"{what}.{name}"): _numbers(rows, row, value, f"{what}.{name}") for row in rows}


def _memory(found: Mapping[str, Any], what: str) -> dict[str, dict[str, int]]:
    table = _table(found, "memory", count, what)
    for row, cells in table.items():
        if lacking := [name for name in MEMORY if name not in cells]:
            raise ValueError(f"{what}.memory[{row!r}] has no {lacking[0]!r}; {_WRITE}")
    return table


def _breakdown(found: Mapping[str, Any], seconds: Mapping[str, Any], what: str) -> dict[str, dict[str, float]]:
    table = _table(found, "breakdown", at_least_0, what)
    for row, cells in table.items():
        if not seconds.get(row):
            raise ValueError(f"{what}.breakdown has the contender {row!r}, which has no rounds")
        if not LEAST_SECONDS <= sum(cells.values()) <= MOST_SECONDS:
            raise ValueError(f"{what}.breakdown[{row!r}] adds up to {sum(cells.values()):g}, and seconds are needed")
    return table


def _get(found: Mapping[str, Any], name: str, kind: type, what: str) -> Any:
    return get(found, name, kind, what, _WRITE)


def _seconds(value: Any, what: str) -> float:
    return float(between(number(value, what), LEAST_SECONDS, MOST_SECONDS, what))


def _ratio(value: Any, what: str) -> float:
    return float(between(number(value, what), LEAST_SECONDS / MOST_SECONDS, MOST_SECONDS / LEAST_SECONDS, what))


def write(record: Record, path: Path | str) -> None:
    """Write a record as `read` reads it, with the parts of pytest-benchmark's file that this library uses.

    pytest-benchmark writes the record of a run; this writes records that were put together from others, and tests'.
    The file is replaced at once. Raises OSError, and ValueError where a number is not finite.
    """
    machine = machine_object(record.machine, record.facts, record.versions, record.commit, record.dirty)
    benchmarks = [
        {
            "name": one.key,
            "fullname": one.key,
            "group": one.kind,
            "stats": {"data": one.seconds.get(one.ours, [])},
            "extra_info": {NAME: one.as_dict()},
        }
        for one in record.entries
    ]
    whole = {"machine_info": {NAME: machine}, "benchmarks": benchmarks, "datetime": record.time}
    text = json.dumps(whole, indent=1, allow_nan=False) + "\n"
    write_atomic(Path(path), partial(_write_text, text))


def _write_text(text: str, file: IO[bytes]) -> None:
    file.write(text.encode())
