"""Sort the members of a tar into samples, and count and name every member that no rule takes.

Samples follow webdataset's rule: members whose path is equal up to the first dot of its last part belong together.
"""

import os
import re
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from oner_fast.data.picture_formats import SUFFIXES
from oner_fast.data.tar_headers import BLOCK, Member, members

IMAGE, TEXT, META = 0, 1, 2  # the columns of an index
KINDS = {suffix.removeprefix("."): IMAGE for suffix in SUFFIXES}
KINDS |= {"txt": TEXT, "json": META}
NAMED = 1000  # damaged places that are named; the others are counted
_KEY = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)", re.DOTALL)
_COLUMN = 0.9  # share of the samples that have a second picture of one name, where it is a column of the data
_EXAMPLES = 3


@dataclass
class Gap:
    """A damaged part of a tar that may have held whole samples.

    Attributes:
        row: number of samples found before it.
        size: its length in bytes.
        end: whether nothing was found after it.
        inside: whether the members before and after it belong to one sample.
    """

    row: int
    size: int
    end: bool
    inside: bool = False


@dataclass
class Scan:
    """The samples of a tar by its headers.

    Attributes:
        keys: one for each sample, as bytes, in the order in which they first appear; empty for a lost sample.
        places: (samples, 3, 3) int64: offset and size in bytes, and CRC-32 of the header, of the image, the caption
            and the metadata; -1, -1, 0 for a missing member.
        numbers: (samples,) int64, the number of each sample in the tar where the tar's writer stored it, else -1.
        gaps: where whole samples may be missing.
        damage: a sentence for each damaged place.
        skipped: a sentence for each kind of member that is left out by rule.
    """

    keys: list[bytes]
    places: NDArray[np.int64]
    numbers: NDArray[np.int64]
    gaps: list[Gap] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


class _Left:
    """Members left out, by the rule that leaves them out."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, rule: str, name: str) -> None:
        self.counts[rule] += 1
        examples = self.examples.setdefault(rule, [])
        if len(examples) < _EXAMPLES:
            examples.append(printable(repr(name)))

    def sentences(self) -> list[str]:
        return [
            f"{count:,} {'member is' if count == 1 else 'members are'} not taken ({rule}): "
            + ", ".join(self.examples[rule])
            + (", ..." if count > _EXAMPLES else "")
            for rule, count in self.counts.items()
        ]


def scan_tar(file: BinaryIO, size: int) -> Scan:
    """Read the headers of a tar of `size` bytes. Damage is listed, not raised. Raises OSError."""
    rows: dict[str, int] = {}
    places, numbers = array("q"), array("q")
    damage = Sentences()
    gaps: list[Gap] = []
    lost, by_rule = _Left(), _Left()
    dotted: dict[str, list[tuple[str, str]]] = {}
    last = ""
    open_gap: Gap | None = None
    for found in members(file, size):
        if not isinstance(found, Member):
            after = f" after key {last!r}" if last else ""
            damage.add(f"{found.why} at byte {found.offset}{after}")
            if open_gap is None:
                open_gap = Gap(len(rows), 0, False)
                gaps.append(open_gap)
            open_gap.size += found.end - found.offset
            open_gap.end = found.end >= size
            continue
        key, extension = _split(found.name)
        if open_gap is not None:
            open_gap.inside, open_gap = bool(last) and key == last, None
        kind = KINDS.get(extension.lower())
        if kind is None or found.form != "file":
            _leave_out(found, key, extension, lost, by_rule, dotted)
            continue
        last = key
        if last not in rows:
            rows[last] = len(rows)
            places.extend((-1, -1, -1, -1, -1, -1, 0, 0, 0))
            numbers.append(-1)
        row = rows[last]
        place = 9 * row + kind
        if places[place] != -1:
            damage.add(f"key {last!r} has a second {extension} at byte {found.offset}")
        elif not found.whole:
            damage.add(
                f"key {last!r}: {extension} is cut off, its {found.size} bytes from byte {found.offset} pass the end "
                f"of the tar at {size}"
            )
        else:
            places[place], places[place + 3], places[place + 6] = found.offset, found.size, found.checksum
        if 0 <= found.number <= size // BLOCK:
            numbers[row] = found.number
    table = np.frombuffer(places, dtype=np.int64).reshape(-1, 3, 3) if rows else np.zeros((0, 3, 3), np.int64)
    _sort_dotted(dotted, rows, lost, by_rule)
    return Scan(
        [key.encode("utf-8", "surrogateescape") for key in rows],
        table.copy(),
        np.array(numbers, dtype=np.int64),
        gaps,
        [printable(sentence) for sentence in (*damage.all(), *lost.sentences())],
        [printable(sentence) for sentence in by_rule.sentences()],
    )


class Sentences:
    """A list of sentences of which the first `NAMED` are kept, and the others counted."""

    def __init__(self) -> None:
        self.kept: list[str] = []
        self.more = 0

    def add(self, sentence: str) -> None:
        """Keep or count a sentence."""
        if len(self.kept) < NAMED:
            self.kept.append(sentence)
        else:
            self.more += 1

    def all(self) -> list[str]:
        """The sentences kept, and one with the number of the others."""
        return [*self.kept, f"{self.more:,} more damaged places"] if self.more else self.kept


def printable(text: str) -> str:
    """Write as escapes what UTF-8 cannot encode, such as bytes of a name in another encoding, and line breaks."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _split(name: str) -> tuple[str, str]:
    """Key and extension of a member's name; both are empty where it has none."""
    match = _KEY.fullmatch(name)
    return (match[1], match[2]) if match is not None and not os.path.basename(name).startswith("__") else ("", "")


def _leave_out(
    member: Member, key: str, extension: str, lost: _Left, by_rule: _Left, dotted: dict[str, list[tuple[str, str]]]
) -> None:
    """Sort a member that is part of no sample: `lost` where it looks like one, else `by_rule`."""
    base = os.path.basename(member.name)
    looks = base.rpartition(".")[2].lower() in KINDS and not base.startswith("__")
    if member.form != "file":
        (lost if looks else by_rule).add(f"a {member.form}, and only plain files are read", member.name)
    elif base.startswith("__"):
        by_rule.add("names that begin with __ are webdataset's own", member.name)
    elif not looks:
        by_rule.add("neither a picture nor .txt nor .json" if key else "no extension", member.name)
    elif not key:
        by_rule.add("names that begin with a dot are hidden", member.name)
    else:
        dotted.setdefault(extension.lower(), []).append((key, member.name))


def _sort_dotted(dotted: dict[str, list[tuple[str, str]]], rows: dict[str, int], lost: _Left, by_rule: _Left) -> None:
    """Tell other columns of every sample, such as KEY.seg.png, from names whose key was meant to have a dot."""
    for extension, found in dotted.items():
        column = len(rows) > 1 and extension[:1].isalpha()
        column = column and sum(key in rows for key, _ in found) >= _COLUMN * len(rows)
        for key, name in found:
            if column and key in rows:
                by_rule.add(f"{extension!r} is another column of the samples", name)
            else:
                lost.add("a key ends at the first dot of its name; rename it with no other dot", name)
