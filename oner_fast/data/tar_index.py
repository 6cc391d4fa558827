"""Index of a tar shard: the offsets of each sample's image, caption and metadata, and the damage.

Samples follow webdataset's rule: members whose path is equal up to the first dot of its last part belong together.
"""

import json
import os
import re
import zipfile
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oner_fast.atomic import remove_leftovers, write_atomic
from oner_fast.data.tar_headers import Member, members

FORMAT = 1
IMAGE, TEXT, META = 0, 1, 2  # the columns of an index
KINDS = {extension: IMAGE for extension in ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif")}
KINDS |= {"txt": TEXT, "json": META}
_KEY = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)")
_PROBES = 16
_HEADER = 512
_saving: ContextVar[bool] = ContextVar("saving", default=True)


@dataclass
class TarIndex:
    """The samples of one tar, in the order in which their keys first appear, and its damage.

    A sample with a damaged member keeps its row, so that other samples keep theirs.

    Attributes:
        offsets, sizes: (samples, 3) int64, in bytes, of the image, the caption and the metadata; -1 for a missing
            member.
        damage: one sentence for each damaged place, with the tar, the key and the offset.
    """

    path: Path
    tar_size: int
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    damage: list[str] = field(default_factory=list)
    _names: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    _name_ends: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.offsets)

    def key(self, i: int) -> str:
        """Key of sample `i`."""
        start = int(self._name_ends[i - 1]) if i else 0
        return self._names[start : int(self._name_ends[i])].tobytes().decode("utf-8", "replace")

    @property
    def keys(self) -> list[str]:
        """Every key, in order."""
        return [self.key(i) for i in range(len(self))]

    @staticmethod
    def file(tar: Path) -> Path:
        """Path of a tar's index: `<tar>.index.npz` beside it."""
        return tar.with_name(tar.name + ".index.npz")

    def save(self) -> None:
        """Write the index beside its tar, atomically, with equal bytes for equal tars. Raises OSError."""
        target = self.file(self.path)
        arrays: dict[str, Any] = {
            "format": np.int64(FORMAT),
            "tar_size": np.int64(self.tar_size),
            "probe": np.int64(_probe(self.path, self.offsets)),
            "offsets": self.offsets,
            "sizes": self.sizes,
            "names": self._names,
            "name_ends": self._name_ends,
            "damage": np.frombuffer(json.dumps(self.damage).encode(), np.uint8),
        }
        remove_leftovers(target.parent, target.name)
        write_atomic(target, lambda file: np.savez(file, **arrays))


def build_index(path: str | Path) -> TarIndex:
    """Scan a tar's headers. Damage is listed, not raised. Raises OSError where the file cannot be read at all."""
    path = Path(path)
    rows: dict[str, int] = {}
    places = array("q")
    damage: list[str] = []
    last = ""
    with path.open("rb", buffering=1 << 16) as file:
        tar_size = os.fstat(file.fileno()).st_size
        for found in members(file, tar_size):
            if isinstance(found, Member):
                match = _KEY.fullmatch(found.name)
                if match is None or os.path.basename(found.name).startswith("__"):
                    continue
                last = match[1]
                kind = KINDS.get(match[2].lower())
                if kind is None:
                    continue
                if last not in rows:
                    rows[last] = len(places)
                    places.extend((-1,) * 6)
                place = rows[last] + kind
                if places[place] != -1:
                    damage.append(f"{path.name}: key {last!r} has a second {match[2]} at byte {found.offset}")
                elif not found.whole:
                    damage.append(
                        f"{path.name}: key {last!r}: {match[2]} is cut off, its {found.size} bytes from byte "
                        f"{found.offset} pass the end of the tar at {tar_size}"
                    )
                else:
                    places[place], places[place + 3] = found.offset, found.size
            else:
                after = f" after key {last!r}" if last else ""
                damage.append(f"{path.name}: {found.why} at byte {found.offset}{after}")
    table = np.frombuffer(places, dtype=np.int64).reshape(-1, 6)
    names = [key.encode("utf-8", "surrogateescape") for key in rows]
    lengths = np.asarray([len(name) for name in names], dtype=np.int64)
    index = TarIndex(
        path,
        tar_size,
        np.ascontiguousarray(table[:, :3]),
        np.ascontiguousarray(table[:, 3:]),
        damage,
        np.frombuffer(b"".join(names), np.uint8),
        lengths.cumsum(),
    )
    index.damage += _incomplete(index)
    return index


def _incomplete(index: TarIndex) -> list[str]:
    found = index.offsets >= 0
    without_image = np.flatnonzero(~found[:, IMAGE]).tolist()
    without_text = np.flatnonzero(~found[:, TEXT] & ~found[:, META]).tolist()
    if len(without_text) == len(index):  # a tar of images alone
        without_text = []
    tar = index.path.name
    return [f"{tar}: key {index.key(i)!r} has no whole image" for i in without_image] + [
        f"{tar}: key {index.key(i)!r} has no caption" for i in without_text
    ]


@contextmanager
def indexes_only_in_memory() -> Iterator[None]:
    """Save no new index within the context: a tar without a valid one is read, and nothing is written beside it."""
    before = _saving.set(False)
    try:
        yield
    finally:
        _saving.reset(before)


def load_index(path: str | Path) -> TarIndex:
    """Load the index beside a tar, or build it where it is missing, has another format, or the tar has changed.

    A new index is saved; where the folder is not writable, it is only held in memory.
    """
    path = Path(path)
    index = _read(path)
    if index is None:
        index = build_index(path)
        if _saving.get():
            with suppress(OSError):
                index.save()
    return index


def _read(path: Path) -> TarIndex | None:
    try:
        with np.load(TarIndex.file(path), allow_pickle=False) as stored:
            if stored["format"] != FORMAT or stored["tar_size"] != path.stat().st_size:
                return None
            if stored["probe"] != _probe(path, stored["offsets"]):
                return None
            return TarIndex(
                path,
                int(stored["tar_size"]),
                stored["offsets"],
                stored["sizes"],
                json.loads(stored["damage"].tobytes()),
                stored["names"],
                stored["name_ends"],
            )
    except (OSError, KeyError, ValueError, EOFError, zlib.error, zipfile.BadZipFile):
        return None  # missing or damaged: the index is built again


def _probe(path: Path, offsets: NDArray[np.int64]) -> int:
    """Checksum of a few headers; sizes are not enough, since padded tars often have equal sizes."""
    images = offsets[:, IMAGE]
    images = images[images >= _HEADER]
    checksum = 0
    with path.open("rb") as file:  # buffered, so that a short read is continued
        for place in np.linspace(0, len(images) - 1, _PROBES).astype(np.int64) if len(images) else []:
            file.seek(int(images[place]) - _HEADER)
            checksum = zlib.crc32(file.read(_HEADER), checksum)
    return checksum
