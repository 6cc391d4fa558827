"""The page of a history: where each measurement stands, its trend, and exact counts that changed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from oner_fast.benchmarks.charts.colours import times
from oner_fast.benchmarks.charts.trend import Value, trend
from oner_fast.benchmarks.history.folder import History, Measured
from oner_fast.benchmarks.page.content import Detail, Fact, Figure, Page, Section, Table
from oner_fast.benchmarks.record import Entry
from oner_fast.benchmarks.timing import quantile

_KINDS = {"op": ("ops", "Ops"), "step": ("steps", "Training steps"), "loader": ("loader", "Loader")}


def history_page(history: History) -> Page:
    """Make the page."""
    records = history.records
    newest, oldest = records[-1], records[0]
    span = f"{len(records)} commits" if len(records) > 1 else "1 commit"
    sections = [_standing(history), *_trends(history), _counts(history), _commits(history), _left_out(history)]
    facts = [
        Fact("Newest", f"{newest.commit} {newest.day}".strip(), code=True),
        Fact("Oldest", f"{oldest.commit} {oldest.day}".strip(), code=True),
        Fact("Order", history.order),
        Fact("Machine", newest.record.machine),
    ]
    return Page(
        title="Speed of oner_fast, commit by commit",
        lead=[
            f"{span}. Each figure is the time of the fastest of PyTorch divided by ours, in the same run on the same "
            "machine, so that machines of different speed compare. Above 1x ours is faster."
        ],
        facts=facts,
        sections=[section for section in sections if section is not None],
    )


def spread(entry: Entry) -> tuple[float, float, float]:
    """Return p20, median and p80 of the ratio over rounds; the entry has a baseline."""
    rounds = entry.rounds()
    return quantile(rounds, 0.2), quantile(rounds, 0.5), quantile(rounds, 0.8)


def _figures_of(entry: Entry) -> str:
    low, middle, high = spread(entry)
    return f"{times(middle)} ({low:.2f} to {high:.2f})"


def _standing(history: History) -> Section:
    cells = []
    for key in history.all_keys():
        known = [entry for entry in history.entries(key) if entry is not None and entry.best]
        if not known:
            continue
        before = _figures_of(known[-2]) if len(known) > 1 else ""
        limit = known[-1].limit
        share = f"{limit.share:.0%}" if limit else ""
        cells.append([key, _figures_of(known[-1]), before, known[-1].best, share, str(len(known))])
    columns = ["measurement", "newest (p20 to p80)", "the one before", "fastest of the others", "share of the limit"]
    if not any(row[4] for row in cells):  # records of builds measured in turn have no share
        columns, cells = columns[:4], [row[:4] + row[5:] for row in cells]
    table = Table("The newest record of each measurement", [*columns, "records"], cells)
    said = "oner-fast bench compare A.json B.json says whether a change is more than noise."
    return Section("standing", "Where it stands", [said], tables=[table])


def _trends(history: History) -> list[Section]:
    changes = [place for place in range(1, len(history.records)) if machine_changes(history, place)]
    made: dict[str, list[tuple[Figure, Detail]]] = {}
    for number, key in enumerate(history.all_keys()):
        entries = history.entries(key)
        known = [entry for entry in entries if entry is not None]
        if not any(entry.best for entry in known):
            continue
        made.setdefault(known[-1].kind, []).append(_trend(history, number, key, changes))
    sections = []
    for kind, (anchor, heading) in _KINDS.items():
        if kind in made:
            figures, details = zip(*made[kind], strict=True)
            said = "The band is p20 to p80 of the rounds; a vertical line marks another machine or other versions."
            sections.append(Section(anchor, heading, [said], figures, details=details))
    return sections


def _trend(history: History, number: int, key: str, changes: Sequence[int]) -> tuple[Figure, Detail]:
    values: list[Value | None] = []
    cells, ids = [], []
    for place, (one, entry) in enumerate(zip(history.records, history.entries(key), strict=True)):
        if entry is None or not entry.best:
            values.append(None)
            continue
        low, middle, high = spread(entry)
        said = _figures_of(entry)
        target = f"m{number}-{place}"
        values.append(Value(middle, low, high, f"{one.commit} {one.day}: {said}, {entry.served}", target))
        cells.append([one.commit, one.day, said, entry.best, entry.served])
        ids.append(target)
    known = [value for value in values if value is not None]
    missing = len(values) - len(known)
    caption = f"{key}: {times(known[-1].middle)} at {cells[-1][0]}"
    if len(known) > 1:
        caption += (
            f", {times(min(one.middle for one in known))} to {times(max(one.middle for one in known))} over all commits"
        )
    caption += f"; {missing} of {len(values)} records lack it" if missing else ""
    columns = ["commit", "date, UTC", "ratio (p20 to p80)", "fastest of the others", "by"]
    table = Table(f"{key}, the newest first", columns, cells[::-1], ids[::-1])
    figure = Figure.of(partial(trend, values, changes, caption), caption + ".")
    return figure, Detail(f"Figures of {key}", [table])


def machine_changes(history: History, place: int) -> list[str]:
    """List what differs between the machine and versions of a record and those of the record before."""
    before, here = history.records[place - 1].machine(), history.records[place].machine()
    names = dict.fromkeys([*before, *here])
    return [
        f"{name}: {before.get(name) or 'none'} -> {here.get(name) or 'none'}"
        for name in names
        if before.get(name) != here.get(name)
    ]


def count_changes(history: History) -> list[list[str]]:
    """List every exact count that changed from one record to the next that has its key, the newest first."""
    found: list[tuple[int, list[str]]] = []
    for key in history.all_keys():
        before: Entry | None = None
        for place, (one, entry) in enumerate(zip(history.records, history.entries(key), strict=True)):
            if entry is None:
                continue
            if before is not None:
                for name in dict.fromkeys([*before.counts, *entry.counts]):
                    old, new = before.counts.get(name), entry.counts.get(name)
                    if old != new:
                        found.append((place, [one.commit, key, name, _count(old), _count(new)]))
            before = entry
    return [cells for _, cells in sorted(found, key=lambda each: -each[0])]


def _count(value: int | None) -> str:
    return "none" if value is None else f"{value:,}"


def _counts(history: History) -> Section:
    changed = count_changes(history)
    if not changed:
        return Section(
            "counts", "Exact counts", ["No exact count changed: bytes kept, graph breaks, FLOPs and others."]
        )
    columns = ["commit", "measurement", "count", "before", "from this commit on"]
    return Section("counts", "Exact counts", tables=[Table("Counts that changed, the newest first", columns, changed)])


def _commits(history: History) -> Section:
    cells = []
    for place, one in reversed(list(enumerate(history.records))):
        changed = "; ".join(machine_changes(history, place)) if place else ""
        cells.append([one.commit, one.day, str(len(one.record.entries)), _versions(one), changed, one.name])
    columns = ["commit", "date, UTC", "measurements", "versions", "machine changed", "file"]
    return Section(
        "commits", "Commits", details=[Detail("Every record, the newest first", [Table("Records", columns, cells)])]
    )


def _versions(one: Measured) -> str:
    return ", ".join(f"{name} {version}" for name, version in one.record.versions.items() if version)


def _left_out(history: History) -> Section | None:
    alone = [
        (key, "ours ran alone, without a baseline")
        for key in history.all_keys()
        if not any(entry is not None and entry.best for entry in history.entries(key))
    ]
    cells = [[name, why] for name, why in (*history.left_out, *alone)]
    if not cells:
        return None
    return Section("left-out", "Left out", tables=[Table("What this page leaves out, and why", ["what", "why"], cells)])
