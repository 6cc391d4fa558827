"""Find tars that two data sets share, under whatever names: the same file, or a copy with the same bytes."""

import filecmp
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from oner_fast.data.tar_index import TarIndex


@dataclass(frozen=True)
class SharedTar:
    """A tar of one data set, the tar of the other that is the same, and how it is."""

    path: Path
    other: Path
    how: str


def shared_tars(tars: Sequence[TarIndex], others: Sequence[TarIndex]) -> list[SharedTar]:
    """Find the tars that are among `others` too.

    Two paths can lead to one file, through links. Two files are the same where their indexes are (the places, sizes
    and headers of all members) and their bytes too. Only tars with equal indexes are read.

    Raises:
        OSError: a tar cannot be read.
    """
    files = {_inode(index.path): index.path for index in others}
    contents: dict[bytes, list[TarIndex]] = {}
    for index in others:
        contents.setdefault(_digest(index), []).append(index)
    found = []
    for index in tars:
        if (same := files.get(_inode(index.path))) is not None:
            how = "the same file" if same.absolute() == index.path.absolute() else "the same file under another name"
            found.append(SharedTar(index.path, same, how))
            continue
        for other in contents.get(_digest(index), []):
            if index.same_samples(other) and filecmp.cmp(index.path, other.path, shallow=False):
                found.append(SharedTar(index.path, other.path, "a copy with the same bytes"))
                break
    return found


def _inode(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _digest(index: TarIndex) -> bytes:
    """Digest of the size of a tar and of the places and headers of its members."""
    digest = hashlib.sha256(str(index.tar_size).encode())
    for array in (index.offsets, index.sizes, index.checksums):
        digest.update(array.tobytes())
    return digest.digest()
