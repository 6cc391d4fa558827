"""Index of a tar shard: the offsets of each sample's image, caption and metadata, and the damage."""

import json
import logging
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oner_fast import bounded_json
from oner_fast.data.foreign_files import refuse_compressed, what_it_is
from oner_fast.data.index_file import read_arrays, write_arrays
from oner_fast.data.lost_samples import place_lost_samples
from oner_fast.data.tar_headers import BLOCK
from oner_fast.data.tar_scan import IMAGE as IMAGE
from oner_fast.data.tar_scan import KINDS as KINDS
from oner_fast.data.tar_scan import META as META
from oner_fast.data.tar_scan import NAMED, Gap, Scan, printable, scan_tar
from oner_fast.data.tar_scan import TEXT as TEXT

logger = logging.getLogger("oner_fast.data")

FORMAT = 2
_ARRAYS = {"format": ("<i8", 0), "tar_size": ("<i8", 0), "offsets": ("<i8", 2), "sizes": ("<i8", 2)}
_ARRAYS |= {"checksums": ("<u4", 2), "names": ("|u1", 1), "name_ends": ("<i8", 1)}
_ARRAYS |= {"damage": ("|u1", 1), "skipped": ("|u1", 1)}
_PROBES = 16
_LARGEST_LIST = 1_000_000  # samples of one tar that dataset.json may list without bytes for them in the tar
_saving: ContextVar[bool] = ContextVar("saving", default=True)


@dataclass
class TarIndex:
    """The samples of one tar, in the order in which their keys first appear, and its damage.

    A sample keeps its row where a member of it, or all of it, is lost, so that other samples keep theirs.

    Attributes:
        tar_mtime_ns: time of the tar's last change, in nanoseconds.
        offsets, sizes: (samples, 3) int64, in bytes, of the image, the caption and the metadata; -1 for a missing
            member.
        checksums: (samples, 3) uint32, CRC-32 of the 512 bytes of header before each member; 0 for a missing one.
        damage: one sentence for each damaged place, with the tar, the key and the offset, and for each rule by which
            members that look like parts of samples are left out.
        skipped: one sentence for each rule by which other members are left out.
    """

    path: Path
    tar_size: int
    tar_mtime_ns: int
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    checksums: NDArray[np.uint32]
    damage: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    _names: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    _name_ends: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.offsets)

    def key(self, i: int) -> str:
        """Key of sample `i`; empty where it is lost and no record holds it."""
        return self._key(i).decode("utf-8", "replace")

    def _key(self, i: int) -> bytes:
        start = int(self._name_ends[i - 1]) if i else 0
        return self._names[start : int(self._name_ends[i])].tobytes()

    @property
    def keys(self) -> list[str]:
        """Every key, in order."""
        return [self.key(i) for i in range(len(self))]

    @staticmethod
    def file(tar: Path) -> Path:
        """Path of a tar's index: `<tar>.index.npz` beside it."""
        return tar.with_name(tar.name + ".index.npz")

    def save(self) -> None:
        """Write the index beside its tar, atomically, with equal bytes for equal tars. Raises OSError.

        The file takes the tar's time of change, which binds it to this version of the tar.
        """
        arrays: dict[str, NDArray[Any]] = {
            "format": np.array(FORMAT, np.int64),
            "tar_size": np.array(self.tar_size, np.int64),
            "offsets": self.offsets,
            "sizes": self.sizes,
            "checksums": self.checksums,
            "names": self._names,
            "name_ends": self._name_ends,
            "damage": np.frombuffer(json.dumps(self.damage).encode(), np.uint8),
            "skipped": np.frombuffer(json.dumps(self.skipped).encode(), np.uint8),
        }
        write_arrays(self.file(self.path), arrays, self.tar_mtime_ns)

    def same_samples(self, other: "TarIndex") -> bool:
        """Tell whether another index has the same keys, places and headers."""
        pairs = (
            (self.offsets, other.offsets),
            (self.sizes, other.sizes),
            (self.checksums, other.checksums),
            (self._names, other._names),
            (self._name_ends, other._name_ends),
        )
        return all(np.array_equal(mine, others) for mine, others in pairs)

    def part(self, first: int, end: int) -> "TarIndex":
        """The samples from `first` up to `end` as an index of their own, without the damage."""
        rows = slice(first, end)
        start = int(self._name_ends[first - 1]) if first else 0
        ends = self._name_ends[rows]
        return replace(
            self,
            offsets=self.offsets[rows],
            sizes=self.sizes[rows],
            checksums=self.checksums[rows],
            damage=[],
            skipped=[],
            _names=self._names[start : int(ends[-1]) if len(ends) else start],
            _name_ends=ends - start,
        )

    def scan(self) -> Scan:
        """The index in the form in which the headers of a tar are scanned."""
        places = np.stack([self.offsets, self.sizes, self.checksums.astype(np.int64)], axis=1)
        keys = [self._key(i) for i in range(len(self))]
        return Scan(keys, places, np.full(len(self), -1, np.int64))


def build_index(path: str | Path, samples: int | None = None, earlier: TarIndex | None = None) -> TarIndex:
    """Scan a tar's headers.

    Damage is listed, not raised.

    Args:
        samples: number of samples of the whole tar, where `dataset.json` states it.
        earlier: an index of the tar before it was damaged, which keeps the numbers of the samples.

    Raises:
        OSError: the file cannot be read at all.
        ValueError: it is compressed or a pipe, or `samples` is more than a tar can hold.
    """
    path = Path(path)
    if stat.S_ISFIFO(path.stat().st_mode):  # opening it would wait for a writer
        raise ValueError(f"{path} is a pipe, and samples are read in any order; write it to a file first")
    with path.open("rb", buffering=1 << 16) as file:
        status = os.fstat(file.fileno())
        start = file.read(BLOCK)
        refuse_compressed(path, start)
        if samples is not None and samples > max(_LARGEST_LIST, status.st_size // BLOCK):
            raise ValueError(
                f"{path.parent / 'dataset.json'} lists {samples:,} samples in {path.name}, too many for it"
            )
        foreign = what_it_is(start)
        if foreign:
            nothing = np.zeros((0, 3, 3), np.int64)
            scan = Scan([], nothing, np.zeros(0, np.int64), [Gap(0, status.st_size, True)], [foreign])
        else:
            scan = scan_tar(file, status.st_size)
            if not scan.keys and not scan.skipped and scan.gaps and start[257:262] != b"ustar" and any(start):
                scan.damage.insert(0, f"is not a tar: it begins with {start[:16]!r}")
    scan = place_lost_samples(scan, samples, earlier.scan() if earlier is not None else None)
    ends = np.cumsum([len(key) for key in scan.keys], dtype=np.int64)
    index = TarIndex(
        path,
        status.st_size,
        status.st_mtime_ns,
        np.ascontiguousarray(scan.places[:, 0]),
        np.ascontiguousarray(scan.places[:, 1]),
        scan.places[:, 2].astype(np.uint32),
        _of_tar(path, scan.damage),
        _of_tar(path, scan.skipped),
        np.frombuffer(b"".join(scan.keys), np.uint8),
        ends,
    )
    index.damage += _of_tar(path, _incomplete(index))
    return index


def _of_tar(path: Path, sentences: list[str]) -> list[str]:
    name = printable(path.name)
    return [f"{name}: {sentence}" for sentence in sentences]


def _incomplete(index: TarIndex) -> list[str]:
    found = index.offsets >= 0
    there = found.any(axis=1)
    without_image = np.flatnonzero(there & ~found[:, IMAGE])
    without_text = np.flatnonzero(there & ~found[:, TEXT] & ~found[:, META])
    if len(without_text) == there.sum():  # a tar of images alone
        without_text = without_text[:0]
    return [
        *_named(index, without_image, "has no whole image", "keys have no whole image"),
        *_named(index, without_text, "has no caption", "keys have no caption"),
    ]


def _named(index: TarIndex, rows: NDArray[np.int64], has: str, have: str) -> list[str]:
    sentences = [f"key {index.key(i)!r} {has}" for i in rows[:NAMED].tolist()]
    return sentences + ([f"{len(rows) - NAMED:,} more {have}"] if len(rows) > NAMED else [])


@contextmanager
def indexes_only_in_memory() -> Iterator[None]:
    """Save no new index within the context: a tar without a valid one is read, and nothing is written beside it."""
    before = _saving.set(False)
    try:
        yield
    finally:
        _saving.reset(before)


def load_index(path: str | Path, samples: int | None = None) -> TarIndex:
    """Load the index beside a tar, or build it where it is missing, has another format, or the tar has changed.

    A new index is saved; where the folder is not writable, it is only held in memory. So is one without samples, as of
    a file that is no tar, beside which nothing is to be left. A tar that was damaged since its
    index was made keeps the numbers of its samples. Takes `samples` and raises as `build_index` does.
    """
    path = Path(path)
    index, current = stored_index(path)
    if index is not None and current and (samples is None or len(index) >= samples):
        return index
    fresh = build_index(path, samples, index)
    if index is not None and not current and not fresh.same_samples(index):
        number = f"; it had {len(index):,} samples and has {len(fresh):,}" if len(index) != len(fresh) else ""
        logger.warning("%s changed since its index was made, and is indexed again%s", path, number)
    if _saving.get() and len(fresh):
        with suppress(OSError):
            fresh.save()
    return fresh


def stored_index(path: Path) -> tuple[TarIndex | None, bool]:
    """Read the index beside a tar.

    Returns:
        The index, or None where it is missing, damaged or of another format; and whether it is current: the tar's size
        and time of change and 16 headers, spread over images, captions and metadata, are those that were indexed.

    Raises:
        OSError: the tar cannot be read.
    """
    file = TarIndex.file(path)
    tar = path.stat()
    try:
        arrays = read_arrays(file, _ARRAYS)
        index = _checked(path, arrays, file.stat().st_mtime_ns)
    except (OSError, ValueError):
        return None, False
    current = index.tar_size == tar.st_size and index.tar_mtime_ns == tar.st_mtime_ns
    return index, current and _probe(index)


def _checked(path: Path, arrays: dict[str, NDArray[Any]], mtime_ns: int) -> TarIndex:
    """Make an index of the arrays of a file. Raises ValueError where they fit neither each other nor a tar."""
    offsets, sizes, checksums = arrays["offsets"], arrays["sizes"], arrays["checksums"]
    names, ends, tar_size = arrays["names"], arrays["name_ends"], int(arrays["tar_size"])
    if int(arrays["format"]) != FORMAT or tar_size < 0:
        raise ValueError("another format")
    if not offsets.shape == sizes.shape == checksums.shape == (len(ends), 3):
        raise ValueError("columns of different lengths")
    if (np.diff(ends, prepend=0) < 0).any() or (int(ends[-1]) if len(ends) else 0) != len(names):
        raise ValueError("keys that do not fit their lengths")
    there = offsets != -1
    if (offsets[there] < BLOCK).any() or (offsets[there] > tar_size).any() or (sizes[~there] != -1).any():
        raise ValueError("offsets outside the tar")
    if (sizes[there] < 0).any() or (sizes[there] > tar_size - offsets[there]).any():
        raise ValueError("sizes outside the tar")
    damage, skipped = _sentences(arrays["damage"]), _sentences(arrays["skipped"])
    return TarIndex(path, tar_size, mtime_ns, offsets, sizes, checksums, damage, skipped, names, ends)


def _sentences(text: NDArray[np.uint8]) -> list[str]:
    lines = bounded_json.loads(text.tobytes(), "the index", max_depth=1)
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError("damage that is no list of sentences")
    return lines


def _probe(index: TarIndex) -> bool:
    """Compare a few headers of all kinds of members, the first and the last among them, with their checksums."""
    places = index.offsets.ravel()
    there = np.flatnonzero(places >= 0)
    chosen = there[np.linspace(0, len(there) - 1, min(_PROBES, len(there))).astype(np.int64)] if len(there) else there
    with index.path.open("rb", buffering=0) as file:
        return all(
            zlib.crc32(os.pread(file.fileno(), BLOCK, int(places[place]) - BLOCK)) == int(index.checksums.flat[place])
            for place in chosen
        )
