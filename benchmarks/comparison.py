"""Compare two records of a commit: times beyond their noise, exact counts for equality, memory with a tolerance.

Times are compared as our time in units of PyTorch's within the same round (ours / baseline), which does not depend on
the speed of the machine. The baseline is the one that was the fastest in both records together. Two records that were
measured in turn on one machine share their rounds; there our times are compared directly, round by round. See
`oner_fast.benchmarks.bootstrap` for the statistic.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from oner_fast.benchmarks import bootstrap
from oner_fast.benchmarks.record import Entry, Record

# Probability that noise calls any key of a comparison slower (and as much for faster), beside the margins.
ERROR = 0.01
# A change smaller than the margin is none: what one process has by luck (the place of its memory, for example) stays
# with all of its rounds. The margins were fixed on A/A pairs, see docs/benchmarks.md.
PAIRED_MARGIN, MARGIN = 0.05, 0.25
# A slow-down that a comparison should be able to see; a remark says where the interval includes it.
SOUGHT = 0.2
# Intervals end at a million times as fast.
MOST_LOG = math.log(1e6)
# Peaks are exact to some hundred KiB.
PEAK_SHARE, PEAK_BYTES = 0.02, 2**20
INTERLEAVED = "interleaved"
"""Name of the object in a record's facts that says in which rounds it was measured, and by which clock."""
SLOWER, FASTER, SAME, NEW, GONE, UNKNOWN = "slower", "faster", "same", "new", "gone", "not compared"


@dataclass(frozen=True)
class Row:
    """The comparison of one key.

    Args:
        key: what was measured.
        verdict: "slower", "faster", "same", "new", "gone" or "not compared".
        before, after: PyTorch's time / ours, medians over rounds; None where there is none.
        change: after / before - 1 of our speed; -0.5 is half the speed.
        low, high: the ends of its interval.
        more, less: counts and bytes that rose or fell.
        remarks: what a reader needs besides.
    """

    key: str
    verdict: str
    before: float | None = None
    after: float | None = None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    more: list[str] = field(default_factory=list)
    less: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def regressed(self) -> bool:
        """Whether it is slower, or a count or its memory rose."""
        return self.verdict == SLOWER or bool(self.more)


@dataclass(frozen=True)
class Comparison:
    """The comparison of two records.

    Args:
        before, after: commit, machine and versions of each.
        paired: whether both share their rounds.
        error, margin: as given to `compare`.
        rows: one for each key of either record.
    """

    before: dict[str, Any]
    after: dict[str, Any]
    paired: bool
    error: float
    margin: float
    rows: list[Row]

    @property
    def regressions(self) -> list[Row]:
        """Rows that regressed."""
        return [row for row in self.rows if row.regressed]

    def as_dict(self) -> dict[str, Any]:
        """The comparison as a dict for JSON."""
        rows = [{**asdict(row), "regressed": row.regressed} for row in self.rows]
        return {"format": 1, **asdict(self), "rows": rows, "regressions": len(self.regressions)}


def compare(before: Record, after: Record, *, error: float = ERROR, margin: float | None = None) -> Comparison:
    """Compare two records.

    Args:
        before, after: the records.
        error: probability that noise alone calls any key slower.
        margin: least change that counts, 0.05 for 5 % of time; by default `PAIRED_MARGIN` where both records share
            their rounds, and `MARGIN` elsewhere.

    Raises:
        ValueError: the records have no key in common.
    """
    mine, theirs = ({one.key: one for one in record.entries} for record in (before, after))
    common = [key for key in mine if key in theirs]
    if not common:
        raise ValueError(
            f"the records have no key in common: one has {_some(list(mine))}, the other {_some(list(theirs))}; "
            "measure both with the same set"
        )
    ways = {name: _interleaved(record) for name, record in (("before", before), ("after", after))}
    paired = bool(ways["before"].get("id")) and ways["before"].get("id") == ways["after"].get("id")
    margin = margin if margin is not None else PAIRED_MARGIN if paired else MARGIN
    blocks = {key: max(_rounds_in_a_visit(way, key) for way in ways.values()) for key in common}
    rows = []
    for key in dict.fromkeys([*mine, *theirs]):
        if key not in common:
            one = mine.get(key) or theirs[key]
            rows.append(Row(key, GONE, one.ratio) if key in mine else Row(key, NEW, None, one.ratio))
        else:
            rows.append(_row(mine[key], theirs[key], paired, blocks[key], error / len(common), margin))
    return Comparison(_about(before), _about(after), paired, error, margin, rows)


def _row(before: Entry, after: Entry, paired: bool, block: int, error: float, margin: float) -> Row:
    more, less = _counts(before, after)
    remarks = []
    if before.served != after.served:
        remarks.append(f"served by {after.served or 'nothing'}, before by {before.served or 'nothing'}")
    ratios: tuple[float | None, float | None] = before.ratio, after.ratio
    try:
        if paired:
            ours = before.seconds[before.ours], after.seconds[after.ours]
            change = bootstrap.paired(*ours, block=block, error=error)
        else:
            baseline = _baseline(before, after)
            relative = [_relative(one, baseline) for one in (before, after)]
            ratios = 1 / statistics.median(relative[0]), 1 / statistics.median(relative[1])
            change = bootstrap.independent(*relative, block=block, error=error)
            if baseline != after.best:
                remarks.append(f"against {baseline}")
    except ValueError as problem:
        return Row(before.key, UNKNOWN, *ratios, more=more, less=less, remarks=[*remarks, str(problem)])
    least = math.log1p(margin)
    verdict = SLOWER if change.low > least else FASTER if change.high < -least else SAME
    if verdict == SAME and change.high > math.log1p(SOUGHT):
        remarks.append(f"too noisy to rule out that it takes {SOUGHT:.0%} longer")
    middle, low, high = (math.expm1(min(-log, MOST_LOG)) for log in (change.log, change.high, change.low))
    return Row(before.key, verdict, *ratios, middle, low, high, more, less, remarks)


def _baseline(before: Entry, after: Entry) -> str:
    """Name the baseline of both entries that was the fastest in both together."""
    ours = {before.ours, after.ours}
    names = [name for name in before.seconds if name in after.seconds and name.split()[0] not in ours]
    names = [name for name in names if before.seconds[name] and after.seconds[name]]
    if not names:
        raise ValueError("the records have no PyTorch baseline of it in common")
    long = [
        name
        for name in names
        if min(len(before.seconds[name]), len(after.seconds[name])) >= bootstrap.LEAST_ROUNDS
    ]  # fmt: skip

    def both(name: str) -> float:
        return statistics.median(before.seconds[name]) * statistics.median(after.seconds[name])

    return min(long or names, key=both)


def _relative(entry: Entry, baseline: str) -> list[float]:
    return [a / b for a, b in zip(entry.seconds[entry.ours], entry.seconds[baseline], strict=False)]


def _counts(before: Entry, after: Entry) -> tuple[list[str], list[str]]:
    """Compare exact numbers for equality and the peak with its tolerance; return what rose and what fell."""
    more: list[str] = []
    less: list[str] = []
    memory = before.memory.get(before.ours, {}), after.memory.get(after.ours, {})
    for old, new in ((before.counts, after.counts), memory):
        for name in old:
            if name != "peak" and name in new and new[name] != old[name]:
                (more if new[name] > old[name] else less).append(f"{name} {old[name]:,} -> {new[name]:,}")
    if "peak" in memory[0] and "peak" in memory[1]:
        old_peak, new_peak = memory[0]["peak"], memory[1]["peak"]
        if abs(new_peak - old_peak) > max(PEAK_BYTES, PEAK_SHARE * old_peak):
            text = f"peak memory {old_peak / 2**20:.1f} -> {new_peak / 2**20:.1f} MiB"
            (more if new_peak > old_peak else less).append(text)
    return more, less


def _interleaved(record: Record) -> dict[str, Any]:
    found = record.facts.get(INTERLEAVED)
    return found if isinstance(found, dict) else {}


def _rounds_in_a_visit(way: dict[str, Any], key: str) -> int:
    rounds = way.get("rounds_in_a_visit")
    found = rounds.get(key, 1) if isinstance(rounds, dict) else 1
    return found if isinstance(found, int) and found > 0 else 1


def _about(record: Record) -> dict[str, Any]:
    return {
        "commit": record.commit,
        "dirty": record.dirty,
        "machine": record.machine,
        "versions": record.versions,
        "time": record.time,
    }


def _some(keys: list[str]) -> str:
    return ", ".join(repr(key) for key in keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "") or "none"
