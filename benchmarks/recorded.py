"""Open a results.json or the record of a commit as a report."""

from __future__ import annotations

from pathlib import Path

from oner_fast.benchmarks.cases import OURS
from oner_fast.benchmarks.record import MEMORY, MOST_BYTES, Entry, Record, parse
from oner_fast.benchmarks.report import Report
from oner_fast.benchmarks.rows import Row
from oner_fast.benchmarks.timing import Samples
from oner_fast.benchmarks.values import between
from oner_fast.benchmarks.words import CRITERIA
from oner_fast.bounded_json import load_object


def report_of(path: Path) -> Report:
    """Read either kind of file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is neither; the message names it.
    """
    with open(path, "rb") as file:
        data = file.read(MOST_BYTES + 1)
    whole = load_object(data, str(path), max_bytes=MOST_BYTES)
    if "machine_info" in whole:
        return from_record(parse(data, str(path)))
    if "rows" not in whole:
        raise ValueError(
            f"{path} has neither rows nor machine_info: `oner-fast bench ops` and `pytest benchmarks` write such"
        )
    try:
        report = Report.from_dict(whole)
        for place, row in enumerate(report.rows):
            _check(row, f"rows[{place}]")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no results.json of `oner-fast bench ops` ({error})") from error
    return report


def _check(row: Row, what: str) -> None:
    """Refuse a row whose fields do not belong together. Raises ValueError."""
    for names, known, which in (
        ([row.best] if row.best else [], row.times, "time"),
        ([row.eager] if row.eager else [], row.times, "time"),
        (row.breakdown, row.times, "time"),
        (row.met, CRITERIA, "criterion"),
        (row.target, CRITERIA, "criterion"),
        (row.floor, ("gemm", "copy"), "limit"),
    ):
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"{what} names {unknown[0]!r}, and has no {which} of it")
    for cells in row.memory.values():
        if lacking := [name for name in MEMORY if name not in cells]:
            raise ValueError(f"{what}.memory has no {lacking[0]!r}")
    ratios = [one for each in (row.speedup, row.speedup_eager) if each for one in (each.p20, each.p50, each.p80)]
    seconds = [one for each in row.times.values() for one in (each.p20, each.p50, each.p80)]
    parts = [sum(each.values()) for each in row.breakdown.values()]
    rates = [one for one in (row.share, row.limit_rate if row.limit else None) if one is not None]
    for one in [*ratios, *seconds, *parts, *rates]:
        between(one, 1e-21, 1e21, f"a ratio, a time or a rate of {what}")
    if any(not name.strip() for name in (row.op, *row.times, *row.memory, *row.precision, *row.breakdown)):
        raise ValueError(f"{what} has an empty name")


def from_record(record: Record) -> Report:
    """Make a report of a record's ops and steps."""
    rows = [row_of(entry) for entry in record.entries]
    commit = record.commit + ("+" if record.dirty else "")
    return Report(
        "pytest benchmarks --benchmark-json",
        record.machine,
        dict(record.facts),
        rows,
        True,
        commit,
        f"{record.time[:16].replace('T', ' ')} UTC",
    )


def row_of(entry: Entry) -> Row:
    """Make a row of an entry: its quantiles, memory, errors and share of the limit."""
    row = Row(entry.op, entry.shape, entry.dtype, entry.served)
    samples = {
        (OURS if name == entry.ours else name): Samples(name, list(one)) for name, one in entry.seconds.items() if one
    }
    row.add_times(samples, [name for name in samples if "eager" in name])
    if entry.limit is not None:
        row.limit, row.limit_rate, row.limit_unit = entry.limit.name, entry.limit.rate, entry.limit.unit
        row.share, row.rate = entry.limit.share, entry.limit.share * entry.limit.rate
    row.memory, row.precision, row.notes = dict(entry.memory), dict(entry.errors), list(entry.notes)
    row.errors = {name: max(errors.values()) for name, errors in entry.errors.items() if errors}
    row.graph_breaks = entry.counts.get("graph_breaks")
    row.parts = dict(entry.parts)
    row.breakdown = {name: dict(kinds) for name, kinds in entry.breakdown.items()}
    return row
