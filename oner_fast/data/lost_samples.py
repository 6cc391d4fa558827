"""Give the samples that damage took from a tar their places again, so that no other sample's number moves.

Four records can say where the lost samples stood. The first that exists decides: an earlier index of the tar; the
number that oner_fast's builders store in each header; keys that count up by one; the number of samples in
`dataset.json`, where one damaged part alone can hold them.
"""

import re
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from oner_fast.data.tar_headers import BLOCK
from oner_fast.data.tar_scan import Scan

_COUNTED = re.compile(rb"(.*?)([0-9]{1,18})", re.DOTALL)


def place_lost_samples(scan: Scan, expected: int | None, earlier: Scan | None = None) -> Scan:
    """Insert a row for each lost sample.

    Args:
        scan: what a tar holds now.
        expected: its number of samples by `dataset.json`, if that is known.
        earlier: what an index made of the tar before, if there is one.

    Returns:
        The scan with rows whose places are all -1 for the lost samples, and with sentences that name them. The key of a
        lost sample is empty where no record holds it.
    """
    if not scan.gaps and (expected is None or len(scan.keys) >= expected):
        return scan
    if earlier is not None and len(earlier.keys) >= (expected or 0):
        rows = _rows_before(scan, earlier)
        if rows is not None:
            return _spread(scan, rows, list(earlier.keys), "its earlier index had")
    numbers = scan.numbers
    if len(numbers) and (numbers >= 0).all() and (np.diff(numbers) > 0).all():
        total = max(int(numbers[-1]) + 1, expected or 0)
        keys = [b""] * total
        return _spread(scan, numbers, keys, "its headers count")
    return _insert(scan, expected)


def _rows_before(scan: Scan, earlier: Scan) -> NDArray[np.int64] | None:
    """Row of each sample in an earlier scan of the same tar; None where it was another tar."""
    known = {key: row for row, key in enumerate(earlier.keys) if key}
    rows = np.array([known.get(key, -1) for key in scan.keys], dtype=np.int64)
    if (rows < 0).any():
        return None
    now, before = scan.places[:, 0], earlier.places[rows, 0]
    both = (now >= 0) & (before >= 0)
    return rows if (now[both] == before[both]).all() else None


def _insert(scan: Scan, expected: int | None) -> Scan:
    """Insert lost samples at the gaps, as far as keys and the expected number tell how many."""
    found = len(scan.keys)
    missing = max(0, expected - found) if expected is not None else 0
    steps = _steps(scan)
    counts = [0] * len(scan.gaps)
    unknown = []
    for i, gap in enumerate(scan.gaps):
        step = int(steps[gap.row - 1]) if steps is not None and 0 < gap.row < found else 0
        if 1 <= step <= 1 + gap.size // BLOCK:
            counts[i] = step - 1
        elif not gap.inside:
            unknown.append(i)
    if expected is not None and sum(counts) > missing:  # the keys leave out numbers that were never in the tar
        counts, unknown = [0] * len(counts), [i for i, gap in enumerate(scan.gaps) if not gap.inside]
    unsure = ""
    if expected is None:
        if any(not scan.gaps[i].end for i in unknown):
            unsure = "no record says how many samples a damaged part held, so numbers after it may have moved"
    elif unknown and (left := missing - sum(counts)):
        for i, share in zip(unknown, _shares(scan, unknown, left), strict=True):
            counts[i] += share
        if len(unknown) > 1:
            unsure = "several damaged parts share the lost samples, so numbers between those parts may have moved"
    extra = np.zeros(found + 1, dtype=np.int64)
    np.add.at(extra, [gap.row for gap in scan.gaps], counts)
    if expected is not None:  # where nothing else says more, the end of the tar is lost
        extra[found] += max(0, missing - int(extra.sum()))
    keys: list[bytes] = []
    for row, count in enumerate(extra.tolist()):
        if count:
            known = steps is not None and 0 < row < found and count == steps[row - 1] - 1
            keys += _after(scan.keys[row - 1], count) if known else [b""] * count
        keys += scan.keys[row : row + 1]
    rows = np.arange(found, dtype=np.int64) + extra.cumsum()[:found]
    placed = _spread(scan, rows, keys, "its keys count" if expected is None else "dataset.json lists")
    if unsure:
        placed.damage.append(unsure)
    return placed


def _shares(scan: Scan, gaps: list[int], missing: int) -> list[int]:
    """Divide the missing samples among gaps by their sizes; the lost end of a tar takes what does not fit elsewhere."""
    sizes = [scan.gaps[i].size for i in gaps]
    if scan.gaps[gaps[-1]].end:
        sample = int((scan.places[:, 1].clip(0) + BLOCK).sum()) // max(1, len(scan.keys)) + BLOCK
        shares = []
        for size in sizes[:-1]:
            shares.append(min(size // sample, missing))
            missing -= shares[-1]
        return [*shares, missing]
    ends = [missing * end // max(1, sum(sizes)) for end in accumulate(sizes)]
    ends[-1] = missing
    return [end - start for start, end in pairwise([0, *ends])]


def _steps(scan: Scan) -> NDArray[np.int64] | None:
    """Differences between following keys, where keys are numbers that go up by one outside the gaps; else None."""
    parts = [_COUNTED.fullmatch(key) for key in scan.keys]
    if len(parts) < 3 or None in parts or len({(part[1], len(part[2])) for part in parts if part}) > 1:
        return None
    counts = np.array([int(part[2]) for part in parts if part], dtype=np.int64)
    steps = counts[1:] - counts[:-1]
    at_gap = np.zeros(len(steps), dtype=bool)
    at_gap[[gap.row - 1 for gap in scan.gaps if 0 < gap.row < len(parts)]] = True
    regular = steps[~at_gap]
    return steps if len(regular) and (regular == 1).all() else None


def _after(key: bytes, count: int) -> list[bytes]:
    """The `count` keys that follow a numbered key."""
    part = _COUNTED.fullmatch(key)
    assert part is not None
    return [part[1] + b"%0*d" % (len(part[2]), int(part[2]) + 1 + i) for i in range(count)]


def _spread(scan: Scan, rows: NDArray[np.int64], keys: list[bytes], record: str) -> Scan:
    """Move each sample to its row in a longer table."""
    lost = len(keys) - len(scan.keys)
    places = np.full((len(keys), 3, 3), -1, dtype=np.int64)
    places[:, 2] = 0
    places[rows] = scan.places
    for row, key in zip(rows.tolist(), scan.keys, strict=True):
        keys[row] = key
    numbers = np.full(len(keys), -1, dtype=np.int64)
    numbers[rows] = scan.numbers
    damage = list(scan.damage)
    if lost:
        damage.append(
            f"{len(scan.keys):,} samples of the {len(keys):,} that {record}; the lost ones keep their numbers"
        )
    return Scan(keys, places, numbers, scan.gaps, damage, scan.skipped)
