"""Open a results.json or the record of a commit as a report."""

from __future__ import annotations

from pathlib import Path

from oner_fast.benchmarks.cases import OURS
from oner_fast.benchmarks.record import MOST_BYTES, Entry, Record, parse
from oner_fast.benchmarks.report import Report
from oner_fast.benchmarks.rows import Row
from oner_fast.benchmarks.timing import Samples
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
        return Report.from_dict(whole)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no results.json of `oner-fast bench ops` ({error})") from error


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
