"""Read a folder of records and put them in the order of their commits."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from oner_fast.benchmarks.comparison import INTERLEAVED
from oner_fast.benchmarks.record import MOST_BYTES, Entry, Record, parse
from oner_fast.benchmarks.source import git, refusal
from oner_fast.benchmarks.values import cleaned
from oner_fast.bounded_json import load_object

SHORT = 10
BY_GIT = "first-parent order of git"
BY_DATE = "date of the commit"
# Facts of the machine that change from run to run without changing what is measured.
_PASSING = ("load", "oner_fast")


@dataclass(frozen=True)
class Measured:
    """One record of the history.

    Args:
        name: the file's name in the folder.
        record: what it holds.
        date: the commit's date; that of the measurement where the file does not say; None without both.
    """

    name: str
    record: Record
    date: datetime | None

    @property
    def commit(self) -> str:
        """The first digits of the commit, with "+" where the sources differed from it."""
        return (self.record.commit[:SHORT] or "no commit") + ("+" if self.record.dirty else "")

    @property
    def day(self) -> str:
        """The date for readers, in UTC; empty without one."""
        return "" if self.date is None else self.date.strftime("%Y-%m-%d %H:%M")

    def machine(self) -> dict[str, str]:
        """The facts by which a ratio can differ, by name."""
        facts = {name: str(value) for name, value in self.record.facts.items() if name not in _PASSING}
        if isinstance(turns := self.record.facts.get(INTERLEAVED), dict):
            # The comparison's own number is a new one each time.
            facts[INTERLEAVED] = f"by the {turns.get('clock')} clock"
        return facts or {"machine": self.record.machine}

    def entry(self, key: str) -> Entry | None:
        """The entry of a key, where the record has it."""
        return next((one for one in self.record.entries if one.key == key), None)


@dataclass(frozen=True)
class History:
    """Records in order, the oldest first.

    Args:
        records: the records.
        order: `BY_GIT` or `BY_DATE`.
        left_out: files that are not in `records`, each with the reason.
    """

    records: Sequence[Measured]
    order: str
    left_out: Sequence[tuple[str, str]] = field(default=())

    def all_keys(self) -> list[str]:
        """List all keys, in the order of the newest record that has them."""
        found: dict[str, None] = {}
        for one in reversed(self.records):
            found |= dict.fromkeys(entry.key for entry in one.record.entries)
        return list(found)

    def entries(self, key: str) -> list[Entry | None]:
        """List the entry of a key for every record, None where a record lacks it."""
        return [one.entry(key) for one in self.records]


def read_folder(folder: Path, repository: Path) -> History:
    """Read every `*.json` of the folder.

    A file that is no record is left out, and so is an older record of a commit that was measured again. The order is
    that of git where the repository's first-parent line has every commit, otherwise that of the commits' dates.

    Raises:
        OSError: the folder cannot be listed.
        ValueError: no file of the folder is a record.
    """
    names = sorted(path.name for path in folder.iterdir() if path.suffix == ".json")
    found: list[Measured] = []
    left_out: list[tuple[str, str]] = []
    for name in names:
        try:
            found.append(_measured(folder / name))
        except (OSError, ValueError) as error:
            left_out.append((_named(name), cleaned(str(error).removeprefix(f"{folder / name}: "), name)))
    if not found:
        told = "; ".join(why for _, why in left_out) or "it holds no *.json"
        raise ValueError(f"{folder} has no record of `pytest benchmarks --benchmark-json`: {told}")
    newest, older = _one_a_commit(found)
    line = first_parents(repository)
    places = {sha: number for number, sha in enumerate(reversed(line))}
    if all(one.record.commit in places for one in newest):
        return History(sorted(newest, key=lambda one: places[one.record.commit]), BY_GIT, [*left_out, *older])
    return History(sorted(newest, key=_by_date), BY_DATE, [*left_out, *older])


def first_parents(repository: Path) -> list[str]:
    """List the commits of the first-parent line of HEAD, newest first; empty without git or a repository."""
    try:
        done = git(repository, "rev-list", "--first-parent", "HEAD")
    except OSError:
        return []
    if reason := refusal(done):
        print(f"the order is that of the dates: {reason}", file=sys.stderr)
    return [] if done.returncode else done.stdout.split()


def _measured(path: Path) -> Measured:
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no regular file")
    with open(path, "rb") as file:
        data = file.read(MOST_BYTES + 1)
    record = parse(data, str(path))
    info = load_object(data, str(path), max_bytes=MOST_BYTES).get("commit_info")
    told = [info.get("time") if isinstance(info, dict) else None, record.time]
    return Measured(_named(path.name), record, next((date for date in map(_date, told) if date), None))


def _named(name: str) -> str:
    """Write a file's name so that it can be printed; names of Linux may be any bytes."""
    return cleaned(os.fsencode(name).decode(errors="replace"), name)


def _date(text: Any) -> datetime | None:
    try:
        date = datetime.fromisoformat(text) if isinstance(text, str) else None
        return None if date is None else date.replace(tzinfo=date.tzinfo or UTC).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _by_date(one: Measured) -> tuple[datetime, str]:
    return one.date or datetime.min.replace(tzinfo=UTC), one.record.time


def _one_a_commit(found: Sequence[Measured]) -> tuple[list[Measured], list[tuple[str, str]]]:
    """Keep the newest record of each commit, and say of the others that they are older."""
    key: Callable[[Measured], tuple[str, str]] = lambda one: (one.record.time, one.name)  # noqa: E731
    kept: dict[tuple[str, bool, str], Measured] = {}
    older = []
    for one in sorted(found, key=key):
        # Records without a commit have nothing in common.
        place = (one.record.commit, one.record.dirty, "" if one.record.commit else one.name)
        if place in kept:
            before = kept[place]
            older.append((before.name, f"an older record of commit {one.commit}, which {one.name} measured again"))
        kept[place] = one
    return list(kept.values()), older
